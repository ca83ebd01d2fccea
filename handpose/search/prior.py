"""Priors: where the author of a search space believes that the best value of a parameter lies.

A belief about a number is a normal distribution, or a log-normal one, truncated to the range of the parameter. A belief
about a choice gives half of the probability to one option, and spreads the other half evenly over all options. Both are
as in PriorBand (Mallik et al. 2023, arXiv:2306.12370) and NePS, but for the weight of the option.

Densities are relative to a uniform draw from the range (of the logarithm, if the range is logarithmic). So the density
of a parameter without a prior is 1, and the densities of numbers and choices can be multiplied.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.special import log_ndtr, ndtr, ndtri

from handpose.errors import UserError
from handpose.plain_values import is_plain, is_same, to_plain
from handpose.search.distributions import Numeric, Scalar, fit_value, parse_label, round_to_distribution

_DEFAULT_DEVIATION = 0.25
"""Standard deviation of a prior without a spread, as a fraction of the range (of its logarithm)."""

_MAX_DEVIATION = 100.0
"""The largest standard deviation, as a fraction of the range. The truncated distribution is uniform long before."""

_OPTION_WEIGHT = 0.5

_SPREAD = re.compile(r"(?P<value>.*?)\s*(?:\+-|\+/-|±)\s*(?P<factor>factor\b)?\s*(?P<spread>.*)")


@dataclass(frozen=True)
class Prior:
    """A belief about the best value of one parameter.

    Attributes:
        value: the most probable value.
        spread: the standard deviation of the value; with `is_factor`, the exponential of the standard deviation of its
            logarithm. None: a quarter of the range, in the scale of the range.
        is_factor: the belief is log-normal.
    """

    value: Any
    spread: float | None = None
    is_factor: bool = False

    def __str__(self) -> str:
        if self.spread is None:
            return str(self.value)
        return f"{self.value:g} +- {'factor ' if self.is_factor else ''}{self.spread:g}"

    def find_problem(self, distribution: BaseDistribution) -> str | None:
        """Return why the prior does not fit a parameter, as the end of a sentence; None if it fits."""
        if isinstance(distribution, CategoricalDistribution):
            options = ", ".join(str(parse_label(choice)) for choice in distribution.choices)
            if self.spread is not None:
                return f"is a choice, which has no spread; write one of its options alone: {options}"
            return None if self._find_label(distribution) is not None else f"has no such option; it has {options}"
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        low, high = distribution.low, distribution.high
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            return f"is a number from {low:g} to {high:g}; write VALUE, VALUE +- NUMBER or VALUE +- factor NUMBER"
        if not low <= self.value <= high:
            return f"ranges from {low:g} to {high:g}; give a value in this range, or extend the range"
        if self.is_factor and low <= 0:
            return f"starts at {low:g}, and a factor needs a range above 0; write VALUE +- NUMBER"
        return None

    def log_density(self, values: Sequence[Any] | np.ndarray, distribution: BaseDistribution) -> np.ndarray:
        """Compute the logarithm of the density of values, relative to a uniform draw from the distribution.

        Args:
            values: n values as the study stores them: numbers in the range, or labels of options.
            distribution: the distribution of the parameter, which the prior fits.

        Returns:
            Logarithms (n,); for a parameter with few values, those of the ratio of the probabilities.
        """
        if isinstance(distribution, CategoricalDistribution):
            label, num = self._find_label(distribution), len(distribution.choices)
            option, other = math.log(_OPTION_WEIGHT * num + 1 - _OPTION_WEIGHT), math.log(1 - _OPTION_WEIGHT)
            return np.array([option if is_same([value], label) else other for value in values])
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        belief = self._make_normal(distribution)
        numbers = np.asarray(values, dtype=float)
        if distribution.low == distribution.high:
            return np.zeros(len(numbers))
        if distribution.step is None:
            slope = (np.log(numbers) if distribution.log else 0.0) - (np.log(numbers) if belief.is_log else 0.0)
            return belief.log_density(numbers) + slope + math.log(_get_width(distribution, is_log=distribution.log))
        return belief.log_mass(*_get_cells(numbers, distribution)) - _get_log_share(numbers, distribution)

    def sample(self, distribution: BaseDistribution, generator: np.random.Generator) -> Any:
        """Draw a value.

        Args:
            distribution: the distribution of the parameter, which the prior fits.
            generator: the source of chance.

        Returns:
            The value as the study stores it: a number, or the label of an option.
        """
        if isinstance(distribution, CategoricalDistribution):
            label = self._find_label(distribution)
            assert label is not None
            is_named = generator.random() < _OPTION_WEIGHT
            other = distribution.choices[generator.integers(len(distribution.choices))]
            return label[0] if is_named else other
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        return round_to_distribution(self._make_normal(distribution).sample(generator.random()), distribution)

    def _find_label(self, distribution: CategoricalDistribution) -> list[Scalar] | None:
        """Return the label of the option, in a list since it may be None; None if there is no such option."""
        for value in (self.value, str(self.value)):  # 16 may stand for the option "16"
            with contextlib.suppress(ValueError):
                return [fit_value(value, distribution)]
        return None

    def _make_normal(self, distribution: Numeric) -> "_TruncatedNormal":
        is_log = self.is_factor or (self.spread is None and distribution.log)
        low, high = _get_bounds(distribution)
        if is_log:
            low = max(low, distribution.low / 2)
        scale = math.log if is_log else float
        width = scale(high) - scale(low)
        deviation = _DEFAULT_DEVIATION * width if self.spread is None else scale(self.spread) if is_log else self.spread
        return _TruncatedNormal(
            scale(self.value), min(deviation, _MAX_DEVIATION * width), scale(low), scale(high), is_log=is_log
        )


@dataclass(frozen=True)
class _TruncatedNormal:
    """A normal distribution of a number or of its logarithm, truncated to an interval that contains its mean."""

    mean: float
    deviation: float
    low: float
    high: float
    is_log: bool

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Return the logarithm of the density, in the scale of the distribution."""
        places = self._standardise(values)
        return -(places**2) / 2 - math.log(math.sqrt(2 * math.pi) * self.deviation) - self._get_log_total()

    def log_mass(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return the logarithm of the probability of intervals."""
        low = np.maximum(low, math.exp(self.low)) if self.is_log else low
        return _compute_log_mass(self._standardise(low), self._standardise(high)) - self._get_log_total()

    def sample(self, position: float) -> float:
        """Return the quantile at a position between 0 and 1."""
        ends = self._get_ends()
        place = self.mean + self.deviation * float(ndtri(ndtr(ends[0]) + position * (ndtr(ends[1]) - ndtr(ends[0]))))
        place = min(max(place, self.low), self.high)
        return math.exp(place) if self.is_log else place

    def _standardise(self, values: np.ndarray) -> np.ndarray:
        return ((np.log(values) if self.is_log else values) - self.mean) / self.deviation

    def _get_ends(self) -> tuple[float, float]:
        return (self.low - self.mean) / self.deviation, (self.high - self.mean) / self.deviation

    def _get_log_total(self) -> float:
        low, high = self._get_ends()
        return math.log(ndtr(high) - ndtr(low))


def _compute_log_mass(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probability of intervals of the standard normal distribution, also far from 0."""
    is_right = low > 0
    low, high = np.where(is_right, -high, low), np.where(is_right, -low, high)
    with np.errstate(divide="ignore"):  # log(0) is -inf
        return log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))


