"""Search for labels that differ strongly from the rest of their data set and are probably mistakes.

Medians and median absolute deviations decide, so a few wrong labels do not hide each other. Normal variation of hands
and cameras is not reported: sizes within a factor of 2, bones within 1.5, distances within 3, and hands that are cut
off by the border of the image.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handpose.data.sample import Annotations
from handpose.geometry import compare_proportions, compute_bone_lengths, find_outliers, project
from handpose.skeleton import BONES, JOINT_NAMES, REFERENCE_BONE, ROOT

_MIN_HANDS = 10  # with fewer hands a median is not reliable
_MIN_DISTANCE_LIMIT = math.log(3.0)
_SCALE_LIMIT = math.log(1.5)
_MAX_OUTSIDE_FRACTION = 0.5  # of the image side; joints of a hand that is cut off lie up to 0.3 outside
_MAX_OTHER_SIDE_FRACTION = 0.1  # a larger fraction means that the data set has left and right hands
_NUM_SHOWN = 10

_WRIST, _INDEX, _LITTLE = (JOINT_NAMES.index(name) for name in ("wrist", "index_mcp", "little_mcp"))
_THUMB = [JOINT_NAMES.index(f"thumb_{segment}") for segment in ("pip", "dip", "tip")]
_BASES, _TIPS = (
    [JOINT_NAMES.index(f"{finger}_{segment}") for finger in ("index", "middle", "ring", "little")]
    for segment in ("mcp", "tip")
)


class SuspiciousLabel(NamedTuple):
    """A pose whose label is probably wrong.

    Attributes:
        image: position in the split of the first image of the pose.
        reasons: what is unusual about the label.
    """

    image: int
    reasons: tuple[str, ...]


def find_suspicious_labels(
    annotations: Annotations, intrinsics: NDArray[np.floating], size: int
) -> list[SuspiciousLabel]:
    """Find the poses of a split whose labels differ strongly from the rest.

    Args:
        annotations: the split.
        intrinsics: (N, 3, 3) of its N images, in pixels of images with side `size`.
        size: side of the images in pixels.

    Returns:
        The poses in their order. The list is empty if the split has no joints.
    """
    if annotations.xyz_m is None:
        return []
    _, first = np.unique(annotations.pose, return_index=True)
    if annotations.rays is not None:  # of some hands only 2-D keypoints are known
        first = first[np.isfinite(annotations.xyz_m[first]).any(axis=(1, 2))]
    xyz_m = torch.from_numpy(np.array(annotations.xyz_m[first], dtype=np.float64))
    camera = torch.from_numpy(np.array(intrinsics[first], dtype=np.float64))
    scale_m = None if annotations.scale_m is None else torch.from_numpy(np.array(annotations.scale_m[first]))
    reasons: list[list[str]] = [[] for _ in first]
    for hand, reason in _find_reasons(xyz_m, camera, size, scale_m):
        reasons[hand].append(reason)
    return [SuspiciousLabel(int(image), tuple(why)) for image, why in zip(first, reasons, strict=True) if why]


def format_warning(split: str, files: Sequence[Path], suspicions: Sequence[SuspiciousLabel], *, num_poses: int) -> str:
    """Format a warning for the terminal that names the entries and their images.

    Args:
        split: name of the split.
        files: images of the split.
        suspicions: the poses found.
        num_poses: number of poses in the split.
    """
    lines = [
        f"warning: {len(suspicions)} of {num_poses} hands of the {split} split have unusual labels; "
        "check them, and correct or remove wrong ones"
    ]
    for suspicion in suspicions[:_NUM_SHOWN]:
        file = files[suspicion.image]
        entry = int(file.stem) if file.stem.isdecimal() else file.stem
        lines.append(f"  entry {entry} ({file}): {'; '.join(suspicion.reasons)}")
    if len(suspicions) > _NUM_SHOWN:
        lines.append(f"  and {len(suspicions) - _NUM_SHOWN} more")
    return "\n".join(lines)


def _find_reasons(xyz_m: Tensor, intrinsics: Tensor, size: int, scale_m: Tensor | None) -> Iterator[tuple[int, str]]:
    """Yield the position of a hand among the N hands, and what is wrong with its label.

    Args:
        xyz_m: (N, K, 3) joints in metres.
        intrinsics: (N, 3, 3) in pixels.
        size: side of the images in pixels.
        scale_m: (N,) published length of the reference bone in metres; None if there is none.
    """
    if len(xyz_m) >= _MIN_HANDS:
        yield from _find_outliers(xyz_m)
    yield from _find_outside(xyz_m, intrinsics, size)
    if scale_m is not None:
        ratio = scale_m / compute_bone_lengths(xyz_m)[:, BONES.index(REFERENCE_BONE)]
        for hand in (ratio.log().abs() > _SCALE_LIMIT).nonzero()[:, 0].tolist():
            yield hand, f"its scale is {ratio[hand]:.3g} times the length of the bone {_name_bone(REFERENCE_BONE)}"


def _find_outliers(xyz_m: Tensor) -> Iterator[tuple[int, str]]:
    hands = compare_proportions(xyz_m)
    for hand in hands.is_unusual_bone.any(dim=-1).nonzero()[:, 0].tolist():
        deviation = hands.bones[hand].nan_to_num(math.inf).where(hands.is_unusual_bone[hand], torch.zeros(()))
        worst = int(deviation.abs().argmax())
        times = float(hands.bones[hand, worst].exp())
        if math.isfinite(times) and times > 0:
            yield hand, f"the bone {_name_bone(BONES[worst])} is {times:.3g} times as long as in the median hand"
        else:
            yield hand, f"the bone {_name_bone(BONES[worst])} has no length, or its joints are not finite"
    for hand in (hands.is_unusual_size & hands.size.isfinite()).nonzero()[:, 0].tolist():
        yield hand, f"the hand is {hands.size[hand].exp():.3g} times as large as the median hand"
    root_m = xyz_m[:, ROOT, 2]
    median_m = root_m.nanmedian()
    is_far = find_outliers((root_m / median_m).log(), min_limit=_MIN_DISTANCE_LIMIT) & root_m.isfinite()
    for hand in is_far.nonzero()[:, 0].tolist():
        yield hand, f"it is {root_m[hand]:.3g} m from the camera, but the median hand is at {median_m:.3g} m"
    is_right, is_left = _find_sides(xyz_m)
    side, others = ("right", "left") if is_right.sum() < is_left.sum() else ("left", "right")
    rare = is_right if side == "right" else is_left
    if rare.sum() <= _MAX_OTHER_SIDE_FRACTION * len(xyz_m):
        for hand in (rare & hands.is_typical).nonzero()[:, 0].tolist():
            yield hand, f"it is a {side} hand, but nearly all others are {others} hands"


def _find_sides(xyz_m: Tensor) -> tuple[Tensor, Tensor]:
    """Find the hands that are clearly right hands, and those that are clearly left hands: (N,) bool each.

    Thumb and bent fingers lie in front of the palm. In a right hand this is the side of the normal, in a left hand the
    other side. A hand with straight fingers and the thumb beside the palm may be neither.
    """
    normal = torch.linalg.cross(xyz_m[:, _INDEX] - xyz_m[:, _WRIST], xyz_m[:, _LITTLE] - xyz_m[:, _WRIST])
    normal = normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
    unit = compute_bone_lengths(xyz_m)[:, BONES.index(REFERENCE_BONE)].nanmedian()
    thumb = ((xyz_m[:, _THUMB].mean(dim=1) - xyz_m[:, _WRIST]) * normal).sum(dim=-1) / unit
    fingers = ((xyz_m[:, _TIPS] - xyz_m[:, _BASES]).mean(dim=1) * normal).sum(dim=-1) / unit
    both = thumb + fingers
    return (thumb > 0.25) & (both > 0.3), (thumb < -0.25) & (both < -0.3)


def _find_outside(xyz_m: Tensor, intrinsics: Tensor, size: int) -> Iterator[tuple[int, str]]:
    uv = project(xyz_m, intrinsics)
    beyond = torch.maximum(-0.5 - uv, uv - (size - 0.5)).amax(dim=-1)  # (N, K) px outside the image; negative inside
    is_wrong = (beyond.amax(dim=-1) > _MAX_OUTSIDE_FRACTION * size) | (beyond > 0).all(dim=-1)
    for hand in is_wrong.nonzero()[:, 0].tolist():
        num_outside, far = int((beyond[hand] > 0).sum()), float(beyond[hand].max())
        yield hand, f"{num_outside} of its joints lie outside the picture of {size} px, by up to {far:.0f} px"


def _name_bone(joints: tuple[int, int]) -> str:
    return f"{JOINT_NAMES[joints[0]]} to {JOINT_NAMES[joints[1]]}"
