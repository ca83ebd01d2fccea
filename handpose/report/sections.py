"""The sections of a report about a sweep, their order, and the sentences that describe them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from handpose.report.advice import Finding
from handpose.report.comparison import compare_sweeps
from handpose.report.effects import ShownEffect
from handpose.report.formatting import (
    format_cost_name,
    format_cost_value,
    format_duration,
    format_metric,
    format_metric_name,
    format_metric_value,
    format_value,
    get_test_name,
)
from handpose.report.html import BLOCKS, HtmlPage
from handpose.report.isolation import IsolationResult
from handpose.report.plots import plot_best_so_far, plot_confirmation, plot_slot_time
from handpose.report.search_sections import (
    add_front_section,
    add_isolation_section,
    add_parameter_sections,
    add_progress_section,
    format_param,
)
from handpose.report.slot_time import account_slot_time
from handpose.report.sweep_record import CombinedSeeds, Confirmation, Interval, SweepRecord, TrialRecord
from handpose.report.trial_table import STATES, shorten_names
from handpose.report.utilisation_section import add_utilisation_section

_MAX_STORIES = 2000
"""Number of trials whose stories are in the page. They take about 1 KB each."""

_KIND_LABELS = {"act": "to do", "note": "worth knowing", "fine": "fine", "open": "open"}


def add_sweep_sections(
    page: HtmlPage,
    record: SweepRecord,
    findings: Sequence[Finding],
    *,
    shown: Sequence[ShownEffect],
    next_space: str | None,
    isolation: IsolationResult | None,
) -> None:
    """Add all sections about one sweep.

    Args:
        page: the page.
        record: the sweep.
        findings: the advice.
        shown: the shown effects.
        next_space: the text of next_space.yaml; None if there is no suggestion.
        isolation: the comparison of the values of the scientific parameter; None if there is none.
    """
    _add_winner(page, record)
    _add_advice(page, findings, next_space)
    if any(trial.reports for trial in record.trials):
        add_progress_section(page, record)
        add_parameter_sections(page, record, shown)
    if isolation is not None:
        add_isolation_section(page, record, isolation)
    if record.second_objective is not None and any(
        record.second_objective.name in trial.costs for trial in record.trials
    ):
        add_front_section(page, record)
    _add_slot_time(page, record)
    add_utilisation_section(page, record)
    _add_failures(page, record)
    if record.retrained is not None:
        _add_retrained(page, record)
        _add_seeds(page, record.retrained.combined)
    _add_trials(page, record)
    _add_origin(page, record)


def add_comparison_section(page: HtmlPage, records: Sequence[SweepRecord]) -> None:
    """Add a section that compares several sweeps."""
    page.add_section(
        "comparison",
        "The sweeps side by side",
        "The best value of each sweep is a single run, so only confirmed winners can be compared by a test.",
    )
    head = ["sweep", "trials", "epochs", "slot-hours", "best trial", "confirmed winner", "gain over the default"]
    rows = [
        [
            record.name,
            len(record.trials),
            record.max_epochs,
            f"{record.num_slots * record.seconds / 3600:.2g}",
            *_list_winner_values(record),
        ]
        for record in records
    ]
    page.add_markup(BLOCKS.table(head, rows, numeric=(1, 2, 3)))
    pairs = [[each.first, each.second, each.test, each.text] for each in compare_sweeps(records)]
    page.add_markup(BLOCKS.table(["sweep", "against", "what was compared", "what came out"], pairs, wide=(3,)))
    if len({record.metric for record in records}) == 1 and any(record.ranked for record in records):
        page.add_chart(
            plot_best_so_far([record for record in records if record.ranked]),
            "The trial that each sweep would have chosen if it had ended after a given slot-time: the best one at the "
            "highest rung reached by then. These values are too good on average, because they were selected.",
        )


def format_status(record: SweepRecord) -> str:
    """Format the state of a sweep in a sentence."""
    counts = Counter(trial.state for trial in record.trials)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    spent = "its budget is spent; it can be resumed with a larger one"
    if record.expected_gain is not None:
        spent = (
            "ended because doubling the number of trials was expected to improve the metric by "
            f"{record.expected_gain:.2g}, less than sweep.stop_when; it can be resumed with a smaller value"
        )
    how = {
        "finished": "finished",
        "spent": spent,
        "interrupted": "interrupted; it can be resumed",
        "halted": "halted because no trial worked",
        "": "running, or killed",
    }[record.end]
    earlier = ", then ".join(map(str, record.earlier_max_epochs))
    raised = f" (at first {earlier}, which the user raised)" if earlier else ""
    folds = f" ({record.folds} folds of {record.fold_epochs})" if record.folds > 1 else ""
    return (
        f"{len(record.trials)} of {record.num_trials} trials ({states or 'none yet'}), at most {record.max_epochs} "
        f"epochs each{folds}{raised}, in {format_duration(record.seconds)} on {record.num_slots} slots; {how}."
        + "".join(
            f" After {format_duration(change.at_s)} the user changed the search space: trials from number "
            f"{change.first_trial} on were proposed from {change.name}."
            for change in record.space_changes
        )
    )


# --- what came out ----------------------------------------------------------------------------------------------------


def _add_winner(page: HtmlPage, record: SweepRecord) -> None:
    winner = record.find_winner()
    if winner is None:
        page.add_section("winner", "Winner", "No trial has given a finite value yet.")
        return
    confirmation = record.confirmation
    if confirmation is None or confirmation.winner is None:
        sentence = (
            f"Trial {winner.number} has the best value after {winner.epochs} epochs. It was selected for this value "
            "among many runs and has not been confirmed with new seeds, so the value is too good on average."
        )
    else:
        sentence = (
            f"The configuration of {confirmation.winner.label} has the best mean over {len(confirmation.seeds)} fresh "
            f"seeds at {confirmation.epochs} epochs.{_format_doubts(record, confirmation)}"
        )
    page.add_section("winner", "Winner", sentence)
    page.add_markup(BLOCKS.cards(_make_headline_cards(record, winner)))
    if confirmation is not None:
        page.add_chart(
            plot_confirmation(confirmation, record.metric),
            "The finalists and the default configuration, trained again: one dot per run, the mean with its 95 % "
            f"interval. {confirmation.method}",
        )
        head = ["configuration", "mean", "95 % interval", "against the winner", "verdict"]
        rows = [_make_candidate_row(record, each) for each in confirmation.candidates]
        page.add_markup(BLOCKS.table(head, rows, numeric=(1,), wide=(4,)))
    names = shorten_names(winner.params)
    rows = [
        [key, _format_default(record, key), format_value(value)] for key, value in winner.params.items() if key in names
    ]
    page.add_markup(BLOCKS.table(["parameter", "default", "winner"], rows))
    if "command" in record.best:
        page.add_markup(BLOCKS.preformatted(str(record.best["command"])))


def _format_doubts(record: SweepRecord, confirmation: Confirmation) -> str:
    """Format what the confirmation does not show, and how optimistic the winner's mean is."""
    doubts = []
    if not confirmation.compared:
        doubts.append(f"Whether it is better than the others is unknown: {confirmation.why_not_compared}.")
    if confirmation.optimism > 0:
        too_good = format_metric(record.metric, confirmation.optimism)
        doubts.append(f"The best of several means is too good on average, here by about {too_good}.")
    if confirmation.gain is None and (reason := confirmation.unknown.get("gain_over_default")):
        doubts.append(f"The gain over the default configuration is unknown: {reason}.")
    return "".join(f" {sentence}" for sentence in doubts)