def _get_bounds(distribution: Numeric) -> tuple[float, float]:
    """Return the ends of the interval whose numbers are rounded to the values of a distribution."""
    if distribution.step is None:
        return distribution.low, distribution.high
    half = distribution.step / 2
    return distribution.low - half, distribution.high + half


def _get_cells(values: np.ndarray, distribution: Numeric) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the intervals whose numbers are rounded to each of the values."""
    assert distribution.step is not None
    half = distribution.step / 2
    return values - half, values + half


def _get_width(distribution: Numeric, *, is_log: bool) -> float:
    low, high = _get_bounds(distribution)
    return math.log(high) - math.log(low) if is_log else high - low


def _get_log_share(values: np.ndarray, distribution: Numeric) -> np.ndarray:
    """Return the logarithm of the probability of each value in a uniform draw, as Optuna draws it."""
    low, high = _get_cells(values, distribution)
    if distribution.log:
        low, high = np.log(low), np.log(high)
    return np.log(high - low) - math.log(_get_width(distribution, is_log=distribution.log))


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_prior(where: str, written: Any, parse_text: Callable[[str], Any] = str) -> Prior:
    """Parse a prior as a search space file has it.

    Args:
        where: the file and the key, for the error message.
        written: the value, or text: `0.005 +- factor 3` or `0.04 +- 0.01`.
        parse_text: parses a text without a spread.

    Raises:
        UserError: the text is malformed.
    """
    found = _SPREAD.fullmatch(written.strip()) if isinstance(written, str) else None
    if found is None:
        value = parse_text(written) if isinstance(written, str) else to_plain(written)
        if not is_plain(value):
            raise UserError(f"{where}: {value!r} is not one value; {_REMEDY}")
        return Prior(value)
    try:
        value, spread = _parse_number(found["value"]), float(found["spread"])
    except ValueError as error:
        raise UserError(f"{where}: {written}: cannot read this prior; {_REMEDY}") from error
    is_factor, least = found["factor"] is not None, 1 if found["factor"] else 0
    if not least < spread < math.inf:
        what = "factor" if is_factor else "spread"
        raise UserError(f"{where}: {written}: the {what} must be a number above {least}, not {spread:g}")
    return Prior(value, spread, is_factor)


_REMEDY = "write VALUE, VALUE +- NUMBER or VALUE +- factor NUMBER, as in `optimizer.lr: 0.005 +- factor 3`"


def _parse_number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
