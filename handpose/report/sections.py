"""The sections of a sweep's report: what is shown, in which order, and the sentence that says what it is."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from handpose.report.advice import Finding
from handpose.report.comparison import compare
from handpose.report.effects import ShownEffect
from handpose.report.html import BLOCKS, Page
from handpose.report.isolation import Isolation
from handpose.report.plots import best_so_far, confirmed, slot_time_bars
from handpose.report.record import Confirmation, Interval, SweepRecord, TrialRecord
from handpose.report.search_sections import add_course, add_front, add_isolation, add_parameters, param_text
from handpose.report.slot_time import slot_time
from handpose.report.table import STATES, short_names
from handpose.report.words import (
    cost_label,
    cost_number,
    duration,
    metric_label,
    metric_number,
    metric_text,
    value_text,
)

_KINDS = {"act": "to do", "note": "worth knowing", "fine": "fine", "open": "open"}


def add_sweep(
    page: Page,
    record: SweepRecord,
    findings: Sequence[Finding],
    *,
    shown: Sequence[ShownEffect],
    next_space: str | None,
    isolation: Isolation | None,
) -> None:
    """All sections of one sweep. next_space: the text of next_space.yaml, if there is one."""
    _winner(page, record)
    _advice(page, findings, next_space)
    if any(trial.reports for trial in record.trials):
        add_course(page, record)
        add_parameters(page, record, shown)
    if isolation is not None:
        add_isolation(page, record, isolation)
    if record.objective is not None and any(record.objective.name in trial.costs for trial in record.trials):
        add_front(page, record)
    _slot_time(page, record)
    _failures(page, record)
    if record.retrained is not None:
        _retrained(page, record)
    _trials(page, record)
    _origin(page, record)


def add_comparison(page: Page, records: Sequence[SweepRecord]) -> None:
    """Several sweeps side by side."""
    page.section(
        "comparison",
        "The sweeps side by side",
        "Best values of single sweeps are one draw each and cannot be tested; confirmed winners can.",
    )
    head = ["sweep", "trials", "epochs", "slot-hours", "best trial", "confirmed winner", "gain over the default"]
    rows = [
        [
            record.name,
            len(record.trials),
            record.max_epochs,
            f"{record.num_slots * record.seconds / 3600:.2g}",
            *_values_of_winner(record),
        ]
        for record in records
    ]
    page.add(BLOCKS.table(head, rows, numeric=(1, 2, 3)))
    pairs = [[each.first, each.second, each.test, each.text] for each in compare(records)]
    page.add(BLOCKS.table(["sweep", "against", "what was compared", "what came out"], pairs, wide=(3,)))
    if len({record.metric for record in records}) == 1 and any(record.ranked for record in records):
        page.chart(
            best_so_far([record for record in records if record.ranked]),
            "What each sweep would have picked, had it ended after so much slot-time: the best trial at the highest "
            "rung reached by then, by its own value. These values are too good, since they were picked.",
        )


def status_line(record: SweepRecord) -> str:
    """Where a sweep stands, in a sentence."""
    counts = Counter(trial.state for trial in record.trials)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    how = {
        "finished": "finished",
        "spent": "its budget is spent, and it can go on with a larger one",
        "interrupted": "interrupted; it can go on",
        "halted": "halted, since no trial worked",
        "": "running, or killed",
    }[record.end]
    return (
        f"{len(record.trials)} of {record.num_trials} trials ({states or 'none yet'}), at most {record.max_epochs} "
        f"epochs each, in {duration(record.seconds)} on {record.num_slots} slots; {how}."
    )


# --- what came out ----------------------------------------------------------------------------------------------------


def _winner(page: Page, record: SweepRecord) -> None:
    winner = record.winner()
    if winner is None:
        page.section("winner", "Winner", "No trial has given a finite value yet.")
        return
    confirmation = record.confirmation
    if confirmation is None or confirmation.winner is None:
        sentence = (
            f"Trial {winner.number} leads by its own value after {winner.epochs} epochs. It was picked for that value, "
            "one run of many, so that the value is optimistic: it has not been confirmed over fresh seeds."
        )
    else:
        sentence = (
            f"The configuration of {confirmation.winner.label} has the best mean over {len(confirmation.seeds)} fresh "
            f"seeds at {confirmation.epochs} epochs.{_doubts(record, confirmation)}"
        )
    page.section("winner", "Winner", sentence)
    page.add(BLOCKS.cards(_headline(record, winner)))
    if confirmation is not None:
        page.chart(
            confirmed(confirmation, record.metric),
            "The finalists and the default configuration, trained again: one dot a run, the mean with its 95 % "
            f"interval. {confirmation.method}",
        )
        head = ["configuration", "mean", "95 % interval", "against the winner", "verdict"]
        rows = [_candidate_row(record, each) for each in confirmation.candidates]
        page.add(BLOCKS.table(head, rows, numeric=(1,), wide=(4,)))
    names = short_names(winner.params)
    rows = [[key, _default(record, key), value_text(value)] for key, value in winner.params.items() if key in names]
    page.add(BLOCKS.table(["parameter", "default", "winner"], rows))
    if "command" in record.best:
        page.add(BLOCKS.preformatted(str(record.best["command"])))


def _doubts(record: SweepRecord, confirmation: Confirmation) -> str:
    """Sentences on what the confirmation does not show, and on how optimistic the winner's mean is."""
    doubts = []
    if not confirmation.compared:
        doubts.append(f"Whether it is better than the others is unknown: {confirmation.why_not_compared}.")
    if confirmation.optimism > 0:
        too_good = metric_text(record.metric, confirmation.optimism)
        doubts.append(f"As the best of several means it is too good by about {too_good} on average.")
    if confirmation.gain is None and (reason := confirmation.unknown.get("gain_over_default")):
        doubts.append(f"The gain over the default configuration is unknown: {reason}.")
    return "".join(f" {sentence}" for sentence in doubts)


