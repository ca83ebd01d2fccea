"""What to do next, from one sweep's own data: the questions of Google's Deep Learning Tuning Playbook, each answered
with its evidence or left open with the reason (https://github.com/google-research/tuning_playbook, "Exploration vs
exploitation" to "Bayesian optimization").
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from scipy import stats

from handpose.report.ranges import (
    LEAST_TRIALS,
    LEAST_UNSEEN,
    NEAR,
    SIGNIFICANT,
    Crowd,
    best_trials,
    crowded_edges,
    expression,
    is_near,
    places,
    settled_span,
    that_matter,
    unseen,
    widened,
)
from handpose.report.record import Parameter, SweepRecord, TrialRecord
from handpose.report.table import short_names
from handpose.report.words import value_text

Kind = Literal["act", "note", "fine", "open"]
"""act: something should be changed. note: worth knowing. fine: looked at, nothing to do. open: too little evidence."""


class Finding(NamedTuple):
    """An answer. text: what it means, in a sentence or two. evidence: the counts behind it. paste: lines of a search
    space.
    """

    question: str
    kind: Kind
    text: str
    evidence: str
    paste: str = ""


def advice(record: SweepRecord) -> list[Finding]:
    """All answers, what is to be done first."""
    questions: Sequence[Callable[[SweepRecord], list[Finding]]] = (
        trust,
        edges,
        density,
        losses,
        overfitting,
        late_divergence,
        unfinished,
        settled,
        early_ranks,
    )
    found = [finding for question in questions for finding in question(record)]
    return sorted(found, key=lambda finding: ("act", "note", "fine", "open").index(finding.kind))


def advice_text(findings: Sequence[Finding]) -> str:
    """For the terminal: what is to be done or worth knowing, a line or two each."""
    lines: list[str] = []
    for finding in findings:
        if finding.kind in ("act", "note"):
            lines.append(f"{'advice' if not lines else '':<12}{finding.text} ({finding.evidence})")
            lines += [f"{'':<12}  {line}" for line in finding.paste.splitlines()]
    return "\n".join(lines)


# --- the questions ----------------------------------------------------------------------------------------------------


def trust(record: SweepRecord) -> list[Finding]:
    """Is the winner better than luck?"""
    question = "Can the winner be trusted?"
    confirmed = record.confirmation
    if confirmed is None:
        if not record.ranked:
            return []
        evidence = f"best of {len(record.ranked)} trials, one run each"
        text = (
            "The winner's value is that of the best of many noisy trials, which flatters it: confirm it over seeds "
            "(sweep.confirm) before a claim rests on it."
        )
        return [Finding(question, "note", text, evidence)]
    winner = confirmed.winner
    if winner is None:
        text = "No candidate came through the confirmation, so that the winner's value is one run's."
        return [Finding(question, "act", text, f"{len(confirmed.candidates)} candidates, {len(confirmed.seeds)} seeds")]
    evidence = f"{len(confirmed.seeds)} seeds of {len(confirmed.candidates)} configurations at epoch {confirmed.epochs}"
    label, compared = winner.label.capitalize(), confirmed.compared
    if not compared:
        text = f"{label} has the best mean, but whether it is better than the others is unknown: "
        return [Finding(question, "open", f"{text}{confirmed.why_not_compared}.", evidence)]
    equals = [each.label for each in compared if not each.is_distinguishable]
    if equals:
        text = f"{label} has the best mean, but is not distinguishable from {', '.join(equals)}."
        return [Finding(question, "note", text, evidence)]
    worse = [each.label for each in compared if each.difference and each.difference.mean * record.sign > 0]
    if not worse:
        return [Finding(question, "note", f"{label} is the only one that can win, and is not the best.", evidence)]
    return [Finding(question, "fine", f"{label} is better than {', '.join(worse)} over fresh seeds.", evidence)]


def edges(record: SweepRecord) -> list[Finding]:
    """Do the best trials crowd an edge of a range?"""
    question = "Do the best trials crowd an edge of a range?"
    if (lacking := _lacking(record, question)) is not None:
        return [lacking]
    found = [_edge(question, crowd) for crowd in crowded_edges(record)]
    num = sum(parameter.kind != "choice" for parameter in record.parameters)
    text, evidence = "No range ends where the best trials are.", f"{len(best_trials(record))} best trials, {num} ranges"
    return found or [Finding(question, "fine", text, evidence)]


def _edge(question: str, crowd: Crowd) -> Finding:
    parameter, is_upper = crowd.parameter, crowd.is_upper
    end = parameter.high if is_upper else parameter.low
    low, high = widened(parameter, is_upper=is_upper)
    return Finding(
        question,
        "act",
        f"The best trials crowd the {'upper' if is_upper else 'lower'} end of {parameter.key}: the best value may lie "
        "beyond. Search a wider range, where the model allows it.",
        f"{crowd.num_there} of the {crowd.num_best} best lie at or near {value_text(end)}",
        f"{parameter.key}: {expression(parameter, low, high)}",
    )


def density(record: SweepRecord) -> list[Finding]:
    """Were there enough points near the best?"""
    question = "Were there enough trials near the best one?"
    if (lacking := _lacking(record, question)) is not None:
        return [lacking]
    best, *others = record.leading(len(record.ranked))
    keys = that_matter(record)
    near = [trial for trial in others if all(is_near(parameter, best, trial) for parameter in keys)]
    names = ", ".join(short_names([parameter.key for parameter in keys]).values())
    evidence = f"{len(near)} of {len(others)} other trials within {NEAR:.0%} of the range of {names}"
    if len(near) < 3:
        text = (
            f"Trial {best.number} stands almost alone, so that its neighbourhood is not known and there may be better. "
            "Search a narrower space, or run more trials."
        )
        return [Finding(question, "act", text, evidence)]
    return [Finding(question, "fine", f"Trial {best.number} has neighbours that were tried too.", evidence)]


def losses(record: SweepRecord) -> list[Finding]:
    """How many trials came to nothing, and where in the space?"""
    question = "How many trials came to nothing, and why?"
    over = [trial for trial in record.trials if trial.state not in ("running", "waiting", "paused")]
    if len(over) < 5:
        return [Finding(question, "open", "Too few trials are over.", f"{len(over)} of at least 5")]
    lost = [trial for trial in over if trial.state in ("diverged", "infeasible", "failed")]
    counts = Counter(trial.state for trial in lost)
    evidence = f"{len(lost)} of {len(over)}" + "".join(f", {number} {state}" for state, number in counts.items())
    if len(lost) < max(2, 0.1 * len(over)):
        return [Finding(question, "fine", "Few or none.", evidence)]
    where = _where(record, lost, [trial for trial in over if trial not in lost])
    text = f"{len(lost) / len(over):.0%} of the trials came to nothing. "
    return [Finding(question, "act" if where else "note", text + (where or _most_common(lost)), evidence)]


def _where(record: SweepRecord, lost: Sequence[TrialRecord], sound: Sequence[TrialRecord]) -> str:
    """The parameter in which trials that came to nothing differ most from the others, if one does."""
    told = []
    for parameter in record.parameters:
        differ = _chosen_oftener if parameter.kind == "choice" else _lies_elsewhere
        told += [
            (odds, text) for odds, text in differ(parameter, lost, sound) if odds * len(record.parameters) < SIGNIFICANT
        ]
    return min(told)[1] if told else ""


def _lies_elsewhere(
    parameter: Parameter, lost: Sequence[TrialRecord], sound: Sequence[TrialRecord]
) -> list[tuple[float, str]]:
    """By the Mann-Whitney test of where they lie in the range."""
    ours, theirs = places(parameter, lost), places(parameter, sound)
    if min(len(ours), len(theirs)) < 3:
        return []
    odds = float(stats.mannwhitneyu(ours, theirs, method="asymptotic").pvalue)
    middles = [statistics.median(ours), statistics.median(theirs)]
    shown = [value_text(parameter.value_at(middle)) for middle in middles]
    larger = "larger" if middles[0] > middles[1] else "smaller"
    return [(odds, f"They have a {larger} {parameter.key}: in the median {shown[0]} against {shown[1]}.")]


def _chosen_oftener(
    parameter: Parameter, lost: Sequence[TrialRecord], sound: Sequence[TrialRecord]
) -> list[tuple[float, str]]:
    """By Fisher's exact test of each option; one that both have alike tells nothing."""
    told = []
    for index, choice in enumerate(parameter.choices):
        ours, theirs = (_num_with(parameter, index, trials) for trials in (lost, sound))
        table = [[ours, len(lost) - ours], [theirs, len(sound) - theirs]]
        odds = float(stats.fisher_exact(table, alternative="greater").pvalue) * len(parameter.choices)
        shares = f"{ours} of these {len(lost)}, {theirs} of the other {len(sound)}"
        told.append((odds, f"They have {parameter.key} {value_text(choice)} more often: {shares}."))
    return told


