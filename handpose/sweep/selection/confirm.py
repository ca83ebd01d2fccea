"""Train the finalists of a sweep again with all epochs and fresh seeds, so that noise does not choose the winner.

The best of many noisy values is better, on average, than the true value of its configuration; the more trials, the
larger this bias. Results with fresh seeds, which no trial was trained with, are free of it. Picking the best of the few
means brings back a smaller bias; `paired_means` explains how the intervals account for it. All configurations are
trained with the same seeds, so that they can be compared in pairs. The default configuration is trained as well, which
measures the gain from tuning.

The runs are trials of a sweep in the folder `confirm/`, with its own events, trials.csv and TensorBoard files. An
interrupted confirmation resumes. If the finalists have changed since, only the missing runs are trained.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose.files import archive
from handpose.plain_values import is_same
from handpose.report.trial_table import TrialRow, TrialTable
from handpose.schedulers.scheduler import Fifo
from handpose.search.searcher import Searcher
from handpose.search.space import Params, Space
from handpose.sweep.budget.stages import ConfirmationBudget
from handpose.sweep.controller.history import rebuild_history
from handpose.sweep.driver.run import SweepRun, read_process_mb, run_sweep
from handpose.sweep.record.events import EVENTS_FILE, Event, SweepOpened, TrialSuggested, read_events
from handpose.sweep.record.settings import ConfirmSettings, RaySettings, SweepSettings
from handpose.sweep.selection.paired_means import (
    METHOD,
    ONE_SEED,
    Estimate,
    estimate_differences,
    estimate_means,
    estimate_optimism,
    explain_incomparability,
    explain_missing_interval,
)
from handpose.sweep.selection.winner import drop_seed, is_default, select_finalists
from handpose.sweep.storage.folder_sync import FolderSync
from handpose.sweep.trainable.reporting import TrialFunction
from handpose.yaml_files import read_yaml, write_yaml

CONFIRM_FOLDER, CONFIRM_FILE = "confirm", "confirm.yaml"
_EPOCHS = "epochs"
"""Key of the confirmation's sweep.yaml: the number of epochs of its runs."""


class Candidate(NamedTuple):
    """A configuration to confirm.

    Attributes:
        row: its trial in the sweep; None if no trial had this configuration.
        params: its parameters without the seed.
        is_finalist: whether its result in the sweep made it a finalist. Otherwise it is the default configuration,
            trained for comparison.
        is_default: whether it is the default configuration.
        can_win: whether it may be selected: it was a trial and does not exceed the sweep's limits on costs.
    """

    row: TrialRow | None
    params: Params
    is_finalist: bool
    is_default: bool
    can_win: bool

    @property
    def label(self) -> str:
        """Name of the candidate for readers."""
        if not self.is_finalist or self.row is None:
            return "default"
        return f"trial {self.row.number}" + (" (default)" if self.is_default else "")


def confirm_finalists(
    table: TrialTable,
    *,
    sweep: SweepSettings,
    cluster: RaySettings,
    space: Space,
    defaults: Mapping[str, Any],
    trial_function: TrialFunction,
    command: Callable[[Params], str],
    origin: Mapping[str, Any],
    folder_sync: FolderSync | None = None,
    used_seeds: Collection[int] = (),
    budget: ConfirmationBudget | None = None,
) -> dict[str, Any] | None:
    """Train the finalists of a sweep again with fresh seeds, and write confirm.yaml.

    Args:
        table: trials of the sweep.
        sweep: settings of the sweep, which has ended. The runs have as many epochs as the table says.
        cluster: settings of Ray.
        space: search space.
        defaults: configuration key -> value of the default configuration.
        trial_function: what a trial runs.
        command: returns the command line that trains parameters again.
        origin: provenance of the sweep, as `collect_provenance` returns it.
        folder_sync: copies the folder to an object store.
        used_seeds: seeds of earlier sweeps that this one has learned from.
        budget: how much is confirmed, and in what time; None: as much as the settings say.

    Returns:
        The content of confirm.yaml. None if there is nothing to confirm, or if the budget ended it before every
        candidate was trained with one seed.

    Raises:
        UserError, SweepInterruptedError, SweepHaltedError: as `run_sweep` raises them.
    """
    folder = sweep.path / CONFIRM_FOLDER
    _retire_earlier(folder, max_epochs=table.max_epochs, first_max_epochs=sweep.trial_epochs)
    sweep = sweep.change_trial_epochs(table.max_epochs)
    amount = sweep.confirm if budget is None else ConfirmSettings(top_k=budget.top_k, seeds=budget.seeds)
    chosen = choose_candidates(table, defaults=defaults, top_k=amount.top_k)
    if not amount.is_enabled or not chosen:
        return None
    events = read_events(folder / EVENTS_FILE)
    seeds, points, begun = _choose_runs(chosen, amount.seeds, table, defaults, used_seeds=used_seeds, events=events)
    _print_plan(chosen, seeds, num_runs=len(points) - len(begun), max_epochs=sweep.trial_epochs)
    run = SweepRun(
        sweep=_limit_settings(_make_confirm_settings(sweep, folder, num_trials=len(points)), events, budget),
        cluster=cluster,
        space=space,
        searcher=lambda **asked: PointSearcher(points),
        make_scheduler=Fifo,
        trial_function=trial_function,
        command=command,
        description=None if begun else {"confirms": str(sweep.path), _EPOCHS: sweep.trial_epochs, **origin},
        folder_sync=folder_sync,
        process_mb=read_process_mb(sweep.path),
    )
    with run_sweep(run) as trained:
        return _write_confirmation(folder, chosen, seeds, trained)


