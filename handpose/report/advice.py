"""What to do next, from one sweep's own data: the questions of Google's Deep Learning Tuning Playbook, each answered
with its evidence or left open with the reason (https://github.com/google-research/tuning_playbook, "Exploration vs
exploitation" to "Bayesian optimization").

What is said of a parameter rests on an effect that is shown (`effects`); benchmarks/claims.py measures how often noise
makes any of these claims. "Not shown" never means "no effect".
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

FindingKind = Literal["act", "note", "fine", "open"]
"""act: something should be changed. note: worth knowing. fine: looked at, nothing to do. open: too little evidence."""

_MIN_AGREEMENT = 0.3
"""Correlation of the first rung with the last epoch, below which early stopping is close to random."""

_MIN_WORSENING = 0.03  # of the metric, by which the best trials must get worse before it is called overfitting
_MIN_IMPROVEMENT = 0.05  # of the metric, by which they must still improve
_TAIL_LEVEL = 0.02  # of the intervals for both: with the effects of parameters, claims in noise stay below 5 %


class Finding(NamedTuple):
    """An answer. text: what it means, in a sentence or two. evidence: the counts behind it. paste: lines for a search
    space file.
    """

    question: str
    kind: FindingKind
    text: str
    evidence: str
    paste: str = ""


def give_advice(record: SweepRecord, shown: Sequence[ShownEffect] | None = None) -> list[Finding]:
    """All answers, the ones that call for a change first. shown: of `find_shown_effects`, if it was called already."""
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
    ]
    return sorted(found, key=lambda finding: ("act", "note", "fine", "open").index(finding.kind))


def format_advice(findings: Sequence[Finding]) -> str:
    """For the terminal: the answers that call for a change or are worth knowing, a line or two each."""
    lines: list[str] = []
    for finding in findings:
        if finding.kind in ("act", "note"):
            lines.append(f"{'advice' if not lines else '':<12}{finding.text} ({finding.evidence})")
            lines += [f"{'':<12}  {line}" for line in finding.paste.splitlines()]
    return "\n".join(lines)


# --- the questions ----------------------------------------------------------------------------------------------------


def check_winner(record: SweepRecord) -> list[Finding]:
    """Is the winner better than luck?"""
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
    """Does a range end where the best trials are?"""
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
    """Were there enough trials near the best one, in the parameters that are shown to matter?"""
    question = "Were there enough trials near the best one?"
    if (lacking := _make_missing_finding(record, question)) is not None:
        return [lacking]
    if not shown:
        return [_make_no_effect_finding(question, record)]
    best, *others = record.list_leading_trials(len(record.ranked))
    keys = [effect.key for effect in shown]
    known = [parameter for parameter in record.parameters if parameter.key in keys]
    near = [trial for trial in others if all(is_near(parameter, best, trial) for parameter in known)]
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
    """How many trials came to nothing, and where in the space?"""
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
        return [Finding(question, "fine", "Few trials or none gave no result.", evidence)]
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
    """Between which values the middle half of the trials lies: lost ones may be at both ends of a range."""
    lie = list_places(parameter, trials)
    if not lie:
        return "undefined, because none has this parameter"
    low, high = (format_value(parameter.to_value(float(place))) for place in np.quantile(lie, [0.25, 0.75]))
    return f"at {low}" if low == high else f"between {low} and {high}"


def _explain_choice(parameter: Parameter, failed: Sequence[TrialRecord], successful: Sequence[TrialRecord]) -> str:
    """Of the choice whose share differs most."""
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
    """Does the validation metric of good trials get worse before the end?"""
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
    """Did trials that were good diverge late?"""
    question = "Did good trials diverge late?"
    diverged = [trial for trial in record.trials if trial.state == "diverged" and trial.epochs > record.max_epochs / 2]
    evidence = f"{len(diverged)} of {len(record.trials)} trials diverged in the second half of their epochs"
    if len(diverged) < 2:
        return [Finding(question, "fine", "At most one trial diverged late.", evidence)]
    text = "Some trials diverged after more than half of their epochs: trainer.gradient_clip_val or a smaller learning "
    text += "rate may help."
    return [Finding(question, "act", text, evidence)]


def check_unfinished_training(record: SweepRecord) -> list[Finding]:
    """Do good trials still improve at the last epoch?"""
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
    """(trials, 4) mean loss in each quarter of the epochs, of up to five good trials that were trained to the end.

    Good by their mean over all epochs: picking them by the last value would make them look as if they improved. The
    epochs of rungs do not count: only trials with good values there were trained further, so that these values are too
    good on average, and trials whose curves are flat would look as if they got worse after them.
    """
    selecting = {epoch for epoch in record.rungs if epoch < record.max_epochs}
    curves = [
        trial.curve
        for trial in record.list_leading_trials(len(record.ranked))
        if trial.epochs >= record.max_epochs and not trial.is_perturbed
    ]
    edges_at = [record.max_epochs * place / 4 for place in range(5)]
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
    """How much larger each value became, as a part of the mean size of both.

    Of the first one alone it would be positive on average in noise, which makes some of the first ones small.
    """
    size = (np.abs(before) + np.abs(after)) / 2
    change: NDArray[np.float64] = (after - before) / np.where(size > 0, size, 1.0)
    return change


def _compute_t_interval(values: NDArray[np.float64], *, level: float) -> tuple[float, float]:
    """The t interval of a mean that leaves out `level` on each side."""
    half = float(stats.t.ppf(1 - level, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def summarise_effects(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[Finding]:
    """Which parameters have a shown effect, where are their best values, and which make little difference?"""
    question = "Which parameters matter, and where are their best values?"
    if (lacking := _make_missing_finding(record, question)) is not None:
        return [lacking]
    narrowed = {each.parameter.key: each for each in find_settled_parameters(record, shown)}
    found = []
    for effect in shown:
        known = narrowed.get(effect.key)
        text = (
            f"{effect.key} has an effect."
            if known is None
            else f"{effect.key} {known.summary} ({CONFIDENCE:.0%} confidence)."
        )
        found.append(Finding(question, "fine" if known is None else "note", text, _format_evidence(effect)))
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
    said = {effect.key for effect in shown} | {each.key for each in small}
    rest = [parameter.key for parameter in record.parameters if parameter.key not in said]
    if rest:
        names = ", ".join(shorten_names(rest).values())
        text = (
            f"It is not known whether these parameters have an effect: {names}. More trials may show it. This does not "
            "mean that they have no effect."
        )
        found.append(Finding(question, "open", text, f"{len(record.ranked)} trials with a result"))
    return found


def check_early_ranks(record: SweepRecord) -> list[Finding]:
    """Do early epochs tell which trials will be good?"""
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
        question, "open", text, f"at least 3 trials of {record.max_epochs} epochs, and at least 4 epochs, are needed"
    )