def _num_with(parameter: Parameter, index: int, trials: Sequence[TrialRecord]) -> int:
    owners = [trial for trial in trials if parameter.key in trial.params]
    return sum(parameter.index(trial.params[parameter.key]) == index for trial in owners)


def _most_common(lost: Sequence[TrialRecord]) -> str:
    causes = Counter(trial.error for trial in lost if trial.error)
    return (
        f"Most common cause: {causes.most_common(1)[0][0]}"
        if causes
        else "Nothing in their parameters sets them apart."
    )


def overfitting(record: SweepRecord) -> list[Finding]:
    """Does the validation metric of the best trials turn before the end?"""
    question = "Do the best trials get worse again before the last epoch?"
    curves = _best_curves(record)
    if len(curves) < 3 or record.max_epochs < 5:
        return [_too_short(question, record, curves)]
    turned = [curve for curve in curves if _turns(curve, record)]
    evidence = f"{len(turned)} of the {len(curves)} best trials end at least 3 % worse than they were before 3/4 of it"
    if 2 * len(turned) > len(curves):
        text = "The best trials are past their best: they overfit, or their learning rate stays too high. Train them "
        text += "for fewer epochs, or search weight decay and augmentation."
        return [Finding(question, "act", text, evidence)]
    return [Finding(question, "fine", "No.", evidence)]


