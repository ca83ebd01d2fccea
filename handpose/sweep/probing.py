"""Points of a search space, tried on a worker as trials have them, and which parameter is to blame where one fails."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.sweep.space import Params, Space, probes
from handpose.sweep.trial import TrialRecipe
from handpose.sweep.trial_cost import FEWEST_STEPS, DataSize, Gauge, Refusal, TrialCost, first_line
from handpose.sweep.warm_up import worker_environment
from handpose.sweep.worker_death import death_of_worker
from handpose.sweep.worker_start import PATIENCE_S, PROBE_AFTER_S, StartProbe, never_started

_PATIENCE_S = 600.0

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


class Bench:
    """Measures configurations on one worker with a slot's resources, which imports only once.

    A context manager, which ends the worker; one that a point has killed is replaced. Raises UserError where no worker
    can be had.
    """

    def __init__(self, *, cpus: int, gpus: float, recipe: TrialRecipe, data: DataSize) -> None:
        self.gpus = gpus
        self._cpus = cpus
        self._recipe = recipe
        self._data = data
        self._worker: Any = None
        self._is_ready = False

    def __enter__(self) -> "Bench":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def outcome(self, params: Params, *, num_steps: int = FEWEST_STEPS, weights: bool = False) -> TrialCost | Refusal:
        """Measure the trial with these parameters; num_steps, weights: as `measure` takes them."""
        self._ensure_ready()
        overrides = self._recipe.in_worker(params)
        how = {"num_steps": num_steps, "weights": weights, "num_workers": self._recipe.num_workers}
        call = self._worker.measure.remote(overrides, params, self._data, **how)
        try:
            return ray.get(call, timeout=_PATIENCE_S)
        except GetTimeoutError:
            refusal = Refusal("time", f"a few steps of it take more than {_PATIENCE_S / 60:.0f} minutes")
        except OutOfMemoryError:
            refusal = Refusal("memory", "the machine's memory was full")
        except RayActorError as error:
            death = death_of_worker(str(error))
            refusal = Refusal("crashed" if death.crashed else "killed", death.sentence)
        self._stop()
        return refusal

    def _ensure_ready(self) -> None:
        if self._worker is None:
            self._start()
        if self._is_ready:
            return
        ready = self._worker.ready.remote()
        try:
            if not ray.wait([ready], timeout=PROBE_AFTER_S)[0]:
                self._check_start(ready)
            ray.get(ready)
        except RayError as error:
            raise UserError(f"no worker can be started: {first_line(error)}") from error
        self._is_ready = True

    def _check_start(self, ready: Any) -> None:
        """Wait for the rest of the patience; raises UserError, which tells a taken slot from a worker that fails."""
        probe = StartProbe()
        if ray.wait([ready], timeout=PATIENCE_S - PROBE_AFTER_S)[0]:
            return
        if not probe.has_run():
            raise never_started()
        raise UserError(
            f"no slot (sweep.cpus_per_trial={self._cpus}, sweep.gpus_per_trial={self.gpus:g}) was free for "
            f"{PATIENCE_S / 60:.0f} minutes: others use what Ray has; try again when they are done"
        )

    def _start(self) -> None:
        worker = ray.remote(num_cpus=self._cpus, num_gpus=self.gpus, runtime_env=worker_environment())(Gauge)
        self._worker = worker.remote()
        self._is_ready = False

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(RayError):
                ray.kill(worker)


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
