"""Miniature data sets in the published layouts: the orders, frames and units are those of the publications.

Each picture shows a bright disk at the tip of the index finger, so that a test can see where the joint is in the
pixels. Nothing here uses the readers.
"""

import functools
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    image = make_noise(size).copy()
    rows, columns = np.mgrid[: size[1], : size[0]]
    for u, v in tips:
        image[(columns - u) ** 2 + (rows - v) ** 2 <= 6**2] = 255
    write_jpeg(path, image)


@functools.cache
def make_noise(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)


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


_DEXYCB_DAYS = ("0709", "0813", "0820", "0903", "0908", "0918", "0928", "1002", "1015", "1022")
DEXYCB_SUBJECTS = tuple(f"2020{day}-subject-{number:02d}" for number, day in enumerate(_DEXYCB_DAYS, start=1))
DEXYCB_SERIALS = (
    *("836212060125", "839512060362", "840412060917", "841412060263"),
    *("932122060857", "932122060861", "932122061900", "932122062010"),
)
DEXYCB_FRAMES = dict.fromkeys((0, 2, 6, 7), (0, 4, 15, 35))
"""Subject -> sequences that have a frame. For every setup there is one in each split."""


def is_left_in_dexycb(sequence: int) -> bool:
    return sequence in (4, 35)


def make_dexycb_hand(subject: int, sequence: int, camera: int) -> NDArray[np.float64]:
    """The hand as it is published: a left hand is the mirror image of a hand of make_frame_hands."""
    xyz_m = make_frame_hands(1, 1000 * subject + 10 * sequence + camera)[0]
    return xyz_m * [-1, 1, 1] if is_left_in_dexycb(sequence) else xyz_m


def make_dexycb_camera(camera: int) -> NDArray[np.float64]:
    return FRAME_CAMERA + camera * np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]])


def write_dexycb(root: Path, frames: dict[int, Sequence[int]] = DEXYCB_FRAMES, *, num_sequences: int = 100) -> Path:
    """DexYCB with one frame in some sequences and none in the others."""
    for camera, serial in enumerate(DEXYCB_SERIALS):
        (fx, _, cx), (_, fy, cy), _ = make_dexycb_camera(camera).tolist()
        file = root / f"calibration/intrinsics/{serial}_640x480.yml"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = ["color:", f"  fx: {fx}", f"  fy: {fy}", f"  ppx: {cx}", f"  ppy: {cy}", "depth:", "  fx: 1.0"]
        file.write_text("\n".join(lines), encoding="utf-8")
    for subject, name in enumerate(DEXYCB_SUBJECTS):
        for sequence in range(num_sequences):
            folder = root / name / f"{name[:8]}_{100000 + sequence}"
            folder.mkdir(parents=True)
            has_frame = sequence in frames.get(subject, ())
            side = "left" if is_left_in_dexycb(sequence) else "right"
            meta = f"mano_calib:\n- {name}_{side}\nmano_sides:\n- {side}\nnum_frames: {int(has_frame)}\n"
            (folder / "meta.yml").write_text(meta + "ycb_grasp_ind: 0\nycb_ids:\n- 1\n- 11\n", encoding="utf-8")
            for camera, serial in enumerate(DEXYCB_SERIALS if has_frame else ()):
                hand = make_dexycb_hand(subject, sequence, camera)
                write_dexycb_frame(folder / serial, 0, hand, make_dexycb_camera(camera))
    return root


def write_dexycb_frame(
    folder: Path, frame: int, xyz_m: NDArray[np.float64], camera: NDArray[np.float64], *, visible: bool = True
) -> None:
    uv = project(xyz_m, camera)
    write_frame(folder / f"color_{frame:06d}.jpg", [uv[INDEX_TIP]] if visible else [])
    joints = {"joint_3d": xyz_m[None], "joint_2d": uv[None]}
    labels = {
        name: (array if visible else np.full_like(array, -1)).astype(np.float32) for name, array in joints.items()
    }
    pose = np.ones((1, 51), np.float32) * visible
    np.savez_compressed(folder / f"labels_{frame:06d}.npz", seg=np.zeros((48, 64), np.uint8), pose_m=pose, **labels)


_FINGERS = ("thumb", "index", "middle", "ring", "little")
INTERHAND_NAMES = (*(f"{finger}_{part}" for finger in _FINGERS for part in ("tip", "dip", "pip", "mcp")), "wrist")
INTERHAND_SIZE = (334, 512)
INTERHAND_CAMERAS = ("400002", "410001")
_INTERHAND_TYPES = ("right", "left", "right", "left", "interacting")


class InterHandCamera(NamedTuple):
    """A camera of the dome, with the fields of camera.json."""

    campos: NDArray[np.float64]
    camrot: NDArray[np.float64]
    focal: NDArray[np.float64]
    princpt: NDArray[np.float64]


