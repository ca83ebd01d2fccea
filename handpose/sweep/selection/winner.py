"""Selects the finalists and the winner of a sweep, and writes best.yaml and the files of the Pareto front."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from handpose.config import compose, quote_override
from handpose.plain_values import is_equal
from handpose.report.trial_table import TrialRow, TrialTable
from handpose.search.space import Params
from handpose.sweep.record.provenance import select_configuration
from handpose.sweep.record.settings import SweepSettings
from handpose.yaml_files import write_yaml


class NoWinnerError(RuntimeError):
    """No trial of the sweep has a finite value."""


def select_finalists(table: TrialTable, num: int) -> list[TrialRow]:
    """Select up to `num` of the best trials, each with a different configuration.

    With one objective these are the first ones of the ranking; with two, trials spread evenly over the Pareto front.
    Trials that differ only in their seed have the same configuration.
    """
    different: dict[str, TrialRow] = {}
    for row in table.find_front() if table.objectives else table.rank_trials():
        different.setdefault(json.dumps(drop_seed(row.params), sort_keys=True), row)
    rows = list(different.values())
    if not table.objectives or len(rows) <= num:
        return rows[:num]
    return [rows[round(place)] for place in np.linspace(0, len(rows) - 1, num)]


def drop_seed(params: Mapping[str, Any]) -> Params:
    """Return the parameters without the training seed, which does not belong to a configuration."""
    return {key: value for key, value in params.items() if key != "seed"}


def is_default(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Return whether parameters, except the seed, equal those of the default configuration (key -> value)."""
    return all(key in defaults and is_equal(defaults[key], value) for key, value in drop_seed(params).items())


def select_winner(table: TrialTable, *, folder: Path, confirmed: Mapping[str, Any] | None = None) -> TrialRow:
    """Return the winner of the confirmation; without one, the best of the trials that were trained longest.

    Values of different epochs are never compared. The last epoch of a trial counts, not its best one: the minimum over
    noisy epochs favours trials that were measured more often.

    Args:
        table: trials of the sweep.
        folder: folder of the sweep, named in the error.
        confirmed: content of confirm.yaml; None without a confirmation.

    Raises:
        NoWinnerError: no trial has a finite value. The message contains the first error and the file with its
            traceback.
    """
    ranked = table.rank_trials()
    if not ranked:
        raise NoWinnerError(_explain_no_winner(table, folder))
    if confirmed is None or confirmed["winner"] is None:
        return ranked[0]
    return table.rows[confirmed["winner_trial"]]


def _explain_no_winner(table: TrialTable, folder: Path) -> str:
    counts = table.count_states()
    ends = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    if table.end == "spent":
        ends += "; the budget is spent" if ends else "the budget is spent"
    failed = [row for row in table.rows.values() if row.state == "failed"]
    if not failed:
        return f"no trial gave a finite {table.metric} ({ends or 'none was started'})"
    first = min(failed, key=lambda row: row.number)
    said = f"trial {first.number} ended with: {first.error} (traceback: {folder / 'trials.csv'})"
    return f"no trial gave a finite {table.metric} ({ends}); {said}"


def write_winner(
    table: TrialTable,
    winner: TrialRow,
    *,
    overrides: Callable[[TrialRow], Sequence[str]],
    sweep: SweepSettings,
    origin: Mapping[str, Any],
    confirmed: Mapping[str, Any] | None,
) -> None:
    """Write best.yaml of the winner into the sweep's folder and, with two objectives, `front/`; see `write_best`."""
    write_file = partial(write_best, table=table, overrides=overrides, sweep=sweep, origin=origin, confirmed=confirmed)
    write_file(sweep.path / "best.yaml", row=winner)
    write_front(sweep.path / "front", table, write_file)


