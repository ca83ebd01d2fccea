"""Points of a search space, tried on a worker as trials have them, and which parameter is to blame where one fails."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.search.space import Params, Space, probes
from handpose.sweep.execution.probe_worker import Bench
from handpose.sweep.trainable.trial_cost import Refusal, TrialCost

_MOST_CANDIDATES = 4

LOWER, UPPER, OPTION, RANDOM = "lower end", "upper end", "option", "random"
"""Labels of points."""


@dataclass(frozen=True)
class Point:
    """A point of a space. label: which one it is."""

    label: str
    params: Params


@dataclass
class Probed:
    """Points that were tried, and what each costs. num_left_out: those for which there was no time."""

    points: list[Point] = field(default_factory=list)
    costs: list[TrialCost] = field(default_factory=list)
    num_left_out: int = 0

    @property
    def typical(self) -> list[TrialCost]:
        """Of points drawn at random, as trials are; of all where none were."""
        drawn = [cost for point, cost in zip(self.points, self.costs, strict=True) if point.label == RANDOM]
        return drawn or self.costs


def points_of(space: Space, *, num_random: int) -> list[Point]:
    """The space's ends, some points at random as trials are, then every option of every choice; none twice."""
    corners = list(probes(space, num_random=0))
    drawn = list(probes(space, num_random=num_random))[len(corners) :]
    labelled = [
        *zip((LOWER, UPPER), corners, strict=False),
        *((RANDOM, params) for params in drawn),
        *((OPTION, params) for params in corners[2:]),
    ]
    points: list[Point] = []
    for label, params in labelled:
        if all(params != point.params for point in points):
            points.append(Point(label, params))
    return points


def probe(
    bench: Bench,
    points: Sequence[Point],
    *,
    space: Space,
    default: Params | None,
    num_steps: int,
    weights: bool,
    time_s: float,
) -> Probed:
    """Measure points of a space, the first three whatever they take, the others while there is time.

    default: parameters of the default configuration, where it lies in the space. num_steps, weights: as `measure` takes
    them. Raises UserError where a point cannot be trained, which names the parameters that are to blame.
    """
    began = time.monotonic()
    probed = Probed()
    for number, point in enumerate(points):
        if number >= 3 and time.monotonic() - began > time_s:
            probed.num_left_out = len(points) - number
            break
        outcome = bench.outcome(point.params, num_steps=num_steps, weights=weights)
        if isinstance(outcome, Refusal):
            others = [other.params for other in (*probed.points, *points[number + 1 :])][:_MOST_CANDIDATES]
            candidates = others if default is None else [default, *others]
            raise UserError(f"{space.file}: {_explained(bench, point.params, outcome, candidates)}")
        probed.points.append(point)
        probed.costs.append(outcome)
    return probed


def _explained(bench: Bench, params: Params, refusal: Refusal, candidates: Sequence[Params]) -> str:
    if refusal.kind == "value":  # these tell what to mend
        is_named = any(key in refusal.reason for key in params)
        return refusal.reason if is_named else f"{refusal.reason} (tried with {_text(params)})"
    sound = next((other for other in candidates if isinstance(bench.outcome(other), TrialCost)), None)
    if sound is None:
        what = "no point that was tried can be trained"
    else:
        what = f"{_text(_to_blame(bench, params, refusal, sound))} cannot be trained"
    if refusal.kind not in ("memory", "killed"):
        return f"{what}: {refusal.reason}"
    more = "a larger sweep.gpus_per_trial" if bench.gpus else "fewer trials at a time (sweep.max_concurrent)"
    why = ", for want of memory" if refusal.kind == "memory" else ""
    return f"{what}{why}: {refusal.reason}; a narrower range, a smaller data.batch_size or {more} may help"


def _text(params: Params) -> str:
    return " ".join(quote_override(key, value) for key, value in params.items())


def _to_blame(bench: Bench, params: Params, refusal: Refusal, sound: Params) -> Params:
    """The least part of a point that fails alike when all the rest is as in a point that is sound.

    Parameters are put back one by one; those that cannot be put back without mending the point remain.
    """
    guilty = [key for key, value in params.items() if key not in sound or sound[key] != value]
    for key in list(guilty):
        rest = [other for other in guilty if other != key]
        outcome = bench.outcome({**sound, **{other: params[other] for other in rest}}) if rest else None
        if isinstance(outcome, Refusal) and outcome.kind == refusal.kind:
            guilty = rest
    return {key: params[key] for key in guilty}


_AT_EVERY_STEP = ("model", "heatmap", "loss", "augment", "optimizer")


def without_effect(bench: Bench, probed: Probed, start: Params) -> Iterator[str]:
    """Parameters that, moved alone from `start`, leave the first steps of training as they were, bit for bit.

    Only of parts that act at every step: what a schedule does may come later.
    """
    before = bench.outcome(start)
    for key in start:
        others = [point.params[key] for point in probed.points if key in point.params]
        moved = [value for value in others if value != start[key]]
        if not moved or key.replace("/", ".").partition(".")[0] not in _AT_EVERY_STEP:
            continue
        after = bench.outcome({**start, key: moved[0]})
        if isinstance(before, TrialCost) and isinstance(after, TrialCost) and before.trace == after.trace:
            yield key