def _turns(curve: dict[int, float], record: SweepRecord) -> bool:
    last = max(curve)
    before = [record.sign * value for epoch, value in curve.items() if epoch <= 0.75 * last]
    end = record.sign * curve[last]
    return bool(before) and end - min(before) > 0.03 * abs(min(before))


def late_divergence(record: SweepRecord) -> list[Finding]:
    """Did trials that were good diverge late?"""
    question = "Did good trials diverge late?"
    diverged = [trial for trial in record.trials if trial.state == "diverged" and trial.epochs > record.max_epochs / 2]
    evidence = f"{len(diverged)} of {len(record.trials)} trials diverged in the second half of their epochs"
    if len(diverged) < 2:
        return [Finding(question, "fine", "No.", evidence)]
    text = (
        "Training becomes unstable late: a longer warm-up, trainer.gradient_clip_val or a smaller learning rate helps."
    )
    return [Finding(question, "act", text, evidence)]


def unfinished(record: SweepRecord) -> list[Finding]:
    """Do the best trials still improve at the last epoch?"""
    question = "Do the best trials still improve at the last epoch?"
    curves = _best_curves(record)
    if len(curves) < 3 or record.max_epochs < 4:
        return [_too_short(question, record, curves)]
    gains = [_late_gain(curve, record) for curve in curves]
    middle = statistics.median(gains)
    evidence = f"median improvement over the last quarter {middle:.1%}, of the {len(curves)} best trials"
    if middle > 0.05:
        text = "They do, so that a longer training may rank them otherwise: raise sweep.max_epochs, or give the "
        text += "retraining more epochs (trainer.max_epochs)."
        return [Finding(question, "note", text, evidence)]
    return [Finding(question, "fine", "Hardly: the epochs suffice to tell them apart.", evidence)]


