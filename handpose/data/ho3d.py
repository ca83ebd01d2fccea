"""HO-3D version 3: a right hand that holds an object, in videos of up to five cameras, 640 x 480 pixels.

Hampali et al., "HOnnotate: A Method for 3D Annotation of Hand and Object Poses", CVPR 2020, and "HO-3D_v3", arXiv
2107.00887. The facts below are those of the authors' scripts, github.com/shreyashampali/ho3d (README, vis_HO3D.py,
utils/vis_utils.py, pred.py):

- train.txt and evaluation.txt list the frames as SEQUENCE/FRAME. A frame is {split}/SEQUENCE/rgb/FRAME.jpg, with its
  labels in {split}/SEQUENCE/meta/FRAME.pkl: camMat in pixels, handJoints3D in metres.
- Joints are in the OpenGL frame: y up, and the hand at negative z. The signs of y and z change here.
- Joints are in the order of the MANO model: wrist, three each of index, middle, little, ring finger and thumb, then
  the tips of thumb, index, middle, ring and little finger.
- The labels of the evaluation split have only the wrist and a bounding box of the hand. The joints are published as a
  separate file, evaluation_xyz.json, with the entries of evaluation.txt. It is used if it is there.

The name of a sequence is letters and a number whose last digit is the camera, if there are several. Sequences with the
same letters may be the same recording, so validation holds them out together.
"""

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from handpose.data.crops import (
    FrameHands,
    compute_crops,
    cut_out_hands,
    describe_left_out,
    find_cut_off,
    move_intrinsics,
)
from handpose.data.label_files import (
    Arrays,
    check_root,
    map_files,
    read_arrays,
    read_bytes,
    read_json,
    read_pickle,
    to_array,
)
from handpose.data.pictures import check_picture_size
from handpose.data.sample import Annotations, ImageFiles, Splits, number_poses
from handpose.data.splitting import choose_groups, keep_every, number_groups
from handpose.errors import UserError
from handpose.skeleton import NUM_JOINTS

FREIHAND_FROM_HO3D = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
"""`freihand = ho3d[FREIHAND_FROM_HO3D]`."""

_SIZE = (640, 480)
_WHERE = (
    "HO-3D is for academic research and has no download by script: get HO-3D_v3 through its project page (Hand and "
    "Object 3D Pose Annotation at TU Graz, linked from github.com/shreyashampali/ho3d) and unpack it there"
)
_LAYOUT = f"data.root must be the folder that HO-3D_v3 is unpacked to ({_WHERE})"
_FROM_OPENGL = np.array([1.0, -1.0, -1.0])
_WRIST_TOLERANCE_M = 0.01


@dataclass(eq=False)
class Ho3d:
    """Reader of HO-3D version 3 as published.

    Args:
        root: folder of the data set, always data.root.
        crop_margin: margin around the joints (in the test split: around the published box) on each side, as a fraction
            of the longer side of their bounding box.
        val_fraction: fraction of the training frames that is held out for validation, approximately: whole sequences
            are held out, with all their cameras.
        split_seed: seed that chooses the sequences.
        frame_step: use every n-th frame of the training and validation sequences; 1: all.
        cache_folder: folder in which the labels are kept as arrays; None: they are not kept.
    """

    name: ClassVar[str] = "ho3d"

    root: str
    _: KW_ONLY
    crop_margin: Annotated[float, Field(ge=0, le=2)]
    val_fraction: float
    split_seed: int
    frame_step: Annotated[int, Field(ge=1)]
    cache_folder: str | None = None

    def splits(self) -> Splits:
        """Read the labels and list the images. Of the images only the header of one is read.

        Raises:
            UserError: a folder or file is missing or broken, or a split has no hand.
        """
        root = Path(self.root).expanduser().absolute()
        check_root(root, inner="train.txt", where=_WHERE)
        frames = np.array(sorted(_read_frames(root / "train.txt")))
        sequences = np.array([frame.split("/")[0] for frame in frames])
        kept = keep_every(sequences, self.frame_step)
        frames, sequences = frames[kept], sequences[kept]
        recordings = np.array([re.sub(r"\d+$", "", name) for name in sequences])
        in_val = choose_groups(
            recordings,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
            what="sequences with different letters",
        )
        train, train_notes = self._read_training(root, frames[~in_val], recordings[~in_val], "training")
        val, val_notes = self._read_training(root, frames[in_val], recordings[in_val], "validation")
        test = self._read_evaluation(root)
        return number_poses(train, val, test, notes=(*train_notes, *val_notes))

    def _read_training(
        self, root: Path, frames: NDArray[np.str_], recordings: NDArray[np.str_], split: str
    ) -> tuple[Annotations, tuple[str, ...]]:
        files = _list_files(root / "train", frames, "meta", ".pkl")
        labels = read_arrays(
            lambda: _read_labels(files), files=files, kind=f"ho3d 1 {split}", cache_folder=self.cache_folder
        )
        is_labelled = np.isfinite(labels["xyz_m"]).all(axis=(1, 2))
        hands = FrameHands(
            files=_list_images(root / "train", frames),
            size=np.tile(_SIZE, (len(frames), 1)),
            intrinsics=labels["intrinsics"],
            xyz_m=labels["xyz_m"],
            is_left=np.zeros(len(frames), dtype=np.bool_),
        )
        is_cut_off = np.zeros(len(frames), dtype=np.bool_)
        is_cut_off[is_labelled] = find_cut_off(hands.select(np.flatnonzero(is_labelled)))
        notes = describe_left_out(
            self.name,
            split,
            len(frames),
            {"without joints": (~is_labelled).sum(), "cut off by the border of the picture": is_cut_off.sum()},
        )
        kept = np.flatnonzero(is_labelled & ~is_cut_off)
        if not len(kept):
            raise UserError(f"{root / 'train.txt'}: the {split} split has no hand that can be used; {_LAYOUT}")
        check_picture_size(str(hands.files[int(kept[0])]), _SIZE)
        cut_out = cut_out_hands(hands.select(kept), margin=self.crop_margin)
        return replace(cut_out, group=number_groups(recordings[kept])), notes

    def _read_evaluation(self, root: Path) -> Annotations:
        """Read the test split. No hand is left out, so that the predictions are complete."""
        frames = np.array(_read_frames(root / "evaluation.txt"))
        files = _list_files(root / "evaluation", frames, "meta", ".pkl")
        labels = read_arrays(
            lambda: _read_boxes(files), files=files, kind="ho3d-evaluation 1", cache_folder=self.cache_folder
        )
        crops = compute_crops(labels["box"].reshape(-1, 2, 2), margin=self.crop_margin)
        xyz_m = _read_evaluation_xyz_m(root / "evaluation_xyz.json", labels["wrist_m"])
        return Annotations(
            files=_list_images(root / "evaluation", frames),
            intrinsics=move_intrinsics(labels["intrinsics"], crops),
            xyz_m=xyz_m,
            scale_m=None if xyz_m is None else np.linalg.norm(xyz_m[:, 9] - xyz_m[:, 10], axis=-1),
            pose=np.arange(len(frames)),
            is_scale_given=False,
            crops=crops,
        )


