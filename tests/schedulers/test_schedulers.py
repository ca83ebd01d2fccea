"""Rules of early stopping against Ray's and against the paper's pseudo-code; tests/contracts has what all keep."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

from handpose.errors import UserError
from handpose.schedulers.asha import Asha
from handpose.schedulers.median import MedianStopping
from handpose.schedulers.rungs import ParetoRung, Rung
from handpose.schedulers.scheduler import Fifo, SegmentStart

PARAMS = {"optimizer.lr": 1e-3, "heatmap.sigma": 0.05, "model.decoder.depth": 3}


def make_asha(**changes):
    values = {
        "mode": "stop",
        "grace_period": 1,
        "reduction_factor": 3,
        "brackets": 1,
        "max_epochs": 27,
        "seed": 0,
    }
    return Asha(**values | changes)


def drive_scheduler(
    scheduler, *, seed, num_trials=8, num_slots=3, max_epochs=9, gaps=0.0, failures=0.0, coarse=False, costs=None
):
    """Run a sweep that trains nothing; returns its calls as (method, arguments, answer).

    gaps: how often an epoch is not reported. failures: how often a trial ends for good. coarse: many equal losses.
    costs: second objective of a trial.
    """
    rng = random.Random(seed)
    calls, epochs, num_begun = [], {}, 0

    def call(method, *args, **named):
        answer = getattr(scheduler, method)(*args, **named)
        calls.append((method, args, named, answer))
        return answer

    saved, paused = {}, set()
    while True:
        while len(epochs) < num_slots and not (epochs and rng.random() < 0.3):  # a free slot may wait a while
            start = call("choose_trial_to_resume", can_start_trial=num_begun < num_trials)
            if start is not None:
                trial, source, _ = start
                assert trial in paused
                assert source is None or saved[trial] <= saved[source] < max_epochs
                paused.remove(trial)
                epochs[trial] = saved[trial] if source is None else saved[source]
                call("on_trial_resume", start)
            elif num_begun < num_trials:
                epochs[num_begun] = 0
                call("on_trial_start", num_begun, PARAMS)
                if costs is not None:
                    call("on_trial_cost", num_begun, costs(num_begun))
                num_begun += 1
            else:
                break
        if not epochs:
            return calls
        trial = rng.choice(sorted(epochs))
        epochs[trial] += 1
        if rng.random() < failures:
            del epochs[trial]
            saved.pop(trial, None)
            call("on_trial_end", trial)
            continue
        if epochs[trial] < max_epochs and rng.random() < gaps:
            continue
        loss = rng.random() + 1 / epochs[trial]
        decision = call("on_trial_result", trial, epochs[trial], round(loss * 4) / 4 if coarse else loss)
        if epochs[trial] in scheduler.rungs:
            saved[trial] = epochs[trial]
        if decision == "pause":
            assert epochs[trial] in scheduler.rungs
            assert scheduler.needs_checkpoints
            paused.add(trial)
        if decision != "continue" or epochs[trial] == max_epochs:
            del epochs[trial]


def compute_cost(trial):
    """Some are equal."""
    return float(random.Random(trial).randrange(5))


def replay_calls(scheduler, calls):
    return [(method, args, named, getattr(scheduler, method)(*args, **named)) for method, args, named, _ in calls]


def list_reports(calls):
    """(trial, epoch, loss, verdict) of each report."""
    return [(*args, answer) for method, args, _, answer in calls if method == "on_trial_result"]


def list_completed(calls, max_epochs):
    return {trial for trial, epoch, *_ in list_reports(calls) if epoch == max_epochs}


def test_fifo_trains_every_trial_to_its_end():
    assert list_completed(drive_scheduler(Fifo(), seed=0), 9) == set(range(8))
    assert Fifo.rungs == ()


# --- successive halving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grace_period", "reduction_factor", "brackets", "max_epochs"),
    [(1, 3, 1, 27), (1, 3, 3, 30), (2, 2, 1, 17), (5, 4, 2, 6), (4, 2.5, 1, 70), (3, 3, 1, 3), (1, 10, 1, 1000)],
)
def test_rungs_are_those_of_ray_below_the_last_epoch(grace_period, reduction_factor, brackets, max_epochs):
    scheduler = make_asha(
        grace_period=grace_period, reduction_factor=reduction_factor, brackets=brackets, max_epochs=max_epochs
    )
    rays = AsyncHyperBandScheduler(
        grace_period=grace_period, reduction_factor=reduction_factor, brackets=brackets, max_t=max_epochs
    )
    epochs = {math.ceil(epoch) for bracket in rays._brackets for epoch, _ in bracket._rungs}
    assert scheduler.rungs == tuple(sorted(epoch for epoch in epochs if epoch < max_epochs))


def test_a_rung_whose_epoch_is_whole_but_for_rounding_is_that_epoch():
    assert 100 * 1.1 > 110
    assert make_asha(grace_period=100, reduction_factor=1.1, max_epochs=120).rungs == (100, 110)


@pytest.mark.parametrize(
    ("values", "folds", "fold_epochs", "rungs"),
    [
        ({}, 5, 6, (1, 3, 6, 12)),
        ({}, 5, 27, (1, 3, 9, 27, 81)),
        ({}, 2, 10, (1, 3, 10)),  # 9 would compare trials one epoch before the end of the fold
        ({}, 3, 1, (1,)),
        ({"reduction_factor": 2}, 6, 4, (1, 2, 4, 8, 16)),
        ({"reduction_factor": 2, "brackets": 2}, 6, 4, (1, 2, 4, 8, 16)),
        ({"grace_period": 6}, 2, 6, (6,)),
    ],
)
def test_with_folds_rungs_are_in_the_first_one_and_at_ends_of_folds(values, folds, fold_epochs, rungs):
    scheduler = make_asha(**values, max_epochs=folds * fold_epochs, folds=folds)
    assert scheduler.rungs == rungs
    assert fold_epochs in rungs
    assert all(epoch % fold_epochs == 0 for epoch in rungs if epoch > fold_epochs)


def test_the_first_rung_is_within_the_first_fold():
    with pytest.raises(UserError, match=r"grace_period=7 must be at least 1 and at most sweep.max_epochs=6"):
        make_asha(grace_period=7, max_epochs=30, folds=5)


def test_a_bad_trial_stops_after_one_fold():
    scheduler = make_asha(grace_period=4, max_epochs=12, folds=3)
    for trial in range(6):
        scheduler.on_trial_start(trial, PARAMS)
    decisions = [scheduler.on_trial_result(trial, 4, loss=float(trial)) for trial in range(6)]
    assert decisions == ["continue"] + ["stop"] * 5


class RayScheduler:
    """Decisions of one of Ray's schedulers."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._trials = {}
        scheduler.set_search_properties("loss", "min")

    def on_trial_result(self, trial, epoch, loss):
        if trial not in self._trials:
            self._trials[trial] = _RayTrial(str(trial))
            self._scheduler.on_trial_add(None, self._trials[trial])
        return self._scheduler.on_trial_result(_RAY, self._trials[trial], {"epoch": epoch, "loss": loss}).lower()


