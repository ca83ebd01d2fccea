import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handpose import geometry
from handpose.config import compose
from handpose.data.augment import rotate_about_center, rotate_view, to_view, zoom_intrinsics
from handpose.data.coco_wholebody import CocoWholeBody
from handpose.data.datamodule import HandDataModule
from handpose.data.label_check import find_suspicious_labels
from handpose.data.mix import Mix
from handpose.data.sample import Splits
from handpose.errors import UserError
from handpose.training.build import build_training
from handpose.training.fit import prepare_run
from tests.builders import write_freihand, write_json
from tests.data.layouts import INDEX_TIP, make_coco_hand, project, write_coco_person, write_coco_wholebody
from tests.data.test_crops import find_disk

TRAIN = "annotations/coco_wholebody_train_v1.0.json"


def read(root: Path, **options: object) -> Splits:
    defaults = {"crop_margin": 0.3, "min_hand_px": 32, "val_fraction": 0.25, "split_seed": 0}
    return CocoWholeBody(str(root), **{**defaults, **options}).splits()


@pytest.fixture
def root(tmp_path) -> Path:
    return write_coco_wholebody(tmp_path / "data/coco")


def edit(root: Path, change: Callable[[Any], object]) -> None:
    content = json.loads((root / TRAIN).read_text(encoding="utf-8"))
    change(content)
    write_json(root / TRAIN, content)


def test_the_rays_project_to_the_published_keypoints_and_left_hands_are_mirrored(root):
    splits = read(root)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [6, 2, 3]
    for split in (splits.train, splits.val, splits.test):
        assert split.xyz_m is None
        for file, rays, camera, crop in zip(split.files, split.rays, split.intrinsics, split.crops, strict=True):
            published = make_coco_hand(int(file.stem))
            left, top, side, is_mirrored = crop
            assert is_mirrored == int(file.stem) % 2
            uv = project(rays, camera)
            u = side - 1 - uv[:, 0] if is_mirrored else uv[:, 0]
            ours = np.stack([u + left, uv[:, 1] + top], axis=-1)
            assert np.isnan(ours[2]).all()  # has no label
            labelled = np.arange(21) != 2
            np.testing.assert_allclose(ours[labelled], published[labelled], atol=1e-9)


def make_data(source: Any, folder: Path) -> HandDataModule:
    options = {"image_size": 96, "batch_size": 3, "pack_folder": str(folder), "seed": 0, "progress": False}
    return HandDataModule(source, **options)


def test_a_batch_has_rays_where_there_is_no_depth(root, tmp_path):
    options = {"crop_margin": 0.3, "min_hand_px": 32, "val_fraction": 0.25, "split_seed": 0}
    batch = next(iter(make_data(CocoWholeBody(str(root), **options), tmp_path).test_dataloader()))
    assert not batch.has_depth.any()
    assert batch.xyz_m[:, 2].isnan().all()
    uv = geometry.project(batch.xyz_m, batch.intrinsics)
    for image, tip in zip(batch.image.permute(0, 2, 3, 1).numpy(), uv[:, INDEX_TIP], strict=True):
        np.testing.assert_allclose(find_disk(image), tip, atol=0.5)


def test_the_keypoints_move_with_the_image(root, tmp_path):
    options = {"crop_margin": 0.5, "min_hand_px": 32, "val_fraction": 0.25, "split_seed": 0}
    view = to_view(next(iter(make_data(CocoWholeBody(str(root), **options), tmp_path).test_dataloader())))
    rotation = rotate_about_center(torch.tensor([0.5, -1.0, 2.0]), view.intrinsics, view.size)
    intrinsics = zoom_intrinsics(view.intrinsics, torch.full((3,), 0.9), torch.full((3, 2), 4.0), view.size)
    moved = rotate_view(view, rotation, intrinsics)
    uv = geometry.project(moved.xyz_m, moved.intrinsics)
    for image, tip in zip((255 * moved.image).permute(0, 2, 3, 1).numpy(), uv[:, INDEX_TIP], strict=True):
        np.testing.assert_allclose(find_disk(image), tip, atol=0.7)


def test_invalid_small_and_hardly_labelled_hands_are_left_out(root):
    def spoil(content: Any) -> None:
        people = content["annotations"]
        people[0]["righthand_valid"] = False
        people[1] = write_coco_person(1, 1, unlabelled=range(11))
        keypoints = np.array(people[2]["righthand_kpts"]).reshape(21, 3)
        keypoints[:, :2] = keypoints[:, :2] / 20
        people[2]["righthand_kpts"] = keypoints.ravel().tolist()

    edit(root, spoil)
    splits = read(root)
    assert len(splits.train) + len(splits.val) == 5
    assert splits.notes == (
        "coco_wholebody: 2 of 7 hands of the training and validation split are left out: 1 with fewer than 11 labelled "
        "keypoints, 1 smaller than 32 px",
    )
    assert len(read(root, min_hand_px=1).train) + len(splits.val) == 6