def _make_headline_cards(record: SweepRecord, winner: TrialRecord) -> list[tuple[str, str]]:
    """Make cards, each a number and what it means."""
    shown = []
    confirmation = record.confirmation
    if confirmation is not None and confirmation.winner is not None:
        mean = confirmation.winner.mean
        shown.append(
            (
                format_metric(record.metric, mean.mean),
                f"mean of {len(confirmation.seeds)} seeds{_format_interval(record, mean)}",
            )
        )
        if confirmation.gain is not None:
            gain = confirmation.gain
            shown.append(
                (
                    format_metric(record.metric, gain.mean),
                    f"gain over the default configuration{_format_interval(record, gain)}",
                )
            )
        label = f"value of trial {winner.number} in the sweep, for which it was selected"
    else:
        label = f"trial {winner.number} at epoch {winner.epochs}, one run (optimistic)"
    shown.append((format_metric(record.metric, winner.value), label))
    test = _get_test_value(record)
    return [*shown, (format_metric(record.metric, test), "retrained, on the test split")] if test is not None else shown


def _get_test_value(record: SweepRecord) -> float | None:
    if record.retrained is None:
        return None
    return record.retrained.metrics.get(get_test_name(record.metric))


def _format_interval(record: SweepRecord, interval: Interval) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ", no interval"
    return f", 95 % interval {_format_interval_ends(record, interval)}"


