"""Splits of a data set by groups, such as sequences or pictures, that must not be divided."""

import numpy as np
from numpy.typing import NDArray

from handpose.errors import UserError


def choose_groups(groups: NDArray[np.str_], *, val_fraction: float, split_seed: int, what: str) -> NDArray[np.bool_]:
    """Choose groups at random that are held out for validation, until they have the given fraction of the hands.

    Args:
        groups: (N,) group of each hand.
        val_fraction: fraction of the hands to hold out. As groups are not divided, it is met approximately.
        split_seed: seed of the choice.
        what: what the groups are, for the error message.

    Returns:
        (N,) bool. Each side has at least one group.

    Raises:
        UserError: there is only one group, or the fraction is not between 0 and 1.
    """
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2 or not 0.0 < val_fraction < 1.0:
        raise UserError(
            f"data.source.val_fraction={val_fraction} cannot be held out of {len(names)} {what}; the data set must "
            "have at least two of them, and the fraction must be between 0 and 1"
        )
    wanted, total = val_fraction * len(groups), 0
    chosen: list[int] = []
    for group in np.random.default_rng(split_seed).permutation(len(names)):
        if len(chosen) < len(names) - 1 and abs(total + sizes[group] - wanted) < abs(total - wanted):
            chosen.append(int(group))
            total += sizes[group]
    return np.isin(index, chosen or [int(sizes.argmin())])


def number_groups(names: NDArray[np.str_]) -> NDArray[np.int64]:
    """Number groups from 0 in the order of their names: the number (N,) of each of the names (N,)."""
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def keep_every(sequences: NDArray[np.str_], step: int) -> NDArray[np.int64]:
    """Return the positions of every n-th frame of each sequence, the first one included.

    Args:
        sequences: (N,) sequence of each frame, with the frames of a sequence in order.
        step: n.
    """
    order = np.argsort(sequences, kind="stable")
    _, starts, sizes = np.unique(sequences[order], return_index=True, return_counts=True)
    number = np.arange(len(sequences)) - np.repeat(starts, sizes)
    return np.sort(order[number % step == 0])