def _retire_earlier(folder: Path, *, max_epochs: int, first_max_epochs: int) -> None:
    """Remove the confirm.yaml of an earlier confirmation, which may describe other finalists; the runs are kept.

    If they had fewer epochs, because the user has raised their number since, the whole folder is renamed. Confirmations
    of earlier versions of the project, which do not record the number, had the first one.
    """
    if folder.is_dir() and read_yaml(folder / "sweep.yaml").get(_EPOCHS, first_max_epochs) != max_epochs:
        archive(folder)
    (folder / CONFIRM_FILE).unlink(missing_ok=True)


def choose_candidates(table: TrialTable, *, defaults: Mapping[str, Any], top_k: int) -> list[Candidate]:
    """Choose the finalists, the best first, then the default configuration unless it is one of them.

    The list is empty if there are no finalists.
    """
    best = select_finalists(table, top_k)
    chosen = [Candidate(row, drop_seed(row.params), True, is_default(row.params, defaults), True) for row in best]
    if not chosen or any(candidate.is_default for candidate in chosen):
        return chosen
    row = next((row for row in table.rows.values() if is_default(row.params, defaults)), None)
    if row is None:  # no trial had it, for example because it lies outside the search space
        return [*chosen, Candidate(None, {}, False, True, False)]
    return [*chosen, Candidate(row, drop_seed(row.params), False, True, row.state != "infeasible")]


def choose_fresh_seeds(
    num: int,
    table: TrialTable,
    defaults: Mapping[str, Any],
    *,
    used_seeds: Collection[int] = (),
    earlier_seeds: Sequence[int] = (),
) -> list[int]:
    """Choose seeds that had no influence on which configurations became finalists.

    Args:
        num: number of seeds.
        table: trials of the sweep; their seeds are excluded.
        defaults: configuration key -> value of the default configuration; its seed is excluded.
        used_seeds: further seeds to exclude.
        earlier_seeds: seeds of an earlier confirmation of this sweep. They are reused first; the smallest unused
            integers from 1 on follow.
    """
    taken = {defaults.get("seed"), *(row.params.get("seed") for row in table.rows.values()), *used_seeds}
    first = [seed for seed in dict.fromkeys(earlier_seeds) if seed not in taken]
    others = (seed for seed in itertools.count(1) if seed not in taken and seed not in first)
    return list(itertools.islice(itertools.chain(first, others), num))


def _choose_runs(
    chosen: Sequence[Candidate],
    num_seeds: int,
    table: TrialTable,
    defaults: Mapping[str, Any],
    *,
    used_seeds: Collection[int],
    events: Sequence[Event],
) -> tuple[list[int], list[Params], list[Params]]:
    """Return the seeds, the parameters of all runs, and those of the runs that an earlier confirmation has begun."""
    begun = [event.params for event in events if isinstance(event, TrialSuggested)]
    seeds = choose_fresh_seeds(
        num_seeds, table, defaults, used_seeds=used_seeds, earlier_seeds=[params["seed"] for params in begun]
    )
    missing = [params for params in list_runs(chosen, seeds) if not any(is_same(params, each) for each in begun)]
    return seeds, begun + missing, begun


