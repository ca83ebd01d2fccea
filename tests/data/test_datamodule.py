import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DistributedSampler

from handpose.data.datamodule import HandDataModule, OrderedBatches, PackedHands, PrefetchingLoader, ShuffledBatches
from handpose.data.freihand import FreiHand
from handpose.data.freihand_course import FreiHandCourse
from handpose.data.pack import PackedImages, open_map
from handpose.data.random_draws import BatchShare
from handpose.data.sample import Annotations, ImageFiles
from handpose.errors import UserError
from tests.builders import make_hands, write_course, write_freihand

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning; a gather needs none
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning 2.6 with torch 2.15
]


@pytest.fixture
def root(tmp_path) -> Path:
    return write_freihand(tmp_path / "set", num_poses=10, variants=4, num_test=5)


def make_datamodule(root: Path, *, split_seed: int = 0, **options: object) -> HandDataModule:
    source = FreiHand(str(root), val_fraction=0.2, split="blocks", num_blocks=2, split_seed=split_seed)
    defaults = {"image_size": None, "batch_size": 6, "pack_folder": str(root.parent / "packed"), "seed": 3}
    return HandDataModule(source, progress=False, **{**defaults, **options})


def read_with_pillow(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_batch_holds_the_images_and_labels_of_its_index(root, split):
    data = make_datamodule(root)
    annotations = getattr(data.splits, split)
    batches = list(getattr(data, f"{split}_dataloader")())
    for batch in batches:
        for image, intrinsics, xyz_m, scale_m, index, mask, has_depth in zip(*batch, strict=True):
            assert has_depth
            assert mask.shape == (0, 32, 32)
            expected = read_with_pillow(annotations.files[index])
            assert (image.int() - expected.int()).abs().max() <= 1
            np.testing.assert_array_equal(intrinsics, annotations.intrinsics[index].astype(np.float32))
            np.testing.assert_array_equal(xyz_m, annotations.xyz_m[index].astype(np.float32))
            assert scale_m == np.float32(annotations.scale_m[index])


def test_a_batch_is_uint8_with_channels_last_in_memory(root):
    batch = next(iter(make_datamodule(root).train_dataloader()))
    assert batch.image.shape == (6, 3, 32, 32)
    assert batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert [value.dtype for value in batch[1:4]] == [torch.float32] * 3
    assert batch.position.dtype == torch.int64


def test_training_drops_the_rest_and_evaluation_nothing(root):
    data = make_datamodule(root)
    train = torch.cat([batch.position for batch in data.train_dataloader()])
    assert len(train) == len(set(train.tolist())) == 30  # of 32, in batches of 6
    for loader, count in ((data.val_dataloader(), 8), (data.test_dataloader(), 5), (data.predict_dataloader(), 5)):
        assert torch.cat([batch.position for batch in loader]).tolist() == list(range(count))
        assert sum(1 for _ in loader) == len(loader)


def test_training_may_have_the_validation_images_too(root):
    data, apart = make_datamodule(root, train_on_val=True, batch_size=4), make_datamodule(root)
    dataset = data.train_dataloader().dataset
    assert len(dataset) == 40
    for part, split in ((dataset[np.arange(32)], apart.splits.train), (dataset[np.arange(32, 40)], apart.splits.val)):
        np.testing.assert_array_equal(part.xyz_m, split.xyz_m.astype(np.float32))
        for image, file in zip(part.image, split.files, strict=True):
            assert (image.int() - read_with_pillow(file).int()).abs().max() <= 1
    assert {int(i) for batch in data.train_dataloader() for i in batch.position} == set(range(40))
    assert len(data.val_dataloader().dataset) == 8
    assert data.fingerprint == apart.fingerprint


def test_absent_labels_are_nan(root):
    (root / "evaluation_xyz.json").unlink()
    batch = next(iter(make_datamodule(root).test_dataloader()))
    assert batch.xyz_m.shape == (5, 21, 3)
    assert batch.xyz_m.isnan().all()
    assert batch.scale_m.isfinite().all()
    (root / "evaluation_scale.json").unlink()
    assert next(iter(make_datamodule(root).test_dataloader())).scale_m.isnan().all()


def test_a_scale_that_is_measured_on_the_joints_is_hidden_from_predictions(root):
    for split in ("training", "evaluation"):
        (root / f"{split}_scale.json").unlink()
    data = make_datamodule(root)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader)).scale_m.isnan().all()
    assert data.splits.test.scale_m is not None
    assert not data.splits.test.is_scale_given