def _headline(record: SweepRecord, winner: TrialRecord) -> list[tuple[str, str]]:
    """Cards: figures, and what they are."""
    shown = []
    confirmation = record.confirmation
    if confirmation is not None and confirmation.winner is not None:
        mean = confirmation.winner.mean
        shown.append(
            (metric_text(record.metric, mean.mean), f"mean of {len(confirmation.seeds)} seeds{_within(record, mean)}")
        )
        if confirmation.gain is not None:
            gain = confirmation.gain
            shown.append(
                (metric_text(record.metric, gain.mean), f"gain over the default configuration{_within(record, gain)}")
            )
        label = f"trial {winner.number}'s own value, which picked it"
    else:
        label = f"trial {winner.number} at epoch {winner.epochs}, one run (optimistic)"
    shown.append((metric_text(record.metric, winner.value), label))
    test = _test_value(record)
    return [*shown, (metric_text(record.metric, test), "retrained, on the test split")] if test is not None else shown


def _test_value(record: SweepRecord) -> float | None:
    if record.retrained is None:
        return None
    return record.retrained.metrics.get(f"test/{record.metric.partition('/')[2]}")


def _within(record: SweepRecord, interval: Interval) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ", no interval"
    return f", 95 % interval {_ends(record, interval)}"


def _ends(record: SweepRecord, interval: Interval) -> str:
    return " to ".join(metric_number(record.metric, end) for end in (interval.low, interval.high))


def _candidate_row(record: SweepRecord, candidate: Any) -> list[str]:
    mean, difference = candidate.mean, candidate.difference
    is_winner = record.confirmation is not None and candidate is record.confirmation.winner
    if candidate.out:
        return [candidate.label, "", "", "", f"out: {candidate.out}"]
    interval = _ends(record, mean) if math.isfinite(mean.low) else "none"
    against = "" if difference is None else _signed(record, difference.mean) + _within(record, difference)
    decision = "winner" if is_winner else _against_winner(record, candidate)
    return [candidate.label, metric_number(record.metric, mean.mean), interval, against, decision]


def _signed(record: SweepRecord, difference: float) -> str:
    return ("+" if difference >= 0 else "") + metric_number(record.metric, difference)


def _against_winner(record: SweepRecord, candidate: Any) -> str:
    if candidate.difference is None or candidate.is_distinguishable is None:
        return "unknown"
    if not candidate.is_distinguishable:
        return "not distinguishable from the winner"
    is_worse = record.sign * candidate.difference.mean > 0
    return "worse" if is_worse else "better, but it cannot win"  # the default configuration, beyond a constraint