def _format_interval_ends(record: SweepRecord, interval: Interval) -> str:
    return " to ".join(format_metric_value(record.metric, end) for end in (interval.low, interval.high))


def _make_candidate_row(record: SweepRecord, candidate: Any) -> list[str]:
    mean, difference = candidate.mean, candidate.difference
    is_winner = record.confirmation is not None and candidate is record.confirmation.winner
    if candidate.out:
        return [candidate.label, "", "", "", f"excluded: {candidate.out}"]
    interval = _format_interval_ends(record, mean) if math.isfinite(mean.low) else "none"
    against = (
        "" if difference is None else _format_signed(record, difference.mean) + _format_interval(record, difference)
    )
    decision = "winner" if is_winner else _format_difference(record, candidate)
    return [candidate.label, format_metric_value(record.metric, mean.mean), interval, against, decision]


def _format_signed(record: SweepRecord, difference: float) -> str:
    return ("+" if difference >= 0 else "") + format_metric_value(record.metric, difference)


def _format_difference(record: SweepRecord, candidate: Any) -> str:
    if candidate.difference is None or candidate.is_distinguishable is None:
        return "unknown"
    if not candidate.is_distinguishable:
        return "not distinguishable from the winner"
    is_worse = record.sign * candidate.difference.mean > 0
    return "worse" if is_worse else "better, but it cannot win"  # the default configuration violates a constraint


def _list_winner_values(record: SweepRecord) -> list[str]:
    winner, confirmation = record.find_winner(), record.confirmation
    best = "" if winner is None else format_metric(record.metric, winner.value)
    if confirmation is None or confirmation.winner is None:
        return [best, "not confirmed", ""]
    mean, gain = confirmation.winner.mean, confirmation.gain
    confirmed = format_metric(record.metric, mean.mean) + _format_interval(record, mean)
    return [
        best,
        confirmed,
        "" if gain is None else format_metric(record.metric, gain.mean) + _format_interval(record, gain),
    ]


def _format_default(record: SweepRecord, key: str) -> str:
    return format_value(record.defaults[key]) if key in record.defaults else "not set"


def _add_advice(page: HtmlPage, findings: Sequence[Finding], next_space: str | None) -> None:
    page.add_section(
        "advice",
        "Advice",
        "Answers to the questions of the Deep Learning Tuning Playbook from the data of this sweep, each with its "
        "evidence. An open question has too little evidence for an answer.",
    )
    for finding in findings:
        text = (finding.question, finding.text, finding.evidence, finding.paste)
        page.add_markup(BLOCKS.finding(finding.kind, _KIND_LABELS[finding.kind], *text))
    if next_space is not None:
        page.add_text("A search space for the next round, as written to next_space.yaml in the sweep's folder:")
        page.add_markup(BLOCKS.preformatted(next_space))


# --- what it took -----------------------------------------------------------------------------------------------------


def _add_slot_time(page: HtmlPage, record: SweepRecord) -> None:
    account = account_slot_time(record)
    if not account.total:
        return
    page.add_section(
        "slot-time",
        "Where the slot-time went",
        f"{format_duration(account.total)} of slots: {format_duration(record.seconds)} with at most {record.num_slots} "
        "at a time.",
    )
    page.add_chart(
        plot_slot_time(account),
        f"Start-up: {_describe_start_up(record)}. Training includes waiting for data and validation. Lost: epochs that "
        "were not reported or had to be trained again after a failure or a kill. Hatched: the time that the stopped "
        "trials would still have taken.",
    )


