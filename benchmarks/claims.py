"""Measure how often the report makes false claims, and how often it finds true effects.

    python benchmarks/claims.py --output benchmarks/results/claims.json

Sweeps are fabricated (benchmarks/fabricated.py): the searcher, scheduler, events, study and report are real, and the
values come from a formula instead of training. There are two truths:

noise    no parameter matters. Every claim is a false alarm: a shown effect, advice that asks for a change or notes
         something, or a space for the next round.
effects  the metric improves towards the upper end of optimizer.lr (by 2 over the range), is best at 0.4 of the range of
         heatmap.sigma (3 per range to either side), and is 1.5 worse for all but one value of a third parameter, which
         is a choice of the space or the decoder's depth. Nothing else matters.

The values of a trial have a random offset (standard deviation 0.4), noise at each epoch (0.3), and a curve that falls
with the epochs. Goal for each searcher, scheduler and space: a claim in at most 5 % of the noise sweeps.

With --sweeps FOLDER the fabricated sweeps are kept in that folder, and existing ones are used again.
"""

import argparse
import math
import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.fabricated import SPACE_NAMES, SweepSetup, fabricate_sweep  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.report.advice import give_advice  # noqa: E402
from handpose.report.effects import find_shown_effects  # noqa: E402
from handpose.report.next_space import suggest_next_space  # noqa: E402
from handpose.report.ranges import SettledParameter, find_crowded_edges, find_settled_parameters  # noqa: E402
from handpose.report.sweep_record import Parameter, SweepRecord  # noqa: E402
from handpose.sweep.analysis.read_sweep import read_sweep  # noqa: E402

_RATE, _SIGMA = "optimizer.lr", "heatmap.sigma"
_BEST_SIGMA = 0.4  # position in its range, from 0 to 1
_THIRD_PARAMETER: dict[str, tuple[str, Any]] = {
    "accuracy_latency": ("model.decoder.conv", "separable"),
    "architecture": ("model.decoder.head", "heatmaps"),
    "decoder_family": ("model/decoder", "pyramid"),
    "default": ("model.decoder.depth", 2),
    "full": ("heatmap.target", "gaussian"),
    "recipe": ("lr_schedule", "flat_cosine"),
}
"""Space -> the third parameter that matters, and its best value."""

_SCHEDULERS = {"fifo": ("fifo", "stop"), "asha stop": ("asha", "stop"), "asha promote": ("asha", "promote")}
_SEARCHERS = {"random": "random", "tpe": "tpe", "curves": "curves", "gp": "gp"}


class SweepKind(NamedTuple):
    """A combination of truth, space, searcher and scheduler, for which many sweeps are fabricated."""

    truth: str
    space: str
    searcher: str
    scheduler: str


