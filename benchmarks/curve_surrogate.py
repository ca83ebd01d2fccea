"""A surrogate of recorded trainings: learning curves of any configuration, with the differences between seeds.

    python benchmarks/curve_surrogate.py default full photographs

prints how well it predicts trainings that were held out. benchmarks/search.py compares search methods on it, as YAHPO
Gym (Pfisterer et al. 2022, arXiv:2109.03670) and JAHS-Bench-201 (Bansal et al. 2022) do with theirs: a search takes
minutes, every method sees the same function, and its optimum is known.

The curves are those of benchmarks/record_curves.py. The logarithms of the loss over the epochs are reduced to a few
principal components, and a Gaussian process over the parameters predicts each of them, as well as the logarithm of the
processor seconds of an epoch. A parameter that a configuration does not have lies in the middle of its range, with an
indicator beside it. To the predicted curve, the deviation of a recorded repetition from the mean of its configuration
is added, which one the seed decides. A configuration diverges if the nearest recorded one did.

The table compares predictions with trainings held out in five folds: the rank correlation (Spearman) at the first,
ninth and last epoch, the root mean square error of the logarithm at the last epoch, and the standard deviation between
seeds there, the least error that there can be.
"""

import argparse
import importlib.util
import math
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.record_curves import CURVES, RECORDINGS, read_trainings  # noqa: E402
from handpose.search.candidates import CandidatePool  # noqa: E402
from handpose.search.space import Params, Space, load_space  # noqa: E402

LOSS = "val/pa_mpjpe_mm"
_NUM_FOLDS = 5
_EXPLAINED = 0.999
_MAX_COMPONENTS = 6


class RecordedCurve(NamedTuple):
    """A recorded training.

    Attributes:
        number: number of its configuration.
        params: its parameters.
        losses: the loss after each epoch; shorter than the others if it diverged.
        epoch_s: processor seconds of an epoch, the median.
    """

    number: int
    params: Params
    losses: Sequence[float]
    epoch_s: float


def read_curves(file: Path, metric: str = LOSS) -> list[RecordedCurve]:
    """Read the trainings of a file of record_curves.py. Those that diverged in the first epoch have no losses."""
    curves = []
    for line in read_trainings(file):
        losses = [value for value in line["metrics"].get(metric, []) if math.isfinite(value)]
        seconds = float(np.median(line["seconds"])) if line["seconds"] else math.nan
        curves.append(RecordedCurve(line["number"], line["params"], losses, seconds))
    return curves


