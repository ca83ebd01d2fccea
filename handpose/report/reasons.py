"""Sentences that say why a decision was made, from the reasons that the events of a sweep store.

The same sentence stands in trials.csv, in the report, in TensorBoard and in the story of a trial. The audit compares
the numbers in trials.csv with those of the events, not the words.
"""

from collections.abc import Callable

from handpose.report.formatting import (
    format_comparison,
    format_cost,
    format_cost_name,
    format_cost_value,
    format_metric,
    format_metric_name,
    format_metric_value,
)
from handpose.schedulers.reason import Reason


def format_reason(reason: Reason | None, metric: str, *, outcome: str, epoch: int = 0) -> str:
    """Format the reason of a decision: `rung at epoch 3: PA-MPJPE 19.90 mm, worse than the cutoff 17.80, rank 4 of 5`.

    Args:
        reason: the reason; None if none is recorded, as in sweeps of earlier versions.
        metric: the metric of the sweep.
        outcome: what was decided: a decision about a report, `retry` or `no_retry` after a failure, or `resume`.
        epoch: the epoch of the report, or the last epoch of a trial that is resumed.

    Returns:
        The reason without a full stop; empty if there is none.
    """
    if reason is None:
        return ""
    formatter, needed = _FORMATTERS.get(reason.rule, (_format_other, ()))
    is_known = all(getattr(reason, name) is not None for name in needed)  # an extension may use a rule's name otherwise
    return (formatter if is_known else _format_other)(reason, metric, outcome, epoch)


def format_close_reason(reason: str, budget: Reason | None) -> str:
    """Format why a trial was interrupted when its sweep was closed.

    Args:
        reason: as in `SweepClosed.reason`.
        budget: the spent budget, if one is recorded.
    """
    if budget is not None and budget.cutoff is not None:
        return format_spent_budget(budget.rule, budget.cutoff, budget.value)
    return {"spent": "a budget is spent", "finished": "the sweep has finished"}.get(reason, f"the sweep was {reason}")


def format_spent_budget(key: str, amount: float, used: float | None) -> str:
    """Format why a sweep has ended before all of its trials.

    Args:
        key: configuration key of its budget, or `sweep.stop_when`.
        amount: the value of the key.
        used: how much was used; of `sweep.stop_when`, the gain that was expected.
    """
    if key != "sweep.stop_when" or used is None:
        return f"{key}={amount:g} is spent"
    gain = f"doubling the number of trials is expected to improve the metric by only {used:.2g}"
    return f"{gain}, less than {key}={amount:g}"


