"""FreiHAND_pub_v2 as published: one hand per image, with its camera and its 21 joints in metres.

Zimmermann et al., "FreiHAND: A Dataset for Markerless Capture of Hand Pose and Shape from Single RGB Images", 2019. The
JSON files have one entry for each pose. A pose is shown by one image, or by four that differ only in the background:
image id = pose + num_poses * variant. training/mask has one mask for each pose. The validation set consists of poses,
because a split by images would show the hands of the validation set to the network during training.

Pixels: the published toolbox draws K xyz over `imshow`, so the centres of pixels are at integer coordinates, as in this
project.
"""

import json
import os
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from handpose.data.sample import Annotations, ImageFiles, Splits
from handpose.data.splitting import choose_groups, number_groups
from handpose.errors import UserError, join_lines
from handpose.skeleton import NUM_JOINTS, REFERENCE_BONE

URL = "https://lmb.informatik.uni-freiburg.de/projects/freihand"
IMAGES_PER_POSE = (1, 4)
_LAYOUT = f"data.root must be the folder that FreiHAND_pub_v2 is unpacked to ({URL})"
_CORRECT_REMEDY = "correct it, or unpack the data set again"
_REFERENCE_BONE_LIMITS_M = (0.005, 0.2)
_SCALE_TOLERANCE = 0.05


@dataclass(eq=False)
class FreiHand:
    """Reader of a data set in the layout of FreiHAND_pub_v2.

    Args:
        root: folder of the data set, always data.root.
        val_fraction: fraction of the training poses that is held out for validation.
        split: what is held out; blocks: runs of neighbouring frames, since the frames are video and neighbours look
            alike; group: whole groups of the file `groups`; random: single poses.
        num_blocks: number of runs of held-out poses, with split=blocks.
        split_seed: seed that places the blocks, or draws the groups or poses.
        groups: with split=group, a text file with a line for each training pose: the name of its group, such as a
            person or a sequence. A relative path starts from data.root.
    """

    name: ClassVar[str] = "freihand"

    root: str
    _: KW_ONLY
    val_fraction: float
    split: Literal["blocks", "group", "random"]
    num_blocks: int
    split_seed: int
    groups: str | None = None

    def splits(self) -> Splits:
        """Read the annotations and list the images. No image is opened.

        Raises:
            UserError: a folder or file is missing, broken or inconsistent with the others, or the split leaves no pose
                for training or for validation.
        """
        root = Path(self.root).expanduser().absolute()
        _check_root(root)
        training = read_annotations(root / "training/rgb", root, "training", _LAYOUT, xyz="required")
        test = read_annotations(root / "evaluation/rgb", root, "evaluation", _LAYOUT, xyz="optional")
        num_poses = int(training.pose.max()) + 1
        masks = root / "training/mask"
        training = replace(training, masks=masks if masks.is_dir() else None)
        in_val = self._choose_validation_poses(root, num_poses)[training.pose]
        group = self._number_groups(root, num_poses)
        training = replace(training, group=None if group is None else group[training.pose])
        return Splits(
            train=training.select(np.flatnonzero(~in_val)),
            val=training.select(np.flatnonzero(in_val)),
            test=replace(test, pose=test.pose + num_poses),
        )

    def _choose_validation_poses(self, root: Path, num_poses: int) -> NDArray[np.bool_]:
        if (self.split == "group") != (self.groups is not None):
            raise UserError(
                f"data.source.split={self.split} and data.source.groups={self.groups} do not fit together; give both "
                "split=group and the file of the groups, or neither"
            )
        if self.groups is not None:
            return choose_groups(
                read_groups(root / Path(self.groups).expanduser(), num_poses),
                val_fraction=self.val_fraction,
                split_seed=self.split_seed,
                what=f"groups of {self.groups}",
            )
        assert self.split != "group"
        return choose_validation_poses(
            num_poses,
            val_fraction=self.val_fraction,
            split=self.split,
            num_blocks=self.num_blocks,
            split_seed=self.split_seed,
        )

    def _number_groups(self, root: Path, num_poses: int) -> NDArray[np.int64] | None:
        """Return the group of each pose that folds must not divide, (num_poses,); None: each pose is one."""
        if self.groups is not None:
            return number_groups(read_groups(root / Path(self.groups).expanduser(), num_poses))
        if self.split == "random":
            return None
        return number_runs(num_poses, val_fraction=self.val_fraction, num_blocks=self.num_blocks)