class _RayTrial:
    def __init__(self, trial_id):
        self.trial_id = trial_id


_RAY = SimpleNamespace(get_live_trials=list)


@pytest.mark.parametrize("reduction_factor", [2, 3, 4, 2.5])
@pytest.mark.parametrize("coarse", [False, True])
def test_mode_stop_decides_as_ray_when_every_epoch_is_reported(reduction_factor, coarse):
    for seed in range(20):
        scheduler = make_asha(reduction_factor=reduction_factor, max_epochs=20)
        calls = drive_scheduler(scheduler, seed=seed, num_trials=40, num_slots=5, max_epochs=20, coarse=coarse)
        rays = RayScheduler(
            AsyncHyperBandScheduler("epoch", max_t=21, reduction_factor=reduction_factor, grace_period=1)
        )
        below_the_end = [report for report in list_reports(calls) if report[1] < 20]
        assert [decision for *_, decision in below_the_end] == [
            rays.on_trial_result(*report[:3]) for report in below_the_end
        ]
        assert {decision for *_, decision in below_the_end} == {"continue", "stop"}


@settings(deadline=None)
@given(
    losses=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    reduction_factor=st.sampled_from([1.1, 1.7, 2, 2.5, 3, 4, 10]),
)
def test_the_cutoff_is_numpys_percentile_to_the_last_bit(losses, reduction_factor):
    rung = Rung(reduction_factor)
    assert rung.compute_cutoff() is None
    for trial, loss in enumerate(losses):
        rung.record(trial, loss)
    assert -rung.compute_cutoff() == np.nanpercentile([-loss for loss in losses], (1 - 1 / reduction_factor) * 100)