def _format_rung(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.value is not None
    place = f"rung at epoch {epoch}: "
    if reason.num_passing is not None:
        return f"{place}{format_metric(metric, reason.value)}, {_format_rank(reason, outcome)}"
    if reason.cutoff is None:
        return f"{place}{format_metric(metric, reason.value)}, the first trial there"
    value, cutoff = format_comparison(metric, reason.value, reason.cutoff)
    relation = "worse than" if outcome == "stop" else "within"
    return f"{place}{value}, {relation} the cutoff {cutoff}, rank {reason.rank} of {reason.num_compared}"


def _format_pareto_rung(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.value is not None
    value = format_metric(metric, reason.value)
    return f"rung at epoch {epoch}: {value}, by accuracy and cost {_format_rank(reason, outcome)}"


def _format_last_rung(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.value is not None
    value = format_metric(metric, reason.value)
    return f"rung at epoch {epoch}: {value}, the best of the paused trials, and nothing else is left to train"


def _format_rank(reason: Reason, outcome: str) -> str:
    rank, num_compared, num_passing = reason.rank, reason.num_compared, reason.num_passing
    place = f"one of {num_compared}" if rank is None else f"rank {rank} of {num_compared}"
    if not num_passing:
        return f"{place}, too few for one to pass"
    best = "the best one passes" if num_passing == 1 else f"the best {num_passing} pass"
    if rank is None:
        return f"{place}, and not among the best {num_passing}, which pass"
    first = ", another one first" if outcome == "pause" and rank <= num_passing else ""
    return f"{place}, and {best}{first}"


def _format_median(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.value is not None
    assert reason.cutoff is not None
    assert reason.num_compared is not None
    value, cutoff = format_comparison(metric, reason.value, reason.cutoff)
    relation, others = "worse than" if outcome == "stop" else "within", reason.num_compared - 1
    return f"epoch {epoch}: at best {value}, {relation} {cutoff}, the median of the means of {others} other trials"


def _format_population(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    rank, num_compared, num_passing = reason.rank, reason.num_compared, reason.num_passing
    assert reason.value is not None
    assert rank is not None
    assert num_compared is not None
    assert num_passing is not None
    text = f"epoch {epoch}: {format_metric(metric, reason.value)}, rank {rank} of {num_compared} in the population"
    if rank <= num_passing:
        return text
    remark = ", but no better one has trained as far" if outcome == "continue" else ""
    num_worst = num_compared - num_passing
    worst = "the worst one copies" if num_worst == 1 else f"the worst {num_worst} copy"
    return f"{text}, and {worst} a better trial{remark}"


def _format_worth(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.value is not None
    assert reason.num_compared is not None
    text = f"epoch {epoch}: expected to end at {format_metric(metric, reason.value)}"
    others = reason.num_compared - 1
    if not others:
        return f"{text}; nothing else is left to train"
    num_better = (reason.rank or 1) - 1
    if not num_better:
        return f"{text}; none of {others} others, paused or new, is worth enough more to be trained instead"
    verb = "is" if num_better == 1 else "are"
    return f"{text}; {num_better} of {others} others, paused or new, {verb} worth enough more to be trained instead"


def _format_turn(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    return "its turn in the population" if outcome == "resume" else "the turn of another trial of the population"


def _format_last_epoch(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    return f"trained to sweep.max_epochs={reason.cutoff:g}"


def _format_last_fold(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    return f"trained with all folds, {reason.cutoff:g} epochs"


def _format_not_finite(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    name, _, _ = format_metric_name(metric).partition(" ")  # without the unit
    return f"epoch {epoch}: {name} is not finite"


def _format_divergence(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.value is not None
    assert reason.cutoff is not None
    value, cutoff = format_comparison(metric, reason.value, reason.cutoff)
    return f"epoch {epoch}: {value}, beyond {cutoff}, which sweep.divergence_factor allows after its best value"


def _format_limit(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    assert reason.subject is not None
    name = reason.subject
    if reason.value is None:
        return f"{format_cost_name(name)} could not be measured"
    limit = "" if reason.cutoff is None else f", above the limit {format_cost_value(name, reason.cutoff)}"
    return f"{format_cost(name, reason.value)}{limit} (searcher.constraints.{name})"


def _format_retries(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    allowed = "allows a retry" if outcome == "retry" else "allows no further retry"
    return f"failure {reason.value:g} of the trial, and sweep.max_retries={reason.cutoff:g} {allowed}"


def _format_gpu_share(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    return f"it gets {reason.value:g} of a GPU instead of {reason.cutoff:g}"


def _format_halt(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    return f"the sweep is halted: {reason.value:g} trials failed before any had reported"


def _format_kept(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    return (
        f"kept by the user, although the scheduler would {reason.subject} it" if reason.subject else "kept by the user"
    )


def _format_raised(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    then = {"pause": "waits at a rung", "stop": "stopped at a rung"}.get(outcome, "continues")
    return f"the user has raised sweep.max_epochs to {reason.cutoff:g}: {then}"


def _format_other(reason: Reason, metric: str, outcome: str, epoch: int) -> str:
    """Format a rule that only its scheduler knows."""
    parts = [reason.rule if reason.subject is None else f"{reason.rule} ({reason.subject})"]
    if reason.value is not None:
        parts.append(format_metric(metric, reason.value))
    if reason.cutoff is not None:
        parts.append(f"cutoff {format_metric_value(metric, reason.cutoff)}")
    if reason.rank is not None:
        parts.append(f"rank {reason.rank}" + (f" of {reason.num_compared}" if reason.num_compared else ""))
    if reason.num_passing is not None:
        parts.append(f"the best {reason.num_passing} pass")
    text = ", ".join(parts)
    return f"epoch {epoch}: {text}" if epoch else text


_Formatter = Callable[[Reason, str, str, int], str]


def _format_words(words: str) -> tuple[_Formatter, tuple[str, ...]]:
    return lambda reason, metric, outcome, epoch: words, ()


_FORMATTERS: dict[str, tuple[_Formatter, tuple[str, ...]]] = {
    "rung": (_format_rung, ("value", "rank", "num_compared")),
    "pareto_rung": (_format_pareto_rung, ("value", "num_compared", "num_passing")),
    "last_rung": (_format_last_rung, ("value",)),
    "median": (_format_median, ("value", "cutoff", "num_compared")),
    "population": (_format_population, ("value", "rank", "num_compared", "num_passing")),
    "worth": (_format_worth, ("value", "rank", "num_compared")),
    "turn": (_format_turn, ()),
    "max_epochs": (_format_last_epoch, ("cutoff",)),
    "all_folds": (_format_last_fold, ("cutoff",)),
    "not_finite": (_format_not_finite, ()),
    "divergence_factor": (_format_divergence, ("value", "cutoff")),
    "cost_limit": (_format_limit, ("subject",)),
    "retries": (_format_retries, ("value", "cutoff")),
    "gpu_share": (_format_gpu_share, ("value", "cutoff")),
    "halt": (_format_halt, ("value",)),
    "blameless": _format_words("not the trial's fault, so it does not count as a retry"),
    "node": _format_words("perhaps the node's fault, so it does not count as a retry for now"),
    "quarantine": _format_words("the node's fault, so it does not count as a retry"),
    "same_failure": _format_words("the same failure would come again"),
    "not_promoted": _format_words("not promoted before the sweep ended"),
    "kept_by_user": (_format_kept, ()),
    "stopped_by_user": _format_words("stopped by the user"),
    "retried_by_user": _format_words("retried by the user"),
    "sweep_paused": _format_words("the user has paused the sweep"),
    "epochs_raised": (_format_raised, ("cutoff",)),
    "no_checkpoint": _format_words("it has no checkpoint to continue from after the user has raised sweep.max_epochs"),
    "returned": _format_words("its function returned before the last epoch"),
}
"""Rule -> function of the reason, the metric, the outcome and the epoch; and the fields that the function needs."""