def read_groups(path: Path, num_poses: int) -> NDArray[np.str_]:
    """Read the group of each pose: a text file with a name in each line.

    Args:
        path: the file.
        num_poses: number of poses.

    Returns:
        (num_poses,) names.

    Raises:
        UserError: the file is missing, is not text, has an empty line or another number of lines.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source.groups={path} cannot be read as text ({join_lines(error)})") from error
    if len(lines) != num_poses or not all(lines):
        empty = f", and line {lines.index('') + 1} is empty" if "" in lines else ""
        raise UserError(
            f"{path} has {len(lines)} lines for {num_poses} training poses{empty}; it needs the name of a group in one "
            "line for each pose"
        )
    return np.array(lines, dtype=np.str_)


def choose_validation_poses(
    num_poses: int, *, val_fraction: float, split: Literal["blocks", "random"], num_blocks: int, split_seed: int
) -> NDArray[np.bool_]:
    """Choose the poses that are held out for validation.

    With split="blocks" the sequence is cut into `num_blocks` parts of equal length. Each part contains one block, at a
    place that the seed decides.

    Args:
        num_poses: number of training poses.
        val_fraction: fraction that is held out.
        split: "blocks" or "random".
        num_blocks: number of blocks.
        split_seed: seed that places the blocks or draws the poses.

    Returns:
        (num_poses,) bool.

    Raises:
        UserError: training or validation would be empty, or there are fewer validation poses than blocks.
    """
    if split not in ("blocks", "random"):
        raise UserError(f"data.source.split={split} is unknown; use blocks or random")
    num_val = round(val_fraction * num_poses)
    if not 0 < num_val < num_poses:
        side = "validation" if num_val <= 0 else "training"
        raise UserError(
            f"data.source.val_fraction={val_fraction} of {num_poses} poses leaves no pose for {side}; "
            "choose a fraction between 0 and 1 that leaves at least one pose on each side"
        )
    generator = np.random.default_rng(split_seed)
    chosen = np.zeros(num_poses, dtype=np.bool_)
    if split == "random":
        chosen[generator.permutation(num_poses)[:num_val]] = True
        return chosen
    if not 1 <= num_blocks <= num_val:
        raise UserError(
            f"data.source.num_blocks={num_blocks} does not fit the {num_val} validation poses "
            f"(data.source.val_fraction={val_fraction} of {num_poses}); choose 1 to {num_val} blocks"
        )
    segments = _compute_cut_points(num_poses, num_blocks)
    lengths = np.minimum(np.diff(_compute_cut_points(num_val, num_blocks)), np.diff(segments))
    starts = segments[:-1] + generator.integers(0, np.diff(segments) - lengths, endpoint=True)
    for start, length in zip(starts, lengths, strict=True):
        chosen[start : start + length] = True
    return chosen


def number_runs(num_poses: int, *, val_fraction: float, num_blocks: int) -> NDArray[np.int64]:
    """Cut the sequence of poses into runs about as long as a block of the validation split.

    Args:
        num_poses: number of training poses.
        val_fraction: fraction that is held out for validation.
        num_blocks: number of blocks that it is held out in.

    Returns:
        (num_poses,) number of the run of each pose.
    """
    num_runs = min(num_poses, max(1, round(num_blocks / val_fraction)))
    return np.repeat(np.arange(num_runs), np.diff(_compute_cut_points(num_poses, num_runs)))


def read_annotations(
    images: Path, root: Path, prefix: str, layout: str, *, xyz: Literal["required", "optional"]
) -> Annotations:
    """Read one split: the images of a folder and `root/{prefix}_{K,xyz,scale}.json`.

    An entry of the JSON files belongs to one image, or to four. If there is no scale file, the scale is measured on
    xyz, and predictions do not use it.

    Args:
        images: folder of the images.
        root: folder of the JSON files.
        prefix: beginning of the names of the JSON files.
        layout: what to do about a missing file, for error messages.
        xyz: whether the file of joints may be missing.

    Raises:
        UserError: a folder or file is missing, broken or inconsistent with the others.
    """
    files = list_image_files(images, layout)
    camera_path, xyz_path, scale_path = (root / f"{prefix}_{what}.json" for what in ("K", "xyz", "scale"))
    intrinsics = read_intrinsics(camera_path, layout)
    xyz_m = read_xyz_m(xyz_path, layout) if xyz == "required" or xyz_path.exists() else None
    scale_m = _read_scale_m(scale_path, layout) if scale_path.exists() else None
    for path, entries in ((xyz_path, xyz_m), (scale_path, scale_m)):
        if entries is not None and len(entries) != len(intrinsics):
            raise UserError(
                f"{camera_path} has {len(intrinsics)} entries but {path.name} has {len(entries)}; "
                "they must come from the same release of the data set"
            )
    _check_images_per_pose(len(files), images, len(intrinsics), camera_path)
    if xyz_m is not None and scale_m is not None:
        _check_scale(scale_m, scale_path, xyz_m, xyz_path)
    pose = np.arange(len(files)) % len(intrinsics)
    is_scale_given = scale_m is not None
    if scale_m is None and xyz_m is not None:
        scale_m = _compute_reference_bone_m(xyz_m)
    return Annotations(
        files=files,
        intrinsics=intrinsics[pose],
        xyz_m=None if xyz_m is None else xyz_m[pose],
        scale_m=None if scale_m is None else scale_m[pose],
        pose=pose,
        is_scale_given=is_scale_given,
    )


def list_image_files(folder: Path, layout: str) -> ImageFiles:
    """List the files `%08d.jpg` of a folder in the order of their numbers.

    Args:
        folder: the folder.
        layout: what to do about a missing folder, for error messages.

    Raises:
        UserError: the folder does not exist or has no such file, or the numbers do not run from 0 without a gap.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; {layout}")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if len(entry.name) == 12 and entry.name.endswith(".jpg"))
    if not names:
        raise UserError(f"{folder} has no image named like 00000000.jpg; {layout}")
    for number, name in enumerate(names):
        if name != f"{number:08d}.jpg":
            raise UserError(
                f"{folder / f'{number:08d}.jpg'} is missing, though {names[-1]} is there; unpack the data set again"
            )
    return ImageFiles.from_paths(folder / name for name in names)