def test_a_report_that_comes_after_a_rung_is_not_recorded_there():
    scheduler = make_asha()
    for trial in range(3):
        scheduler.on_trial_start(trial, PARAMS)
    assert scheduler.on_trial_result(0, 2, 0.1) == "continue"  # rung 1 was jumped over
    assert scheduler.on_trial_result(1, 1, 0.5) == "continue"  # and so has nobody to compare with
    assert scheduler.on_trial_result(1, 3, 0.4) == "continue"
    assert scheduler.on_trial_result(0, 4, 0.1) == "continue"
    assert scheduler.on_trial_result(2, 3, 0.3) == "continue"
    assert scheduler.on_trial_result(0, 9, 0.9) == "continue"


def test_brackets_are_drawn_with_rays_odds_from_seed_and_number_alone():
    num_trials = 20_000
    scheduler, rays = (
        make_asha(brackets=3, max_epochs=30),
        AsyncHyperBandScheduler(max_t=30, reduction_factor=3, brackets=3, grace_period=1),
    )
    first_rungs = []
    for trial in reversed(range(num_trials)):
        scheduler.on_trial_start(trial, PARAMS)
        first_rungs.append(min(scheduler._bracket_by_trial[trial]))
    again = make_asha(brackets=3, max_epochs=30)
    for trial in range(0, num_trials, 7):  # numbers may be missing
        again.on_trial_start(trial, PARAMS)
        assert min(again._bracket_by_trial[trial]) == first_rungs[num_trials - 1 - trial]
    weights = {min(epoch for epoch, _ in bracket._rungs): math.exp(len(bracket._rungs)) for bracket in rays._brackets}
    counts = Counter(first_rungs)
    for epoch, weight in weights.items():
        share = weight / sum(weights.values())
        assert counts[epoch] / num_trials == pytest.approx(share, abs=4 * math.sqrt(share / num_trials))


def test_trials_of_different_brackets_are_not_compared():
    scheduler = make_asha(brackets=2, seed=1)
    brackets = {}
    for trial in range(20):
        scheduler.on_trial_start(trial, PARAMS)
        brackets.setdefault(min(scheduler._bracket_by_trial[trial]), []).append(trial)
    scheduler.on_trial_result(brackets[1][0], 3, 0.1)
    assert scheduler.on_trial_result(brackets[3][0], 1, 9.9) == "continue"  # no rung of its bracket
    assert scheduler.on_trial_result(brackets[3][0], 3, 9.9) == "continue"  # the first one there
    assert scheduler.on_trial_result(brackets[1][1], 3, 9.9) == "stop"


