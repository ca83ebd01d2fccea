"""Trains points of the search space on a worker as trials do, and finds the parameters that make a point fail."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.search.space import Params, Space, generate_probe_params
from handpose.sweep.execution.probe_worker import ProbeWorker
from handpose.sweep.trainable.trial_cost import ProbeFailure, TrialCost

_MAX_CANDIDATES = 4

LOWER, UPPER, OPTION, RANDOM = "lower end", "upper end", "option", "random"
"""Values of `ProbePoint.label`."""


@dataclass(frozen=True)
class ProbePoint:
    """A point of the search space to measure.

    Attributes:
        label: why it was chosen: one of LOWER, UPPER, OPTION and RANDOM.
        params: its parameters.
    """

    label: str
    params: Params


@dataclass
class ProbeResults:
    """Points that were measured, and their costs.

    Attributes:
        points: the measured points.
        costs: the cost of each point, in the same order.
        num_left_out: number of points that were skipped because the time was over.
        worker_start_s: seconds until a worker has started and imported everything.
    """

    points: list[ProbePoint] = field(default_factory=list)
    costs: list[TrialCost] = field(default_factory=list)
    num_left_out: int = 0
    worker_start_s: float = 0.0

    @property
    def typical_costs(self) -> list[TrialCost]:
        """Costs of the points drawn at random, as trials are; costs of all points if none was."""
        drawn = [cost for point, cost in zip(self.points, self.costs, strict=True) if point.label == RANDOM]
        return drawn or self.costs


def choose_probe_points(space: Space, *, num_random: int) -> list[ProbePoint]:
    """Choose the ends of the space, then random points, then every option of every choice, without duplicates."""
    corners = list(generate_probe_params(space, num_random=0))
    drawn = list(generate_probe_params(space, num_random=num_random))[len(corners) :]
    labelled = [
        *zip((LOWER, UPPER), corners, strict=False),
        *((RANDOM, params) for params in drawn),
        *((OPTION, params) for params in corners[2:]),
    ]
    points: list[ProbePoint] = []
    for label, params in labelled:
        if all(params != point.params for point in points):
            points.append(ProbePoint(label, params))
    return points


def probe_points(
    worker: ProbeWorker,
    points: Sequence[ProbePoint],
    *,
    space: Space,
    default: Params | None,
    num_steps: int,
    weights: bool,
    time_s: float,
) -> ProbeResults:
    """Measure points of a space: the first three in any case, the others while there is time.

    Args:
        worker: worker that trains the points.
        points: points to measure.
        space: search space, named in errors.
        default: parameters of the default configuration, if it lies in the space.
        num_steps: training steps per point.
        weights: whether to fetch pretrained weights.
        time_s: seconds after which no further point is started.

    Raises:
        UserError: a point cannot be trained; the message names the parameters that cause it.
    """
    began = time.monotonic()
    probed = ProbeResults()
    for number, point in enumerate(points):
        if number >= 3 and time.monotonic() - began > time_s:
            probed.num_left_out = len(points) - number
            break
        outcome = worker.measure_params(point.params, num_steps=num_steps, weights=weights)
        if isinstance(outcome, ProbeFailure):
            others = [other.params for other in (*probed.points, *points[number + 1 :])][:_MAX_CANDIDATES]
            candidates = others if default is None else [default, *others]
            raise UserError(f"{space.file}: {_explain_failure(worker, point.params, outcome, candidates)}")
        probed.points.append(point)
        probed.costs.append(outcome)
    probed.worker_start_s = worker.start_s
    return probed


def _explain_failure(worker: ProbeWorker, params: Params, failure: ProbeFailure, candidates: Sequence[Params]) -> str:
    if failure.kind == "value":  # such a message already says what to correct
        is_named = any(key in failure.reason for key in params)
        return failure.reason if is_named else f"{failure.reason} (tried with {_format_params(params)})"
    sound = next((other for other in candidates if isinstance(worker.measure_params(other), TrialCost)), None)
    if sound is None:
        what = "no point that was tried can be trained"
    else:
        what = f"{_format_params(_find_culprits(worker, params, failure, sound))} cannot be trained"
    if failure.kind not in ("memory", "killed"):
        return f"{what}: {failure.reason}"
    more = "a larger sweep.gpus_per_trial" if worker.gpus else "fewer trials at a time (sweep.max_concurrent)"
    why = ", because there is not enough memory" if failure.kind == "memory" else ""
    return f"{what}{why}: {failure.reason}; a narrower range, a smaller data.batch_size or {more} may help"


def _format_params(params: Params) -> str:
    return " ".join(quote_override(key, value) for key, value in params.items())


def _find_culprits(worker: ProbeWorker, params: Params, failure: ProbeFailure, working: Params) -> Params:
    """Return the parameters that cause a point to fail in the same way while all others are those of a working point.

    Parameters are reset to the working point one by one. Those without which the failure disappears are kept.
    """
    guilty = [key for key, value in params.items() if key not in working or working[key] != value]
    for key in list(guilty):
        rest = [other for other in guilty if other != key]
        outcome = worker.measure_params({**working, **{other: params[other] for other in rest}}) if rest else None
        if isinstance(outcome, ProbeFailure) and outcome.kind == failure.kind:
            guilty = rest
    return {key: params[key] for key in guilty}


_GROUPS_USED_EVERY_STEP = ("model", "heatmap", "loss", "augment", "optimizer")


def find_ineffective_params(worker: ProbeWorker, probed: ProbeResults, start: Params) -> Iterator[str]:
    """Yield parameters that do not change the first training steps when they alone differ from `start`, bit for bit.

    Only parameters of components that act at every step are tried. A schedule may act later.
    """
    before = worker.measure_params(start)
    for key in start:
        others = [point.params[key] for point in probed.points if key in point.params]
        moved = [value for value in others if value != start[key]]
        if not moved or key.replace("/", ".").partition(".")[0] not in _GROUPS_USED_EVERY_STEP:
            continue
        after = worker.measure_params({**start, key: moved[0]})
        if isinstance(before, TrialCost) and isinstance(after, TrialCost) and before.trace == after.trace:
            yield key
