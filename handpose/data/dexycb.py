"""DexYCB: right and left hands that grasp objects, in videos of eight cameras, 640 x 480 pixels.

Chao et al., "DexYCB: A Benchmark for Capturing Hand Grasping of Objects", CVPR 2021. The facts below are those of the
authors' toolkit, github.com/NVlabs/dex-ycb-toolkit (README, dex_ycb_toolkit/dex_ycb.py):

- A frame is SUBJECT/SEQUENCE/SERIAL/color_%06d.jpg, with labels_%06d.npz beside it. Its array joint_3d, 1 x 21 x 3, is
  in metres in the frame of this camera, with the axes of this project; joint_2d has the pixels. All values are -1 if
  the hand is not visible or has no label.
- Joints: wrist, then thumb, index, middle, ring and little finger from base to tip, which is FreiHAND's order.
- calibration/intrinsics/{SERIAL}_640x480.yml has fx, fy, ppx and ppy of the camera, under `color`.
- SEQUENCE/meta.yml has num_frames, and the side of the hand in mano_sides.
- Four setups divide the 10 subjects, 8 cameras and 100 sequences of each subject into train, val and test: s0 by
  sequences, s1 by subjects, s2 by cameras, s3 by grasped objects.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field

from handpose.data.crops import FrameHands, cut_out_hands, describe_left_out, find_cut_off, project_points
from handpose.data.label_files import Arrays, check_root, map_files, read_arrays, to_array
from handpose.data.pictures import check_picture_size
from handpose.data.sample import Annotations, ImageFiles, Splits, number_poses
from handpose.data.splitting import number_groups
from handpose.errors import UserError, join_lines
from handpose.skeleton import NUM_JOINTS
from handpose.yaml_files import load_yaml

Setup = Literal["s0", "s1", "s2", "s3"]
Split = Literal["train", "val", "test"]

SUBJECTS = (
    "20200709-subject-01",
    "20200813-subject-02",
    "20200820-subject-03",
    "20200903-subject-04",
    "20200908-subject-05",
    "20200918-subject-06",
    "20200928-subject-07",
    "20201002-subject-08",
    "20201015-subject-09",
    "20201022-subject-10",
)
SERIALS = (
    "836212060125",
    "839512060362",
    "840412060917",
    "841412060263",
    "932122060857",
    "932122060861",
    "932122061900",
    "932122062010",
)
NUM_SEQUENCES = 100
"""Sequences of each subject: five for each of 20 objects."""

_SIZE = (640, 480)
_WHERE = (
    "DexYCB is under CC BY-NC 4.0 and has no download by script here: get all subjects and the calibration from its "
    "project page (dex-ycb.github.io) and unpack them into one folder"
)
_PROJECTION_TOLERANCE_PX = 2.0
_NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}


class Video(NamedTuple):
    """The frames of a sequence as one camera sees them.

    Attributes:
        folder: folder of the frames.
        serial: the camera.
        num_frames: number of frames.
        is_left: whether the hand is a left hand.
        group: what the setup holds out of it: the sequence (s0), the subject (s1), the camera (s2) or the object (s3).
    """

    folder: Path
    serial: str
    num_frames: int
    is_left: bool
    group: str


@dataclass(eq=False)
class DexYcb:
    """Reader of DexYCB as published.

    Args:
        root: folder of the data set, always data.root.
        setup: published setup, which divides the data set; s0: unseen sequences; s1: unseen subjects; s2: unseen
            cameras; s3: unseen grasped objects.
        crop_margin: margin around the joints on each side, as a fraction of the longer side of their bounding box.
        frame_step: use every n-th frame of the training and validation sequences; 1: all.
        cache_folder: folder in which the labels are kept as arrays; None: they are not kept.
    """

    name: ClassVar[str] = "dexycb"

    root: str
    _: KW_ONLY
    setup: Setup
    crop_margin: Annotated[float, Field(ge=0, le=2)]
    frame_step: Annotated[int, Field(ge=1)]
    cache_folder: str | None = None

    def splits(self) -> Splits:
        """Read the labels and list the images. Of the images only the header of one in each split is read.

        Raises:
            UserError: a folder or file is missing or broken, or a split has no hand.
        """
        root = Path(self.root).expanduser().absolute()
        check_root(root, inner="calibration/intrinsics", where=_WHERE)
        cameras = {serial: _read_camera(root, serial) for serial in SERIALS}
        videos = _list_videos(root, self.setup)
        train, train_notes = self._read_split(videos["train"], cameras, "train")
        val, val_notes = self._read_split(videos["val"], cameras, "val")
        test, test_notes = self._read_split(videos["test"], cameras, "test")
        return number_poses(train, val, test, notes=(*train_notes, *val_notes, *test_notes))

    def _read_split(
        self, videos: Sequence[Video], cameras: dict[str, NDArray[np.float64]], split: Split
    ) -> tuple[Annotations, tuple[str, ...]]:
        """Read a split. The test split keeps hands that are cut off, because published results include them."""
        step = 1 if split == "test" else self.frame_step
        frames = [(video, number) for video in videos for number in range(0, video.num_frames, step)]
        files = [video.folder / f"labels_{number:06d}.npz" for video, number in frames]
        labels = read_arrays(
            lambda: _read_labels(files), files=files, kind=f"dexycb 1 {split}", cache_folder=self.cache_folder
        )
        hands = FrameHands(
            files=ImageFiles.from_paths(video.folder / f"color_{number:06d}.jpg" for video, number in frames),
            size=np.tile(_SIZE, (len(frames), 1)),
            intrinsics=np.array([cameras[video.serial] for video, _ in frames]).reshape(-1, 3, 3),
            xyz_m=labels["xyz_m"],
            is_left=np.array([video.is_left for video, _ in frames], dtype=np.bool_),
        )
        labelled = np.flatnonzero(np.isfinite(labels["xyz_m"]).all(axis=(1, 2)))
        whole = hands.select(labelled)
        _check_projection(whole, labels["uv"][labelled])
        is_cut_off = find_cut_off(whole, keep_at_border=split == "test")
        kept = labelled[~is_cut_off]
        if not len(kept):
            raise UserError(
                f"data.root={self.root}: the {split} split of data.source.setup={self.setup} has no hand that can be "
                f"used; {_WHERE}"
            )
        check_picture_size(str(hands.files[int(kept[0])]), _SIZE)
        counts = {
            "without a visible hand": len(frames) - len(labelled),
            "cut off by the border of the picture": is_cut_off.sum(),
        }
        notes = describe_left_out(self.name, _NAMES[split], len(frames), counts)
        groups = np.array([video.group for video, _ in frames], dtype=np.str_)[kept]
        return replace(cut_out_hands(hands.select(kept), margin=self.crop_margin), group=number_groups(groups)), notes


def find_split(setup: Setup, *, subject: int, camera: int, sequence: int) -> Split | None:
    """Return the published split of a sequence as a camera sees it.

    Args:
        setup: the setup.
        subject: position in SUBJECTS.
        camera: position in SERIALS.
        sequence: position among the sorted sequences of the subject; five of each object, in the order of objects.

    Returns:
        The split; None if the setup does not use it.
    """
    if setup == "s0":
        return "train" if sequence % 5 != 4 else "val" if subject < 2 else "test"
    if setup == "s1":
        return {6: "val", 7: "test", 8: "test"}.get(subject, "train")  # type: ignore[return-value]
    if setup == "s2":
        return {6: "val", 7: "test"}.get(camera, "train")  # type: ignore[return-value]
    held_out: dict[int, Split] = {3: "val", 19: "val", 7: "test", 11: "test", 15: "test"}
    return held_out.get(sequence // 5, "train")


def _list_videos(root: Path, setup: Setup) -> dict[Split, list[Video]]:
    videos: dict[Split, list[Video]] = {"train": [], "val": [], "test": []}
    for subject, name in enumerate(SUBJECTS):
        for sequence, folder in enumerate(_list_sequences(root / name)):
            num_frames, is_left = _read_meta(folder / "meta.yml")
            for camera, serial in enumerate(SERIALS):
                split = find_split(setup, subject=subject, camera=camera, sequence=sequence)
                if split is not None:
                    groups = {"s0": f"{name}/{folder.name}", "s1": name, "s2": serial, "s3": str(sequence // 5)}
                    videos[split].append(Video(folder / serial, serial, num_frames, is_left, groups[setup]))
    return videos


def _list_sequences(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; {_WHERE}")
    sequences = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(sequences) != NUM_SEQUENCES:
        raise UserError(
            f"{folder} has {len(sequences)} sequences, but each subject has {NUM_SEQUENCES}, whose order decides the "
            "split; unpack the data set again"
        )
    return sequences


def _read_meta(path: Path) -> tuple[int, bool]:
    """Return the number of frames of a sequence, and whether the hand is a left hand."""
    meta = _read_mapping(path)
    num_frames, sides = meta.get("num_frames"), meta.get("mano_sides")
    if not isinstance(num_frames, int) or not isinstance(sides, list) or sides[:1] not in (["left"], ["right"]):
        raise UserError(
            f"{path} must have num_frames and mano_sides (left or right), but has num_frames={num_frames} and "
            f"mano_sides={sides}; unpack the data set again"
        )
    return num_frames, sides[0] == "left"


def _read_camera(root: Path, serial: str) -> NDArray[np.float64]:
    """Return the camera matrix of a camera, (3, 3)."""
    path = root / "calibration/intrinsics" / f"{serial}_{_SIZE[0]}x{_SIZE[1]}.yml"
    color = _read_mapping(path).get("color")
    values = [color.get(name) for name in ("fx", "fy", "ppx", "ppy")] if isinstance(color, dict) else None
    fx, fy, cx, cy = to_array(values, (4,), path, "fx, fy, ppx, ppy under color")
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_WHERE}")
    try:
        content = load_yaml(path)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged ({join_lines(error)}); unpack the data set again") from None
    return content if isinstance(content, dict) else {}


def _read_labels(files: Sequence[Path]) -> Arrays:
    """Read joints (N, K, 3) in metres and keypoints (N, K, 2) in pixels; NaN: no hand."""
    labels = np.array(map_files(_read_label, files)).reshape(-1, NUM_JOINTS, 5)
    return {"xyz_m": labels[..., :3], "uv": labels[..., 3:]}


def _read_label(path: Path) -> NDArray[np.float64]:
    """Read x, y, z, u and v of each joint, (K, 5)."""
    try:
        with np.load(path, allow_pickle=False) as label:
            joints, keypoints = label["joint_3d"], label["joint_2d"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; unpack the data set again") from None
    except Exception as error:  # a damaged archive can raise any exception
        raise UserError(f"{path} cannot be read ({error}); unpack the data set again") from None
    xyz_m = to_array(joints, (1, NUM_JOINTS, 3), path, "joint_3d")[0]
    uv = to_array(keypoints, (1, NUM_JOINTS, 2), path, "joint_2d")[0]
    values = np.concatenate([xyz_m, uv], axis=-1)
    return np.full_like(values, np.nan) if (xyz_m == -1).all() or (uv == -1).all() else values


def _check_projection(hands: FrameHands, uv: NDArray[np.float64]) -> None:
    """Raise UserError if the published keypoints are not the projections of the published joints."""
    if not len(uv):
        return
    error_px = float(np.median(np.linalg.norm(project_points(hands.xyz_m, hands.intrinsics) - uv, axis=-1)))
    if not error_px <= _PROJECTION_TOLERANCE_PX:
        raise UserError(
            f"joint_3d projects {error_px:.3g} px from joint_2d in the median, for example of {hands.files[0]}; the "
            "files in calibration/intrinsics must come from the same release as the labels"
        )