def list_runs(chosen: Sequence[Candidate], seeds: Sequence[int]) -> list[Params]:
    """List the runs to train: all configurations with the first seed, then all with the next one, and so on."""
    return [{**candidate.params, "seed": seed} for seed in seeds for candidate in chosen]


class PointSearcher(Searcher):
    """A searcher that proposes the points of a list in order and learns nothing."""

    def __init__(self, points: Sequence[Params]) -> None:
        self._points = points
        self.num_points = len(points)

    def suggest(self, number: int, /) -> Params:
        return self._points[number]


def _print_plan(chosen: Sequence[Candidate], seeds: Sequence[int], *, num_runs: int, max_epochs: int) -> None:
    names, numbers = ", ".join(candidate.label for candidate in chosen), ", ".join(map(str, seeds))
    if num_runs:
        print(f"confirm     {names} with seeds {numbers}: {num_runs} runs of {max_epochs} epochs", flush=True)


def _make_confirm_settings(sweep: SweepSettings, folder: Path, *, num_trials: int) -> SweepSettings:
    """Return the settings of the confirmation, a sweep over seeds.

    For `gpus_per_trial=auto`, read from the sweep's events the value that the preflight found.
    """
    gpus = sweep.gpus_per_trial
    if gpus == "auto":
        gpus = [event.gpus for event in read_events(sweep.path / EVENTS_FILE) if isinstance(event, SweepOpened)][-1]
    return replace(
        sweep,
        name=f"{sweep.name}/{CONFIRM_FOLDER}",
        folder=str(folder),
        resume=str(sweep.resume_path),
        num_trials=num_trials,
        gpus_per_trial=gpus,
        second_objective=None,
        time_budget_s=None,
        gpu_hours=None,
        stop_when=None,
        preflight="off",
    )


def _limit_settings(
    settings: SweepSettings, events: Sequence[Event], budget: ConfirmationBudget | None
) -> SweepSettings:
    """Return the settings with the limits of the budget, which are counted from now on, after what was used before."""
    if budget is None:
        return settings
    history = rebuild_history(settings, events)
    gpu_hours = None if budget.gpu_hours is None else history.count_gpu_hours(history.at) + budget.gpu_hours
    return replace(settings, time_budget_s=history.at + max(budget.time_s, 1.0), gpu_hours=gpu_hours)


def _write_confirmation(
    folder: Path, chosen: Sequence[Candidate], seeds: list[int], trained: TrialTable
) -> dict[str, Any] | None:
    """Write confirm.yaml and return its content.

    If a budget has ended the confirmation, only the seeds count with which all candidates have been trained. Without
    such a seed nothing is written.
    """
    common = _list_trained_seeds(trained, chosen, seeds)
    if not common:
        return None
    content = summarise_confirmation(chosen, common, trained)
    write_yaml(folder / CONFIRM_FILE, content)
    return content


def _list_trained_seeds(table: TrialTable, chosen: Sequence[Candidate], seeds: list[int]) -> list[int]:
    """Return the seeds that all candidates were trained with; these are all seeds unless a budget ended the runs."""
    if table.end != "spent":
        return seeds
    trained = [seed for seed in seeds if _is_trained(table, chosen, seed)]
    if not trained:
        print("confirm     the budget ended it before every candidate was trained with one seed", flush=True)
    return trained


def _is_trained(table: TrialTable, chosen: Sequence[Candidate], seed: int) -> bool:
    """Return whether the runs of all candidates with a seed are over."""
    runs = (_find_run(table, {**candidate.params, "seed": seed}) for candidate in chosen)
    return all(run is not None and run.is_over for run in runs)


# --- results ----------------------------------------------------------------------------------------------------------