class PaperAsha:
    """Algorithm 2 of Li et al. 2018, word for word, with ended trials left out of what can be promoted."""

    def __init__(self, eta, rungs):
        self.eta = eta
        self.epochs = rungs
        self.rungs = [{} for _ in rungs]
        self.already_promoted = [set() for _ in rungs]
        self.gone = set()

    def ranked(self, rung):
        return sorted(rung, key=lambda t: (rung[t], t))

    def get_job(self):
        for k in reversed(range(len(self.rungs))):
            rung = self.rungs[k]
            candidates = self.ranked(rung)[: math.floor(len(rung) / self.eta)]
            promotable = [t for t in candidates if t not in self.already_promoted[k] and t not in self.gone]
            if promotable:
                return promotable[0], k
        return None

    def choose_trial_to_resume(self, *, can_start_trial):
        job = self.get_job()
        return job and SegmentStart(job[0])

    def on_trial_resume(self, start):
        trial, k = self.get_job()
        assert trial == start.trial
        self.already_promoted[k].add(trial)

    def on_trial_result(self, trial, epoch, loss):
        if epoch not in self.epochs:
            return "continue"
        k = self.epochs.index(epoch)
        self.rungs[k][trial] = loss
        if self.get_job() != (trial, k):
            return "pause"
        self.already_promoted[k].add(trial)
        return "continue"

    def on_trial_end(self, trial):
        self.gone.add(trial)

    def on_trial_start(self, trial, params):
        pass


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    eta=st.sampled_from([2, 3, 4, 2.5]),
    slots=st.integers(1, 12),
    gaps=st.sampled_from([0.0, 0.3]),
    coarse=st.booleans(),
)
def test_mode_promote_is_algorithm_2_of_the_paper(seed, eta, slots, gaps, coarse):
    scheduler = make_asha(mode="promote", reduction_factor=eta, max_epochs=20)
    calls = drive_scheduler(
        scheduler, seed=seed, num_trials=60, num_slots=slots, max_epochs=20, gaps=gaps, failures=0.05, coarse=coarse
    )
    calls = calls[: find_last_start(calls)]  # with nothing left to begin the paper has no more to say
    assert replay_calls(PaperAsha(eta, scheduler.rungs), calls) == calls


class PaperAshaOfTwo(PaperAsha):
    """Schmucker et al. 2021: fronts are peeled off; within one, each next trial is the farthest from those before."""

    def __init__(self, eta, rungs):
        super().__init__(eta, rungs)
        self.costs = {}

    def on_trial_cost(self, trial, cost):
        self.costs[trial] = cost

    def ranked(self, rung):
        left, order = {t: (rung[t], self.costs[t]) for t in sorted(rung)}, []
        while left:
            front = {t: p for t, p in left.items() if not any(q < p and q[1] <= p[1] for q in left.values())}
            order += self.from_the_first(front)
            left = {t: p for t, p in left.items() if t not in front}
        return order

    def from_the_first(self, front):
        sides = [[point[i] for point in front.values()] for i in (0, 1)]
        spans = [(min(side), max(side) - min(side) or 1.0) for side in sides]
        places = {t: [(a - low) / span for a, (low, span) in zip(front[t], spans, strict=True)] for t in front}

        def apart(one, other):
            return sum((a - b) * (a - b) for a, b in zip(places[one], places[other], strict=True))

        order = [min(front, key=lambda t: (front[t], t))]
        while len(order) < len(front):
            order.append(max(sorted(front.keys() - order), key=lambda t: min(apart(t, o) for o in order)))
        return order


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), eta=st.sampled_from([2, 3, 2.5]), slots=st.integers(1, 8), coarse=st.booleans())
def test_with_two_objectives_it_is_that_algorithm_over_fronts(seed, eta, slots, coarse):
    scheduler = make_asha(mode="promote", reduction_factor=eta, max_epochs=9, num_objectives=2)
    calls = drive_scheduler(
        scheduler,
        seed=seed,
        num_trials=20,
        num_slots=slots,
        max_epochs=9,
        failures=0.05,
        coarse=coarse,
        costs=compute_cost,
    )
    calls = calls[: find_last_start(calls)]
    assert replay_calls(PaperAshaOfTwo(eta, scheduler.rungs), calls) == calls