def main() -> None:
    """Fabricate sweeps, judge their claims, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repetitions", type=int, default=100, help="number of sweeps for each combination; default: %(default)s"
    )
    parser.add_argument("--trials", type=int, default=40, help="number of trials of each sweep; default: %(default)s")
    parser.add_argument(
        "--truths",
        nargs="+",
        choices=("noise", "effects"),
        default=["noise", "effects"],
        help="what matters in the sweeps: nothing (noise), or three parameters (effects)",
    )
    parser.add_argument(
        "--spaces",
        nargs="+",
        choices=SPACE_NAMES,
        default=list(SPACE_NAMES),
        help="search spaces, files in search_spaces/",
    )
    parser.add_argument(
        "--searchers",
        nargs="+",
        choices=list(_SEARCHERS),
        default=list(_SEARCHERS),
        help="searchers to combine with each space",
    )
    parser.add_argument(
        "--schedulers",
        nargs="+",
        choices=list(_SCHEDULERS),
        default=list(_SCHEDULERS),
        help="schedulers to combine with each space",
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes; default: %(default)s")
    parser.add_argument("--sweeps", type=Path, help="folder in which the fabricated sweeps are kept")
    parser.add_argument("--kept-only", action="store_true", help="evaluate only the sweeps that exist in --sweeps")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    cells = [
        SweepKind(truth, space, searcher, scheduler)
        for truth in given.truths
        for searcher in given.searchers
        for space in given.spaces
        for scheduler in given.schedulers
    ]
    judged = judge_all(cells, given)
    rows = [summarise_cell(cell, judged[cell]) for cell in cells if judged[cell]]
    print(format_table(rows))
    settings = {"repetitions": given.repetitions, "trials": given.trials}
    write_results(given.output, {"settings": settings, "cells": rows})


def judge_all(cells: Sequence[SweepKind], given: argparse.Namespace) -> dict[SweepKind, list[dict[str, Any]]]:
    """Judge the claims of every sweep, and return them by kind."""
    judged: dict[SweepKind, list[dict[str, Any]]] = defaultdict(list)
    wanted = [(cell, seed) for cell in cells for seed in range(given.repetitions)]
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(given.workers) as pool:
        folder = given.sweeps or Path(scratch)
        if given.kept_only:
            wanted = [
                (cell, seed) for cell, seed in wanted if _make_folder_name(folder, cell, seed, given.trials).exists()
            ]
        waiting = {pool.submit(judge_sweep, cell, seed, given.trials, folder): cell for cell, seed in wanted}
        for future in as_completed(waiting):
            judged[waiting[future]].append(future.result())
    return judged


# --- one sweep --------------------------------------------------------------------------------------------------------


def judge_sweep(cell: SweepKind, seed: int, num_trials: int, sweeps: Path) -> dict[str, Any]:
    """Fabricate a sweep, unless it exists, and return the claims of its report."""
    folder = _make_folder_name(sweeps, cell, seed, num_trials)
    if not folder.exists():
        scheduler, mode = _SCHEDULERS[cell.scheduler]
        setup = SweepSetup(cell.space, _SEARCHERS[cell.searcher], scheduler, mode, num_trials=num_trials)
        loss = compute_noise_loss if cell.truth == "noise" else partial(compute_effects_loss, cell.space)
        unfinished = folder.with_suffix(f".{os.getpid()}")
        fabricate_sweep(setup, loss, unfinished, seed=seed)
        unfinished.rename(folder)
    return list_claims(read_sweep(folder, with_importance=False), cell)


def _make_folder_name(sweeps: Path, cell: SweepKind, seed: int, num_trials: int) -> Path:
    return sweeps / f"{' '.join(cell)} {num_trials} trials" / str(seed)


def compute_noise_loss(params: Mapping[str, Any], epoch: int, generator: random.Random) -> float:
    """Return a loss that does not depend on the parameters.

    Args:
        params: the parameters.
        epoch: the epoch.
        generator: the generator of the trial. Its first draw, at epoch 1, is the offset of the trial.
    """
    if epoch == 1:
        generator.level = generator.gauss(0, 0.4)  # type: ignore[attr-defined]
    level: float = generator.level  # type: ignore[attr-defined]
    return 15 + level + 5 / epoch + generator.gauss(0, 0.3)


@cache
def _list_ranges(space: str) -> Mapping[str, Parameter]:
    """Return the ranges of the numeric parameters of a space that have effects."""
    low_sigma = 0.006 if space in ("architecture", "full", "recipe") else 0.01
    low_rate, high_rate = {"full": (2e-4, 2e-2), "recipe": (5e-4, 2e-2)}.get(space, (2e-4, 1e-2))
    return {
        _RATE: Parameter(_RATE, "float", low_rate, high_rate, log=True),
        _SIGMA: Parameter(_SIGMA, "float", low_sigma, 0.08, log=True),
    }


def compute_effects_loss(space: str, params: Mapping[str, Any], epoch: int, generator: random.Random) -> float:
    """Return a loss that depends on three parameters."""
    ranges = _list_ranges(space)
    key, best = _THIRD_PARAMETER[space]
    effect = 2 * (1 - ranges[_RATE].to_place(params[_RATE]))
    effect += 3 * abs(ranges[_SIGMA].to_place(params[_SIGMA]) - _BEST_SIGMA)
    effect += 1.5 * (params[key] != best)
    return effect + compute_noise_loss(params, epoch, generator)


def list_claims(record: SweepRecord, cell: SweepKind) -> dict[str, Any]:
    """List the claims of a report, and which of them are false."""
    shown = find_shown_effects(record)
    advice = [finding for finding in give_advice(record, shown) if finding.kind in ("act", "note")]
    findings = [finding for finding in advice if "trusted" not in finding.question]
    edges = find_crowded_edges(record, shown)
    narrowed = find_settled_parameters(record, shown)
    space = suggest_next_space(record, shown)
    matters = {_RATE, _SIGMA, _THIRD_PARAMETER[cell.space][0]} if cell.truth == "effects" else set()
    return {
        "any": bool(findings) or bool(shown) or space is not None,
        "questions": sorted({finding.question for finding in findings}),
        "next_space": space is not None,
        "shown": sorted({effect.key for effect in shown} & matters),
        "not_so": sorted({effect.key for effect in shown} - matters),
        "edges": [[crowd.parameter.key, crowd.is_upper] for crowd in edges],
        "narrowed": [each.parameter.key for each in narrowed],
        "cut_off": [each.parameter.key for each in narrowed if _is_cut_off(each, cell)],
    }


def _is_cut_off(known: SettledParameter, cell: SweepKind) -> bool:
    """Whether the narrowed range leaves out the best value. If a parameter has no effect, every value is best."""
    key, best = _THIRD_PARAMETER[cell.space]
    parameter = known.parameter
    if cell.truth == "noise" or parameter.key not in (_RATE, _SIGMA, key):
        return False
    if parameter.kind == "choice":
        return best not in known.kept_options
    value = {_RATE: parameter.to_value(1.0), _SIGMA: parameter.to_value(_BEST_SIGMA), key: best}[parameter.key]
    return not known.low * (1 - 1e-9) <= value <= known.high * (1 + 1e-9)


# --- the table --------------------------------------------------------------------------------------------------------


def summarise_cell(cell: SweepKind, judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the fractions of the sweeps of a kind."""

    def share(condition: Any) -> float:
        return round(float(np.mean([bool(condition(claims)) for claims in judged])), 3)

    num_any = sum(claims["any"] for claims in judged)
    num_narrowed = sum(len(claims["narrowed"]) for claims in judged)
    return {
        **cell._asdict(),
        "sweeps": len(judged),
        "any_claim": share(lambda claims: claims["any"]),
        "at_most": round(_compute_upper_limit(num_any, len(judged)), 3),
        "next_space": share(lambda claims: claims["next_space"]),
        "rate_shown": share(lambda claims: _RATE in claims["shown"]),
        "sigma_shown": share(lambda claims: _SIGMA in claims["shown"]),
        "third_shown": share(lambda claims: _THIRD_PARAMETER[cell.space][0] in claims["shown"]),
        "true_edge": share(lambda claims: [_RATE, True] in claims["edges"]),
        "wrong_effect": share(lambda claims: claims["not_so"]),
        "wrong_edge": share(lambda claims: [edge for edge in claims["edges"] if edge != [_RATE, True]]),
        "narrowed": round(num_narrowed / len(judged), 3),
        "cut_off": None
        if not num_narrowed
        else round(sum(len(claims["cut_off"]) for claims in judged) / num_narrowed, 3),
    }


