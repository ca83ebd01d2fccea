"""Advice on what to do after a sweep, derived from the sweep's own data.

The questions are those of Google's Deep Learning Tuning Playbook, from "Exploration vs exploitation" to "Bayesian
optimization" (https://github.com/google-research/tuning_playbook). Each is answered with its evidence, or left open
with the reason.

A claim about a parameter requires an effect that is shown (see `effects`). benchmarks/claims.py measures how often
noise alone leads to any of these claims. "Not shown" never means "no effect".
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from handpose.report.effects import (
    CONFIDENCE,
    MIN_EFFECT_TRIALS,
    ShownEffect,
    find_distinguishing_key,
    find_shown_effects,
    find_small_effects,
)
from handpose.report.formatting import format_metric, format_value
from handpose.report.ranges import (
    NEAR_DISTANCE,
    CrowdedEdge,
    find_crowded_edges,
    find_settled_parameters,
    format_range,
    is_near,
    list_places,
    select_best_trials,
    widen_range,
)
from handpose.report.rank_agreement import MIN_AGREEMENT_TRIALS as LEAST_FULLY_TRAINED
from handpose.report.rank_agreement import estimate_rank_agreement
from handpose.report.sweep_record import Parameter, SweepRecord, TrialRecord
from handpose.report.trial_table import shorten_names
from handpose.report.utilisation import PHASE_NAMES, judge

FindingKind = Literal["act", "note", "fine", "open"]
"""`act`: change something. `note`: worth knowing. `fine`: checked, nothing to do. `open`: too little evidence."""

_MIN_AGREEMENT = 0.3
"""Correlation of the values at the first rung and the last epoch; below it, early stopping is close to random."""

_MIN_WORSENING = 0.03  # least relative change of the metric that counts as getting worse
_MIN_IMPROVEMENT = 0.05  # least relative change of the metric that counts as still improving
_TAIL_LEVEL = 0.02
"""Significance level of each of these two claims. Together with the claims about parameters, false claims in pure noise
stay below 5 %."""


class Finding(NamedTuple):
    """An answer to a question about a sweep.

    Attributes:
        question: the question.
        kind: whether the answer calls for a change.
        text: what was found and what to do, in a sentence or two.
        evidence: the numbers that support it.
        paste: lines to paste into a search space file; empty if there are none.
    """

    question: str
    kind: FindingKind
    text: str
    evidence: str
    paste: str = ""


def give_advice(record: SweepRecord, shown: Sequence[ShownEffect] | None = None) -> list[Finding]:
    """Answer all questions about a sweep.

    Args:
        record: the sweep.
        shown: the result of `find_shown_effects`, if it has been computed already.

    Returns:
        The findings; those that call for a change come first.
    """
    shown = find_shown_effects(record) if shown is None else shown
    found = [
        *check_winner(record),
        *check_range_edges(record, shown),
        *check_density(record, shown),
        *check_failed_trials(record),
        *check_overfitting(record),
        *check_late_divergence(record),
        *check_unfinished_training(record),
        *summarise_effects(record, shown),
        *check_early_ranks(record),
        *check_utilisation(record),
    ]
    return sorted(found, key=lambda finding: ("act", "note", "fine", "open").index(finding.kind))


def format_advice(findings: Sequence[Finding]) -> str:
    """Format the findings that call for a change or are worth knowing, for the terminal."""
    lines: list[str] = []
    for finding in findings:
        if finding.kind in ("act", "note"):
            lines.append(f"{'advice' if not lines else '':<12}{finding.text} ({finding.evidence})")
            lines += [f"{'':<12}  {line}" for line in finding.paste.splitlines()]
    return "\n".join(lines)


# --- the questions ----------------------------------------------------------------------------------------------------


def check_winner(record: SweepRecord) -> list[Finding]:
    """Check whether the winner is better than the other candidates by more than chance."""
    question = "Can the winner be trusted?"
    confirmed = record.confirmation
    if confirmed is None:
        if not record.ranked:
            return []
        evidence = f"best of {len(record.ranked)} trials, one run each"
        text = (
            "The winner is the best of many noisy trials, so its value is too good on average: train it again with "
            "other seeds (sweep.confirm) before you report it."
        )
        return [Finding(question, "note", text, evidence)]
    winner = confirmed.winner
    if winner is None:
        text = "No candidate completed the confirmation, so the winner's value comes from a single run."
        return [Finding(question, "act", text, f"{len(confirmed.candidates)} candidates, {len(confirmed.seeds)} seeds")]
    num_seeds = f"{len(confirmed.seeds)} seed{'' if len(confirmed.seeds) == 1 else 's'}"
    evidence = f"{len(confirmed.candidates)} configurations with {num_seeds} each, at epoch {confirmed.epochs}"
    label, compared = winner.label.capitalize(), confirmed.compared
    if not compared:
        text = f"{label} has the best mean, but it is unknown whether it is better than the others: "
        return [Finding(question, "open", f"{text}{confirmed.why_not_compared}.", evidence)]
    equals = [each.label for each in compared if not each.is_distinguishable]
    if equals:
        text = f"{label} has the best mean, but is not distinguishable from {', '.join(equals)}."
        return [Finding(question, "note", text, evidence)]
    worse = [each.label for each in compared if each.difference and each.difference.mean * record.sign > 0]
    if not worse:
        return [
            Finding(
                question,
                "note",
                f"{label} wins as the only candidate that may win, although another has a better mean.",
                evidence,
            )
        ]
    return [Finding(question, "fine", f"{label} is better than {', '.join(worse)} with new seeds.", evidence)]


def check_range_edges(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[Finding]:
    """Check whether the best trials lie at an end of a searched range."""
    question = "Are the best trials at the edge of a range?"
    if (lacking := _make_missing_finding(record, question)) is not None:
        return [lacking]
    found = [_make_edge_finding(question, crowd) for crowd in find_crowded_edges(record, shown)]
    if found or shown:
        evidence = f"{len(select_best_trials(record))} best trials, {len(shown)} parameters with a shown effect"
        return found or [Finding(question, "fine", "No range is shown to exclude better values.", evidence)]
    return [_make_no_effect_finding(question, record)]


def _make_edge_finding(question: str, crowd: CrowdedEdge) -> Finding:
    parameter, is_upper, effect = crowd.parameter, crowd.is_upper, crowd.effect
    end = parameter.high if is_upper else parameter.low
    low, high = widen_range(parameter, is_upper=is_upper)
    return Finding(
        question,
        "act",
        f"The best trials are close to the {'upper' if is_upper else 'lower'} end of {parameter.key}, and the metric "
        "improves towards it, so a better value may lie outside the range. Widen it if the model allows it.",
        f"{crowd.num_at_edge} of the {crowd.num_best} best trials lie at or near {format_value(end)}; "
        f"{_format_evidence(effect)}",
        f"{parameter.key}: {format_range(parameter, low, high)}",
    )


def _format_evidence(effect: ShownEffect) -> str:
    return f"effect shown by {effect.num_trials} trials at epoch {effect.epoch}, p = {effect.p_value:.2g}"


def _make_no_effect_finding(question: str, record: SweepRecord) -> Finding:
    evidence = f"{len(record.ranked)} trials with a result, {len(record.parameters)} parameters"
    return Finding(question, "open", "It is not known yet which parameters have an effect.", evidence)


def check_density(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[Finding]:
    """Check whether enough trials are near the best one, in the parameters with a shown effect."""
    question = "Were there enough trials near the best one?"
    if (lacking := _make_missing_finding(record, question)) is not None:
        return [lacking]
    if not shown:
        return [_make_no_effect_finding(question, record)]
    best, *others = record.list_leading_trials(len(record.ranked))
    keys = [effect.key for effect in shown]
    important = [parameter for parameter in record.parameters if parameter.key in keys]
    near = [trial for trial in others if all(is_near(parameter, best, trial) for parameter in important)]
    names = ", ".join(shorten_names(keys).values())
    evidence = f"{len(near)} of {len(others)} other trials within {NEAR_DISTANCE:.0%} of the range of {names}"
    if len(near) < 3:
        text = (
            f"Few trials are close to trial {best.number} in the parameters that are shown to have an effect, so there "
            "may be better values near it. Search a narrower space, or run more trials."
        )
        return [Finding(question, "act", text, evidence)]
    return [Finding(question, "fine", f"Enough other trials are close to trial {best.number}.", evidence)]


def check_failed_trials(record: SweepRecord) -> list[Finding]:
    """Check how many trials diverged, failed or were infeasible, and in which part of the search space."""
    question = "How many trials gave no result, and why?"
    over = [trial for trial in record.trials if trial.state not in ("running", "waiting", "paused")]
    if len(over) < 5:
        return [
            Finding(
                question,
                "open",
                "Too few trials have ended to judge failures.",
                f"{len(over)} trials, at least 5 are needed",
            )
        ]
    lost = [trial for trial in over if trial.state in ("diverged", "infeasible", "failed")]
    counts = Counter(trial.state for trial in lost)
    evidence = f"{len(lost)} of {len(over)} trials" + "".join(f", {number} {state}" for state, number in counts.items())
    if len(lost) < max(2, 0.1 * len(over)):
        return [Finding(question, "fine", "At most a few trials gave no result.", evidence)]
    key = find_distinguishing_key(record, over, lost)
    text = f"{len(lost) / len(over):.0%} of the trials gave no result. "
    if key is None:
        return [Finding(question, "note", text + _find_most_common_cause(lost), evidence)]
    sound = [trial for trial in over if trial not in lost]
    parameter = next(each for each in record.parameters if each.key == key)
    describe = _explain_choice if parameter.kind == "choice" else _explain_location
    return [Finding(question, "act", text + describe(parameter, lost, sound), evidence)]


def _explain_location(parameter: Parameter, failed: Sequence[TrialRecord], successful: Sequence[TrialRecord]) -> str:
    ours, theirs = (_format_middle_half(parameter, trials) for trials in (failed, successful))
    return f"These trials differ in {parameter.key}: the middle half of them is {ours}, that of the others is {theirs}."


def _format_middle_half(parameter: Parameter, trials: Sequence[TrialRecord]) -> str:
    """Format the interval between the quartiles of the trials' values.

    Failed trials may lie at both ends of a range, which a mean or median would hide.
    """
    places = list_places(parameter, trials)
    if not places:
        return "undefined, because none has this parameter"
    low, high = (format_value(parameter.to_value(float(place))) for place in np.quantile(places, [0.25, 0.75]))
    return f"at {low}" if low == high else f"between {low} and {high}"


def _explain_choice(parameter: Parameter, failed: Sequence[TrialRecord], successful: Sequence[TrialRecord]) -> str:
    """Describe the choice whose frequency differs most between failed and successful trials."""
    counts = [
        (_count_with_choice(parameter, index, failed), _count_with_choice(parameter, index, successful), choice)
        for index, choice in enumerate(parameter.choices)
    ]
    ours, theirs, choice = max(counts, key=lambda each: each[0] / len(failed) - each[1] / max(1, len(successful)))
    shares = f"{ours} of these {len(failed)} trials, {theirs} of the other {len(successful)}"
    return f"These trials have {parameter.key}={format_value(choice)} more often: {shares}."


def _count_with_choice(parameter: Parameter, index: int, trials: Sequence[TrialRecord]) -> int:
    owners = [trial for trial in trials if parameter.key in trial.params]
    return sum(parameter.find_option(trial.params[parameter.key]) == index for trial in owners)


def _find_most_common_cause(failed: Sequence[TrialRecord]) -> str:
    causes = Counter(trial.error for trial in failed if trial.error)
    return (
        f"Most common cause: {causes.most_common(1)[0][0]}"
        if causes
        else "Their parameters do not differ clearly from those of the other trials."
    )


def check_overfitting(record: SweepRecord) -> list[Finding]:
    """Check whether the validation metric of good trials gets worse before the last epoch."""
    question = "Do the best trials get worse again before the last epoch?"
    quarters = _average_quarters(record)
    if quarters is None:
        return [_make_too_short_finding(question, record)]
    changes = [_compute_relative_change(quarters[:, place], quarters[:, 3]) for place in range(3)]
    worst = max(changes, key=lambda change: change.mean())
    low, _ = _compute_t_interval(worst, level=_TAIL_LEVEL / len(changes))
    evidence = (
        f"loss in the last quarter of the epochs {worst.mean():+.1%} compared with the best earlier quarter, "
        f"mean of {len(worst)} trials"
    )
    if low > 0 and worst.mean() > _MIN_WORSENING:
        text = "The best trials get worse in their last epochs: they overfit, or their learning rate stays too high. "
        text += "Train for fewer epochs, or search weight decay and augmentation."
        return [Finding(question, "act", text, evidence)]
    return [Finding(question, "fine", "The best trials are not shown to get worse before the last epoch.", evidence)]


def check_late_divergence(record: SweepRecord) -> list[Finding]:
    """Check whether trials diverged in the second half of their epochs."""
    question = "Did good trials diverge late?"
    diverged = [trial for trial in record.trials if trial.state == "diverged" and trial.epochs > record.fold_epochs / 2]
    evidence = f"{len(diverged)} of {len(record.trials)} trials diverged in the second half of their epochs"
    if len(diverged) < 2:
        return [Finding(question, "fine", "At most one trial diverged late.", evidence)]
    text = "Some trials diverged after more than half of their epochs: trainer.gradient_clip_val or a smaller learning "
    text += "rate may help."
    return [Finding(question, "act", text, evidence)]


def check_unfinished_training(record: SweepRecord) -> list[Finding]:
    """Check whether good trials still improve at the last epoch."""
    question = "Do the best trials still improve at the last epoch?"
    quarters = _average_quarters(record)
    if quarters is None:
        return [_make_too_short_finding(question, record)]
    gains = -_compute_relative_change(quarters[:, 2], quarters[:, 3])
    low, _ = _compute_t_interval(gains, level=_TAIL_LEVEL)
    evidence = (
        f"improvement of {gains.mean():.1%} from the third to the last quarter of the epochs, mean of "
        f"{len(gains)} trials"
    )
    if low > 0 and gains.mean() > _MIN_IMPROVEMENT:
        text = "The best trials still improve at the last epoch, so a longer training may rank them differently: raise "
        text += "sweep.max_epochs, or give the retraining more epochs (trainer.max_epochs)."
        return [Finding(question, "note", text, evidence)]
    return [Finding(question, "fine", "The best trials change little in the last quarter of the epochs.", evidence)]


def _average_quarters(record: SweepRecord) -> NDArray[np.float64] | None:
    """Average the losses of the best trials in each quarter of the epochs, of the first fold if there are several.

    Trials are selected by their mean over all epochs. If they were selected by their last value, they would appear to
    improve. The epochs of rungs are left out: only trials with good values there were trained further, so these values
    are too good on average, and trials with flat curves would appear to get worse after a rung.

    Returns:
        (T, 4) mean losses of T = 3 to 5 trials that were trained to the last epoch with the same parameters; None if
        fewer than 3 of them have a value in each quarter.
    """
    selecting = {epoch for epoch in record.rungs if epoch < record.max_epochs}
    curves = [
        trial.curve
        for trial in record.list_leading_trials(len(record.ranked))
        if trial.epochs >= record.max_epochs and not trial.is_perturbed
    ]
    edges_at = [record.fold_epochs * place / 4 for place in range(5)]
    rows = []
    for curve in curves:
        groups = [
            [record.sign * value for epoch, value in curve.items() if low < epoch <= high and epoch not in selecting]
            for low, high in itertools.pairwise(edges_at)
        ]
        if all(groups):
            rows.append([statistics.fmean(group) for group in groups])
    rows.sort(key=statistics.fmean)
    return np.array(rows[:5]) if len(rows) >= 3 else None


def _compute_relative_change(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the change of each value, relative to the mean size of both values.

    Relative to the first value alone, it would be positive on average in pure noise, because noise makes some of the
    first values small.
    """
    size = (np.abs(before) + np.abs(after)) / 2
    change: NDArray[np.float64] = (after - before) / np.where(size > 0, size, 1.0)
    return change