@pytest.mark.parametrize("mode", ["stop", "promote"])
def test_what_is_cheap_goes_on_beside_what_is_accurate(mode):
    """Of nine trials, the worse the cheaper but for one, which is dominated."""
    decisions = {}
    for num_objectives in (1, 2):
        scheduler = make_asha(mode=mode, reduction_factor=3, num_objectives=num_objectives)
        for trial, (loss, price) in enumerate([*((20.0 - i, float(i)) for i in range(8)), (21.0, 9.0)]):
            scheduler.on_trial_start(trial, PARAMS)
            scheduler.on_trial_cost(trial, price)
            decisions[num_objectives, trial] = scheduler.on_trial_result(trial, 1, loss)
        going_on = [trial for trial in range(9) if decisions[num_objectives, trial] == "continue"]
        while (start := scheduler.choose_trial_to_resume(can_start_trial=True)) is not None:
            scheduler.on_trial_resume(start)
            going_on.append(start.trial)
        assert 7 in going_on  # the most accurate
        assert (0 in going_on) == (num_objectives == 2 or mode == "stop")  # the cheapest; the first one passes anyway
        assert 8 not in going_on


@settings(deadline=None)
@given(
    losses=st.lists(st.integers(0, 9).map(float), min_size=2, max_size=30),
    reduction_factor=st.sampled_from([1.7, 2, 3, 4]),
)
def test_where_all_cost_the_same_two_objectives_stop_by_the_quantile_of_one(losses, reduction_factor):
    """But for a loss between the two that the quantile lies between, which may stop."""
    one, two = Rung(reduction_factor), ParetoRung(reduction_factor, costs=dict.fromkeys(range(len(losses)), 1.0))
    for trial, loss in enumerate(losses):
        before = sorted(losses[:trial])
        place = (trial - 1) / reduction_factor
        between = trial and before[math.floor(place)] <= loss <= before[math.ceil(place)]
        passes, other_passes = one.compare(trial, loss).passes, two.compare(trial, loss).passes
        assert passes or not other_passes
        assert passes == other_passes or between
        one.record(trial, loss)
        two.record(trial, loss)


def find_last_start(calls):
    return max(i for i, (method, *_) in enumerate(calls) if method == "on_trial_start")


def test_a_loss_between_the_two_that_the_quantile_lies_between_stops_with_two_objectives():
    """Of three losses with a factor of 4 the quantile, 1.5, lies halfway between the best two."""
    one, two = Rung(4), ParetoRung(4, costs=dict.fromkeys(range(4), 1.0))
    for trial, loss in enumerate([1.0, 2.0, 3.0]):
        one.record(trial, loss)
        two.record(trial, loss)
    assert [(one.compare(3, loss).passes, two.compare(3, loss).passes) for loss in (0.9, 1.4, 1.6)] == [
        (True, True),
        (True, False),
        (False, False),
    ]


def test_a_trial_is_promoted_however_late_it_enters_the_best():
    scheduler = make_asha(mode="promote", reduction_factor=2)
    for trial, loss in enumerate([0.5, 0.4]):
        scheduler.on_trial_start(trial, PARAMS)
        assert scheduler.on_trial_result(trial, 1, loss) == ("pause" if trial == 0 else "continue")
    for trial, loss in ((2, 0.9), (3, 0.8)):
        assert scheduler.choose_trial_to_resume(can_start_trial=True) is None
        scheduler.on_trial_start(trial, PARAMS)
        assert scheduler.on_trial_result(trial, 1, loss) == "pause"
    assert scheduler.choose_trial_to_resume(can_start_trial=True) == SegmentStart(0)
    scheduler.on_trial_resume(SegmentStart(0))
    assert scheduler.choose_trial_to_resume(can_start_trial=True) is None


