"""A suggested search space for the next sweep.

A range is only widened or narrowed if there is evidence, which is written beside it as a comment.

If some parameters exist only for certain values of others (branches of the search space), the suggested space contains
only the branch of the winner, so that it can be written as plain ranges. It is only suggested if the other branches are
shown to be worse.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from handpose.config import quote_override
from handpose.plain_values import is_same
from handpose.report.effects import CONFIDENCE, Bound, ShownEffect, find_shown_effects
from handpose.report.formatting import format_value
from handpose.report.ranges import (
    CrowdedEdge,
    SettledParameter,
    find_crowded_edges,
    find_settled_parameters,
    format_range,
    round_outward,
    widen_range,
)
from handpose.report.sweep_record import Parameter, SweepRecord, TrialRecord


class _SpaceLine(NamedTuple):
    key: str
    text: str
    why: str


def suggest_next_space(record: SweepRecord, shown: Sequence[ShownEffect] | None = None) -> str | None:
    """Suggest a search space for the next sweep.

    Args:
        record: the sweep.
        shown: the result of `find_shown_effects`, if it has been computed already.

    Returns:
        The text of a search space file. None if nothing should change, if there is no winner yet, if the user has
        changed the search space since the winner was proposed, or if a branch other than the winner's is not shown to
        be worse.
    """
    winner = record.find_winner()
    if winner is None or not record.parameters:
        return None
    if record.space_changes and winner.number < record.space_changes[-1].first_trial:
        return None
    shown = find_shown_effects(record) if shown is None else shown
    wider = {crowd.parameter.key: crowd for crowd in find_crowded_edges(record, shown)}
    narrower = {each.parameter.key: each for each in find_settled_parameters(record, shown)}
    kept = [parameter for parameter in record.parameters if parameter.key in winner.params]
    if not all(_is_branch_shown_worse(record, parameter, winner, narrower.get(parameter.key)) for parameter in kept):
        return None
    lines = [
        _make_line(record, parameter, winner, wider.get(parameter.key), narrower.get(parameter.key))
        for parameter in kept
    ]
    fixed = [_SpaceLine(key, _quote_value(value), "as before") for key, value in record.fixed.items()]
    if all(line.why in ("as before", "one value") for line in lines) or all(line.why == "one value" for line in lines):
        return None
    head = (
        f"# The next round after {len(record.trials)} trials of {record.name}, whose winner is trial {winner.number}.\n"
    )
    return head + "".join(_format_line(line) for line in [*lines, *fixed])


def _is_branch_shown_worse(
    record: SweepRecord, parameter: Parameter, winner: TrialRecord, narrower: SettledParameter | None
) -> bool:
    """Return whether the values that lead to branches other than the winner's are shown to be worse."""
    allowed = _list_allowed_values(record, parameter, winner)
    if allowed is None:
        return True
    if narrower is None:
        return False
    if parameter.kind == "choice":
        return all(_contains(choice, allowed) for choice in narrower.kept_options)
    return min(allowed) <= narrower.low and narrower.high <= max(allowed)


def _format_line(line: _SpaceLine) -> str:
    """Format a line as YAML. A text that YAML would read as another type is quoted."""
    entry = yaml.safe_dump({line.key: line.text}, width=10_000, allow_unicode=True).rstrip("\n")
    return entry + (f"  # {line.why}" if line.why != "as before" else "") + "\n"


