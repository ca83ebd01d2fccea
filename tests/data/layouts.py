"""Miniature data sets in the published layouts: the orders, frames and units are those of the publications.

Each picture shows a disk at every fingertip of the index finger, so that a test can see where the joint is in the
pixels. Nothing here uses the readers.
"""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handpose.skeleton import JOINT_NAMES
from tests.builders import make_hands, write_jpeg, write_json

INDEX_TIP = JOINT_NAMES.index("index_tip")
FRAME_SIZE = (640, 480)
FRAME_CAMERA = np.array([[610.0, 0.0, 318.5], [0.0, 612.0, 243.0], [0.0, 0.0, 1.0]])

_FINGERS_OF_MANO = ("index", "middle", "little", "ring", "thumb")
HO3D_NAMES = (
    "wrist",
    *(f"{finger}_{segment}" for finger in _FINGERS_OF_MANO for segment in ("mcp", "pip", "dip")),
    *(f"{finger}_tip" for finger in ("thumb", "index", "middle", "ring", "little")),
)


def reorder(xyz: NDArray[np.float64], names: Sequence[str]) -> NDArray[np.float64]:
    """The joints (..., 21, C) of FreiHAND's order in the order of the given names."""
    return xyz[..., [JOINT_NAMES.index(name) for name in names], :]


def project(xyz: NDArray[np.float64], camera: NDArray[np.float64]) -> NDArray[np.float64]:
    uvw = np.einsum("...ij,...kj->...ki", camera, xyz)
    return uvw[..., :2] / uvw[..., 2:]


def write_frame(path: Path, tips: Sequence[NDArray[np.float64]], size: tuple[int, int] = FRAME_SIZE) -> None:
    """A picture with a bright disk around each given pixel, on dark noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[: size[1], : size[0]]
    image = np.random.default_rng(len(str(path))).integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)
    for u, v in tips:
        image[(columns - u) ** 2 + (rows - v) ** 2 <= 6**2] = 255
    write_jpeg(path, image)


def make_frame_hands(num: int, seed: int = 0) -> NDArray[np.float64]:
    """Hands 0.6 m before the camera, at different places of the picture, all of it inside: (num, 21, 3) metres."""
    shift = np.random.default_rng(seed).uniform([-0.1, -0.06, 0.0], [0.1, 0.06, 0.2], (num, 3))
    return make_hands(num, seed) + shift[:, None]


def write_ho3d(root: Path, *, sequences: Sequence[str] = ("ABF10", "ABF11", "MC1", "SM2"), frames: int = 3) -> Path:
    """HO-3D version 3 with evaluation_xyz.json. The joints of sequence i are make_frame_hands(frames, i)."""
    listed = []
    for number, sequence in enumerate(sequences):
        for frame, xyz_m in enumerate(make_frame_hands(frames, number)):
            write_ho3d_frame(root / "train" / sequence, frame, xyz_m, {"handJoints3D": to_ho3d(xyz_m)})
            listed.append(f"{sequence}/{frame:04d}")
    (root / "train.txt").write_text("\n".join(listed) + "\n", encoding="utf-8")
    test = make_frame_hands(4, 50)
    for frame, xyz_m in enumerate(test):
        uv = project(xyz_m, FRAME_CAMERA)
        box = np.concatenate([uv.min(axis=0), uv.max(axis=0)]).round().astype(int).tolist()
        label = {"handJoints3D": to_ho3d(xyz_m)[0], "handBoundingBox": box}
        write_ho3d_frame(root / "evaluation/SM1", frame, xyz_m, label)
    (root / "evaluation.txt").write_text("\n".join(f"SM1/{frame:04d}" for frame in range(4)), encoding="utf-8")
    write_json(root / "evaluation_xyz.json", to_ho3d(test))
    return root


def to_ho3d(xyz_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """Joints in HO-3D's order and in the OpenGL frame."""
    x, y, z = np.moveaxis(reorder(xyz_m, HO3D_NAMES), -1, 0)
    return np.stack([x, -y, -z], axis=-1)


def write_ho3d_frame(folder: Path, frame: int, xyz_m: NDArray[np.float64], label: dict[str, object]) -> None:
    write_frame(folder / f"rgb/{frame:04d}.jpg", [project(xyz_m, FRAME_CAMERA)[INDEX_TIP]])
    file = folder / f"meta/{frame:04d}.pkl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps({"camMat": FRAME_CAMERA, "objName": "019_pitcher_base", **label}, protocol=2))


def write_text_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
