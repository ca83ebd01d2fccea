"""InterHand2.6M, the pictures with a single hand: right and left hands in videos of many cameras in a dome.

Moon et al., "InterHand2.6M: A Dataset and Baseline for 3D Interacting Hand Pose Estimation from a Single RGB Image",
ECCV 2020. The facts below are those of the project page (mks0601.github.io/InterHand2.6M), of the authors' reader
(github.com/facebookresearch/InterHand2.6M, data/InterHand2.6M/dataset.py) and of the order of joints in MMPose
(interhand3d_dataset.py):

- annotations/{split}/InterHand2.6M_{split}_data.json lists pictures and hands as COCO does. In version 0.0 the folder
  is annotations/all. A picture is images/{split}/{file_name}.
- InterHand2.6M_{split}_joint_3d.json: capture -> frame -> world_coord, 42 joints in millimetres in the world frame.
- InterHand2.6M_{split}_camera.json: capture -> campos, camrot, focal, princpt -> camera. A joint X has the place
  camrot (X - campos) in the frame of the camera, which has the axes of this project.
- Joints: of the right hand thumb, index, middle, ring and little finger, each from the tip to the base, then the wrist;
  then the same for the left hand. joint_valid tells which have a label.
- hand_type is right, left or interacting. Pictures of interacting hands are left out.

The training, validation and test splits are the published ones.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from handpose.data.crops import FrameHands, cut_out_hands, describe_left_out, find_cut_off
from handpose.data.label_files import Arrays, check_root, read_arrays, read_json, to_array
from handpose.data.sample import Annotations, ImageFiles, Splits, number_poses
from handpose.data.splitting import keep_every, number_groups
from handpose.errors import UserError
from handpose.skeleton import NUM_JOINTS

Split = Literal["train", "val", "test"]

FREIHAND_FROM_INTERHAND = (20, *(4 * finger + segment for finger in range(5) for segment in (3, 2, 1, 0)))
"""`freihand = hand[FREIHAND_FROM_INTERHAND]`, for the 21 joints of one hand."""

_WHERE = (
    "InterHand2.6M is under CC BY-NC 4.0 and has no download by script here: get the images and annotations from its "
    "project page (mks0601.github.io/InterHand2.6M) and unpack them into images/ and annotations/ of one folder"
)
_MM_PER_M = 1000.0
_NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}
_REASONS = ("of interacting hands", "of a hand whose side is uncertain", "with a joint that has no label")


@dataclass(eq=False)
class InterHand:
    """Reader of the pictures of InterHand2.6M with a single hand, as published.

    Args:
        root: folder of the data set, always data.root.
        crop_margin: margin around the joints on each side, as a fraction of the longer side of their bounding box.
        frame_step: use every n-th frame of the training and validation sequences; 1: all.
        cache_folder: folder in which the labels are kept as arrays; None: they are not kept.
    """

    name: ClassVar[str] = "interhand"

    root: str
    _: KW_ONLY
    crop_margin: Annotated[float, Field(ge=0, le=2)]
    frame_step: Annotated[int, Field(ge=1)]
    cache_folder: str | None = None

    def splits(self) -> Splits:
        """Read the labels and list the images. No image is opened.

        Raises:
            UserError: a folder or file is missing or broken, or a split has no hand.
        """
        root = Path(self.root).expanduser().absolute()
        check_root(root, inner="annotations", where=_WHERE)
        train, train_notes = self._read_split(root, "train")
        val, val_notes = self._read_split(root, "val")
        test, test_notes = self._read_split(root, "test")
        return number_poses(train, val, test, notes=(*train_notes, *val_notes, *test_notes))

    def _read_split(self, root: Path, split: Split) -> tuple[Annotations, tuple[str, ...]]:
        """Read a split. The test split keeps hands that are cut off, because published results include them."""
        files = {kind: _find_file(root, split, kind) for kind in ("data", "camera", "joint_3d")}
        labels = read_arrays(
            lambda: _read_labels(files, root / "images" / split),
            files=list(files.values()),
            kind=f"interhand 1 {split}",
            cache_folder=self.cache_folder,
        )
        kept = keep_every(labels["sequence"], 1 if split == "test" else self.frame_step)
        hands = FrameHands(
            files=ImageFiles(labels["path"]),
            size=labels["size"],
            intrinsics=labels["intrinsics"],
            xyz_m=labels["xyz_m"],
            is_left=labels["is_left"],
        ).select(kept)
        is_cut_off = find_cut_off(hands, keep_at_border=split == "test") if len(kept) else np.empty(0, dtype=np.bool_)
        counts = dict(zip(_REASONS, labels["left_out"], strict=True))
        notes = describe_left_out(
            self.name,
            _NAMES[split],
            len(kept) + int(labels["left_out"].sum()),
            counts | {"cut off by the border of the picture": is_cut_off.sum()},
        )
        if is_cut_off.all():
            raise UserError(f"{files['data']}: the {_NAMES[split]} split has no single hand that can be used; {_WHERE}")
        cut_out = cut_out_hands(hands.select(np.flatnonzero(~is_cut_off)), margin=self.crop_margin)
        captures = np.array([name.split("/")[0] for name in labels["sequence"][kept][~is_cut_off]], dtype=np.str_)
        return replace(cut_out, group=number_groups(captures)), notes  # a capture is a person


def _find_file(root: Path, split: Split, kind: str) -> Path:
    folders = [root / "annotations" / name for name in (split, "all")]
    found = [folder / f"InterHand2.6M_{split}_{kind}.json" for folder in folders]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        raise UserError(f"neither {found[0]} nor {found[1]} (as in version 0.0) exists; {_WHERE}")
    return path


def _read_labels(files: Mapping[str, Path], images: Path) -> Arrays:
    """Read the single hands of a split.

    Args:
        files: the files of the kinds data, camera and joint_3d.
        images: folder of the pictures of the split.

    Returns:
        Of the N hands, sorted by sequence, camera and frame: path, size, intrinsics, xyz_m, is_left, sequence. Also
        left_out, (3,), the numbers of pictures that are left out, in the order of _REASONS.
    """
    data, cameras, joints = (read_json(files[kind], _WHERE) for kind in ("data", "camera", "joint_3d"))
    left_out = np.zeros(len(_REASONS), dtype=np.int64)
    rows = []
    try:
        pictures = {picture["id"]: picture for picture in data["images"]}
        for hand in data["annotations"]:
            reason = _find_reason(hand)
            if reason is not None:
                left_out[reason] += 1
                continue
            rows.append(_read_hand(pictures[hand["image_id"]], hand, cameras, joints, files))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        name = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{files['data']} does not have the published fields, or {files['camera'].name} or "
            f"{files['joint_3d'].name} lacks a camera or frame of it ({name}); unpack the data set again"
        ) from None
    rows.sort(key=lambda row: row[0])
    columns = list(zip(*rows, strict=True)) or [()] * 6
    places, names, sizes, intrinsics, xyz_m, is_left = columns
    return {
        "path": ImageFiles.from_paths(images / name for name in names).paths,
        "sequence": np.array(["/".join(map(str, place[:3])) for place in places], dtype=np.str_),
        "size": np.array(sizes, dtype=np.int64).reshape(-1, 2),
        "intrinsics": np.array(intrinsics, dtype=np.float64).reshape(-1, 3, 3),
        "xyz_m": np.array(xyz_m, dtype=np.float64).reshape(-1, NUM_JOINTS, 3),
        "is_left": np.array(is_left, dtype=np.bool_),
        "left_out": left_out,
    }


def _find_reason(hand: Mapping[str, Any]) -> int | None:
    """Return the position in _REASONS of the reason to leave a picture out; None: it is used."""
    if hand["hand_type"] not in ("right", "left"):
        return 0
    if not hand["hand_type_valid"]:
        return 1
    valid = np.array(hand["joint_valid"]).reshape(2, NUM_JOINTS)
    return None if valid[int(hand["hand_type"] == "left")].all() else 2


def _read_hand(
    picture: Mapping[str, Any],
    hand: Mapping[str, Any],
    cameras: Mapping[str, Any],
    joints: Mapping[str, Any],
    files: Mapping[str, Path],
) -> tuple[Any, ...]:
    """Return the place of a hand (for sorting), the name and size of its picture, its camera, joints and side."""
    capture, name = str(picture["capture"]), str(picture["camera"])
    parts = {
        part: to_array(cameras[capture][part][name], shape, files["camera"], f"{part} of capture {capture}, {name}")
        for part, shape in (("campos", (3,)), ("camrot", (3, 3)), ("focal", (2,)), ("princpt", (2,)))
    }
    world = joints[capture][str(picture["frame_idx"])]["world_coord"]
    is_left = hand["hand_type"] == "left"
    where = f"the hand in {picture['file_name']}"
    world_mm = to_array(
        world[NUM_JOINTS:] if is_left else world[:NUM_JOINTS], (NUM_JOINTS, 3), files["joint_3d"], where
    )
    (fx, fy), (cx, cy) = parts["focal"], parts["princpt"]
    return (
        (int(capture), picture["seq_name"], name, int(picture["frame_idx"])),
        picture["file_name"],
        (picture["width"], picture["height"]),
        np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]),
        convert_joints(world_mm, rotation=parts["camrot"], position_mm=parts["campos"]),
        is_left,
    )


def convert_joints(
    world_mm: NDArray[np.float64], *, rotation: NDArray[np.float64], position_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Convert the joints of one hand to FreiHAND's order, metres and the frame of a camera.

    Args:
        world_mm: (K, 3) in millimetres, world frame, InterHand2.6M's order.
        rotation: (3, 3) camrot of the camera.
        position_mm: (3,) campos of the camera.
    """
    return (world_mm[list(FREIHAND_FROM_INTERHAND)] - position_mm) @ rotation.T / _MM_PER_M