def _compute_upper_limit(num: int, total: int) -> float:
    """Return the upper end of the one-sided 95 % interval of a proportion (Clopper and Pearson 1934)."""
    return 1.0 if num == total else float(stats.beta.ppf(0.95, num + 1, total - num))


_COLUMNS = {
    "noise": ("any_claim", "at_most", "next_space"),
    "effects": (
        "any_claim",
        "rate_shown",
        "sigma_shown",
        "third_shown",
        "true_edge",
        "narrowed",
        "cut_off",
        "wrong_effect",
        "wrong_edge",
    ),
}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a block for each truth, with a line for each kind and the mean and largest value of each column."""
    lines = []
    for truth, columns in _COLUMNS.items():
        some = [each for each in rows if each["truth"] == truth]
        if not some:
            continue
        lines.append(f"\n{truth:<50}{'sweeps':>8}" + "".join(f"{name:>13}" for name in columns))
        for each in some:
            name = f"{each['space']}, {each['searcher']}, {each['scheduler']}"
            lines.append(
                f"{name:<50}{each['sweeps']:>8}" + "".join(f"{_format_value(each[column]):>13}" for column in columns)
            )
        for name, summary in (("mean", np.mean), ("largest", np.max)):
            known = [[each[column] for each in some if each[column] is not None] or [math.nan] for column in columns]
            lines.append(f"{name:<58}" + "".join(f"{float(summary(values)):>13.3f}" for values in known))
    return "\n".join(lines)


def _format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