def make_interhand_camera(number: int) -> InterHandCamera:
    """A camera 0.6 m from the hands, which are at the origin of the world, looking at them from another side."""
    rotation, _ = np.linalg.qr(np.random.default_rng(number).normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    position_mm = -rotation.T @ np.array([0.0, 0.0, 600.0])
    return InterHandCamera(position_mm, rotation, np.array([600.0, 590.0 + number]), np.array([160.0, 250.0 + number]))


def make_interhand_world(frame: int, seed: int) -> NDArray[np.float64]:
    """The 42 joints of two hands around the origin in mm, InterHand's order: (42, 3)."""
    right, left = (make_hands(1, 100 * seed + 2 * frame + side)[0] - [0, 0, 0.6] for side in (0, 1))
    return 1000 * np.concatenate([reorder(right, INTERHAND_NAMES), reorder(left * [-1, 1, 1], INTERHAND_NAMES)])


def project_interhand(world_mm: NDArray[np.float64], camera: InterHandCamera) -> NDArray[np.float64]:
    """Pixels (K, 2), as the authors' world2cam and cam2pixel compute them."""
    x, y, z = camera.camrot @ (world_mm.T - camera.campos[:, None])
    return np.stack([x / z * camera.focal[0] + camera.princpt[0], y / z * camera.focal[1] + camera.princpt[1]], axis=-1)


def write_interhand(root: Path, *, frames: int = 5, folder: str = "{split}") -> Path:
    """InterHand2.6M with both cameras seeing each frame. Frame i shows _INTERHAND_TYPES[i]."""
    for seed, split in enumerate(("train", "val", "test")):
        cameras = {name: make_interhand_camera(10 * seed + i) for i, name in enumerate(INTERHAND_CAMERAS)}
        pictures, hands, joints = [], [], {}
        for frame in range(frames):
            kind, world = _INTERHAND_TYPES[frame % len(_INTERHAND_TYPES)], make_interhand_world(frame, seed)
            valid = [[int(kind in ("interacting", side))] for side in ("right", "left") for _ in range(21)]
            joints[str(frame)] = {"world_coord": world.tolist(), "joint_valid": valid, "hand_type": kind}
            for name, camera in cameras.items():
                file = f"Capture0/ROM01_Neutral/cam{name}/image{frame}.jpg"
                side = world[21:] if kind == "left" else world[:21]
                tip = project_interhand(side, camera)[INTERHAND_NAMES.index("index_tip")]
                write_frame(root / "images" / split / file, [tip], INTERHAND_SIZE)
                number = len(pictures)
                place = {"capture": 0, "subject": 5, "seq_name": "ROM01_Neutral", "camera": name, "frame_idx": frame}
                size = {"width": INTERHAND_SIZE[0], "height": INTERHAND_SIZE[1]}
                pictures.append({"id": number, "file_name": file, **size, **place})
                labels = {"joint_valid": valid, "hand_type": kind, "hand_type_valid": 1, "bbox": [0, 0, 9, 9]}
                hands.append({"id": number, "image_id": number, **labels})
        annotations = root / "annotations" / folder.format(split=split)
        write_text_json(annotations / f"InterHand2.6M_{split}_data.json", {"images": pictures, "annotations": hands})
        write_text_json(annotations / f"InterHand2.6M_{split}_joint_3d.json", {"0": joints})
        fields = {
            field: {name: getattr(camera, field).tolist() for name, camera in cameras.items()}
            for field in InterHandCamera._fields
        }
        write_text_json(annotations / f"InterHand2.6M_{split}_camera.json", {"0": fields})
    return root


def make_coco_hand(number: int) -> NDArray[np.float64]:
    """Keypoints of hand i in pixels of its photograph, (21, 2)."""
    return project(make_frame_hands(1, number)[0], FRAME_CAMERA)


def write_coco_person(number: int, photograph: int, *, unlabelled: Sequence[int] = (2,)) -> dict[str, object]:
    """A person with one hand: right with an even number, left with an odd one."""
    keypoints = np.concatenate([make_coco_hand(number), np.ones((21, 1))], axis=-1)
    keypoints[list(unlabelled)] = 0.0
    sides, nothing = ("right", "left")[:: 1 if number % 2 == 0 else -1], [0.0] * 63
    person = {"id": number, "image_id": photograph, "category_id": 1, "keypoints": [0] * 51, "num_keypoints": 0}
    for side, values, valid in zip(sides, (keypoints.ravel().tolist(), nothing), (True, False), strict=True):
        person |= {f"{side}hand_kpts": values, f"{side}hand_valid": valid, f"{side}hand_box": [0.0] * 4}
    return person


def write_coco_wholebody(root: Path, *, photographs: int = 8) -> Path:
    """COCO-WholeBody: photograph i of the training set shows hand i, that of the validation set hand 100 + i."""
    for part, first, num in (("train", 0, photographs), ("val", 100, 3)):
        numbers = range(first, first + num)
        for number in numbers:
            write_frame(root / f"{part}2017/{number:012d}.jpg", [make_coco_hand(number)[INDEX_TIP]])
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 640, "height": 480} for n in numbers]
        people = [write_coco_person(n, n) for n in numbers]
        path = root / f"annotations/coco_wholebody_{part}_v1.0.json"
        write_text_json(path, {"images": images, "annotations": people})
    return root