def _read_frames(path: Path) -> list[str]:
    """Read the names SEQUENCE/FRAME in a list of frames."""
    frames = read_bytes(path, _LAYOUT).decode("utf-8", "replace").split()
    wrong = next((frame for frame in frames if not re.fullmatch(r"\w+/\w+", frame)), None)
    if not frames or wrong is not None:
        raise UserError(
            f"{path} must list frames as SEQUENCE/FRAME, but has {wrong or 'none'}; unpack the data set again"
        )
    return frames


def _list_files(folder: Path, frames: NDArray[np.str_], kind: str, suffix: str) -> list[Path]:
    return [folder / sequence / kind / f"{frame}{suffix}" for sequence, frame in (name.split("/") for name in frames)]


def _list_images(folder: Path, frames: NDArray[np.str_]) -> ImageFiles:
    images = _list_files(folder, frames, "rgb", ".jpg")
    if not images[0].exists() and images[0].with_suffix(".png").exists():
        raise UserError(
            f"{images[0]} does not exist, but a .png file does, as in HO-3D version 2; this reader needs version 3"
        )
    return ImageFiles.from_paths(images)


def _read_labels(files: Sequence[Path]) -> Arrays:
    """Read camera matrices (N, 3, 3), and joints (N, K, 3) in this project's order and frame; NaN: no joints."""
    intrinsics, xyz_m = zip(*map_files(_read_label, files), strict=True)
    return {"intrinsics": np.stack(intrinsics), "xyz_m": np.stack(xyz_m)}


def _read_label(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    label = read_pickle(path, _LAYOUT)
    if label.get("handJoints3D") is None or label.get("camMat") is None:
        return np.full((3, 3), np.nan), np.full((NUM_JOINTS, 3), np.nan)
    joints = to_array(label["handJoints3D"], (NUM_JOINTS, 3), path, "handJoints3D")
    return to_array(label["camMat"], (3, 3), path, "camMat"), convert_joints(joints)


def _read_boxes(files: Sequence[Path]) -> Arrays:
    """Read camera matrices (N, 3, 3), boxes (N, 4) of left, top, right and bottom in pixels, and wrists (N, 3)."""
    labels = [read_pickle(path, _LAYOUT) for path in files]
    parts = {"intrinsics": ("camMat", (3, 3)), "box": ("handBoundingBox", (4,)), "wrist_m": ("handJoints3D", (3,))}
    arrays = {
        name: np.stack([to_array(label.get(key), shape, path, key) for path, label in zip(files, labels, strict=True)])
        for name, (key, shape) in parts.items()
    }
    return arrays | {"wrist_m": arrays["wrist_m"] * _FROM_OPENGL}


def convert_joints(joints: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert joints (..., K, 3) of HO-3D's order and OpenGL frame to FreiHAND's order and this project's frame."""
    return joints[..., FREIHAND_FROM_HO3D, :] * _FROM_OPENGL


def _read_evaluation_xyz_m(path: Path, wrist_m: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Read the joints of the evaluation split, (N, K, 3); None if the file does not exist."""
    if not path.exists():
        return None
    joints = to_array(read_json(path, _LAYOUT), (len(wrist_m), NUM_JOINTS, 3), path, "the list of joints")
    xyz_m = convert_joints(joints)
    distance = float(np.median(np.linalg.norm(xyz_m[:, 0] - wrist_m, axis=-1)))
    if distance > _WRIST_TOLERANCE_M:
        raise UserError(
            f"{path}: the first joint is {distance:.3g} m from the wrist in the meta files in the median; the file "
            "must have the frames of evaluation.txt, in metres and in the OpenGL frame"
        )
    return xyz_m