def write_best(
    path: Path,
    *,
    table: TrialTable,
    row: TrialRow,
    overrides: Callable[[TrialRow], Sequence[str]],
    sweep: SweepSettings,
    origin: Mapping[str, Any],
    confirmed: Mapping[str, Any] | None = None,
) -> None:
    """Write best.yaml, which train.py reads with `best=PATH`.

    The file also contains the configuration that train.py composes now, so that `provenance.describe_differences` can
    compare it later.

    Args:
        path: file to write.
        table: trials of the sweep.
        row: the trial.
        overrides: returns the user's overrides followed by the trial's, for train.py with its full schedule.
        sweep: settings of the sweep.
        origin: provenance of the sweep, as `collect_provenance` returns it.
        confirmed: content of confirm.yaml; None without a confirmation.
    """
    trains = overrides(row)
    metric = {"name": table.metric, "mode": table.mode, "value": table.get_value(row)}
    content = {
        "overrides": list(trains),
        "command": shlex.join(["python", "train.py", quote_override("best", str(path))]),
        "params": dict(row.params),
        **_describe_metric(table, row, metric, confirmed),
        **({"costs": dict(row.costs)} if row.costs else {}),
        "trial": row.number,
        "sweep": {"name": sweep.name, "seed": sweep.seed, "num_trials": len(table.rows)},
        **origin,
        "configuration": select_configuration(compose("train", trains)),
    }
    write_yaml(path, content)


def write_front(folder: Path, table: TrialTable, write_file: Callable[..., None]) -> None:
    """Write a file like best.yaml for every trial on the Pareto front; do nothing with a single objective.

    Files of trials that are no longer on the front are removed.

    Args:
        folder: folder of the files.
        table: trials of the sweep.
        write_file: `write_best` with all arguments bound except the path and `row`.
    """
    if not table.objectives:
        return
    folder.mkdir(exist_ok=True)
    files = {folder / f"trial_{row.number:05d}.yaml": row for row in table.find_front()}
    for file in set(folder.glob("trial_*.yaml")) - set(files):
        file.unlink()
    for file, row in files.items():
        write_file(file, row=row)


def _describe_metric(
    table: TrialTable, row: TrialRow, metric: Mapping[str, Any], confirmed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Describe the metric, the epochs trained, what the trial was chosen by and how it compares with the others."""
    candidate = None if confirmed is None else _find_candidate(confirmed, row)
    if confirmed is None or candidate is None or candidate["mean"] is None:
        value = f"its value in the sweep, one of {len(table.rows)}: the best of them is too good on average"
        return {
            "metric": dict(metric),
            "chosen_by": value,
            **_make_empty_comparison(
                "the configuration was not confirmed: its value is that of one run, with one seed"
            ),
            "fidelity": {"epochs": row.epochs, "max_epochs": table.max_epochs},
            "seeds": [],
        }
    num_seeds, is_winner = len(confirmed["seeds"]), row.number == confirmed["winner_trial"]
    means = {key: candidate[key] for key in ("mean", "low", "high", "values")} | {"n": num_seeds}
    if is_winner:
        chosen_by = f"its mean over {num_seeds} fresh seeds; value is that of the trial"
        means["optimism"] = confirmed["optimism"]
        comparison = {key: confirmed[key] for key in (*_COMPARISON_KEYS, "not_compared", "unknown")}
    else:
        chosen_by = f"its place on the Pareto front; mean is over {num_seeds} fresh seeds, value is that of the trial"
        comparison = _make_empty_comparison("only the winner is compared with the others: see confirm/confirm.yaml")
    return {
        "metric": {**metric, **means},
        "chosen_by": chosen_by,
        **comparison,
        "fidelity": {"epochs": confirmed["epochs"], "max_epochs": table.max_epochs},
        "seeds": list(confirmed["seeds"]),
    }


_COMPARISON_KEYS = ("not_distinguishable_from", "gain_over_default")


def _make_empty_comparison(reason: str) -> dict[str, Any]:
    return {**dict.fromkeys(_COMPARISON_KEYS), "unknown": dict.fromkeys(_COMPARISON_KEYS, reason)}


def _find_candidate(confirmed: Mapping[str, Any], row: TrialRow) -> Mapping[str, Any] | None:
    """Return the confirmed candidate of a trial; None if the trial was not confirmed."""
    winner = confirmed["candidates"][confirmed["winner"]] if confirmed["winner_trial"] == row.number else None
    return winner or next((each for each in confirmed["candidates"] if each["trial"] == row.number), None)
