"""The Pareto front of a sweep with two objectives, for the terminal."""

from handpose.report.formatting import format_cost, format_metric, format_params
from handpose.report.trial_table import TrialTable


def format_front(table: TrialTable, *, max_trials: int = 12) -> str:
    """Format the front with one line per trial, the best metric first.

    Args:
        table: the trials.
        max_trials: the largest number of trials to show. If there are more, they are selected evenly along the front,
            including both ends.

    Returns:
        The text; empty if there is only one objective, or no trial on the front.
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
    """Select at most `max_indices` of the indices below `num`, evenly spaced, including the first and the last."""
    if num <= max_indices:
        return list(range(num))
    return sorted({round(place * (num - 1) / (max_indices - 1)) for place in range(max_indices)})
