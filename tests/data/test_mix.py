import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.config import compose
from handpose.data.datamodule import HandDataModule, draw_order
from handpose.data.mix import Mix
from handpose.errors import UserError
from handpose.training.build import build_data
from tests.builders import write_freihand
from tests.data.layouts import write_ho3d

FREIHAND = {"num_blocks": 2, "val_fraction": 0.2}
HO3D = {"val_fraction": 0.25}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two data sets: 32 training images of FreiHAND, and about 9 of HO-3D."""
    write_freihand(tmp_path / "data/FreiHAND_pub_v2")
    write_ho3d(tmp_path / "data/HO3D_v3")
    return tmp_path / "data"


def make_mix(folder: Path, *, eval_part: str | None = None, freihand: float = 1, ho3d: float = 3) -> Mix:
    parts = {"freihand": {"weight": freihand, **FREIHAND}, "ho3d": {"weight": ho3d, **HO3D}}
    return Mix(str(folder), parts=parts, eval_part=eval_part, image_size=32)


def make_data(folder: Path, **options: object) -> HandDataModule:
    return HandDataModule(
        make_mix(folder, **options),
        image_size=32,
        batch_size=4,
        pack_folder=str(folder / "packed"),
        seed=5,
        progress=False,
    )


def count_parts(data: HandDataModule, epoch: int) -> Counter[str]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    files = data.training_annotations.files
    drawn = np.concatenate(list(loader.sampler))
    return Counter("ho3d" if "HO3D_v3" in str(files[int(i)]) else "freihand" for i in drawn)


def test_each_epoch_draws_the_parts_in_proportion_to_their_weights(folder):
    data = make_data(folder)
    num = len(data.training_annotations)
    for epoch in range(3):
        counts = count_parts(data, epoch)
        assert sum(counts.values()) == num // 4 * 4
        assert abs(counts["ho3d"] / num - 0.75) < 4.5 / num  # up to 3 images of the epoch make no whole batch
    assert count_parts(make_data(folder, ho3d=0), 0).keys() == {"freihand"}


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_the_numbers_of_draws_are_exact(sizes, weights, seed):
    parts = np.repeat(np.arange(len(sizes)), sizes)
    weight = (np.array(weights)[: len(sizes)] / sizes)[parts]
    order = draw_order(len(parts), weight, np.random.default_rng(seed))
    assert len(order) == len(parts)
    expected = weight * len(parts) / weight.sum()
    assert (np.abs(np.bincount(order, minlength=len(parts)) - expected) < 1 + 1e-9).all()
    for value in np.unique(weight):  # parts whose images have the same weight are drawn as one
        same = weight == value
        assert abs(same[order].sum() - expected[same].sum()) < 1 + 1e-6


def test_equal_weights_of_the_images_draw_each_once():
    order = draw_order(50, np.full(50, 0.3), np.random.default_rng(0))
    assert sorted(order) == list(range(50))
    assert order.tolist() != list(range(50))


def test_the_order_depends_only_on_seed_and_epoch(folder):
    def list_order(epoch: int, start: int = 0) -> list[int]:
        loader = make_data(folder).train_dataloader()
        for number in range(start, epoch + 1):  # a resumed run does not have the epochs before
            loader.sampler.set_epoch(number)
            order = np.concatenate(list(loader.sampler)).tolist()
        return order

    assert list_order(3) == list_order(3, start=3)
    assert list_order(3) != list_order(2)


def test_batches_have_the_images_and_labels_of_their_part(folder):
    data = make_data(folder)
    annotations = data.training_annotations
    assert annotations.masks is None
    for batch in data.train_dataloader():
        for row, position in enumerate(batch.position.tolist()):
            np.testing.assert_allclose(batch.xyz_m[row], annotations.xyz_m[position], rtol=1e-6)
            is_dark = batch.image[row].float().mean() < 60  # pictures of HO-3D are dark here
            assert is_dark == ("HO3D_v3" in str(annotations.files[position]))


def test_validation_and_test_come_from_the_chosen_part(folder):
    for eval_part, name in ((None, "FreiHAND_pub_v2"), ("ho3d", "HO3D_v3")):
        splits = make_mix(folder, eval_part=eval_part).splits()
        assert all(name in str(file) for split in (splits.val, splits.test) for file in split.files)
        poses = [set(split.pose.tolist()) for split in (splits.train, splits.val, splits.test)]
        assert sum(map(len, poses)) == len(set().union(*poses))
    without_training = make_mix(folder, eval_part="ho3d", ho3d=0).splits()
    assert not any("HO3D_v3" in str(file) for file in without_training.train.files)
    assert all("HO3D_v3" in str(file) for file in without_training.val.files)


def test_training_may_have_the_validation_images_too(folder):
    data = make_data(folder)
    data.train_on_val = True
    annotations = data.training_annotations
    assert len(annotations) == len(data.splits.train) + len(data.splits.val)
    assert annotations.weight[-1] == annotations.weight[0]  # both of FreiHAND


def test_the_fingerprint_covers_all_parts_and_their_weights(folder):
    before = make_data(folder).fingerprint
    assert make_data(folder).fingerprint == before
    assert make_data(folder, ho3d=2).fingerprint != before
    (folder / "HO3D_v3/train/MC1/rgb/0001.jpg").write_bytes(
        (folder / "HO3D_v3/train/MC1/rgb/0002.jpg").read_bytes() + b"x"
    )
    assert make_data(folder).fingerprint != before


def test_a_part_has_the_defaults_of_its_data_set_and_its_folder_in_data_root(folder, tmp_path):
    parts = f"{{small: {{reader: freihand, root: {folder}/FreiHAND_pub_v2, num_blocks: 1, weight: 2}}, ho3d: {{}}}}"
    given = [f"data.source.parts={parts}", f"data.root={folder}", "data.image_size=32", f"paths.packed={tmp_path}/p"]
    data = build_data(compose("train", ["data=mix", *given, "data.batch_size=2"]), quiet=True)
    assert len(data.splits.val) == 4  # a tenth of ten poses, four images each
    assert {"FreiHAND_pub_v2", "HO3D_v3"} == {
        next(name for name in file.parts if name in ("FreiHAND_pub_v2", "HO3D_v3")) for file in data.splits.train.files
    }
    assert list((tmp_path / "p").glob("labels-ho3d-*.npz"))  # parts use the cache of labels


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (None, ["data.source.parts names no data set"]),
        ({"freihand": 3}, ["data.source.parts.freihand=3 must be options"]),
        ({"freihand": {"weight": -1}}, ["data.source.parts.freihand.weight=-1", "at least 0"]),
        ({"freihand": {"weight": "much"}}, ["data.source.parts.freihand.weight=much"]),
        ({"freihand": {"weight": 0}}, ["all weights", "are 0"]),
        ({"freihnd": {}}, ["data.source.parts.freihnd.reader=freihnd", "did you mean freihand?"]),
        ({"a": {"reader": "mix"}}, ["data.source.parts.a.reader=mix"]),
        ({"freihand": {"num_blocs": 2}}, ["no configuration key data.source.parts.freihand.num_blocs", "num_blocks"]),
        ({"freihand": {"val_fraction": 2.0}}, ["data.source.parts.freihand.val_fraction must be below 1"]),
        ({"ho3d": {"crop_margin": -1}}, ["data.source.parts.ho3d.crop_margin must be at least 0"]),
        ({"freihand": {}, "ho3d": {}}, ["eval_part=dexycb", "freihand, ho3d"]),
    ],
)
def test_a_wrong_part_is_told_in_one_sentence(tmp_path, parts, words):
    eval_part = "dexycb" if parts and len(parts) == 2 else None
    with pytest.raises(UserError) as error:
        Mix(str(tmp_path), parts=parts, eval_part=eval_part, image_size=32)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_errors_of_a_reader_name_the_part(folder):
    options = {"weight": 1, "reader": "freihand", "root": "nothing"}
    mix = Mix(str(folder), parts={"mine": options}, eval_part=None, image_size=32)
    with pytest.raises(UserError, match=re.escape(f"data.source.parts.mine.root={folder}/nothing does not exist")):
        mix.splits()
    options = {"reader": "freihand", "root": "FreiHAND_pub_v2", "num_blocks": 5, "val_fraction": 0.2}
    mix = Mix(str(folder), parts={"mine": options}, eval_part=None, image_size=32)
    with pytest.raises(UserError, match=re.escape("data.source.parts.mine.num_blocks=5 does not fit")):
        mix.splits()
