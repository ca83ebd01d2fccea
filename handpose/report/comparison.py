"""Statistical comparison of several sweeps.

The best value of a sweep is a single draw that was selected for being good, so no test can compare the best values of
two sweeps. Two comparisons are valid:

- If both sweeps are confirmed, the values of their winners over fresh seeds are compared by Welch's t-test. Its p-value
  is multiplied by the number of configurations that the better winner was selected from.
- Otherwise, all trials at one epoch are compared. This shows which sweep has better trials, not which has the better
  winner. The Mann-Whitney test applies only if the trials are independent: drawn at random, and not selected before
  that epoch. A searcher that learns turns one lucky trial into many good ones, so two runs of the same sweep differ by
  more than the test assumes.

The p-values of several pairs are corrected by Holm's method.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from handpose.report.formatting import format_metric
from handpose.report.sweep_record import Confirmation, SweepRecord

_MIN_TRIALS = 8  # that each sweep needs at an epoch for its trials to be compared
_SIGNIFICANT = 0.05


class SweepComparison(NamedTuple):
    """A comparison of two sweeps.

    Attributes:
        first: name of the first sweep.
        second: name of the second sweep.
        test: what was compared, and by which test.
        text: the result, in a sentence.
        p_value: the corrected p-value; NaN if there was no test.
    """

    first: str
    second: str
    test: str
    text: str
    p_value: float


def compare_sweeps(records: Sequence[SweepRecord]) -> list[SweepComparison]:
    """Compare every pair of sweeps, in their order."""
    pairs = list(itertools.combinations(records, 2))
    compared = [_compare_pair(*pair) for pair in pairs]
    corrected = correct_p_values([each.p_value for each in compared])
    return [_add_verdict(each, odds) for each, odds in zip(compared, corrected, strict=True)]


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests (Holm 1979). NaN values do not count as tests and remain NaN."""
    finite = sorted((value, place) for place, value in enumerate(p_values) if math.isfinite(value))
    corrected, most = [math.nan] * len(p_values), 0.0
    for rank, (value, place) in enumerate(finite):
        most = max(most, min(1.0, (len(finite) - rank) * value))
        corrected[place] = most
    return corrected


def _compare_pair(first: SweepRecord, second: SweepRecord) -> SweepComparison:
    names = first.name, second.name
    reason = explain_incomparable(first, second)
    if reason:
        return SweepComparison(*names, "none", reason, math.nan)
    confirmations = [each for each in (first.confirmation, second.confirmation) if each and each.winner]
    if len(confirmations) == 2:
        return _compare_winners(first, second, *confirmations)
    epochs = set(first.list_compared_epochs(min_trials=_MIN_TRIALS)) & set(
        second.list_compared_epochs(min_trials=_MIN_TRIALS)
    )
    if not epochs:
        text = f"The sweeps cannot be compared: they are not both confirmed, and do not both have {_MIN_TRIALS} trials "
        text += "at one epoch."
        return SweepComparison(*names, "none", text, math.nan)
    return _compare_trials(first, second, max(epochs))


def explain_incomparable(first: SweepRecord, second: SweepRecord) -> str:
    """Return why the values of two sweeps cannot be compared; empty if they can."""
    if (first.metric, first.mode) != (second.metric, second.mode):
        return f"One optimises {first.metric}, the other {second.metric}: their values cannot be compared."
    data = [record.origin.get("data_fingerprint") for record in (first, second)]
    if data[0] != data[1]:
        return "They were trained on different data: their values cannot be compared."
    if first.folds != second.folds:
        return f"One measures with {first.folds} folds, the other with {second.folds}: their values cannot be compared."
    if first.max_epochs != second.max_epochs:
        return (
            f"One trains for {first.max_epochs} epochs, the other for {second.max_epochs}, so their learning-rate "
            "schedules differ: their values cannot be compared."
        )
    return ""


def _compare_winners(first: SweepRecord, second: SweepRecord, *confirmations: Confirmation) -> SweepComparison:
    values = [np.array(list(each.winner.values.values())) for each in confirmations if each.winner]
    test = "confirmed winners (Welch's t-test)"
    difference = format_metric(first.metric, abs(values[0].mean() - values[1].mean()))
    better = 0 if first.sign * values[0].mean() <= first.sign * values[1].mean() else 1
    name = (first.name, second.name)[better]
    for lacking, reason in ((min(map(len, values)) < 2, "over one seed"), (not any(map(np.ptp, values)), "no noise")):
        if lacking:
            text = f"the mean of {name}'s winner is better by {difference}; unknown whether by chance ({reason})"
            return SweepComparison(first.name, second.name, test, text, math.nan)
    num_picked_from = sum(not candidate.out for candidate in confirmations[better].candidates)
    odds = min(1.0, num_picked_from * float(stats.ttest_ind(*values, equal_var=False).pvalue))
    return SweepComparison(first.name, second.name, test, f"the winner of {name} is better by {difference}", odds)


def _compare_trials(first: SweepRecord, second: SweepRecord, epoch: int) -> SweepComparison:
    ours, theirs = (list(record.get_values_at(epoch).values()) for record in (first, second))
    result = stats.mannwhitneyu(ours, theirs, method="asymptotic")
    share = result.statistic / (len(ours) * len(theirs))  # of pairs in which the first sweep's value is larger
    wins = 1 - share if first.mode == "min" else share
    better = (first.name, wins) if wins >= 0.5 else (second.name, 1 - wins)
    test = f"all trials at epoch {epoch}, {len(ours)} and {len(theirs)}"
    text = f"a trial of {better[0]} is better in {better[1]:.0%} of the pairs"
    if not (_has_independent_trials(first, epoch) and _has_independent_trials(second, epoch)):
        text += "; not tested, because their trials depend on each other"
        return SweepComparison(first.name, second.name, test, text, math.nan)
    return SweepComparison(first.name, second.name, f"{test} (Mann-Whitney)", text, float(result.pvalue))


def _has_independent_trials(record: SweepRecord, epoch: int) -> bool:
    """Return whether the trials were drawn at random, and none was stopped before that epoch because of its value."""
    sampler = (record.configuration.get("searcher") or {}).get("sampler") or {}
    is_random = str(sampler.get("_target_", "")).endswith(".RandomSampler")
    is_selected = not record.selects_only_at_rungs or min(record.rungs, default=epoch) < epoch
    return is_random and not is_selected


def _add_verdict(comparison: SweepComparison, p_value: float) -> SweepComparison:
    if not math.isfinite(p_value):
        return comparison
    decision = "distinguishable" if p_value < _SIGNIFICANT else "not distinguishable"
    return comparison._replace(text=f"{comparison.text}; {decision} (p = {p_value:.2g})", p_value=p_value)