def test_the_course_goes_through_the_same_road(tmp_path):
    source = FreiHandCourse(str(write_course(tmp_path / "set", num_poses=4)))
    data = HandDataModule(source, image_size=16, batch_size=8, pack_folder=str(tmp_path), seed=0, progress=False)
    batch = next(iter(data.val_dataloader()))
    assert batch.image.shape == (8, 3, 16, 16)
    np.testing.assert_array_equal(batch.xyz_m, make_hands(4, seed=1)[[0, 1, 2, 3] * 2].astype(np.float32))
    assert next(iter(data.test_dataloader())).xyz_m.isnan().all()


def test_another_split_uses_the_same_store(root):
    for split_seed in range(3):
        data = make_datamodule(root, split_seed=split_seed)
        data.prepare_data()
        batch = next(iter(data.val_dataloader()))
        expected = read_with_pillow(data.splits.val.files[3])
        assert (batch.image[3].int() - expected.int()).abs().max() <= 1
    assert len([path for path in (root.parent / "packed").iterdir() if path.is_dir()]) == 2  # training, evaluation


def test_only_the_stage_that_is_asked_for_is_packed(root):
    data = make_datamodule(root)
    data.setup("test")
    assert len(list((root.parent / "packed").glob("*/images.npy"))) == 1
    data.setup("fit")
    assert len(list((root.parent / "packed").glob("*/images.npy"))) == 2


def test_worker_processes_hand_over_the_same_batches(root):
    expected = next(iter(make_datamodule(root).train_dataloader()))
    loader = make_datamodule(root, num_workers=1).train_dataloader()
    for value, other in zip(next(iter(loader)), expected, strict=True):
        assert torch.equal(value, other)
        assert value.stride() == other.stride()


def test_the_fingerprint_knows_the_data_and_the_split_but_not_the_machine(root):
    first = make_datamodule(root).fingerprint
    os.utime(root / "training/rgb/00000000.jpg", (0, 0))
    assert make_datamodule(root, image_size=16, pack_folder=str(root.parent / "elsewhere")).fingerprint == first
    assert make_datamodule(root, split_seed=4).fingerprint != first
    (root / "evaluation_xyz.json").unlink()
    assert make_datamodule(root).fingerprint != first


def test_the_image_size_is_that_of_the_files_or_the_one_asked_for(root):
    assert make_datamodule(root).image_size == 32
    assert make_datamodule(root, image_size=24).image_size == 24


@pytest.mark.parametrize("batch_size", [33, 1000])
def test_a_batch_that_training_cannot_fill_is_told(root, batch_size):
    with pytest.raises(UserError, match=rf"batch_size={batch_size} on 1 device.* 32 images .*at most 32"):
        make_datamodule(root, batch_size=batch_size).train_dataloader()


def test_an_empty_batch_is_told(root):
    with pytest.raises(UserError, match=r"data.batch_size=0 must be at least 1"):
        make_datamodule(root, batch_size=0)


def test_training_and_test_images_of_two_sizes_are_told(root, tmp_path):
    write_freihand(tmp_path / "larger", size=64)
    (root / "evaluation").rename(tmp_path / "old")
    (tmp_path / "larger/evaluation").rename(root / "evaluation")
    with pytest.raises(UserError, match=r"training images have 32 px but test images 64 px; set data.image_size"):
        make_datamodule(root).prepare_data()
    assert make_datamodule(root, image_size=32).image_size == 32


class Sized:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


@given(
    num_images=st.integers(1, 200),
    batch_size=st.integers(1, 20),
    num_replicas=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 500),
)
def test_shuffled_shares_are_disjoint_and_together_one_order(num_images, batch_size, num_replicas, seed, epoch):
    if batch_size * num_replicas > num_images:
        return
    shares = []
    for rank in range(num_replicas):
        sampler = ShuffledBatches(
            Sized(num_images), batch_size=batch_size, seed=seed, rank=rank, num_replicas=num_replicas
        )
        sampler.set_epoch(epoch)
        shares.append(np.array(list(sampler)))
        assert shares[-1].shape == (len(sampler), batch_size)
    seen = np.concatenate(shares, axis=None)
    assert len(set(seen.tolist())) == len(seen) > num_images - batch_size * num_replicas
    alone = ShuffledBatches(Sized(num_images), batch_size=batch_size * num_replicas, seed=seed)
    alone.set_epoch(epoch)
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), np.array(list(alone)))


@given(num_images=st.integers(1, 200), batch_size=st.integers(1, 20), num_replicas=st.integers(1, 5))
def test_ordered_shares_hold_every_image_once_in_as_many_batches(num_images, batch_size, num_replicas):
    batches = [
        list(OrderedBatches(Sized(num_images), batch_size=batch_size, rank=rank, num_replicas=num_replicas))
        for rank in range(num_replicas)
    ]
    assert sorted(np.concatenate([index for share in batches for index in share])) == list(range(num_images))
    assert len({len(share) for share in batches}) == 1
    assert all(len(index) <= batch_size for share in batches for index in share)