def read_intrinsics(path: Path, layout: str) -> NDArray[np.float64]:
    """Read the camera matrices of a JSON file.

    Args:
        path: the file.
        layout: what to do about a missing file, for error messages.

    Returns:
        (N, 3, 3) in pixels.

    Raises:
        UserError: a matrix is not upper triangular with the last row 0 0 1 and positive focal lengths, or the file
            cannot be read.
    """
    intrinsics = _read_entries(path, (3, 3), layout)
    _check_entries(path, intrinsics[:, 0, 0] > 0, "K with a focal length that is not positive", intrinsics[:, 0, 0])
    _check_entries(path, intrinsics[:, 1, 1] > 0, "K with a focal length that is not positive", intrinsics[:, 1, 1])
    lower = intrinsics[:, [1, 2, 2, 2], [0, 0, 1, 2]]
    upper_triangular = (lower == (0.0, 0.0, 0.0, 1.0)).all(axis=1)
    _check_entries(path, upper_triangular, "K that is not upper triangular with the last row 0 0 1", intrinsics)
    return intrinsics


def read_xyz_m(path: Path, layout: str) -> NDArray[np.float64]:
    """Read the joints of a JSON file.

    Args:
        path: the file.
        layout: what to do about a missing file, for error messages.

    Returns:
        (N, K, 3) joints in metres, FreiHAND order, camera frame, all in front of the camera.

    Raises:
        UserError: a joint is not in front of the camera, the bones are too long or short for metres, or the file cannot
            be read.
    """
    xyz_m = _read_entries(path, (NUM_JOINTS, 3), layout)
    depth = xyz_m[..., 2].min(axis=1)
    _check_entries(path, depth > 0, "a joint that is not in front of the camera, depth", depth)
    length = _compute_reference_bone_m(xyz_m)
    _check_entries(
        path, length > 0, f"joints {REFERENCE_BONE[0]} and {REFERENCE_BONE[1]} in one place, distance", length
    )
    median = float(np.median(length))
    if not _REFERENCE_BONE_LIMITS_M[0] < median < _REFERENCE_BONE_LIMITS_M[1]:
        raise UserError(
            f"{path}: the bone between joints {REFERENCE_BONE[0]} and {REFERENCE_BONE[1]} has a median length of "
            f"{median:.4g}; xyz must be in metres (not millimetres) and in FreiHAND's order of joints"
        )
    return xyz_m