def _values_of_winner(record: SweepRecord) -> list[str]:
    winner, confirmation = record.winner(), record.confirmation
    best = "" if winner is None else metric_text(record.metric, winner.value)
    if confirmation is None or confirmation.winner is None:
        return [best, "not confirmed", ""]
    mean, gain = confirmation.winner.mean, confirmation.gain
    said = metric_text(record.metric, mean.mean) + _within(record, mean)
    return [best, said, "" if gain is None else metric_text(record.metric, gain.mean) + _within(record, gain)]


def _default(record: SweepRecord, key: str) -> str:
    return value_text(record.defaults[key]) if key in record.defaults else "not set"


def _advice(page: Page, findings: Sequence[Finding], next_space: str | None) -> None:
    page.section(
        "advice",
        "Advice",
        "The questions of the Deep Learning Tuning Playbook, answered from this sweep's data, with the evidence beside "
        "each; where there is too little of it, that is said instead.",
    )
    for finding in findings:
        text = (finding.question, finding.text, finding.evidence, finding.paste)
        page.add(BLOCKS.finding(finding.kind, _KINDS[finding.kind], *text))
    if next_space is not None:
        page.text("A search space for the next round, as written to next_space.yaml in the sweep's folder:")
        page.add(BLOCKS.preformatted(next_space))


# --- what it took -----------------------------------------------------------------------------------------------------


def _slot_time(page: Page, record: SweepRecord) -> None:
    account = slot_time(record)
    if not account.total:
        return
    page.section(
        "slot-time",
        "Where the slot-time went",
        f"{duration(account.total)} of slots: {duration(record.seconds)} with at most {record.num_slots} at a time.",
    )
    page.chart(
        slot_time_bars(account),
        "Start-up is what the first epoch of a worker took longer than later ones; validation is part of training, "
        "since trials do not report it apart. Lost is what nobody heard of, or was trained again, after a failure or a "
        "kill. "
        "The hatched bar was not spent: what the stopped trials would still have taken.",
    )


def _failures(page: Page, record: SweepRecord) -> None:
    lost = [trial for trial in record.trials if trial.state in ("diverged", "infeasible", "failed")]
    if not lost and not record.failures:
        page.section("failures", "Failures", "No trial failed, diverged or cost too much.")
        return
    page.section(
        "failures", "Failures", f"{len(lost)} trials came to nothing; {len(record.failures)} times a worker failed."
    )
    causes = Counter((each.kind, each.cause, each.is_retried) for each in record.failures)
    if causes:
        rows = [
            [
                kind.replace("_", " "),
                cause,
                number,
                "tried again" if retried else "given up",
                _owners(record, kind, cause),
            ]
            for (kind, cause, retried), number in causes.most_common(20)
        ]
        page.add(BLOCKS.table(["what", "cause", "times", "then", "trials"], rows, numeric=(2,), wide=(1, 4)))
    reasons: dict[tuple[str, str], list[TrialRecord]] = {}
    for trial in lost:
        if trial.state != "failed":
            reasons.setdefault((trial.state, _why(record, trial)), []).append(trial)
    if reasons:
        rows = [
            [state, why, len(trials), _listed(each.number for each in trials)]
            for (state, why), trials in reasons.items()
        ]
        page.add(BLOCKS.table(["state", "why", "trials", "which"], rows, numeric=(2,), wide=(1, 3)))


def _owners(record: SweepRecord, kind: str, cause: str) -> str:
    return _listed({each.trial for each in record.failures if (each.kind, each.cause) == (kind, cause)})


def _listed(numbers: Iterable[int]) -> str:
    """The first of them."""
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:12])) + (", …" if len(ordered) > 12 else "")


def _why(record: SweepRecord, trial: TrialRecord) -> str:
    if trial.state == "infeasible":
        over = [name for name, limit in record.limits.items() if trial.costs.get(name, 0.0) > limit]
        said = [f"{cost_label(name)}: above the limit of {cost_number(name, record.limits[name])}" for name in over]
        return "; ".join(said) or trial.error or "a cost cannot be told"
    if not math.isfinite(trial.value):
        return f"{metric_label(record.metric)} was not finite"
    return f"{metric_label(record.metric)} far worse than the trial's best"


# --- what is left -----------------------------------------------------------------------------------------------------


