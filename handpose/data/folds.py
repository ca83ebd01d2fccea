"""Cross-validation: divides the training and validation images of a data set into folds.

A training with fold k validates on fold k and trains on all others. The test split is never used. Over all folds, each
image is validated exactly once, so the mean over the folds depends less on which few images are held out.
"""

import heapq
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from handpose.data.sample import ALWAYS_TRAINED, Annotations, Splits, join_annotations
from handpose.errors import UserError

_SEED = 0
"""Seed of the assignment. It is fixed, so that all trainings of a data set have the same folds."""


@dataclass(frozen=True)
class Folds:
    """Which fold is held out for validation.

    Attributes:
        num: number of folds; 1: the data set's own validation split is used.
        index: the fold that is held out, from 0 to num - 1.

    Raises:
        UserError: a value is out of range.
    """

    num: int = 1
    index: int = 0

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"folds.num={self.num} must be at least 1; 1 is the validation split of the data set")
        if not 0 <= self.index < self.num:
            remedy = f"folds.index=0 to {self.num - 1}" if self.num > 1 else "folds.index=0, or folds.num above 1"
            raise UserError(f"folds.index={self.index} is not a fold of folds.num={self.num}; give {remedy}")


def divide_into_folds(splits: Splits, folds: Folds) -> Splits:
    """Return the splits in which one fold of the training and validation images is the validation split.

    Args:
        splits: the splits of the data set. Images of a group (`Annotations.group`, or else of a pose) stay together.
        folds: the fold that is held out; with one fold, `splits` is returned.

    Raises:
        UserError: there are fewer groups than folds, or the validation images are not trained on.
    """
    if folds.num == 1:
        return splits
    both = join_annotations(splits.train, splits.val)
    group = both.pose if both.group is None else both.group
    in_val = assign_folds(group, folds.num) == folds.index
    train = both.select(np.flatnonzero(~in_val))
    if train.weight is not None:
        is_divided = group != ALWAYS_TRAINED
        num_train = len(splits.train)
        train = _keep_total_weight(train, is_divided[~in_val], _sum_weight(splits.train, is_divided[:num_train]))
    return replace(splits, train=train, val=both.select(np.flatnonzero(in_val)))


def assign_folds(group: NDArray[np.int64], num_folds: int) -> NDArray[np.int64]:
    """Assign images to folds. The folds have nearly equal numbers of images, and no group is divided.

    The groups are shuffled with a fixed seed. Then the largest ones are assigned first, each to the smallest fold.

    Args:
        group: (N,) group of each image; ALWAYS_TRAINED: the image is in no fold.
        num_folds: number of folds.

    Returns:
        (N,) fold of each image; -1: it is in no fold.

    Raises:
        UserError: there are fewer groups than folds.
    """
    fold = np.full(len(group), -1)
    divided = np.flatnonzero(group != ALWAYS_TRAINED)
    names, index, sizes = np.unique(group[divided], return_inverse=True, return_counts=True)
    if len(names) < num_folds:
        remedy = (
            f"give at most {len(names)} folds"
            if len(names) > 1
            else "give 1 fold, the validation split of the data set"
        )
        raise UserError(
            f"{num_folds} folds (folds.num, or sweep.folds of a sweep) need as many groups of images that are not "
            f"divided, but the data set has {len(names)}; {remedy}"
        )
    order = np.random.default_rng(_SEED).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of_group = np.empty(len(names), dtype=np.int64)
    smallest = [(0, number) for number in range(num_folds)]  # (number of images, fold), a heap
    for each in order:
        size, number = smallest[0]
        fold_of_group[each] = number
        heapq.heapreplace(smallest, (size + int(sizes[each]), number))
    fold[divided] = fold_of_group[index]
    return fold


def _sum_weight(annotations: Annotations, images: NDArray[np.bool_]) -> float:
    assert annotations.weight is not None
    return float(annotations.weight[images].sum())


def _keep_total_weight(train: Annotations, is_divided: NDArray[np.bool_], total: float) -> Annotations:
    """Scale the weights of the divided images, so that training draws them as often as without folds.

    Args:
        train: the training images of a fold.
        is_divided: (N,) whether an image belongs to a fold.
        total: sum of the weights of the divided images in the training split of the data set.
    """
    now = _sum_weight(train, is_divided)
    if not now > 0:
        raise UserError(
            "the images that are validated have the weight 0 in training, so that folds would all train on the same "
            "images; give data.source.eval_part a weight above 0, or folds.num=1 (in a sweep, sweep.folds=1)"
        )
    assert train.weight is not None
    return replace(train, weight=np.where(is_divided, train.weight * (total / now), train.weight))