def _check_root(root: Path) -> None:
    if not root.is_dir():
        problem = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"data.root={root} {problem}; download FreiHAND_pub_v2 from {URL} and unpack it there")
    if (root / "training").is_dir():
        return
    for inner in sorted(root.iterdir()):
        if (inner / "training" / "rgb").is_dir():
            raise UserError(
                f"data.root={root} has no folder training, but {inner.name} in it has; use data.root={inner}"
            )


def _check_images_per_pose(num_images: int, folder: Path, num_poses: int, path: Path) -> None:
    if num_images not in [num_poses * variants for variants in IMAGES_PER_POSE]:
        raise UserError(
            f"{path.name} has {num_poses} poses but {folder} has {num_images} images; there must be 1 or 4 images per "
            f"pose ({num_poses} or {4 * num_poses}), so unpack the data set again"
        )


def _read_scale_m(path: Path, layout: str) -> NDArray[np.float64]:
    scale_m = _read_entries(path, (), layout)
    _check_entries(path, scale_m > 0, "a scale that is not positive", scale_m)
    return scale_m


def _check_scale(scale_m: NDArray[np.float64], scale_path: Path, xyz_m: NDArray[np.float64], xyz_path: Path) -> None:
    """Raise UserError if the published scale is not the length of the reference bone.

    The comparison uses medians: a scale in another unit or of another bone is a mistake, a single noisy pose is not.
    """
    ratio = float(np.median(scale_m) / np.median(_compute_reference_bone_m(xyz_m)))
    if abs(ratio - 1) > _SCALE_TOLERANCE:
        raise UserError(
            f"{scale_path} is {ratio:.3g} times the bone between joints {REFERENCE_BONE[0]} and {REFERENCE_BONE[1]} of "
            f"{xyz_path.name} in the median; remove it, and predictions have the mean size of the training hands"
        )


def _compute_reference_bone_m(xyz_m: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.norm(xyz_m[:, REFERENCE_BONE[0]] - xyz_m[:, REFERENCE_BONE[1]], axis=-1)


def _read_entries(path: Path, shape: tuple[int, ...], layout: str) -> NDArray[np.float64]:
    """Read a JSON list of N arrays of the given shape, all finite: (N, *shape)."""
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {layout}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); unpack the data set again") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list with one entry per pose; unpack the data set again")
    try:
        array = np.array(entries, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0)
    if array.shape != (len(entries), *shape):
        wanted = " x ".join(map(str, shape)) + " numbers" if shape else "one number"
        bad = next((i for i, entry in enumerate(entries) if not _has_shape(entry, shape)), 0)
        raise UserError(f"{path}: entry {bad} is not {wanted}; unpack the data set again")
    if not np.isfinite(array).all():
        bad, *place = np.argwhere(~np.isfinite(array))[0]
        value = array[(bad, *place)]
        raise UserError(
            f"{path}: entry {bad} has a value that is not finite: {value} at {[int(i) for i in place]}; "
            f"{_CORRECT_REMEDY}"
        )
    return array


def _has_shape(entry: Any, shape: tuple[int, ...]) -> bool:
    try:
        return np.array(entry, dtype=np.float64).shape == shape
    except (ValueError, TypeError, OverflowError):
        return False


def _check_entries(path: Path, is_valid: NDArray[np.bool_], problem: str, values: NDArray[np.float64]) -> None:
    """Raise UserError with the values of the first entry that is not valid, if there is one.

    Args:
        path: the file.
        is_valid: (N,) which entries are valid.
        problem: what is wrong with the others.
        values: (N, ...) values to show.
    """
    if is_valid.all():
        return
    bad = int(np.argmin(is_valid))
    value = np.array2string(values[bad], precision=4, threshold=9).replace("\n", "")
    raise UserError(f"{path}: entry {bad} has {problem}: {value}; {_CORRECT_REMEDY}")


def _compute_cut_points(total: int, parts: int) -> NDArray[np.int64]:
    """Cut 0..total into parts whose lengths differ by at most one, and return the (parts + 1,) cut points."""
    return np.arange(parts + 1) * total // parts
