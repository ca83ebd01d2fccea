"""The search space of the next round: what is settled is narrowed, what ends too early is widened, the rest stays.

Where some parameters are drawn only under others, the file is of the winner's branch: what leads to another branch is
left out, so that it can be written as plain ranges.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from handpose.config import quote_override
from handpose.report.advice import Finding
from handpose.report.ranges import expression, rounded, settled_span
from handpose.report.record import Parameter, SweepRecord, TrialRecord

_MARGIN = 0.5  # of the width of what is settled, to either side


class _Line(NamedTuple):
    key: str
    text: str
    why: str


def next_space(record: SweepRecord, findings: Sequence[Finding]) -> str | None:
    """The text of a search space file, or None where nothing is to be changed or there is no winner yet."""
    winner = record.winner()
    if winner is None or not record.parameters:
        return None
    wider = {
        line.partition(": ")[0]: line.partition(": ")[2] for finding in findings for line in finding.paste.splitlines()
    }
    lines = [
        _line(record, parameter, winner, wider) for parameter in record.parameters if parameter.key in winner.params
    ]
    fixed = [_Line(key, _quoted(value), "as before") for key, value in record.fixed.items()]
    if all(line.why in ("as before", "one value") for line in lines) or all(line.why == "one value" for line in lines):
        return None
    head = (
        f"# The next round after {len(record.trials)} trials of {record.name}, whose winner is trial {winner.number}.\n"
    )
    return head + "".join(_written(line) for line in [*lines, *fixed])


def _written(line: _Line) -> str:
    """As YAML; a text that YAML would read as something else is quoted."""
    entry = yaml.safe_dump({line.key: line.text}, width=10_000, allow_unicode=True).rstrip("\n")
    return entry + (f"  # {line.why}" if line.why != "as before" else "") + "\n"


def _line(record: SweepRecord, parameter: Parameter, winner: TrialRecord, wider: dict[str, str]) -> _Line:
    key, value = parameter.key, winner.params[parameter.key]
    if key in wider:
        return _Line(key, wider[key], "wider: the best trials crowd an edge")
    span = settled_span(record, parameter)
    if parameter.kind == "choice":
        return _choice(record, parameter, winner, span)
    allowed = _allowed(record, parameter, winner)
    if isinstance(span, tuple) and allowed is None:
        low, high = _around(parameter, min(span[0], value), max(span[1], value))
        if low < high:
            return _Line(key, expression(parameter, low, high), "narrower: the best trials agree")
        return _Line(key, _quoted(value), "settled")
    if allowed is not None:
        low, high = min(allowed), max(allowed)
        if low == high:
            return _Line(key, _quoted(value), "of the winner's branch")
        return _Line(key, expression(parameter, low, high), "of the winner's branch")
    return _Line(key, parameter.expression or expression(parameter, parameter.low, parameter.high), "as before")


def _around(parameter: Parameter, low: float, high: float) -> tuple[float, float]:
    """A span with some room, within the range."""
    places = parameter.place(low), parameter.place(high)
    room = _MARGIN * (places[1] - places[0])
    wide = [parameter.value_at(place) for place in (max(0.0, places[0] - room), min(1.0, places[1] + room))]
    if parameter.kind == "int":
        step = parameter.step or 1
        steps = [round((each - parameter.low) / step) for each in wide]
        return int(parameter.low + steps[0] * step), int(parameter.low + steps[1] * step)
    if parameter.step is not None:
        return low, high
    return min(rounded(wide[0]), low), max(rounded(wide[1]), high)


def _choice(record: SweepRecord, parameter: Parameter, winner: TrialRecord, span: object | None) -> _Line:
    key, value = parameter.key, winner.params[parameter.key]
    if span is not None and span == value:
        return _Line(key, _quoted(value), "settled")
    allowed = _allowed(record, parameter, winner)
    if allowed is None:
        text = parameter.expression or _listed(parameter.choices)
        return _Line(key, text, "as before") if len(parameter.choices) > 1 else _Line(key, _quoted(value), "one value")
    return _Line(key, _listed(allowed) if len(allowed) > 1 else _quoted(value), "of the winner's branch")


def _allowed(record: SweepRecord, parameter: Parameter, winner: TrialRecord) -> list[Any] | None:
    """The values under which the same parameters are drawn as in the winner; None where it decides nothing of that.

    It decides about another parameter when, by the trials that there are, its value tells whether that one is drawn.
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


def _listed(choices: Sequence[Any]) -> str:
    return f"choice({', '.join(map(_quoted, choices))})"


def _quoted(value: Any) -> Any:
    """A value in Hydra's grammar."""
    return quote_override("key", value).partition("=")[2]
