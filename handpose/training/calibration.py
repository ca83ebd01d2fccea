"""Calibration: how large the errors are that the widths of heatmaps stand for.

A heatmap is as wide as the targets that it was trained on, and wider where the network is unsure. So the expected error
of a joint along an axis is

    factor * sqrt(variance - narrowest)

where `variance` is that of its heatmap, `narrowest` that of the narrowest heatmaps, and the factor makes the mean of
the expected errors that of the true ones. Both are found on validation images, for each axis (compare the temperature
of Guo et al. 2017, arXiv:1706.04599, which is for classes).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NARROWEST_QUANTILE = 0.02
"""Fraction of the heatmaps of an axis that may be narrower than those that count as the narrowest."""
_LEAST_PART = 0.02
"""The least excess of a variance, as a fraction of the narrowest one: no joint is certain."""


class Calibration(NamedTuple):
    """Turns variances of heatmaps into expected errors. Without calibration, the errors are the standard deviations.

    Attributes:
        narrowest: variance of the narrowest heatmaps of each axis, in squared units of the axis.
        factors: factor of each axis.
    """

    narrowest: tuple[float, float, float] = (0.0, 0.0, 0.0)
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def from_plain(cls, values: Any) -> "Calibration":
        """Make the calibration that a checkpoint holds."""
        return cls(tuple(values["narrowest"]), tuple(values["factors"]))

    def to_plain(self) -> dict[str, list[float]]:
        """Return plain values for a checkpoint."""
        return {"narrowest": list(self.narrowest), "factors": list(self.factors)}

    def compute_errors(self, variances: Tensor) -> Tensor:
        """Compute the expected errors along the axes.

        Args:
            variances: (..., 3) of heatmaps, in squared units of the axes.

        Returns:
            (..., 3) in units of the axes.
        """
        narrowest, factors = (variances.new_tensor(each) for each in self)
        return factors * torch.maximum(variances - narrowest, _LEAST_PART * variances).sqrt()

    def scale(self, factor: float) -> "Calibration":
        """Return a calibration whose errors are as many times as large."""
        first, second, third = self.factors
        return self._replace(factors=(factor * first, factor * second, factor * third))


def fit_calibration(variances: NDArray[np.float64], errors: NDArray[np.float64]) -> Calibration:
    """Fit a calibration to validation images.

    Args:
        variances: (N, K, 3) of the heatmaps, in squared units of the axes.
        errors: (N, K, 3) absolute errors along the axes, in the same units; NaN for joints outside the image.

    Returns:
        The calibration; that of an uncalibrated network if the images do not suffice.
    """
    narrowest = np.quantile(variances.reshape(-1, 3), _NARROWEST_QUANTILE, axis=0)
    raw = Calibration(tuple(narrowest.tolist())).compute_errors(torch.from_numpy(variances)).numpy()
    expected = np.where(np.isnan(errors), 0.0, raw).sum(axis=(0, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.nansum(errors, axis=(0, 1)) / expected
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        return Calibration()  # such as without a joint inside the image
    return Calibration(tuple(narrowest.tolist()), tuple(factors.tolist()))