def _late_gain(curve: dict[int, float], record: SweepRecord) -> float:
    last = max(curve)
    before = curve[max(epoch for epoch in curve if epoch <= max(min(curve), 0.75 * last))]
    return record.sign * (before - curve[last]) / abs(before) if before else 0.0


def settled(record: SweepRecord) -> list[Finding]:
    """Which parameters are settled, and which do not matter?"""
    question = "Which parameters are settled?"
    if (lacking := _lacking(record, question)) is not None:
        return [lacking]
    best = best_trials(record)
    told = []
    for parameter in record.parameters:
        span = settled_span(record, parameter)
        if span is not None:
            told.append(Finding(question, "note", _settled_text(parameter, span), f"the {len(best)} best trials"))
    flat = unseen(record)
    if flat:
        at = [each for each in record.importance if each.num_trials >= LEAST_UNSEEN][-1]
        text = f"No effect is seen of {', '.join(short_names(flat).values())}: not worth searching again."
        told.append(
            Finding(question, "note", text, f"importance below chance, {at.num_trials} trials at epoch {at.epoch}")
        )
    return told or [
        Finding(
            question, "fine", "None yet: the best trials are spread over each range.", f"the {len(best)} best trials"
        )
    ]


def _settled_text(parameter: Parameter, span: tuple[float, float] | object) -> str:
    if isinstance(span, tuple):
        return f"{parameter.key} is settled between {value_text(span[0])} and {value_text(span[1])}."
    return f"{parameter.key} is settled at {value_text(span)}."


def early_ranks(record: SweepRecord) -> list[Finding]:
    """Do early epochs tell which trials will be good?"""
    question = "Do the rungs tell early which trials will be good?"
    last = record.values_at(record.max_epochs)
    if not record.rungs:
        return []
    early = record.values_at(record.rungs[0])
    both = sorted(last.keys() & early.keys())
    if len(both) < 8:
        text = f"Too few trials were trained to epoch {record.max_epochs}."
        return [Finding(question, "open", text, f"{len(both)} of at least 8")]
    agreement = float(stats.spearmanr([early[each] for each in both], [last[each] for each in both]).statistic)
    evidence = (
        f"rank correlation {agreement:.2f} of epochs {record.rungs[0]} and {record.max_epochs}, {len(both)} trials"
    )
    if agreement < 0.3:
        text = "Hardly, as far as the survivors show: raise scheduler.grace_period, lest good trials are stopped."
        return [Finding(question, "act", text, evidence)]
    return [Finding(question, "fine", "They do, as far as the survivors show.", evidence)]


def _lacking(record: SweepRecord, question: str) -> Finding | None:
    if len(record.ranked) >= LEAST_TRIALS:
        return None
    return Finding(
        question, "open", "Too few trials to say.", f"{len(record.ranked)} with a result, of at least {LEAST_TRIALS}"
    )


def _too_short(question: str, record: SweepRecord, curves: Sequence[object]) -> Finding:
    evidence = f"{len(curves)} trials trained to epoch {record.max_epochs}, of at least 3, and of at least 5 epochs"
    return Finding(question, "open", "Too few or too short curves to say.", evidence)


def _best_curves(record: SweepRecord) -> list[dict[int, float]]:
    """Of at most five of the best that were trained to the end."""
    return [trial.curve for trial in record.leading(5) if trial.epochs >= record.max_epochs]
