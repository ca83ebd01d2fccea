"""Encodes configurations of a search space as vectors, for models that measure distances between them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from handpose.plain_values import is_same
from handpose.search.points import draw_trial
from handpose.search.space import Params, Space

_NUM_DRAWS = 200


class _Column(NamedTuple):
    """An entry of the vectors.

    Attributes:
        name: name of the draw.
        distribution: its distribution; None if the entry says whether a configuration has it.
        option: the option whose presence the entry says; None for a number.
    """

    name: str
    distribution: BaseDistribution | None
    option: tuple[Any] | None = None


class SpaceEncoder:
    """Encodes configurations of a search space as vectors with entries from 0 to 1.

    A number lies between the ends of its range, by its logarithm if the range is logarithmic. A choice has an entry for
    each option, except that a choice of two has one. A parameter that only some configurations have has an entry that
    says so; its other entries are 0.5 where it is missing.

    Args:
        space: the search space. Which parameters are conditional is found by random draws.
    """

    def __init__(self, space: Space) -> None:
        sampler = RandomSampler(seed=0)
        drawn = [draw_trial(space, sampler)[0].distributions for _ in range(_NUM_DRAWS)]
        distributions = {name: each for found in drawn for name, each in found.items()}
        self._columns: list[_Column] = []
        for name, distribution in distributions.items():
            self._columns += _list_columns(name, distribution)
            if not all(name in found for found in drawn):
                self._columns.append(_Column(name, None))

    @property
    def num_entries(self) -> int:
        """Length of the vectors."""
        return len(self._columns)

    def encode(self, draws: Sequence[Params]) -> np.ndarray:
        """Return the vectors (n, num_entries).

        Args:
            draws: of each configuration, name -> drawn value as the study stores it.
        """
        rows = [[_encode_value(each, column) for column in self._columns] for each in draws]
        return np.array(rows, dtype=float).reshape(len(draws), len(self._columns))


def _list_columns(name: str, distribution: BaseDistribution) -> list[_Column]:
    if distribution.single():
        return []
    if not isinstance(distribution, CategoricalDistribution):
        return [_Column(name, distribution)]
    options = distribution.choices if len(distribution.choices) > 2 else distribution.choices[:1]
    return [_Column(name, distribution, (option,)) for option in options]


def _encode_value(draws: Params, column: _Column) -> float:
    if column.distribution is None:
        return float(column.name in draws)
    if column.name not in draws:
        return 0.5
    value = draws[column.name]
    if column.option is not None:
        return float(is_same(value, column.option[0]))
    assert isinstance(column.distribution, (FloatDistribution, IntDistribution))
    low, high = column.distribution.low, column.distribution.high
    if column.distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
