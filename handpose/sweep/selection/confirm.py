"""The finalists of a sweep once more, at full fidelity over fresh seeds, so that noise does not choose the winner.

The best of many noisy values is better than the configuration that it belongs to; the more trials, the more. Values of
fresh seeds, which no trial was trained with, do not have this bias. A smaller one comes back when the best of the few
means is picked; `paired_means` says how the intervals allow for it. All configurations are trained with the same seeds,
so they are compared in pairs. The default configuration is trained, too, which measures what tuning has gained.

The runs are trials of a sweep in the folder `confirm/`, with its own events, trials.csv and TensorBoard. One that was
cut off goes on, and one whose finalists have changed trains only what it has not trained yet.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose.report.table import TrialRow, TrialTable
from handpose.schedulers.scheduler import Fifo
from handpose.search.searcher import EndState, Known
from handpose.search.space import Params, Space
from handpose.sweep.driver.run import recorded_process_mb, swept
from handpose.sweep.record.events import EVENTS, Asked, Opened, read_events
from handpose.sweep.record.settings import RaySettings, SweepSettings
from handpose.sweep.selection.paired_means import (
    METHOD,
    ONE_SEED,
    Estimate,
    difference_estimates,
    mean_estimates,
    optimism,
    why_no_interval,
    why_not_comparable,
)
from handpose.sweep.selection.winner import finalists, is_default, without_seed
from handpose.sweep.storage.folder_sync import Mirror
from handpose.sweep.trainable.reporting import Objective
from handpose.values import same
from handpose.yaml_files import write_yaml

FOLDER, FILE = "confirm", "confirm.yaml"


class Candidate(NamedTuple):
    """A configuration to be confirmed.

    row: its trial; None: it was none. params: without a seed. is_finalist: by its value; else it is the default
    configuration, which runs along. can_win: it was a trial, and costs no more than the sweep allows.
    """

    row: TrialRow | None
    params: Params
    is_finalist: bool
    is_default: bool
    can_win: bool

    @property
    def label(self) -> str:
        """How people call it."""
        if not self.is_finalist or self.row is None:
            return "default"
        return f"trial {self.row.number}" + (" (default)" if self.is_default else "")


def confirm(
    table: TrialTable,
    *,
    sweep: SweepSettings,
    cluster: RaySettings,
    space: Space,
    defaults: Mapping[str, Any],
    objective: Objective,
    command: Callable[[Params], str],
    origin: Mapping[str, Any],
    mirror: Mirror | None = None,
    used_seeds: Collection[int] = (),
) -> dict[str, Any] | None:
    """Train the finalists of a sweep's table again; returns what confirm.yaml says, None where nothing is to be done.

    sweep: settings of the sweep that has ended. defaults: configuration key -> value of the default configuration.
    objective, command, mirror: as `swept` takes them. origin: as `provenance` gives it. used_seeds: of earlier
    sweeps that this one has learned from. Ray is used where it runs. Raises as `swept` does.
    """
    folder = sweep.path / FOLDER
    (folder / FILE).unlink(missing_ok=True)  # it may be of other finalists; what it is made of remains
    chosen = candidates(table, defaults=defaults, top_k=sweep.confirm.top_k)
    if not sweep.confirm.is_on or not chosen:
        return None
    begun = [event.params for event in read_events(folder / EVENTS) if isinstance(event, Asked)]
    seeds = fresh_seeds(
        sweep.confirm.seeds, table, defaults, used=used_seeds, begun=[params["seed"] for params in begun]
    )
    points = begun + [point for point in runs(chosen, seeds) if not any(same(point, each) for each in begun)]
    if len(points) > len(begun):
        print(_plan(chosen, seeds, len(points) - len(begun), sweep.max_epochs), flush=True)
    with swept(
        sweep=_settings(sweep, folder, num_trials=len(points)),
        cluster=cluster,
        space=space,
        searcher=lambda **asked: PointSearcher(points),
        rule=Fifo,
        objective=objective,
        command=command,
        description=None if begun else {"confirms": str(sweep.path), **origin},
        mirror=mirror,
        process_mb=recorded_process_mb(sweep.path),
    ) as trained:
        content = account(chosen, seeds, trained)
    write_yaml(folder / FILE, content)
    return content


def candidates(table: TrialTable, *, defaults: Mapping[str, Any], top_k: int) -> list[Candidate]:
    """The finalists, the best first, and the default configuration, unless it is one of them; none where none is."""
    best = finalists(table, top_k)
    chosen = [Candidate(row, without_seed(row.params), True, is_default(row.params, defaults), True) for row in best]
    if not chosen or any(candidate.is_default for candidate in chosen):
        return chosen
    row = next((row for row in table.rows.values() if is_default(row.params, defaults)), None)
    if row is None:  # it does not lie in the search space
        return [*chosen, Candidate(None, {}, False, True, False)]
    return [*chosen, Candidate(row, without_seed(row.params), False, True, row.state != "infeasible")]


def fresh_seeds(
    num: int,
    table: TrialTable,
    defaults: Mapping[str, Any],
    *,
    used: Collection[int] = (),
    begun: Sequence[int] = (),
) -> list[int]:
    """Return seeds that nothing was chosen by: no trial of the table was trained with them, nor are they in `used`.

    begun: seeds of an earlier confirmation of this sweep, which are taken first; then the smallest ones from 1 on.
    """
    taken = {defaults.get("seed"), *(row.params.get("seed") for row in table.rows.values()), *used}
    first = [seed for seed in dict.fromkeys(begun) if seed not in taken]
    others = (seed for seed in itertools.count(1) if seed not in taken and seed not in first)
    return list(itertools.islice(itertools.chain(first, others), num))


def runs(chosen: Sequence[Candidate], seeds: Sequence[int]) -> list[Params]:
    """What is trained: all configurations with the first seed, then all with the next one."""
    return [{**candidate.params, "seed": seed} for seed in seeds for candidate in chosen]


class PointSearcher:
    """Proposes the points of a list, one after the other, and learns nothing."""

    first_number = 0
    constraints: Mapping[str, float] = {}
    warm_start: Sequence[Mapping[str, Any]] = ()

    def __init__(self, points: Sequence[Params]) -> None:
        self._points = points
        self.num_points: int | None = len(points)

    def ask(self, number: int, /) -> Params:
        return self._points[number]

    def began(self, number: int, /) -> None:
        """Nothing to note."""

    def measured(self, number: int, costs: Mapping[str, float], /) -> None:
        """Nothing to note."""

    def reported(self, number: int, epoch: int, value: float, /) -> None:
        """Nothing to note."""

    def waits(self, number: int, /) -> None:
        """Nothing to note."""

    def ended(self, number: int, state: EndState, /) -> None:
        """Nothing to note."""

    def align(self, trials: Sequence[Known], /) -> None:
        """There is no study."""

    def close(self) -> None:
        """Nothing is kept."""


def _plan(chosen: Sequence[Candidate], seeds: Sequence[int], num_runs: int, max_epochs: int) -> str:
    named = ", ".join(candidate.label for candidate in chosen)
    return f"confirm     {named} with seeds {', '.join(map(str, seeds))}: {num_runs} runs of {max_epochs} epochs"


def _settings(sweep: SweepSettings, folder: Path, *, num_trials: int) -> SweepSettings:
    """Of the sweep over seeds. The share of a GPU that the preflight found stands in the events."""
    gpus = sweep.gpus_per_trial
    if gpus == "auto":
        gpus = [event.gpus for event in read_events(sweep.path / EVENTS) if isinstance(event, Opened)][-1]
    return replace(
        sweep,
        name=f"{sweep.name}/{FOLDER}",
        folder=str(folder),
        resume=str(sweep.resumed_by),
        num_trials=num_trials,
        gpus_per_trial=gpus,
        second_objective=None,
        time_budget_s=None,
        gpu_hours=None,
        preflight="off",
    )


# --- what came out ----------------------------------------------------------------------------------------------------


def account(chosen: Sequence[Candidate], seeds: Sequence[int], trained: TrialTable) -> dict[str, Any]:
    """Return the content of confirm.yaml.

    The winner is the one with the best mean among those that can win, and of equal ones the first. No further rule
    picks among the configurations that the data do not distinguish from it; they are listed. A candidate with a run
    that diverged or failed is out. What the values do not show is null, with the reason in `unknown`.

    Args:
        chosen: the candidates.
        seeds: that each of them was trained with.
        trained: the table of the runs.
    """
    values = [[_value(trained, {**candidate.params, "seed": seed}) for seed in seeds] for candidate in chosen]
    sound = [index for index, row in enumerate(values) if all(map(math.isfinite, row))]
    matrix = np.array([values[index] for index in sound]).reshape(len(sound), len(seeds))
    means: dict[int, Estimate] = dict(zip(sound, mean_estimates(matrix), strict=True)) if sound else {}
    sign = trained.target.sign
    selectable = [index for index in sound if chosen[index].can_win]
    winner = min(selectable, key=lambda index: sign * means[index].mean, default=None)
    differences: dict[int, Estimate] = {}
    if winner is not None:
        estimated = difference_estimates(matrix, to=sound.index(winner))
        differences = {index: each for index, each in zip(sound, estimated, strict=True) if index != winner}
    rows = [
        {
            **_described(candidate, trained.metric),
            "values": {seed: value if math.isfinite(value) else None for seed, value in zip(seeds, row, strict=True)},
            **(means[index]._asdict() if index in means else dict.fromkeys(Estimate._fields)),
            "difference_to_winner": differences[index]._asdict() if index in differences else None,
            "distinguishable": differences[index].excludes_zero if index in differences else None,
            "out": None if index in means else _why_out(candidate, seeds, trained),
        }
        for index, (candidate, row) in enumerate(zip(chosen, values, strict=True))
    ]
    places = [sound.index(index) for index in selectable]
    return {
        "metric": trained.metric,
        "mode": trained.mode,
        "epochs": trained.max_epochs,
        "seeds": list(seeds),
        "candidates": rows,
        "winner": winner,
        "winner_trial": None if winner is None else _number(chosen[winner]),
        "optimism": None if winner is None else optimism(matrix, places, mode=trained.mode),
        **_evidence(rows, winner, matrix, mode=trained.mode),
        "method": METHOD if len(seeds) > 1 else f"One seed, hence no intervals: {ONE_SEED}.",
    }


def _evidence(
    rows: Sequence[Mapping[str, Any]], winner: int | None, matrix: NDArray[np.float64], *, mode: str
) -> dict[str, Any]:
    """What the values say of the winner beside the others, and why where they say nothing.

    rows: of the candidates. matrix: (candidates that are not out, seeds).
    """
    default = next(row for row in rows if row["is_default"])
    gain = None if default["difference_to_winner"] is None else Estimate(**default["difference_to_winner"])
    if winner is None:
        no_interval: str | None = "no finalist was trained to the end with every seed"
        not_compared = no_interval
    else:
        no_interval, not_compared = why_no_interval(matrix), why_not_comparable(matrix)
    if winner is not None and default is rows[winner]:
        no_gain: str | None = "the default configuration is the winner"
    else:
        no_gain = f"the default configuration is out: {default['out']}" if default["out"] else not_compared
    reasons = {"interval": no_interval, "not_distinguishable_from": not_compared, "gain_over_default": no_gain}
    alike = [row["label"] for row in rows if row["distinguishable"] is False]
    return {
        "not_distinguishable_from": alike if not_compared is None else None,
        "not_compared": [row["label"] for row in rows if row["out"]],
        "gain_over_default": None if gain is None else (gain if mode == "min" else gain.negated())._asdict(),
        "unknown": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def _described(candidate: Candidate, metric: str) -> dict[str, Any]:
    """Which one it is, and what the sweep had measured of it."""
    row = candidate.row
    return {
        "trial": row.number if row is not None and candidate.is_finalist else None,
        "label": candidate.label,
        "is_default": candidate.is_default,
        "can_win": candidate.can_win,
        "params": candidate.params,
        "in_sweep": {"value": row.metrics[metric], "epochs": row.epochs} if row and metric in row.metrics else None,
        "costs": dict(row.costs) if row else {},
    }


def _number(candidate: Candidate) -> int:
    assert candidate.row is not None, "only a trial can win"
    return candidate.row.number


def _run(trained: TrialTable, params: Params) -> TrialRow | None:
    return next((row for row in trained.rows.values() if same(row.params, params)), None)


def _value(trained: TrialTable, params: Params) -> float:
    """At full fidelity; NaN where the run did not come to it."""
    row = _run(trained, params)
    return trained.value(row) if row is not None and row.state == "complete" else math.nan


def _why_out(candidate: Candidate, seeds: Sequence[int], trained: TrialTable) -> str:
    """Name the first run without a finite value at full fidelity."""
    points = {seed: {**candidate.params, "seed": seed} for seed in seeds}
    seed = next(seed for seed, params in points.items() if not math.isfinite(_value(trained, params)))
    row = _run(trained, points[seed])
    if row is None:
        return f"not trained with seed {seed}"
    if row.state == "complete":
        return f"no finite {trained.metric} with seed {seed}"
    return f"{row.state} with seed {seed}" + (f": {row.error}" if row.error else "")
