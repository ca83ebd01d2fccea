import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from handpose.data.datamodule import HandDataModule
from handpose.data.freihand import FreiHand
from handpose.data.masks import pack_masks
from handpose.errors import UserError
from tests.builders import write_freihand

SIZE = 32


@pytest.fixture
def root(tmp_path):
    return write_freihand(tmp_path / "set", num_poses=10, variants=4, num_test=5, size=SIZE, masks=True)


def make_datamodule(root, *, masks=True, image_size=None, split_seed=0, num_workers=0):
    source = FreiHand(str(root), val_fraction=0.2, split="blocks", num_blocks=2, split_seed=split_seed)
    return HandDataModule(
        source,
        image_size=image_size,
        batch_size=8,
        pack_folder=str(root.parent / "packed"),
        seed=3,
        masks=masks,
        num_workers=num_workers,
        progress=False,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_image_comes_with_the_mask_of_its_pose(root, num_workers):
    data = make_datamodule(root, num_workers=num_workers)
    for batch in data.train_dataloader():
        assert batch.mask.shape == (8, 1, SIZE, SIZE)
        assert batch.mask.dtype == torch.uint8
        columns = (batch.mask[:, 0] == 255).all(dim=1).sum(dim=-1)
        assert columns.tolist() == [int(data.splits.train.pose[i]) + 1 for i in batch.position]
        assert set(batch.mask.unique().tolist()) == {0, 255}


def test_masks_are_packed_only_when_they_are_asked_for(root):
    data = make_datamodule(root, masks=False)
    batch = next(iter(data.train_dataloader()))
    assert batch.mask.shape == (8, 0, SIZE, SIZE)
    assert len(list((root.parent / "packed").glob("*/images.npy"))) == 1
    assert next(iter(make_datamodule(root).val_dataloader())).mask.shape[1] == 0
    make_datamodule(root).setup("fit")
    assert len(list((root.parent / "packed").glob("*/images.npy"))) == 2


def test_one_store_of_masks_serves_every_split_and_all_four_images_of_a_pose(root):
    for split_seed in range(3):
        data = make_datamodule(root, split_seed=split_seed)
        data.setup("fit")
        assert data._open_masks().masks.shape == (10, SIZE, SIZE, 1)
    assert len(list((root.parent / "packed").glob("*/images.npy"))) == 2


def test_a_mask_that_is_to_be_turned_is_refused(root, tmp_path):
    mask = root / "training/mask/00000002.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(mask) as picture:
        picture.save(mask, exif=exif)
    with pytest.raises(UserError, match=r"00000002\.jpg has the EXIF orientation 6"):
        pack_masks(mask.parent, np.arange(3), image_size=16, folder=tmp_path / "packed", progress=False)


def test_masks_are_resized_with_their_images(root):
    batch = next(iter(make_datamodule(root, image_size=16).train_dataloader()))
    assert batch.image.shape[-2:] == batch.mask.shape[-2:] == (16, 16)
    pose = [int(p) for p in make_datamodule(root).splits.train.pose[batch.position]]
    share = (batch.mask / 255.0).mean(dim=(1, 2, 3))
    assert torch.allclose(share, torch.tensor([(p + 1) / SIZE for p in pose]), atol=0.02)


def test_a_data_set_without_masks_is_told_when_they_are_needed(tmp_path):
    root = write_freihand(tmp_path / "set", num_poses=10, variants=1, num_test=5)
    with pytest.raises(UserError, match=r"augment\.background needs the masks .* freihand has none .*background=0"):
        make_datamodule(root).setup("fit")


def test_a_missing_mask_is_named(root):
    (root / "training/mask/00000004.jpg").unlink()
    with pytest.raises(UserError, match=r"mask/00000004\.jpg cannot be read"):
        make_datamodule(root).setup("fit")


def test_a_store_of_masks_travels_to_another_process_as_its_path(root):
    packed = pack_masks(root / "training/mask", np.arange(10), image_size=SIZE, folder=root / "p", progress=False)
    carried = pickle.dumps(packed)
    assert len(carried) < packed.masks.nbytes
    np.testing.assert_array_equal(pickle.loads(carried).select(np.array([3, 1])), packed.select(np.array([3, 1])))
