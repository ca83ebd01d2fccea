"""Square cut-outs of hands from larger pictures, and left hands mirrored to right hands.

A cut-out is the picture of a virtual camera with the same centre and another principal point: all its pixels are pixels
of the file, and outside the file it is black. Only the intrinsics change, and the joints stay as they are, so that
their projection is exact. A left hand is mirrored as a whole: the pixels of the cut-out, the intrinsics and the x
coordinate of the joints. `pack` cuts out and mirrors the pixels while it decodes the files, so the store contains right
hands only. Mirroring a hand twice gives the hand of the file.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose.data.sample import Annotations, ImageFiles


class FrameHands(NamedTuple):
    """Hands in pictures that show more than the hand, as the readers find them in the files of a data set.

    Attributes:
        files: the picture of each of the N hands. A picture may show several hands.
        size: (N, 2) width and height of the pictures in pixels.
        intrinsics: (N, 3, 3) in pixels of the file.
        xyz_m: (N, K, 3) joints in metres, camera frame, FreiHAND's order.
        is_left: (N,) whether the hand is a left hand.
    """

    files: ImageFiles
    size: NDArray[np.int64]
    intrinsics: NDArray[np.float64]
    xyz_m: NDArray[np.float64]
    is_left: NDArray[np.bool_]

    def select(self, hands: NDArray[np.int64]) -> "FrameHands":
        """Select hands by their positions, in the given order."""
        return FrameHands(
            files=self.files[hands],
            size=self.size[hands],
            intrinsics=self.intrinsics[hands],
            xyz_m=self.xyz_m[hands],
            is_left=self.is_left[hands],
        )


def cut_out_hands(hands: FrameHands, *, margin: float) -> Annotations:
    """Return the annotations of the square around each hand. Left hands become right hands.

    Args:
        hands: the hands in their pictures.
        margin: as in `compute_crops`.

    Returns:
        Annotations whose poses are numbered from 0. The scale is measured on the joints.
    """
    crops = compute_crops(project_points(hands.xyz_m, hands.intrinsics), margin=margin)
    crops[:, 3] = hands.is_left
    bone_m = np.linalg.norm(hands.xyz_m[:, 9] - hands.xyz_m[:, 10], axis=-1)
    return Annotations(
        files=hands.files,
        intrinsics=move_intrinsics(hands.intrinsics, crops),
        xyz_m=mirror_points(hands.xyz_m, hands.is_left),
        scale_m=bone_m,
        pose=np.arange(len(hands.files)),
        is_scale_given=False,
        crops=crops,
    )


def compute_crops(uv: NDArray[np.float64], *, margin: float) -> NDArray[np.int64]:
    """Compute the square around the keypoints of each hand.

    Args:
        uv: (N, K, 2) keypoints in pixels; NaN: the keypoint has no label and is left out.
        margin: margin on each side, as a fraction of the longer side of the bounding box of the keypoints.

    Returns:
        (N, 4) left, top and side in pixels, and 0 for "not mirrored". The side is at least 1.
    """
    low, high = np.nanmin(uv, axis=1), np.nanmax(uv, axis=1)
    side = np.maximum(np.ceil((1.0 + 2.0 * margin) * (high - low).max(axis=1)), 1.0)
    corner = np.round((low + high) / 2.0 - (side[:, None] - 1.0) / 2.0)  # pixel centres are at integers
    return np.column_stack([corner, side, np.zeros_like(side)]).astype(np.int64)


def move_intrinsics(intrinsics: NDArray[np.float64], crops: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the camera matrices of cut-outs, (N, 3, 3).

    Args:
        intrinsics: (N, 3, 3) in pixels of the files.
        crops: (N, 4) as in `Annotations.crops`.
    """
    moved = intrinsics.copy()
    moved[:, :2, 2] -= crops[:, :2]
    mirrored = crops[:, 3] == 1
    moved[mirrored, 0, 1] *= -1.0
    moved[mirrored, 0, 2] = (crops[mirrored, 2] - 1.0) - moved[mirrored, 0, 2]
    return moved


def move_keypoints(uv: NDArray[np.float64], crops: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return keypoints in pixels of the cut-outs, (N, K, 2).

    Args:
        uv: (N, K, 2) in pixels of the files.
        crops: (N, 4) as in `Annotations.crops`.
    """
    moved = uv - crops[:, None, :2]
    mirrored = crops[:, 3] == 1
    moved[mirrored, :, 0] = (crops[mirrored, 2] - 1.0)[:, None] - moved[mirrored, :, 0]
    return moved


def mirror_points(xyz_m: NDArray[np.float64], is_mirrored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the joints (N, K, 3), with the other sign of x where a hand is mirrored (N,)."""
    mirrored = xyz_m.copy()
    mirrored[is_mirrored, :, 0] *= -1.0
    return mirrored


def project_points(xyz_m: NDArray[np.float64], intrinsics: NDArray[np.float64]) -> NDArray[np.float64]:
    """Project joints (N, K, 3) with camera matrices (N, 3, 3) to pixels, (N, K, 2)."""
    homogeneous = xyz_m @ intrinsics.transpose(0, 2, 1)
    return homogeneous[..., :2] / homogeneous[..., 2:]


def find_cut_off(hands: FrameHands, *, keep_at_border: bool = False) -> NDArray[np.bool_]:
    """Find the hands that are cut off.

    Args:
        hands: the hands in their pictures.
        keep_at_border: whether a hand with some joints outside the picture counts as whole. A hand with all joints
            outside, or with a joint that is not in front of the camera, never does.

    Returns:
        (N,) bool.
    """
    uv = project_points(hands.xyz_m, hands.intrinsics)
    beyond = np.maximum(-0.5 - uv, uv - (hands.size[:, None, :] - 0.5)).max(axis=2)  # (N, K) px; negative inside
    is_inside = (beyond.min(axis=1) if keep_at_border else beyond.max(axis=1)) <= 0
    return np.logical_not(is_inside & (hands.xyz_m[..., 2].min(axis=1) > 0))


def describe_left_out(name: str, split: str, num_hands: int, reasons: Mapping[str, int]) -> tuple[str, ...]:
    """Say how many hands of a split are left out and why, in one sentence; nothing if there are none.

    Args:
        name: name of the data set.
        split: name of the split.
        num_hands: number of hands before any was left out.
        reasons: reason -> number of hands.
    """
    counted = {reason: int(count) for reason, count in reasons.items() if count}
    if not counted:
        return ()
    why = ", ".join(f"{count} {reason}" for reason, count in counted.items())
    return (f"{name}: {sum(counted.values())} of {num_hands} hands of the {split} split are left out: {why}",)


def cut_square(image: NDArray[np.uint8], crop: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Cut a square out of a picture, and mirror it if the crop says so. Outside the picture it is black.

    Args:
        image: (H, W, channels).
        crop: (4,) left, top, side and whether it is mirrored; side 0: the whole picture.

    Returns:
        (side, side, channels).
    """
    left, top, side, is_mirrored = (int(value) for value in crop)
    if side == 0:
        return image
    height, width = image.shape[:2]
    square = np.zeros((side, side, image.shape[2]), dtype=image.dtype)
    rows = slice(max(top, 0), max(min(top + side, height), 0))
    columns = slice(max(left, 0), max(min(left + side, width), 0))
    part = image[rows, columns]
    if part.size:
        row, column = rows.start - top, columns.start - left
        square[row : row + part.shape[0], column : column + part.shape[1]] = part
    return np.ascontiguousarray(square[:, ::-1]) if is_mirrored else square
