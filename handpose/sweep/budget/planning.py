"""Chooses how much of each part of a sweep fits into the time and the GPU-hours that are left.

If everything that is configured fits, the rest of the budget goes to more trials. Otherwise the parts that matter least
to the result become smaller first: the number of finalists and their seeds, then the number of trials, then their
epochs. The retraining keeps at least a fixed share of the budget, because a longer training improves the result most.

Values that the user has given are kept.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from handpose.errors import UserError

MIN_TRIALS = 8
"""The epochs of a trial are reduced to two before there are fewer trials than this."""

RETRAIN_SHARE = 0.4
"""Smallest part of the time left that is kept for the retraining, unless it needs less."""

SHORT_RETRAIN_SHARE = 0.3
"""The same for the last plan before there are fewer than `MIN_TRIALS` trials."""
_SHORT_EPOCHS = 2
_SMALLEST = ((2, 1), (1, 1))
"""Trials and epochs of the smallest plans. They have no confirmation, and the retraining keeps an epoch at least."""

_RETRAIN_SHARE_AFTER_TRIALS = 0.7
_MAX_TRIALS = 100_000


class Amounts(NamedTuple):
    """How much work a sweep is.

    Attributes:
        num_trials: number of trials.
        max_epochs: epochs of a complete trial.
        top_k: number of finalists that are confirmed.
        seeds: number of seeds of the confirmation.
    """

    num_trials: int
    max_epochs: int
    top_k: int
    seeds: int

    @property
    def is_confirmed(self) -> bool:
        """Whether finalists are trained again."""
        return self.top_k > 0 and self.seeds > 0


KEYS: dict[str, str] = {
    "num_trials": "sweep.num_trials",
    "max_epochs": "sweep.max_epochs",
    "top_k": "sweep.confirm.top_k",
    "seeds": "sweep.confirm.seeds",
}
"""Attribute of `Amounts` -> configuration key."""


class Work(NamedTuple):
    """What a part of a sweep takes.

    Attributes:
        wall_s: seconds.
        gpu_s: GPU-seconds.
    """

    wall_s: float
    gpu_s: float

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.wall_s + other.wall_s, self.gpu_s + other.gpu_s)

    def scale(self, factor: float) -> "Work":
        """Return `factor` times this work."""
        return Work(self.wall_s * factor, self.gpu_s * factor)

    def count_fitting(self, left: "Work") -> float:
        """Return how often this work fits into what is left; 0 if something is negative."""
        parts = [have / need for have, need in zip(left, self, strict=True) if need > 0]
        return max(0.0, min(parts, default=math.inf))


class Costs(NamedTuple):
    """Functions that estimate what the parts of a sweep take.

    Attributes:
        trials: of all trials, from the amounts.
        confirmation: of the confirmation, from the amounts.
        retrain_epoch: an epoch of the retraining.
        num_retrain_epochs: epochs of the full schedule; 0 if the winner is not retrained.
        fixed: everything else that is to come: the start of the retraining, the test, and the report.
    """

    trials: Callable[[Amounts], Work]
    confirmation: Callable[[Amounts], Work]
    retrain_epoch: Work
    num_retrain_epochs: int
    fixed: Work


class BudgetPlan(NamedTuple):
    """How a budget is divided.

    Attributes:
        amounts: how much is trained.
        trials: what the trials are expected to take.
        confirmation: what the confirmation is expected to take.
        retrain_epochs: epochs of the retraining that are expected to fit, at most those of its schedule.
        retraining: what they take.
        left: what was left when the plan was made.
    """

    amounts: Amounts
    trials: Work
    confirmation: Work
    retrain_epochs: float
    retraining: Work
    left: Work

    @property
    def trials_limit(self) -> Work:
        """What the trials may take: all that the confirmation and the retraining do not need."""
        return Work(
            self.left.wall_s - self.confirmation.wall_s - self.retraining.wall_s,
            self.left.gpu_s - self.confirmation.gpu_s - self.retraining.gpu_s,
        )


def list_values(amounts: Amounts) -> dict[str, int]:
    """Return configuration key -> amount."""
    return {key: getattr(amounts, name) for name, key in KEYS.items()}


def make_budget_plan(
    left: Work,
    asked: Amounts,
    costs: Costs,
    *,
    given: Collection[str],
    described: str,
    remedy: str = "give a larger budget",
    num_points: int | None = None,
    allowed_epochs: Collection[int] | None = None,
) -> BudgetPlan:
    """Choose amounts of work that fit into what is left of a budget.

    Args:
        left: what is left of the budget.
        asked: the amounts of the configuration.
        costs: what they take.
        given: configuration keys that the user has given. Their values are kept.
        described: the budget, for errors.
        remedy: what gives more time, for errors.
        num_points: number of different trials that the search space allows; None: any number.
        allowed_epochs: the numbers of epochs that a trial may have, with the scheduler and the validation as they are;
            those of `asked` are always allowed. None: any number.

    Raises:
        UserError: not even the smallest amounts fit that keep the user's values.
    """
    left = Work(left.wall_s - costs.fixed.wall_s, left.gpu_s - costs.fixed.gpu_s)
    most = _MAX_TRIALS if num_points is None else num_points
    asked = asked._replace(num_trials=min(asked.num_trials, most))
    candidates = _list_candidates(asked, given, allowed_epochs)
    for amounts, retrain_share in candidates:
        plan = _evaluate(amounts, left, costs)
        if _is_acceptable(plan, costs, retrain_share):
            break
    else:
        enlarging = _find_enlarging(plan.amounts, asked, given, allowed_epochs)
        if enlarging:
            remedy += " or leave these values out"
        if min(allowed_epochs or [1]) > 1:
            remedy += (
                ", or options of the scheduler and trainer.check_val_every_n_epoch with which a trial may have fewer "
                f"than {min(allowed_epochs or [1])} epochs"
            )
        _check_fits(plan, costs, described, enlarging=enlarging, remedy=remedy)
    if plan.amounts == asked and KEYS["num_trials"] not in given and plan.retrain_epochs >= costs.num_retrain_epochs:
        return _add_trials(plan, left, costs, most)
    return plan


def choose_confirmation(
    left: Work, asked: Amounts, *, run: Work, num_slots: int, retraining: Work, given: Collection[str]
) -> Amounts:
    """Choose anew, after the trials, how many finalists and seeds fit.

    Args:
        left: what is left of the budget.
        asked: the amounts of the configuration.
        run: what one run of the confirmation takes.
        num_slots: number of runs at a time.
        retraining: what the retraining takes with all its epochs.
        given: configuration keys that the user has given. Their values are kept.

    Returns:
        `asked` with the largest `top_k` and `seeds` that leave enough for the retraining; 0 of both if none do.
    """
    kept = left.scale(_RETRAIN_SHARE_AFTER_TRIALS)
    spare_s = left.wall_s - min(retraining.wall_s, kept.wall_s)
    spare_gpu_s = left.gpu_s - min(retraining.gpu_s, kept.gpu_s)
    for amounts, _ in _list_candidates(asked, given):
        num_runs = (amounts.top_k + 1) * amounts.seeds
        needed_s = math.ceil(num_runs / num_slots) * run.wall_s
        if needed_s <= spare_s and num_runs * run.gpu_s <= spare_gpu_s:
            return asked._replace(top_k=amounts.top_k, seeds=amounts.seeds)
    if {KEYS["top_k"], KEYS["seeds"]} & set(given):
        return asked
    return asked._replace(top_k=0, seeds=0)


def _evaluate(amounts: Amounts, left: Work, costs: Costs) -> BudgetPlan:
    trials = costs.trials(amounts)
    confirmation = costs.confirmation(amounts) if amounts.is_confirmed else Work(0.0, 0.0)
    used = trials + confirmation
    rest = Work(left.wall_s - used.wall_s, left.gpu_s - used.gpu_s)
    epochs = min(costs.num_retrain_epochs, costs.retrain_epoch.count_fitting(rest))
    return BudgetPlan(amounts, trials, confirmation, epochs, costs.retrain_epoch.scale(epochs), left)


def _is_acceptable(plan: BudgetPlan, costs: Costs, retrain_share: float) -> bool:
    """Return whether the trials and the confirmation leave enough for the retraining."""
    if min(plan.trials_limit.wall_s - plan.trials.wall_s, plan.trials_limit.gpu_s - plan.trials.gpu_s) < 0:
        return False
    if plan.retrain_epochs >= costs.num_retrain_epochs:
        return True
    kept = costs.retrain_epoch.count_fitting(plan.left.scale(retrain_share)) if retrain_share else 0.0
    return plan.retrain_epochs >= max(1.0, kept)


def _list_candidates(
    asked: Amounts, given: Collection[str], allowed_epochs: Collection[int] | None = None
) -> list[tuple[Amounts, float]]:
    """List amounts from the configured ones down to the smallest, each with the share of the retraining.

    Values that the user has given stay the same. If a confirmation is given, there is one. Epochs that are not allowed
    become the next smaller allowed number, or the smallest one.
    """
    found, kept = [(asked, RETRAIN_SHARE)], {name: getattr(asked, name) for name, key in KEYS.items() if key in given}
    needs_confirmation = asked.is_confirmed and not kept.keys().isdisjoint(("top_k", "seeds"))
    for smaller, share in _reduce(asked):
        amounts = smaller
        if needs_confirmation and not smaller.is_confirmed:
            amounts = amounts._replace(top_k=1, seeds=1)
        if allowed_epochs is not None:
            fitting = [epochs for epochs in allowed_epochs if epochs <= amounts.max_epochs]
            amounts = amounts._replace(max_epochs=max(fitting, default=min(allowed_epochs, default=asked.max_epochs)))
        candidate = (amounts._replace(**kept), share)
        if candidate not in found:
            found.append(candidate)
    return found


def _reduce(asked: Amounts) -> Iterator[tuple[Amounts, float]]:
    """Yield smaller and smaller amounts, each with the share of the retraining."""
    current = asked
    for top_k in range(asked.top_k - 1, 1, -1):  # two finalists are the fewest that compete
        current = current._replace(top_k=top_k)
        yield current, RETRAIN_SHARE
    for seeds in range(asked.seeds - 1, 0, -1):
        current = current._replace(seeds=seeds)
        yield current, RETRAIN_SHARE
    for num_trials in _list_smaller(asked.num_trials, MIN_TRIALS):
        current = current._replace(num_trials=num_trials)
        yield current, RETRAIN_SHARE
    for max_epochs in _list_smaller(asked.max_epochs, 3):
        current = current._replace(max_epochs=max_epochs)
        yield current, RETRAIN_SHARE
    if current.top_k > 1:
        current = current._replace(top_k=1)
        yield current, RETRAIN_SHARE
    yield _limit_trials(current, MIN_TRIALS, _SHORT_EPOCHS), SHORT_RETRAIN_SHARE
    for num_trials, max_epochs in ((6, 2), (4, 2), (3, 2), (3, 1), (2, 1)):
        yield _limit_trials(current, num_trials, max_epochs), RETRAIN_SHARE
    for num_trials, max_epochs in _SMALLEST:
        yield _limit_trials(current._replace(top_k=0, seeds=0), num_trials, max_epochs), 0.0


def _limit_trials(amounts: Amounts, num_trials: int, max_epochs: int) -> Amounts:
    return amounts._replace(
        num_trials=min(amounts.num_trials, num_trials), max_epochs=min(amounts.max_epochs, max_epochs)
    )


def _list_smaller(value: int, least: int) -> list[int]:
    """List integers from a value down to the least one, in steps of about a sixth."""
    smaller = itertools.accumulate(itertools.repeat(value), lambda now, _: min(now - 1, round(now * 5 / 6)))
    return list(itertools.takewhile(lambda each: each >= least, itertools.islice(smaller, 1, None)))


def _add_trials(plan: BudgetPlan, left: Work, costs: Costs, most: int) -> BudgetPlan:
    """Return the plan with as many more trials as fit, found by bisection."""
    best, low, high = plan, plan.amounts.num_trials, plan.amounts.num_trials
    while high < most and best.amounts.num_trials == high:  # grow until it does not fit
        low, high = high, min(most, 2 * high)
        best = _choose_larger(best, _evaluate(plan.amounts._replace(num_trials=high), left, costs), costs)
    while high - low > 1 and best.amounts.num_trials < high:
        middle = (low + high) // 2
        best = _choose_larger(best, _evaluate(plan.amounts._replace(num_trials=middle), left, costs), costs)
        low, high = (middle, high) if best.amounts.num_trials == middle else (low, middle)
    return best


def _choose_larger(plan: BudgetPlan, larger: BudgetPlan, costs: Costs) -> BudgetPlan:
    fits = _is_acceptable(larger, costs, RETRAIN_SHARE) and larger.retrain_epochs >= costs.num_retrain_epochs
    return larger if fits else plan


def _find_enlarging(
    smallest: Amounts, asked: Amounts, given: Collection[str], allowed_epochs: Collection[int] | None
) -> list[str]:
    """Return the given values, `key=value`, without which there would be a smaller plan than the smallest one."""
    free, _ = _list_candidates(asked, (), allowed_epochs)[-1]
    return [
        f"{key}={getattr(smallest, name)}"
        for name, key in KEYS.items()
        if key in given and getattr(smallest, name) > getattr(free, name)
    ]


def _check_fits(smallest: BudgetPlan, costs: Costs, described: str, *, enlarging: Sequence[str], remedy: str) -> None:
    """Raise UserError if even the smallest plan needs more than is left."""
    retraining = costs.retrain_epoch.scale(min(1, costs.num_retrain_epochs))
    least = smallest.trials + smallest.confirmation + retraining + costs.fixed
    left = smallest.left + costs.fixed
    what = f"{', '.join(enlarging)} {'do' if len(enlarging) > 1 else 'does'} not fit"
    if not enlarging:
        what = f"the smallest plan, {_describe_smallest(smallest.amounts, costs)}, does not fit"
    if least.wall_s > left.wall_s:
        raise UserError(
            f"{described} leaves {max(0.0, left.wall_s):.0f} s for training, into which {what}: at least about "
            f"{math.ceil(least.wall_s)} s are needed; {remedy}"
        )
    if least.gpu_s > left.gpu_s:
        raise UserError(
            f"{described} leaves {max(0.0, left.gpu_s) / 3600:.2g} GPU-hours, into which {what}: at least about "
            f"{least.gpu_s / 3600:.2g} are needed; {remedy}"
        )


def _describe_smallest(amounts: Amounts, costs: Costs) -> str:
    trials = f"{amounts.num_trials} trial{'' if amounts.num_trials == 1 else 's'}"
    epochs = f"{amounts.max_epochs} epoch{'' if amounts.max_epochs == 1 else 's'}"
    return f"{trials} of {epochs}" + (" and one epoch of the retraining" if costs.num_retrain_epochs else "")