def _describe_start_up(record: SweepRecord) -> str:
    if any(trial.utilisation for trial in record.trials):
        return "the time from the start of a worker to its first training step"
    return "how much longer the first epoch of a worker took than later ones"


def _add_failures(page: HtmlPage, record: SweepRecord) -> None:
    lost = [trial for trial in record.trials if trial.state in ("diverged", "infeasible", "failed")]
    if not lost and not record.failures:
        page.add_section("failures", "Failures", "No trial failed, diverged or cost too much.")
        return
    page.add_section(
        "failures", "Failures", f"{len(lost)} trials gave no result; {len(record.failures)} workers failed."
    )
    causes = Counter((each.kind, each.cause, each.is_retried) for each in record.failures)
    if causes:
        rows = [
            [
                kind.replace("_", " "),
                cause,
                number,
                "tried again" if retried else "given up",
                _list_failed_trials(record, kind, cause),
            ]
            for (kind, cause, retried), number in causes.most_common(20)
        ]
        page.add_markup(BLOCKS.table(["what", "cause", "times", "then", "trials"], rows, numeric=(2,), wide=(1, 4)))
    reasons: dict[tuple[str, str], list[TrialRecord]] = {}
    for trial in lost:
        if trial.state != "failed":
            reasons.setdefault((trial.state, _explain_end(record, trial)), []).append(trial)
    if reasons:
        rows = [
            [state, why, len(trials), _format_numbers(each.number for each in trials)]
            for (state, why), trials in reasons.items()
        ]
        page.add_markup(BLOCKS.table(["state", "why", "trials", "which"], rows, numeric=(2,), wide=(1, 3)))


def _list_failed_trials(record: SweepRecord, kind: str, cause: str) -> str:
    return _format_numbers({each.trial for each in record.failures if (each.kind, each.cause) == (kind, cause)})


def _format_numbers(numbers: Iterable[int]) -> str:
    """Format the first 12 numbers, sorted."""
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:12])) + (", …" if len(ordered) > 12 else "")


def _explain_end(record: SweepRecord, trial: TrialRecord) -> str:
    if trial.state == "infeasible":
        over = [name for name, limit in record.limits.items() if trial.costs.get(name, 0.0) > limit]
        reasons = [
            f"{format_cost_name(name)}: above the limit of {format_cost_value(name, record.limits[name])}"
            for name in over
        ]
        return "; ".join(reasons) or trial.error or "a cost could not be measured"
    if not math.isfinite(trial.value):
        return f"{format_metric_name(record.metric)} was not finite"
    return f"{format_metric_name(record.metric)} far worse than the trial's best"


# --- what is left -----------------------------------------------------------------------------------------------------


def _add_retrained(page: HtmlPage, record: SweepRecord) -> None:
    assert record.retrained is not None
    page.add_section(
        "retrained",
        "The retrained winner",
        "The winner, trained with its full schedule. The test split is used only here.",
    )
    metrics = record.retrained.metrics
    names = dict.fromkeys(name.partition("/")[2] for name in metrics)
    columns = [stage for stage in ("test", "val", "baseline") if any(name.startswith(f"{stage}/") for name in metrics)]
    rows = [
        [name, *(f"{metrics[key]:.4g}" if (key := f"{stage}/{name}") in metrics else "" for stage in columns)]
        for name in names
    ]
    titles = {"test": "test", "val": "validation", "baseline": "mean pose"}
    page.add_markup(BLOCKS.table(["metric", *(titles[stage] for stage in columns)], rows, numeric=range(1, 4)))
    if "pa_mpjpe_official_mm" in names:
        page.add_text(
            "pa_mpjpe_official_mm is the error to compare with papers on FreiHAND: it is aligned as in the official "
            "eval.py, which allows a reflection. pa_mpjpe_mm and pck_auc never reflect a hand. The sweep optimised "
            f"{record.metric}."
        )
    for kind, title in (("worst", "Its worst hands"), ("best", "Its best hands"), ("other", "Some of its predictions")):
        hands = [hand for hand in record.retrained.hands if hand.kind == kind]
        if hands:
            page.add_text(f"{title} of the test split; the thin white line is the truth, where it is known.")
            page.add_markup(BLOCKS.pictures([(hand.jpeg, _format_caption(hand.name, hand.error_mm)) for hand in hands]))


