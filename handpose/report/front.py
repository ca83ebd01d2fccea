"""The Pareto front of a sweep with two objectives, for a person: which trials no other one beats in both."""

from handpose.report.table import TrialTable
from handpose.report.words import cost_text, metric_text, params_text


def front_text(table: TrialTable, *, most: int = 12) -> str:
    """The front in a line a trial, the best metric first; empty for a sweep with one objective, or without a trial.

    Of more than `most` trials so many are shown, evenly along the front, both its ends among them.
    """
    front = table.front() if table.objectives else []
    if not front:
        return ""
    (other,) = table.objectives
    shown = [front[index] for index in _evenly(len(front), most)]
    values = [metric_text(table.metric, table.value(row)) for row in shown]
    costs = [cost_text(other.name, row.costs[other.name]) for row in shown]
    left_out = f", {len(shown)} of them shown" if len(shown) < len(front) else ""
    lines = [f"front       {len(front)} of {len(table.rows)} trials, after {front[0].epochs} epochs{left_out}"]
    for row, value, cost in zip(shown, values, costs, strict=True):
        place = f"trial {row.number:<4d}  {value:>{max(map(len, values))}}  {cost:<{max(map(len, costs))}}"
        lines.append(f"            {place}  {params_text(row.params)}")
    return "\n".join(lines)


def _evenly(num: int, most: int) -> list[int]:
    """At most so many of the first `num` whole numbers, the first and the last among them."""
    if num <= most:
        return list(range(num))
    return sorted({round(place * (num - 1) / (most - 1)) for place in range(most)})
