"""The Pareto front of a sweep with two objectives, for a person: which trials no other one beats in both."""

from handpose.report.formatting import format_cost, format_metric, format_params
from handpose.report.trial_table import TrialTable


def format_front(table: TrialTable, *, max_trials: int = 12) -> str:
    """The front in a line a trial, the best metric first; empty for a sweep with one objective, or without a trial.

    Of more than `max_trials` trials so many are shown, evenly along the front, both its ends among them.
    """
    front = table.find_front() if table.objectives else []
    if not front:
        return ""
    (other,) = table.objectives
    shown = [front[index] for index in _select_evenly(len(front), max_trials)]
    values = [format_metric(table.metric, table.get_value(row)) for row in shown]
    costs = [format_cost(other.name, row.costs[other.name]) for row in shown]
    left_out = f", {len(shown)} of them shown" if len(shown) < len(front) else ""
    lines = [f"front       {len(front)} of {len(table.rows)} trials, after {front[0].epochs} epochs{left_out}"]
    for row, value, cost in zip(shown, values, costs, strict=True):
        place = f"trial {row.number:<4d}  {value:>{max(map(len, values))}}  {cost:<{max(map(len, costs))}}"
        lines.append(f"            {place}  {format_params(row.params)}")
    return "\n".join(lines)


def _select_evenly(num: int, max_indices: int) -> list[int]:
    """At most so many of the first `num` whole numbers, the first and the last among them."""
    if num <= max_indices:
        return list(range(num))
    return sorted({round(place * (num - 1) / (max_indices - 1)) for place in range(max_indices)})