def _retrained(page: Page, record: SweepRecord) -> None:
    assert record.retrained is not None
    page.section(
        "retrained", "The retrained winner", "The winner with its full schedule; the test split was looked at once."
    )
    metrics = record.retrained.metrics
    names = dict.fromkeys(name.partition("/")[2] for name in metrics)
    columns = [stage for stage in ("test", "val", "baseline") if any(name.startswith(f"{stage}/") for name in metrics)]
    rows = [
        [name, *(f"{metrics[key]:.4g}" if (key := f"{stage}/{name}") in metrics else "" for stage in columns)]
        for name in names
    ]
    titles = {"test": "test", "val": "validation", "baseline": "mean pose"}
    page.add(BLOCKS.table(["metric", *(titles[stage] for stage in columns)], rows, numeric=range(1, 4)))
    for kind, title in (("worst", "Its worst hands"), ("best", "Its best hands"), ("other", "Some of its predictions")):
        hands = [hand for hand in record.retrained.hands if hand.kind == kind]
        if hands:
            page.text(f"{title} of the test split; the truth, where it is known, is the thin white line.")
            page.add(BLOCKS.pictures([(hand.jpeg, _caption(hand.name, hand.error_mm)) for hand in hands]))


def _caption(name: str, error_mm: float) -> str:
    return f"{name}, {error_mm:.1f} mm" if math.isfinite(error_mm) else name


def _trials(page: Page, record: SweepRecord) -> None:
    page.section(
        "trials", "All trials", "The best first; a click on a column's head sorts by it. trials.csv has all of it."
    )
    ranked = {number: place for place, number in enumerate(record.ranked)}
    trials = sorted(record.trials, key=lambda trial: (ranked.get(trial.number, len(ranked)), trial.number))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    costs = list(dict.fromkeys(name for trial in trials for name in trial.costs))
    head = [
        "trial",
        "state",
        "epochs",
        metric_label(record.metric),
        *map(cost_label, costs),
        *short_names(keys).values(),
    ]
    rows = [
        [
            (str(trial.number), None),
            (trial.state, None),
            (str(trial.epochs), None),
            (metric_number(record.metric, trial.value) if trial.reports else "", None),
            *(
                (cost_number(name, trial.costs[name]), trial.costs[name]) if name in trial.costs else ("", None)
                for name in costs
            ),
            *((param_text(trial, key), None) for key in keys),
            (duration(trial.seconds), round(trial.seconds, 1)),
            (trial.error[:160], None),
        ]
        for trial in trials
    ]
    page.add(BLOCKS.trials_table([*head, "time", "error"], rows, prefix=page.sweep))


def _origin(page: Page, record: SweepRecord) -> None:
    page.section("origin", "Configuration, data and versions", "What the sweep was, so that it can be had again.")
    origin = record.origin
    git = origin.get("git") or {}
    revision = f"{git.get('revision') or 'not known'}{', with changes' if git.get('dirty') else ''}"
    rows = [
        ["command", origin.get("command_line", "not known")],
        ["in", origin.get("folder", "not known")],
        ["data", f"fingerprint {origin.get('data_fingerprint', 'not known')}"],
        ["revision", revision],
        ["versions", ", ".join(f"{name} {number}" for name, number in (origin.get("versions") or {}).items())],
        ["metric", f"{record.metric}, {record.mode}"],
        ["rungs", ", ".join(map(str, record.rungs)) or "none"],
    ]
    page.add(BLOCKS.table(["what", "value"], rows, wide=(1,)))
    space = [[each.key, each.expression or _range(each), _default(record, each.key)] for each in record.parameters]
    space += [[key, value_text(value), _default(record, key)] for key, value in record.fixed.items()]
    page.add(BLOCKS.table(["searched", "over", "default"], space))
    text = yaml.safe_dump(dict(record.configuration), sort_keys=False, allow_unicode=True)
    page.add(BLOCKS.folded("The whole configuration", BLOCKS.preformatted(text)))


def _range(parameter: Any) -> str:
    if parameter.kind == "choice":
        return ", ".join(map(value_text, parameter.choices))
    said = f"{value_text(parameter.low)} to {value_text(parameter.high)}{', logarithmic' if parameter.log else ''}"
    return said + ("" if parameter.is_declared else " (as seen)")
