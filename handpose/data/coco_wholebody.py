"""COCO-WholeBody: hands of persons in photographs, with 2-D keypoints only.

Jin et al., "Whole-Body Human Pose Estimation in the Wild", ECCV 2020. The facts below are those of the authors'
repository, github.com/jin-s13/COCO-WholeBody (README, data_format.md):

- annotations/coco_wholebody_{train,val}_v1.0.json list persons. righthand_kpts and lefthand_kpts have x, y and v of 21
  keypoints, in pixels of the photograph counted from 0; v = 0: no label. righthand_valid and lefthand_valid say whether
  the hand is clear enough.
- Keypoints: wrist, then thumb, index, middle, ring and little finger from base to tip, which is FreiHAND's order.
- The photographs are those of COCO 2017: train2017/ and val2017/.

Neither depth nor a camera is known. A nominal camera stands in, so that rotations and zooms move the keypoints with the
image; nothing but the rays of the keypoints is used. The loss leaves out the depth axis and keypoints without a label,
and validation measures pixels only.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from handpose.data.crops import compute_crops, describe_left_out, move_keypoints
from handpose.data.label_files import Arrays, check_root, read_arrays, read_json, to_array
from handpose.data.sample import Annotations, ImageFiles, Splits
from handpose.data.splitting import choose_groups, number_groups
from handpose.errors import UserError
from handpose.skeleton import NUM_JOINTS

NOMINAL_FOCAL = 3.0
"""Focal length of the nominal camera, in sides of the cut-out."""

_WHERE = (
    "COCO-WholeBody is for non-commercial research and has no download by script here: get its annotations through "
    "github.com/jin-s13/COCO-WholeBody, and the photographs train2017 and val2017 from the COCO website "
    "(cocodataset.org), and unpack them into one folder"
)
_MIN_LABELS = 11
"""Smallest number of labelled keypoints: with fewer than half, the place of the hand is uncertain."""


@dataclass(eq=False)
class CocoWholeBody:
    """Reader of the hands of COCO-WholeBody as published.

    Args:
        root: folder of the data set, always data.root.
        crop_margin: margin around the keypoints on each side, as a fraction of the longer side of their bounding box.
        min_hand_px: smallest longer side of the bounding box of the keypoints, in pixels of the photograph; smaller
            hands are left out.
        val_fraction: fraction of the training hands that is held out for validation, approximately: whole photographs
            are held out. The published validation set is the test split.
        split_seed: seed that chooses the photographs.
        cache_folder: folder in which the labels are kept as arrays; None: they are not kept.
    """

    name: ClassVar[str] = "coco_wholebody"

    root: str
    _: KW_ONLY
    crop_margin: Annotated[float, Field(ge=0, le=2)]
    min_hand_px: Annotated[float, Field(ge=1)]
    val_fraction: float
    split_seed: int
    cache_folder: str | None = None

    def splits(self) -> Splits:
        """Read the annotations and list the images. No image is opened.

        Raises:
            UserError: a folder or file is missing or broken, or a split has no hand.
        """
        root = Path(self.root).expanduser().absolute()
        check_root(root, inner="annotations", where=_WHERE)
        training, train_notes = self._read(root, "train")
        test, test_notes = self._read(root, "val")
        photographs = training.files.paths.astype(np.str_)
        training = replace(training, group=number_groups(photographs))
        in_val = choose_groups(
            photographs,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
            what="photographs",
        )
        return Splits(
            train=training.select(np.flatnonzero(~in_val)),
            val=training.select(np.flatnonzero(in_val)),
            test=replace(test, pose=test.pose + len(training)),
            notes=(*train_notes, *test_notes),
        )

    def _read(self, root: Path, part: Literal["train", "val"]) -> tuple[Annotations, tuple[str, ...]]:
        """Read the published training or validation set."""
        path = root / "annotations" / f"coco_wholebody_{part}_v1.0.json"
        images = root / f"{part}2017"
        if not path.exists() or not images.is_dir():
            raise UserError(f"{path if not path.exists() else images} does not exist; {_WHERE}")
        labels = read_arrays(
            lambda: _read_hands(path), files=[path], kind=f"coco_wholebody 1 {part}", cache_folder=self.cache_folder
        )
        uv, num_labels = labels["uv"], np.isfinite(labels["uv"][..., 0]).sum(axis=1)
        has_labels = num_labels >= _MIN_LABELS
        extent = np.zeros(len(uv))
        extent[has_labels] = (np.nanmax(uv[has_labels], axis=1) - np.nanmin(uv[has_labels], axis=1)).max(axis=1)
        is_small = has_labels & (extent < self.min_hand_px)
        kept = np.flatnonzero(has_labels & ~is_small)
        split = "training and validation" if part == "train" else "test"
        notes = describe_left_out(
            self.name,
            split,
            len(uv),
            {
                f"with fewer than {_MIN_LABELS} labelled keypoints": (~has_labels).sum(),
                f"smaller than {self.min_hand_px:g} px": is_small.sum(),
            },
        )
        if not len(kept):
            raise UserError(f"{path} has no hand that can be used; {_WHERE}")
        names = labels["name"][kept]
        files = ImageFiles.from_paths(images / str(name) for name in names)
        return self._annotate(files, uv[kept], labels["is_left"][kept]), notes

    def _annotate(self, files: ImageFiles, uv: NDArray[np.float64], is_left: NDArray[np.bool_]) -> Annotations:
        crops = compute_crops(uv, margin=self.crop_margin)
        crops[:, 3] = is_left
        intrinsics = make_nominal_cameras(crops[:, 2])
        places = move_keypoints(uv, crops) - intrinsics[:, None, :2, 2]
        rays = np.ones((*uv.shape[:2], 3))
        rays[..., :2] = places / intrinsics[:, None, [0, 1], [0, 1]]
        rays[np.isnan(uv[..., 0])] = np.nan
        return Annotations(
            files=files,
            intrinsics=intrinsics,
            xyz_m=None,
            scale_m=None,
            pose=np.arange(len(files)),
            is_scale_given=False,
            crops=crops,
            rays=rays,
        )


def make_nominal_cameras(side: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return camera matrices (N, 3, 3) for images (N,) of which no camera is known."""
    cameras = np.zeros((len(side), 3, 3))
    cameras[:, 0, 0] = cameras[:, 1, 1] = NOMINAL_FOCAL * side
    cameras[:, 0, 2] = cameras[:, 1, 2] = (side - 1) / 2.0
    cameras[:, 2, 2] = 1.0
    return cameras


def _read_hands(path: Path) -> Arrays:
    """Read the valid hands: name of the photograph, uv (N, K, 2) in its pixels, NaN without a label, and is_left."""
    content = read_json(path, _WHERE)
    names, uv, is_left = [], [], []
    try:
        photographs = {photograph["id"]: photograph["file_name"] for photograph in content["images"]}
        for person in content["annotations"]:
            for side in ("right", "left"):
                if person[f"{side}hand_valid"]:
                    names.append(photographs[person["image_id"]])
                    uv.append(_read_keypoints(person, f"{side}hand_kpts", path))
                    is_left.append(side == "left")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not have the published fields ({type(error).__name__}: {error}); unpack the data set again"
        ) from None
    return {
        "name": np.array(names, dtype=np.str_),
        "uv": np.array(uv).reshape(-1, NUM_JOINTS, 2),
        "is_left": np.array(is_left, dtype=np.bool_),
    }


def _read_keypoints(person: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float64]:
    values = to_array(person[key], (3 * NUM_JOINTS,), path, f"{key} of annotation {person.get('id')}")
    uv = values.reshape(NUM_JOINTS, 3)
    return np.where(uv[:, 2:] > 0, uv[:, :2], np.nan)