def summarise_confirmation(chosen: Sequence[Candidate], seeds: Sequence[int], table: TrialTable) -> dict[str, Any]:
    """Return the content of confirm.yaml.

    The winner is the candidate with the best mean among those that can win; of equal means, the first. Configurations
    that the data do not distinguish from the winner are listed, and no further criterion chooses between them. A
    candidate is excluded if one of its runs diverged or failed. What the values cannot show is null, and `unknown`
    gives the reason.

    Args:
        chosen: the candidates.
        seeds: seeds that each candidate was trained with.
        table: the confirmation's runs.
    """
    values = [[_get_final_value(table, {**candidate.params, "seed": seed}) for seed in seeds] for candidate in chosen]
    sound = [index for index, row in enumerate(values) if all(map(math.isfinite, row))]
    matrix = np.array([values[index] for index in sound]).reshape(len(sound), len(seeds))
    means: dict[int, Estimate] = dict(zip(sound, estimate_means(matrix), strict=True)) if sound else {}
    sign = table.target.sign
    selectable = [index for index in sound if chosen[index].can_win]
    winner = min(selectable, key=lambda index: sign * means[index].mean, default=None)
    differences: dict[int, Estimate] = {}
    if winner is not None:
        estimated = estimate_differences(matrix, reference=sound.index(winner))
        differences = {index: each for index, each in zip(sound, estimated, strict=True) if index != winner}
    rows = [
        {
            **_describe_candidate(candidate, table.metric),
            "values": {seed: value if math.isfinite(value) else None for seed, value in zip(seeds, row, strict=True)},
            **(means[index]._asdict() if index in means else dict.fromkeys(Estimate._fields)),
            "difference_to_winner": differences[index]._asdict() if index in differences else None,
            "distinguishable": differences[index].excludes_zero if index in differences else None,
            "out": None if index in means else _explain_exclusion(candidate, seeds, table),
        }
        for index, (candidate, row) in enumerate(zip(chosen, values, strict=True))
    ]
    places = [sound.index(index) for index in selectable]
    return {
        "metric": table.metric,
        "mode": table.mode,
        "epochs": table.max_epochs,
        "seeds": list(seeds),
        "candidates": rows,
        "winner": winner,
        "winner_trial": None if winner is None else _get_trial_number(chosen[winner]),
        "optimism": None if winner is None else estimate_optimism(matrix, places, mode=table.mode),
        **_summarise_evidence(rows, winner, matrix, mode=table.mode),
        "method": METHOD if len(seeds) > 1 else f"One seed, hence no intervals: {ONE_SEED}.",
    }


def _summarise_evidence(
    rows: Sequence[Mapping[str, Any]], winner: int | None, matrix: NDArray[np.float64], *, mode: str
) -> dict[str, Any]:
    """Describe how the winner compares with the other candidates, with reasons for what the values do not show.

    Args:
        rows: descriptions of the candidates, as in confirm.yaml.
        winner: index of the winner in `rows`; None if there is none.
        matrix: (candidates that are not excluded, seeds) values.
        mode: "min" or "max", which values are better.
    """
    default = next(row for row in rows if row["is_default"])
    gain = None if default["difference_to_winner"] is None else Estimate(**default["difference_to_winner"])
    if winner is None:
        no_interval: str | None = "no finalist was trained to the end with every seed"
        not_compared = no_interval
    else:
        no_interval, not_compared = explain_missing_interval(matrix), explain_incomparability(matrix)
    if winner is not None and default is rows[winner]:
        no_gain: str | None = "the default configuration is the winner"
    else:
        no_gain = f"the default configuration is out: {default['out']}" if default["out"] else not_compared
    reasons = {"interval": no_interval, "not_distinguishable_from": not_compared, "gain_over_default": no_gain}
    alike = [row["label"] for row in rows if row["distinguishable"] is False]
    return {
        "not_distinguishable_from": alike if not_compared is None else None,
        "not_compared": [row["label"] for row in rows if row["out"]],
        "gain_over_default": None if gain is None else (gain if mode == "min" else gain.negate())._asdict(),
        "unknown": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def _describe_candidate(candidate: Candidate, metric: str) -> dict[str, Any]:
    """Return which candidate it is, and its result in the sweep."""
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


def _get_trial_number(candidate: Candidate) -> int:
    assert candidate.row is not None, "only a trial can win"
    return candidate.row.number


def _find_run(table: TrialTable, params: Params) -> TrialRow | None:
    return next((row for row in table.rows.values() if is_same(row.params, params)), None)


def _get_final_value(table: TrialTable, params: Params) -> float:
    """Return the value of a run after all epochs; NaN if it did not complete."""
    row = _find_run(table, params)
    return table.get_value(row) if row is not None and row.state == "complete" else math.nan


def _explain_exclusion(candidate: Candidate, seeds: Sequence[int], table: TrialTable) -> str:
    """Name the candidate's first run that has no finite value after all epochs."""
    points = {seed: {**candidate.params, "seed": seed} for seed in seeds}
    seed = next(seed for seed, params in points.items() if not math.isfinite(_get_final_value(table, params)))
    row = _find_run(table, points[seed])
    if row is None:
        return f"not trained with seed {seed}"
    if row.state == "complete":
        return f"no finite {table.metric} with seed {seed}"
    return f"{row.state} with seed {seed}" + (f": {row.error}" if row.error else "")