def _compute_t_interval(values: NDArray[np.float64], *, level: float) -> tuple[float, float]:
    """Compute the t interval of the mean with tail probability `level` on each side."""
    half = float(stats.t.ppf(1 - level, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def summarise_effects(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[Finding]:
    """Summarise which parameters have a shown effect, where their best values are, and which make little difference."""
    question = "Which parameters matter, and where are their best values?"
    if (lacking := _make_missing_finding(record, question)) is not None:
        return [lacking]
    narrowed = {each.parameter.key: each for each in find_settled_parameters(record, shown)}
    found = []
    for effect in shown:
        settled = narrowed.get(effect.key)
        text = (
            f"{effect.key} has an effect."
            if settled is None
            else f"{effect.key} {settled.summary} ({CONFIDENCE:.0%} confidence)."
        )
        found.append(Finding(question, "fine" if settled is None else "note", text, _format_evidence(effect)))
    small = find_small_effects(record, shown)
    if small:
        names = ", ".join(shorten_names([each.key for each in small]).values())
        text = (
            f"These parameters make little difference, less than half of the best trial's gain over the median trial: "
            f"{names}."
        )
        bound = format_metric(record.metric, max(each.bound for each in small))
        evidence = f"differences below {bound} with {CONFIDENCE:.0%} confidence, {small[0].num_trials} trials at epoch "
        found.append(Finding(question, "fine", text, f"{evidence}{small[0].epoch}"))
    covered = {effect.key for effect in shown} | {each.key for each in small}
    rest = [parameter.key for parameter in record.parameters if parameter.key not in covered]
    if rest:
        names = ", ".join(shorten_names(rest).values())
        text = (
            f"It is not known whether these parameters have an effect: {names}. More trials may show it. This does not "
            "mean that they have no effect."
        )
        found.append(Finding(question, "open", text, f"{len(record.ranked)} trials with a result"))
    return found


def check_early_ranks(record: SweepRecord) -> list[Finding]:
    """Check whether the values at the first rung predict which trials will be good at the last epoch."""
    question = "Do early rungs predict which trials will be good?"
    if not record.rungs:
        return []
    epochs = sorted({*record.rungs, record.max_epochs})
    losses_at = [
        {trial: record.sign * value for trial, value in record.get_values_at(epoch).items()} for epoch in epochs
    ]
    agreement = estimate_rank_agreement(losses_at)
    if agreement is None:
        num = len(record.get_values_at(record.max_epochs))
        text = f"Too few trials were trained to epoch {record.max_epochs} to compare the rungs with it."
        return [Finding(question, "open", text, f"{num} trials, at least {LEAST_FULLY_TRAINED} are needed")]
    evidence = (
        f"correlation between epochs {record.rungs[0]} and {record.max_epochs}, estimated for all trials including "
        f"the stopped ones: {agreement.correlation:.2f} [{agreement.low:.2f}, {agreement.high:.2f}], "
        f"{agreement.num_trials} trials"
    )
    if agreement.high < _MIN_AGREEMENT:
        text = "The early rungs do not predict which trials will be good, so good trials may have been stopped: raise "
        text += "scheduler.grace_period."
        return [Finding(question, "act", text, evidence)]
    if agreement.low > _MIN_AGREEMENT:
        return [Finding(question, "fine", "The early rungs predict which trials will be good.", evidence)]
    return [
        Finding(
            question,
            "open",
            "Too few trials reached the last epoch to know whether early rungs predict the result.",
            evidence,
        )
    ]


def check_utilisation(record: SweepRecord) -> list[Finding]:
    """Check what slowed the trials down. Without measurements, as in sweeps of earlier versions, nothing is said."""
    used = record.used
    if used is None:
        return []
    question = "What slowed the trials down?"
    verdict, phase, share, remedy = judge(used)
    num = sum(1 for trial in record.trials if trial.utilisation)
    evidence = f"{PHASE_NAMES[phase]}: {share:.0%} of the time of {num} trials"
    if verdict == "unknown":
        return [Finding(question, "open", remedy, evidence)]
    if verdict != "busy":
        return [Finding(question, "act", f"The trials are {verdict}. {remedy}", evidence)]
    kind: FindingKind = "note" if remedy else "fine"
    return [
        Finding(question, kind, f"The trials are busy: they spend their time on training. {remedy}".strip(), evidence)
    ]


def _make_missing_finding(record: SweepRecord, question: str) -> Finding | None:
    if len(record.ranked) >= MIN_EFFECT_TRIALS:
        return None
    return Finding(
        question,
        "open",
        "There are too few trials for an answer.",
        f"{len(record.ranked)} trials with a result, at least {MIN_EFFECT_TRIALS} are needed",
    )


def _make_too_short_finding(question: str, record: SweepRecord) -> Finding:
    text = "Too few trials were trained to the last epoch, or for too few epochs, to compare the ends of their curves."
    return Finding(
        question, "open", text, f"at least 3 trials of {record.fold_epochs} epochs, and at least 4 epochs, are needed"
    )