def test_each_process_of_a_distributed_run_takes_its_share(root, monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr(BatchShare, "for_this_process", lambda rank=rank: BatchShare(rank, 2))
        data = make_datamodule(root)
        seen.append(
            [
                torch.cat([batch.position for batch in loader()])
                for loader in (data.train_dataloader, data.val_dataloader)
            ]
        )
        assert isinstance(data.train_dataloader().sampler, DistributedSampler)  # so that Lightning adds none
        assert isinstance(data.val_dataloader().sampler, DistributedSampler)
    assert not set(seen[0][0].tolist()) & set(seen[1][0].tolist())
    assert sorted(torch.cat([seen[0][1], seen[1][1]]).tolist()) == list(range(8))


class OrderRecorder(pl.LightningModule):
    """Writes down the order in which a real Trainer shows the images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_order: dict[int, list[int]] = {}
        self.evaluated: dict[str, list[int]] = {"val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.train_order.setdefault(self.current_epoch, []).extend(batch.position.tolist())
        return self.weight * batch.scale_m.sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated["val"].extend(batch.position.tolist())

    def test_step(self, batch, batch_idx):
        self.evaluated["test"].extend(batch.position.tolist())

    def predict_step(self, batch, batch_idx):
        return batch.position

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, max_epochs: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def compute_order(seed: int, epoch: int) -> list[int]:
    """The first 30 of 32 images in the order that the seed and epoch give."""
    return np.random.default_rng((seed, epoch)).permutation(32)[:30].tolist()


def test_lightning_trains_in_the_order_of_seed_and_epoch(root, tmp_path):
    whole = OrderRecorder()
    trainer(tmp_path, 4).fit(whole, datamodule=make_datamodule(root))
    assert whole.train_order == {epoch: compute_order(3, epoch) for epoch in range(4)}
    assert compute_order(3, 0) != compute_order(3, 1)
    assert whole.evaluated["val"] == 4 * list(range(8))


class Saver(pl.Callback):
    """Saves in the hook of that name, as ModelCheckpoint does in one or another; the last epoch's file stays."""

    def __init__(self, hook: str, path: Path) -> None:
        setattr(self, hook, lambda trainer, module: trainer.save_checkpoint(path))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_fit_end"])
def test_a_resumed_run_goes_on_in_the_same_order(root, tmp_path, hook, num_workers):
    path = tmp_path / "half.ckpt"
    trainer(tmp_path, 2, [Saver(hook, path)]).fit(OrderRecorder(), datamodule=make_datamodule(root))
    resumed = OrderRecorder()
    data = make_datamodule(root, num_workers=num_workers)
    trainer(tmp_path, 4).fit(resumed, datamodule=data, ckpt_path=path, weights_only=True)
    assert resumed.train_order == {2: compute_order(3, 2), 3: compute_order(3, 3)}


def test_lightning_tests_and_predicts_every_image_in_order(root, tmp_path):
    model = OrderRecorder()
    trainer(tmp_path, 1).test(model, datamodule=make_datamodule(root, batch_size=2), verbose=False)
    assert model.evaluated["test"] == list(range(5))
    predictions = trainer(tmp_path, 1).predict(model, datamodule=make_datamodule(root, batch_size=2))
    assert torch.cat(predictions).tolist() == list(range(5))
    assert len(list((root.parent / "packed").glob("*/images.npy"))) == 1  # the training images were not asked for


def test_batches_gathered_ahead_are_the_same_batches(root):
    data = make_datamodule(root)
    data.setup("fit")
    loader = data.train_dataloader()
    ahead = PrefetchingLoader(loader.dataset, batch_size=None, sampler=loader.sampler)
    for plain, other in zip(loader, ahead, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_an_error_of_a_batch_gathered_ahead_is_raised():
    with pytest.raises(IndexError):
        list(PrefetchingLoader([0, 1], batch_size=None, sampler=[0, 1, 2]))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts memory as Linux does")
def test_reading_a_whole_store_takes_no_memory_of_its_own(tmp_path):
    """300 MB go by; what they would take, if they were kept, is anonymous memory."""
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(2000, 224, 224, 3))
    packed = PackedImages(tmp_path, open_map(tmp_path), np.zeros((2000, 3, 3), np.float32), "")
    files = ImageFiles(np.zeros(2000, "S1"))
    nothing = Annotations(files, np.zeros((2000, 3, 3)), None, None, np.arange(2000))
    dataset = PackedHands(nothing, packed, np.arange(2000))
    before = measure_anonymous_mb()
    for start in range(0, 2000, 50):
        assert dataset[np.arange(start, start + 50)].image.shape == (50, 3, 224, 224)
    assert measure_anonymous_mb() - before < 60
    assert images.nbytes > 300e6


def measure_anonymous_mb():
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Anonymous:"))