def test_all_hands_of_a_photograph_are_in_one_split(root):
    edit(root, lambda content: content["annotations"].extend(write_coco_person(n, n) for n in range(8)))
    for seed in range(5):
        splits = read(root, split_seed=seed)
        assert not set(splits.train.files) & set(splits.val.files)
        assert len(splits.train) + len(splits.val) == 16


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (shutil.rmtree, ["data.root=", "does not exist", "github.com/jin-s13/COCO-WholeBody", "cocodataset.org"]),
        (lambda root: (root / TRAIN).unlink(), [TRAIN, "does not exist", "COCO-WholeBody"]),
        (lambda root: shutil.rmtree(root / "val2017"), ["val2017 does not exist", "cocodataset.org"]),
        (lambda root: (root / TRAIN).write_bytes(b"["), [TRAIN, "not valid JSON"]),
        (lambda root: edit(root, lambda c: c["annotations"][3].pop("lefthand_valid")), ["published fields"]),
        (
            lambda root: edit(root, lambda c: c["annotations"][3].update(lefthand_kpts=[1, 2])),
            ["lefthand_kpts of annotation 3 is not 63 finite numbers"],
        ),
        (lambda root: edit(root, lambda c: c["annotations"].clear()), ["has no hand that can be used"]),
    ],
)
def test_a_broken_data_set_is_told_in_one_sentence(root, break_it, words):
    break_it(root)
    with pytest.raises(UserError) as error:
        read(root)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def make_mix(folder: Path) -> Mix:
    write_freihand(folder / "FreiHAND_pub_v2")
    parts = {"freihand": {"num_blocks": 2, "val_fraction": 0.2}, "coco_wholebody": {"weight": 2, "val_fraction": 0.25}}
    return Mix(str(folder), parts=parts, eval_part=None, image_size=96)


def test_a_mix_has_hands_with_and_without_depth(root, tmp_path):
    data = make_data(make_mix(root.parent), tmp_path)
    train = data.splits.train
    is_flat = np.array(["coco" in str(file) for file in train.files])
    np.testing.assert_array_equal(np.isnan(train.xyz_m).all(axis=(1, 2)), is_flat)
    np.testing.assert_array_equal(np.isfinite(train.rays).any(axis=(1, 2)), is_flat)
    for batch in data.train_dataloader():
        np.testing.assert_array_equal(batch.has_depth, ~is_flat[batch.position])
    assert data.splits.val.rays is None
    suspicious = find_suspicious_labels(train, train.intrinsics, 32)
    assert not any(is_flat[each.image] for each in suspicious)


SMALL = ("model.encoder.name=test_efficientnet", "data.image_size=64", "data.batch_size=2", "logger=none")


def test_a_training_step_on_a_mix_has_finite_losses_and_gradients(root, tmp_path):
    make_mix(root.parent)
    parts = "{freihand: {num_blocks: 1}, coco_wholebody: {weight: 3, val_fraction: 0.25}}"
    given = [f"data.source.parts={parts}", f"data.root={root.parent}", f"paths.packed={tmp_path}/packed"]
    config = compose("train", ["data=mix", *given, *SMALL, "data.batch_size=8", "augment.occlusion=0.5"])
    module, data, _ = prepare_run(config, stage="fit", quiet=True)
    assert module.axes.depth_range > 1.05  # fitted to the hands with depth
    assert module.axes.bone_lengths.isfinite().all()
    assert set(module.val_metrics.keys()) > {"val/pa_mpjpe_mm"}
    batch = next(iter(data.train_dataloader()))
    assert batch.has_depth.any()
    assert not batch.has_depth.all()
    module.training_step(batch, 0).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


def test_without_depth_the_network_learns_nothing_along_the_depth_axis(root, tmp_path):
    given = ["data=coco_wholebody", f"data.root={root}", f"paths.packed={tmp_path}/packed", *SMALL]
    module, data = build_training(compose("train", [*given, "data.source.val_fraction=0.25"]), quiet=True)
    batch = next(iter(data.train_dataloader()))
    logits = {}

    def keep(*arguments: Any) -> None:
        logits.update(zip(("u", "v", "depth"), arguments[2], strict=True))
        for axis in arguments[2]:
            axis.retain_grad()

    module.net.register_forward_hook(keep)
    module.training_step(batch, 0).backward()
    assert logits["u"].grad.abs().sum() > 0
    assert logits["v"].grad.abs().sum() > 0
    assert logits["depth"].grad.abs().max() == 0
    assert logits["u"].grad[:, 2].abs().max() == 0  # the joint without a label
    assert logits["u"].grad.isfinite().all()


def test_a_validation_without_depth_needs_a_metric_in_pixels(root, tmp_path):
    given = ["data=coco_wholebody", f"data.root={root}", f"paths.packed={tmp_path}/packed", *SMALL]
    given.append("data.source.val_fraction=0.25")
    with pytest.raises(UserError, match=r"metric=val/pa_mpjpe_mm needs joints in 3-D.*=val/keypoint_error_px"):
        prepare_run(compose("train", given), stage="fit", quiet=True)
    chosen = compose("train", [*given, "checkpoints.metric=val/keypoint_error_px"])
    module, _, _ = prepare_run(chosen, stage="fit", quiet=True)
    assert list(module.val_metrics.keys()) == ["val/keypoint_error_px"]
    camera_axes = compose("train", [*given, "heatmap=camera_axes", "augment.scale=0", "augment.shift=0"])
    with pytest.raises(UserError, match=r"2-D keypoints are known, but heatmap=camera_axes needs metres"):
        prepare_run(camera_axes, stage="fit", quiet=True)