def _add_seeds(page: HtmlPage, combined: CombinedSeeds | None) -> None:
    """Add a table of the test metrics over the seeds of the retraining."""
    if combined is None or not combined.mean:
        return
    rows = [
        [
            name.partition("/")[2],
            f"{mean:.4g}",
            f"{combined.deviation[name]:.2g}",
            f"{combined.metrics[name]:.4g}" if name in combined.metrics else "",
        ]
        for name, mean in combined.mean.items()
    ]
    page.add_section(
        "seeds",
        "The retrained winner over seeds",
        f"The winner was retrained with the seeds {', '.join(map(str, combined.seeds))}. The metrics of the section "
        "before are those of the first one. The pictures, and the predictions in retrain/combined, are those of "
        f"{combined.describe_predictions()}.",
    )
    titles = ["test metric", "mean of the seeds", "standard deviation", "of the predictions"]
    page.add_markup(BLOCKS.table(titles, rows, numeric=range(1, 4)))


def _format_caption(name: str, error_mm: float) -> str:
    return f"{name}, {error_mm:.1f} mm" if math.isfinite(error_mm) else name


def _add_trials(page: HtmlPage, record: SweepRecord) -> None:
    page.add_section(
        "trials",
        "All trials",
        "The best trials first; click on a column title to sort by it, and on the number of a trial to see what was "
        "decided about it and why. trials.csv has the whole table.",
    )
    ranked = {number: place for place, number in enumerate(record.ranked)}
    trials = sorted(record.trials, key=lambda trial: (ranked.get(trial.number, len(ranked)), trial.number))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    costs = list(dict.fromkeys(name for trial in trials for name in trial.costs))
    head = [
        "trial",
        "state",
        "epochs",
        format_metric_name(record.metric),
        *map(format_cost_name, costs),
        *shorten_names(keys).values(),
    ]
    rows = [
        [
            (str(trial.number), None),
            (trial.state, None),
            (str(trial.epochs), None),
            (format_metric_value(record.metric, trial.value) if trial.reports else "", None),
            *(
                (format_cost_value(name, trial.costs[name]), trial.costs[name]) if name in trial.costs else ("", None)
                for name in costs
            ),
            *((format_param(trial, key), None) for key in keys),
            (format_duration(trial.seconds), round(trial.seconds, 1)),
            (trial.reason, None),
            (trial.error[:160], None),
        ]
        for trial in trials
    ]
    head += ["time", "reason", "error"]
    page.add_markup(BLOCKS.trials_table(head, rows, prefix=page.sweep, num_stories=_MAX_STORIES))
    for trial in trials[:_MAX_STORIES]:
        page.add_story(trial.number, trial.story)


def _add_origin(page: HtmlPage, record: SweepRecord) -> None:
    page.add_section("origin", "Configuration, data and versions", "Everything needed to run this sweep again.")
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
    page.add_markup(BLOCKS.table(["what", "value"], rows, wide=(1,)))
    space = [
        [each.key, each.expression or _format_range(each), _format_default(record, each.key)]
        for each in record.parameters
    ]
    space += [[key, format_value(value), _format_default(record, key)] for key, value in record.fixed.items()]
    page.add_markup(BLOCKS.table(["searched", "over", "default"], space))
    if record.space_changes:
        page.add_text(
            f"The ranges are those of {record.space_changes[-1].name}. A parameter that only earlier spaces searched "
            "has the range of all its values. The plots and the tests use the values of all trials."
        )
    text = yaml.safe_dump(dict(record.configuration), sort_keys=False, allow_unicode=True)
    page.add_markup(BLOCKS.folded("The whole configuration", BLOCKS.preformatted(text)))


def _format_range(parameter: Any) -> str:
    if parameter.kind == "choice":
        return ", ".join(map(format_value, parameter.choices))
    text = f"{format_value(parameter.low)} to {format_value(parameter.high)}{', logarithmic' if parameter.log else ''}"
    return text + ("" if parameter.is_declared else " (as seen)")
