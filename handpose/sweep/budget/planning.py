"""Chooses how much of each part of a sweep fits into the time and the GPU-hours that are left.

If everything that is configured fits, the rest of the budget goes to more trials. Otherwise the parts that matter least
to the result become smaller first: the number of finalists and their seeds, then the number of trials, then their
epochs. The retraining keeps at least a fixed share of the budget, because a longer training improves the result most.

Values that the user has given are kept.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from handpose.errors import UserError

MIN_TRIALS = 8
"""The epochs of a trial are reduced to two before there are fewer trials than this."""

RETRAIN_SHARE = 0.4
"""Smallest part of the time left that is kept for the retraining, unless it needs less."""

SHORT_RETRAIN_SHARE = 0.3
"""The same for the last plan before there are fewer than `MIN_TRIALS` trials."""
_SHORT_EPOCHS = 2

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
    left: Work, asked: Amounts, costs: Costs, *, given: Collection[str], described: str, num_points: int | None = None
) -> BudgetPlan:
    """Choose amounts of work that fit into what is left of a budget.

    Args:
        left: what is left of the budget.
        asked: the amounts of the configuration.
        costs: what they take.
        given: configuration keys that the user has given. Their values are kept.
        described: the budget, for errors.
        num_points: number of different trials that the search space allows; None: any number.

    Raises:
        UserError: not even the smallest amounts fit that keep the user's values, or no time is left.
    """
    left = Work(left.wall_s - costs.fixed.wall_s, left.gpu_s - costs.fixed.gpu_s)
    candidates = _list_candidates(asked, given)
    plans = (_evaluate(candidate, left, costs) for candidate in candidates)
    plan = next((plan for plan in plans if _is_acceptable(plan, costs)), None)
    if plan is None:
        smallest = _evaluate(candidates[-1], left, costs)
        _check_fits(smallest, costs, given, described)
        return smallest
    if plan.amounts == asked and KEYS["num_trials"] not in given and plan.retrain_epochs >= costs.num_retrain_epochs:
        return _add_trials(plan, left, costs, _MAX_TRIALS if num_points is None else num_points)
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
    for amounts in _list_candidates(asked, given):
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


def _is_acceptable(plan: BudgetPlan, costs: Costs) -> bool:
    """Return whether the trials and the confirmation leave enough for the retraining."""
    if min(plan.trials_limit.wall_s - plan.trials.wall_s, plan.trials_limit.gpu_s - plan.trials.gpu_s) < 0:
        return False
    if plan.retrain_epochs >= costs.num_retrain_epochs:
        return True
    is_last = (plan.amounts.num_trials, plan.amounts.max_epochs) == (MIN_TRIALS, _SHORT_EPOCHS)
    share = plan.left.scale(SHORT_RETRAIN_SHARE if is_last else RETRAIN_SHARE)
    return plan.retrain_epochs >= 1 and plan.retrain_epochs >= costs.retrain_epoch.count_fitting(share)


def _list_candidates(asked: Amounts, given: Collection[str]) -> list[Amounts]:
    """List amounts from the configured ones down to the smallest. Values that the user has given stay the same."""
    found, kept = [asked], {name: getattr(asked, name) for name, key in KEYS.items() if key in given}
    for smaller in _reduce(asked):
        amounts = smaller._replace(**kept)
        if amounts not in found:
            found.append(amounts)
    return found


def _reduce(asked: Amounts) -> Iterator[Amounts]:
    """Yield smaller and smaller amounts."""
    current = asked
    for top_k in range(asked.top_k - 1, 1, -1):  # two finalists are the fewest that compete
        current = current._replace(top_k=top_k)
        yield current
    for seeds in range(asked.seeds - 1, 0, -1):
        current = current._replace(seeds=seeds)
        yield current
    for num_trials in _list_smaller(asked.num_trials, MIN_TRIALS):
        current = current._replace(num_trials=num_trials)
        yield current
    for max_epochs in _list_smaller(asked.max_epochs, 3):
        current = current._replace(max_epochs=max_epochs)
        yield current
    if current.top_k > 1:
        current = current._replace(top_k=1)
        yield current
    for num_trials, max_epochs in ((MIN_TRIALS, _SHORT_EPOCHS), (6, 2), (4, 2), (3, 2), (3, 1), (2, 1)):
        current = current._replace(
            num_trials=min(current.num_trials, num_trials), max_epochs=min(current.max_epochs, max_epochs)
        )
        yield current


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
    fits = _is_acceptable(larger, costs) and larger.retrain_epochs >= costs.num_retrain_epochs
    return larger if fits else plan


def _check_fits(plan: BudgetPlan, costs: Costs, given: Collection[str], described: str) -> None:
    """Raise UserError if there is no time at all, or if values that the user has given do not fit."""
    least = plan.trials + plan.confirmation + costs.retrain_epoch.scale(min(1, costs.num_retrain_epochs)) + costs.fixed
    left = plan.left + costs.fixed
    kept = [f"{key}={value}" for key, value in list_values(plan.amounts).items() if key in given]
    what = f"{', '.join(kept)} {'do' if len(kept) > 1 else 'does'} not fit" if kept else "nothing fits"
    if plan.left.wall_s <= 0 or (kept and least.wall_s > left.wall_s):
        raise UserError(
            f"{described} leaves {max(0.0, left.wall_s):.0f} s for training, into which {what}: at least about "
            f"{least.wall_s:.0f} s are needed; give a larger budget" + (" or leave these values out" if kept else "")
        )
    if plan.left.gpu_s <= 0 or (kept and least.gpu_s > left.gpu_s):
        raise UserError(
            f"{described} leaves {max(0.0, left.gpu_s) / 3600:.2g} GPU-hours, into which {what}: at least about "
            f"{least.gpu_s / 3600:.2g} are needed; give a larger budget"
            + (" or leave these values out" if kept else "")
        )