def _make_line(
    record: SweepRecord,
    parameter: Parameter,
    winner: TrialRecord,
    wider: CrowdedEdge | None,
    narrower: SettledParameter | None,
) -> _SpaceLine:
    key, value = parameter.key, winner.params[parameter.key]
    if parameter.kind == "choice":
        return _make_choice_line(parameter, value, _list_allowed_values(record, parameter, winner), narrower)
    if wider is None and narrower is None:
        return _SpaceLine(
            key, parameter.expression or format_range(parameter, parameter.low, parameter.high), "as before"
        )
    low, high = parameter.low, parameter.high
    reasons = []
    if narrower is not None and narrower.best is not None:
        low = _round_outward(parameter, min(narrower.low, value), up=False)
        high = _round_outward(parameter, max(narrower.high, value), up=True)
        reasons.append(f"{narrower.summary} ({CONFIDENCE:.0%} confidence)")
        reasons += [_format_bound(bound) for bound in (narrower.best.lower, narrower.best.upper) if bound is not None]
    if wider is not None:
        ends = widen_range(parameter, is_upper=wider.is_upper)
        low, high = (low, ends[1]) if wider.is_upper else (ends[0], high)
        effect, end = wider.effect, "upper" if wider.is_upper else "lower"
        reasons.append(
            f"{wider.num_at_edge} of the {wider.num_best} best trials are at the {end} end, "
            f"effect shown at epoch {effect.epoch} with p = {effect.p_value:.2g}"
        )
    if low == high:
        return _SpaceLine(key, _quote_value(value), "; ".join(reasons))
    return _SpaceLine(key, format_range(parameter, low, high), "; ".join(reasons))


def _format_bound(bound: Bound) -> str:
    return f"trend of {bound.num_trials} trials at epoch {bound.epoch}, p = {bound.p_value:.2g}"


def _round_outward(parameter: Parameter, value: float, *, up: bool) -> float:
    """Round an end of a range outward to few digits, but not beyond the searched range."""
    return min(max(round_outward(parameter, value, up=up), parameter.low), parameter.high)


def _make_choice_line(
    parameter: Parameter, value: Any, allowed: Sequence[Any] | None, narrower: SettledParameter | None
) -> _SpaceLine:
    key = parameter.key
    kept = list(parameter.choices) if allowed is None else list(allowed)
    reasons = [] if allowed is None else ["of the winner's branch"]
    if narrower is not None:
        kept = [choice for choice in kept if _contains(choice, narrower.kept_options) or _contains(choice, [value])]
        names = [format_value(choice) for choice in parameter.choices]
        reasons += [
            f"{names[each.option]} did worse than {names[each.better]} in {each.bound.num_trials} trials at epoch "
            f"{each.bound.epoch}, p = {each.bound.p_value:.2g}"
            for each in narrower.worse
        ]
    if not reasons:
        text = parameter.expression or _format_choices(kept)
        return (
            _SpaceLine(key, text, "as before") if len(kept) > 1 else _SpaceLine(key, _quote_value(value), "one value")
        )
    return _SpaceLine(key, _format_choices(kept) if len(kept) > 1 else _quote_value(value), "; ".join(reasons))


def _contains(choice: Any, choices: Sequence[Any]) -> bool:
    """Return whether it is one of the choices. The options 1 and True are different."""
    return any(is_same(choice, other) for other in choices)


def _list_allowed_values(record: SweepRecord, parameter: Parameter, winner: TrialRecord) -> list[Any] | None:
    """List the values of a parameter for which a trial has the same parameters as the winner.

    A parameter decides whether another one exists if, in all trials so far, trials with the same value of it agree on
    whether they have the other one.

    Returns:
        The values; None if no value leads to another branch.
    """
    if parameter.kind == "float" or parameter.is_conditional:
        return None
    by_value: dict[str, list[set[str]]] = {}
    for trial in record.trials:
        by_value.setdefault(json.dumps(trial.params[parameter.key]), []).append(set(trial.params))
    barred: set[str] = set()
    for other in record.parameters:
        drawn = {value: {other.key in keys for keys in sets} for value, sets in by_value.items()}
        if not other.is_conditional or any(len(each) > 1 for each in drawn.values()):
            continue
        barred |= {value for value, each in drawn.items() if each != {other.key in winner.params}}
    if not barred:
        return None
    kept = [json.loads(value) for value in by_value if value not in barred]
    return sorted(kept) if parameter.kind == "int" else kept


def _format_choices(choices: Sequence[Any]) -> str:
    return f"choice({', '.join(map(_quote_value, choices))})"


def _quote_value(value: Any) -> Any:
    """Quote a value for Hydra's override grammar."""
    return quote_override("key", value).partition("=")[2]
