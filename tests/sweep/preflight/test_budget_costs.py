"""What the parts of a sweep take, held against sums that can be done by hand."""

import pytest

from handpose.schedulers.scheduler import Fifo
from handpose.sweep.budget.planning import Amounts, Work
from handpose.sweep.controller.slots import Slots
from handpose.sweep.preflight.budget_costs import estimate_costs
from handpose.sweep.preflight.forecast import RetrainForecast
from handpose.sweep.preflight.probe import RANDOM, ProbePoint, ProbeResults
from tests.sweep.preflight.test_probe import COST
from tests.sweep.sweeps import make_settings

RETRAINING = RetrainForecast(epochs=20, num_devices=2, wall_s=205.0, start_s=5.0)


@pytest.fixture
def estimate(tmp_path):
    """Costs of trials of 10 s an epoch that start in 1 s, in a worker that starts in 7 s."""

    def estimated(*, num_slots=1, gpus=0.0, retraining=RETRAINING, folds=1):
        cost = COST._replace(start_s=1.0, step_s=1.0, steps_per_epoch=10, batches_per_validation=0)
        probed = ProbeResults([ProbePoint(RANDOM, {"optimizer.lr": 0.1})], [cost], worker_start_s=7.0)
        slots = Slots(num_slots=num_slots, cpus=1, gpus=gpus)
        sweep = make_settings(tmp_path, folds=folds)
        return estimate_costs(sweep, probed, slots, bind_scheduler=lambda _: Fifo, retraining=retraining)

    return estimated


def test_the_trials_take_their_epochs_and_the_starts(estimate):
    # 4 s of Ray Tune, 7 s of the worker, and 3 trials of 1 s and 2 epochs.
    assert estimate().trials(Amounts(3, 2, 0, 0)) == Work(4 + 7 + 3 * 21, 0.0)


def test_every_fold_starts_anew_and_has_all_epochs(estimate):
    assert estimate(folds=3).trials(Amounts(2, 2, 0, 0)) == Work(4 + 7 + 2 * 3 * 21, 0.0)
    assert estimate(folds=3).confirmation(Amounts(9, 2, 2, 3)).wall_s == 4 + 7 + 3 * 3 * 3 * 21


def test_neighbours_on_a_cpu_slow_each_other_down(estimate):
    one_round = estimate(num_slots=2).trials(Amounts(2, 2, 0, 0))
    assert one_round.wall_s == pytest.approx(4 + 1.15 * (7 + 21))


def test_trials_on_gpus_use_gpu_seconds_also_while_they_start(estimate):
    work = estimate(num_slots=2, gpus=0.5).trials(Amounts(2, 2, 0, 0))
    assert work == Work(4 + 7 + 21, 0.5 * (2 * 21 + 2 * 7))


def test_the_confirmation_trains_the_finalists_and_the_default_with_each_seed(estimate):
    assert estimate().confirmation(Amounts(9, 2, 2, 3)).wall_s == 4 + 7 + 3 * 3 * 21


def test_an_epoch_of_the_retraining_uses_all_its_devices(estimate):
    costs = estimate(gpus=1.0)
    assert (costs.retrain_epoch, costs.num_retrain_epochs) == (Work(10.0, 20.0), 20)
    assert costs.fixed == Work(5 + 8, 5 * 2)
    assert estimate().retrain_epoch == Work(10.0, 0.0)


def test_without_a_retraining_only_the_report_is_left(estimate):
    costs = estimate(retraining=None)
    assert (costs.retrain_epoch, costs.num_retrain_epochs, costs.fixed) == (Work(0.0, 0.0), 0, Work(8.0, 0.0))