def test_a_trial_that_ended_is_not_promoted_and_keeps_its_place():
    scheduler = make_asha(mode="promote", reduction_factor=2)
    for trial, loss in enumerate([0.1, 0.5, 0.9]):
        scheduler.on_trial_start(trial, PARAMS)
        scheduler.on_trial_result(trial, 1, loss)
    scheduler.on_trial_start(3, PARAMS)
    scheduler.on_trial_end(0)
    assert scheduler.choose_trial_to_resume(can_start_trial=True) is None  # the best of three was it
    scheduler.on_trial_result(3, 1, 0.8)
    assert scheduler.choose_trial_to_resume(can_start_trial=True) == SegmentStart(1)


def test_at_the_end_of_a_short_sweep_the_best_goes_on_once_nothing_else_runs():
    scheduler = make_asha(mode="promote", reduction_factor=4)
    for trial, loss in enumerate([0.5, 0.4, 0.6]):
        scheduler.on_trial_start(trial, PARAMS)
        assert scheduler.choose_trial_to_resume(can_start_trial=False) is None
        scheduler.on_trial_result(trial, 1, loss)
    assert scheduler.choose_trial_to_resume(can_start_trial=True) is None
    assert scheduler.choose_trial_to_resume(can_start_trial=False) == SegmentStart(1)
    scheduler.on_trial_resume(SegmentStart(1))
    assert scheduler.choose_trial_to_resume(can_start_trial=False) is None  # it runs
    scheduler.on_trial_end(1)
    assert scheduler.choose_trial_to_resume(can_start_trial=False) == SegmentStart(0)
    scheduler.on_trial_resume(SegmentStart(0))
    assert scheduler.on_trial_result(0, 4, 0.4) == "pause"
    scheduler.on_trial_resume(scheduler.choose_trial_to_resume(can_start_trial=False))
    assert scheduler.on_trial_result(0, 27, 0.3) == "continue"
    assert scheduler.choose_trial_to_resume(can_start_trial=False) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "halve"}, r"scheduler.mode=halve is unknown; scheduler=asha takes stop or promote"),
        ({"grace_period": 0}, r"scheduler.grace_period=0 must be at least 1"),
        ({"grace_period": 28}, r"grace_period=28 .* at most sweep.max_epochs=27.*configs/scheduler/asha.yaml"),
        ({"reduction_factor": 1.0}, r"scheduler.reduction_factor=1 must be above 1.*configs/scheduler/asha.yaml"),
        ({"reduction_factor": math.nan}, r"scheduler.reduction_factor=nan must be above 1"),
        ({"brackets": 0}, r"scheduler.brackets=0 must be at least 1 .*configs/scheduler/asha.yaml"),
    ],
)
def test_values_that_do_not_go_together_are_told(changes, words):
    with pytest.raises(UserError, match=words):
        make_asha(**changes)


# --- median stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [0.0, 0.4])
@pytest.mark.parametrize(("grace_period", "min_samples_required"), [(1, 1), (2, 3), (5, 4)])
def test_the_median_rule_decides_as_rays(gaps, grace_period, min_samples_required):
    decisions = []
    for seed in range(20):
        scheduler = MedianStopping(grace_period=grace_period, min_samples_required=min_samples_required)
        calls = drive_scheduler(scheduler, seed=seed, num_trials=20, num_slots=4, max_epochs=12, gaps=gaps)
        rays = RayScheduler(
            MedianStoppingRule(
                "epoch",
                grace_period=grace_period,
                min_samples_required=min_samples_required,
                min_time_slice=math.inf,
            )
        )
        decisions += [report[3] for report in list_reports(calls)]
        assert [report[3] for report in list_reports(calls)] == [
            rays.on_trial_result(*report[:3]) for report in list_reports(calls)
        ]
    assert set(decisions) == {"continue", "stop"}


@pytest.mark.parametrize("name", ["grace_period", "min_samples_required"])
def test_a_median_of_nothing_is_told(name):
    with pytest.raises(UserError, match=rf"scheduler.{name}=0 must be at least 1 .*configs/scheduler/median.yaml"):
        MedianStopping(**{"grace_period": 1, "min_samples_required": 1} | {name: 0})