class CurveSurrogate:
    """Predicts the learning curve of any configuration, and draws curves with the differences between seeds.

    Args:
        curves: recorded trainings, some of them repetitions with other seeds.
        space: the search space they were drawn from.
        seed: the seed of the fit.
    """

    def __init__(self, curves: Sequence[RecordedCurve], space: Space, *, seed: int = 0) -> None:
        self.num_epochs = max(len(curve.losses) for curve in curves)
        self._seed = seed
        self.encoder = CandidatePool(space).encoder
        self._all = self.encoder.encode([curve.params for curve in curves])
        self._lengths = np.array([len(curve.losses) for curve in curves])
        complete = [curve for curve in curves if len(curve.losses) == self.num_epochs]
        self._deviations = compute_deviations(complete)
        points = self.encoder.encode([curve.params for curve in complete])
        logs = np.log([curve.losses for curve in complete])
        self._mean = logs.mean(0)
        _, sizes, directions = np.linalg.svd(logs - self._mean, full_matrices=False)
        explained = np.cumsum(sizes**2) / np.sum(sizes**2)
        num = min(int(np.searchsorted(explained, _EXPLAINED)) + 1, _MAX_COMPONENTS)
        self._directions = directions[:num]
        targets = (logs - self._mean) @ self._directions.T
        self._processes = [_fit_process(points, target, seed) for target in targets.T]
        self._seconds = _fit_process(points, np.log([curve.epoch_s for curve in complete]), seed)

    def predict(self, params: Sequence[Params]) -> np.ndarray:
        """Predict the mean learning curves.

        Args:
            params: n configurations.

        Returns:
            Losses (n, epochs); infinite from the epoch in which a configuration diverges.
        """
        points = self.encoder.encode(params)
        weights = np.stack([process.predict(points) for process in self._processes], axis=1)
        losses = np.exp(self._mean + weights @ self._directions)
        nearest = np.argmin(np.linalg.norm(points[:, None] - self._all[None], axis=2), axis=1)
        for row, length in zip(losses, self._lengths[nearest], strict=True):
            row[length:] = math.inf
        return losses

    def predict_epoch_seconds(self, params: Sequence[Params]) -> np.ndarray:
        """Predict the processor seconds of an epoch (n,)."""
        return np.exp(self._seconds.predict(self.encoder.encode(params)))

    def draw_noise(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the factors (epochs,) by which a training with some seed deviates from the mean curve."""
        return np.exp(self._deviations[rng.integers(len(self._deviations))])

    @cached_property
    def noise(self) -> float:
        """Standard deviation between seeds of the logarithm of the loss at the last epoch."""
        return float(np.sqrt(np.mean(self._deviations[:, -1] ** 2)))


def compute_deviations(curves: Sequence[RecordedCurve]) -> np.ndarray:
    """Return how the logarithms of repetitions deviate from the mean of their configuration.

    They are enlarged by sqrt(k / (k - 1)) for k repetitions, so that their variance is that between seeds.
    """
    by_number: dict[int, list[np.ndarray]] = {}
    for curve in curves:
        by_number.setdefault(curve.number, []).append(np.log(curve.losses))
    repeated = [np.array(each) for each in by_number.values() if len(each) > 1]
    return np.concatenate([(each - each.mean(0)) * math.sqrt(len(each) / (len(each) - 1)) for each in repeated])


def _fit_process(points: np.ndarray, targets: np.ndarray, seed: int) -> Any:
    if importlib.util.find_spec("sklearn") is None:
        raise SystemExit("the surrogates need scikit-learn: pip install -r requirements-benchmarks.txt")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    scales = Matern(np.full(points.shape[1], 1.0), (0.05, 50.0), nu=2.5)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * scales + WhiteKernel(0.05, (1e-5, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # a scale at the end of its bounds
        return process.fit(points, targets)


# --- how good it is ---------------------------------------------------------------------------------------------------


class Quality(NamedTuple):
    """How well held-out trainings are predicted.

    Attributes:
        num_configs: number of configurations.
        num_diverged: how many of them diverged.
        rank_correlations: epoch -> Spearman's rank correlation.
        error: root mean square error of the logarithm of the loss at the last epoch.
        noise: standard deviation between seeds there.
        spread: standard deviation between configurations there.
    """

    num_configs: int
    num_diverged: int
    rank_correlations: Mapping[int, float]
    error: float
    noise: float
    spread: float


def measure_quality(curves: Sequence[RecordedCurve], space: Space) -> Quality:
    """Predict the configurations of each fold from the others. Repetitions of a configuration are in the same fold."""
    from scipy.stats import spearmanr

    num_epochs = max(len(curve.losses) for curve in curves)
    complete = [curve for curve in curves if len(curve.losses) == num_epochs]
    # Not by the number modulo five: every twentieth configuration is repeated, so all would be in one fold.
    folds = {number: place % _NUM_FOLDS for place, number in enumerate(_shuffle({curve.number for curve in curves}))}
    predicted, seen = [], []
    for fold in range(_NUM_FOLDS):
        surrogate = CurveSurrogate([curve for curve in curves if folds[curve.number] != fold], space)
        held_out = [curve for curve in complete if folds[curve.number] == fold]
        finite = np.where(np.isfinite(found := surrogate.predict([curve.params for curve in held_out])), found, 1e9)
        predicted.append(finite)
        seen.append(np.array([curve.losses for curve in held_out]))
    ours, theirs = np.concatenate(predicted), np.concatenate(seen)
    last = np.log(theirs[:, -1])
    epochs = sorted({1, min(9, num_epochs), num_epochs})
    numbers = {curve.number for curve in curves}
    deviations = compute_deviations(complete)
    kept = ours[:, -1] < 1e9
    return Quality(
        len(numbers),
        len(numbers - {curve.number for curve in complete}),
        {epoch: float(spearmanr(ours[:, epoch - 1], theirs[:, epoch - 1]).statistic) for epoch in epochs},
        float(np.sqrt(np.mean((np.log(ours[kept, -1]) - last[kept]) ** 2))),
        float(np.sqrt(np.mean(deviations[:, -1] ** 2))),
        float(np.std(last)),
    )


def _shuffle(numbers: Collection[int]) -> list[int]:
    return [int(number) for number in np.random.default_rng(0).permutation(sorted(numbers))]


def main() -> None:
    """Print how good the surrogate of each file is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="names of the recordings, such as default")
    given = parser.parse_args()
    for name in given.names:
        found = measure_quality(read_curves(CURVES / f"{name}.jsonl"), load_space(RECORDINGS[name].space))
        ranks = "  ".join(f"epoch {epoch}: {rank:.3f}" for epoch, rank in found.rank_correlations.items())
        print(
            f"{name:12} {found.num_configs} configurations, {found.num_diverged} diverged;  rank correlation {ranks};  "
            f"error {found.error:.3f}, noise {found.noise:.3f}, spread {found.spread:.3f} (of the logarithm)",
            flush=True,
        )


if __name__ == "__main__":
    main()
