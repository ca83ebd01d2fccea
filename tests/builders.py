"""Tiny data sets written on the fly: random pictures and plausible hands in the layouts that the readers know."""

import json
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

IMAGE_SIZE = 32
SMALL = (
    "data=freihand",
    "data.batch_size=8",
    "data.image_size=64",
    "data.source.val_fraction=0.25",
    "data.source.num_blocks=2",
    "model.encoder.name=test_efficientnet",  # timm's smallest: trained and saved in a third of the default's time
)
"""Overrides for a data set of two dozen poses."""


def make_hands(num_poses: int, seed: int = 0) -> NDArray[np.float64]:
    """Fingers as bent fans from the wrist, turned at random, 0.6 m before the camera: (num_poses, 21, 3) metres."""
    generator = np.random.default_rng(seed)
    xyz_m = np.zeros((num_poses, 21, 3))
    for finger in range(5):
        spread = (finger - 2) * 0.3 + generator.normal(0, 0.05, num_poses)
        bend = generator.uniform(0, 0.5, num_poses)
        for segment, length in enumerate((0.085, 0.045, 0.03, 0.02)):
            pitch = bend * segment
            way = np.stack([np.sin(spread), -np.cos(spread) * np.cos(pitch), -np.cos(spread) * np.sin(pitch)], axis=-1)
            before = xyz_m[:, 0 if segment == 0 else 4 * finger + segment]
            xyz_m[:, 1 + 4 * finger + segment] = before + length * way
    turns, _ = np.linalg.qr(generator.normal(size=(num_poses, 3, 3)))
    xyz_m = (xyz_m - xyz_m.mean(axis=1, keepdims=True)) @ (turns * np.sign(np.linalg.det(turns))[:, None, None])
    return xyz_m + np.array([0, 0, 0.6])


def make_cameras(num_poses: int, size: int = IMAGE_SIZE, seed: int = 0) -> NDArray[np.float64]:
    """Pinhole cameras that see the whole of `make_hands`, principal point not in the middle: (num_poses, 3, 3)
    pixels.
    """
    generator = np.random.default_rng(seed)
    intrinsics = np.zeros((num_poses, 3, 3))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = generator.uniform(1.8, 2.2, num_poses) * size
    intrinsics[:, :2, 2] = size / 2 + generator.uniform(-0.05, 0.05, (num_poses, 2)) * size
    intrinsics[:, 2, 2] = 1
    return intrinsics


def write_images(folder: Path, num_images: int, size: int = IMAGE_SIZE, seed: int = 0) -> None:
    """Images of random colour patches, `00000000.jpg` and so on, no two alike."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(num_images):
        patches = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        write_jpeg(folder / f"{number:08d}.jpg", np.kron(patches, np.ones((size // 4, size // 4, 1), np.uint8)))


def write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """image: (H, W, 3) RGB."""
    path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=98, colorsubsampling="444"))


def write_masks(folder: Path, num_poses: int, size: int = IMAGE_SIZE) -> None:
    """Masks as FreiHAND's: of pose i the first i + 1 columns are the hand."""
    folder.mkdir(parents=True)
    for pose in range(num_poses):
        mask = np.zeros((size, size, 1), np.uint8)
        mask[:, : pose + 1] = 255
        jpeg = simplejpeg.encode_jpeg(mask, quality=90, colorspace="GRAY", colorsubsampling="GRAY")
        (folder / f"{pose:08d}.jpg").write_bytes(jpeg)


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values.tolist() if isinstance(values, np.ndarray) else values), encoding="utf-8")


def write_freihand(
    root: Path,
    *,
    num_poses: int = 10,
    variants: int = 4,
    num_test: int = 5,
    size: int = IMAGE_SIZE,
    seed: int = 0,
    masks: bool = False,
) -> Path:
    """FreiHAND_pub_v2 with everything that is published, evaluation_xyz.json included, and the masks if wanted."""
    if masks:
        write_masks(root / "training/mask", num_poses, size)
    splits = (("training", num_poses, variants * num_poses), ("evaluation", num_test, num_test))
    for number, (prefix, poses, images) in enumerate(splits, start=seed):
        write_images(root / prefix / "rgb", images, size, number)
        xyz_m = make_hands(poses, number)
        write_json(root / f"{prefix}_xyz.json", xyz_m)
        write_json(root / f"{prefix}_K.json", make_cameras(poses, size, number))
        write_json(root / f"{prefix}_scale.json", np.linalg.norm(xyz_m[:, 9] - xyz_m[:, 10], axis=-1))
    return root


def write_course(root: Path, *, num_poses: int = 4, images_per_entry: int = 4) -> Path:
    """freihand_dataset_MP: the test split without joints."""
    for seed, split in enumerate(("train", "val", "test")):
        write_images(root / split, images_per_entry * num_poses, seed=seed)
        write_json(root / f"{split}_K.json", make_cameras(num_poses, seed=seed))
        if split != "test":
            write_json(root / f"{split}_xyz.json", make_hands(num_poses, seed))
    return root


def as_prediction(xyz_m, error_m=0.0):
    """What a network predicts that finds these joints and expects the same error of each."""
    import torch

    from handpose.heatmaps import JointPrediction

    return JointPrediction(xyz_m, torch.full_like(xyz_m[..., 0], error_m))
