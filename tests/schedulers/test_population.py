"""Population based training: who goes on from whom, who waits for whom, and what changes."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import PopulationBasedTraining

from handpose.errors import UserError
from handpose.schedulers.population import PopulationBased, _Explorer, _find_mutable_params
from handpose.schedulers.scheduler import SegmentStart
from handpose.search.space import load_space
from tests.schedulers.test_schedulers import drive_scheduler, list_completed

SPACE = "optimizer.lr: tag(log, interval(0.01, 1.0))\nmodel.decoder.depth: choice(1, 2, 4)\n"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    file = tmp_path_factory.mktemp("space") / "space.yaml"
    file.write_text(SPACE)
    return load_space(str(file))


def make_population(space, **changes):
    values = {
        "mutate": ["optimizer.lr"],
        "perturbation_interval": 2,
        "quantile_fraction": 0.25,
        "resample_probability": 0.25,
        "population_size": 4,
        "max_epochs": 8,
        "seed": 0,
    }
    return PopulationBased(space=space, **values | changes)


def make_params(trial):
    return {"optimizer.lr": 0.1 + trial / 100, "model.decoder.depth": 2}


def start_trials(scheduler, num_trials=4):
    for trial in range(num_trials):
        scheduler.on_trial_start(trial, make_params(trial))


def test_the_worst_go_on_from_the_best_with_other_parameters_of_the_kind_that_may_change(space):
    scheduler = make_population(space, resample_probability=0)
    start_trials(scheduler)
    losses = {1: 0.1, 0: 0.05, 2: 0.9, 3: 0.3}
    assert {trial: scheduler.on_trial_result(trial, 2, loss) for trial, loss in losses.items()} == {
        1: "continue",
        0: "continue",
        2: "pause",
        3: "continue",
    }
    trial, source, changed = scheduler.choose_trial_to_resume(can_start_trial=False)
    assert (trial, source) == (2, 0)
    assert changed["optimizer.lr"] / make_params(0)["optimizer.lr"] in (0.8, 1.25)
    assert changed["model.decoder.depth"] == 2


def test_who_is_worst_is_decided_by_what_is_known_when_it_goes_on(space):
    scheduler = make_population(space)
    start_trials(scheduler, 2)
    for trial in (0, 1):  # the other two have not begun
        assert scheduler.on_trial_result(trial, 2, [0.4, 0.5][trial]) == "pause"
    assert scheduler.choose_trial_to_resume(can_start_trial=True) is None
    for trial in (2, 3):
        scheduler.on_trial_start(trial, make_params(trial))
        assert scheduler.on_trial_result(trial, 2, [0.9, 0.8][trial - 2]) in ("pause", "continue")
    assert scheduler.choose_trial_to_resume(can_start_trial=False) == SegmentStart(0)
    scheduler.on_trial_resume(SegmentStart(0))
    assert scheduler.choose_trial_to_resume(can_start_trial=False) == SegmentStart(1)
    scheduler.on_trial_resume(SegmentStart(1))
    assert scheduler.choose_trial_to_resume(can_start_trial=False).source == 0


def test_the_least_trained_goes_first(space):
    scheduler = make_population(space, population_size=3)
    start_trials(scheduler, 3)
    assert scheduler.on_trial_result(0, 2, 0.5) == "continue"  # alone, and nobody waits
    assert scheduler.on_trial_result(0, 4, 0.4) == "continue"
    assert scheduler.on_trial_result(1, 2, 0.6) == "pause"  # the worst of two
    assert scheduler.on_trial_result(0, 6, 0.1) == "pause"  # trial 1 is at epoch 2
    assert scheduler.choose_trial_to_resume(can_start_trial=False).trial == 1


def test_nobody_goes_on_from_what_is_trained_less_far_or_complete_or_ended_or_a_copy(space):
    def fresh():
        scheduler = make_population(space, quantile_fraction=0.5, population_size=2)
        start_trials(scheduler, 2)
        return scheduler

    scheduler = fresh()
    scheduler.on_trial_result(0, 2, 0.1)
    scheduler.on_trial_result(1, 3, 0.2)
    assert scheduler.on_trial_result(1, 4, 0.2) == "continue"  # trial 0 is at epoch 2
    scheduler = fresh()
    scheduler.on_trial_result(0, 6, 0.1)
    scheduler.on_trial_result(0, 8, 0.1)
    assert scheduler.on_trial_result(1, 2, 0.2) == "continue"
    scheduler = fresh()
    scheduler.on_trial_result(0, 4, 0.1)
    scheduler.on_trial_end(0)
    assert scheduler.on_trial_result(1, 2, 0.2) == "continue"
    scheduler = fresh()
    scheduler.on_trial_result(0, 4, 0.1)
    assert scheduler.on_trial_result(1, 4, 0.2) == "pause"
    scheduler.on_trial_resume(scheduler.choose_trial_to_resume(can_start_trial=False))  # 1 is a copy of 0 at epoch 4
    assert scheduler.on_trial_result(0, 6, 0.3) == "continue"  # the worst now, but 1 has no checkpoint of its own
    assert scheduler.on_trial_result(1, 6, 0.4) == "pause"


def test_a_population_larger_than_the_slots_begins_whole_and_stays_together(space):
    calls = drive_scheduler(make_population(space, population_size=8), seed=1, num_slots=2, max_epochs=8)
    assert list_completed(calls, 8) == set(range(8))
    waiting = dict.fromkeys(range(8), 0)  # trial -> epoch
    for method, arguments, _, answer in calls:
        if method == "on_trial_start":
            del waiting[arguments[0]]
        elif method == "on_trial_resume":
            assert min(waiting.values()) == waiting.pop(arguments[0].trial)
        elif method == "on_trial_result" and answer == "pause":
            waiting[arguments[0]] = arguments[1]
        elif method == "on_trial_result" and arguments[1] in (2, 4, 6):
            assert min(waiting.values(), default=9) >= arguments[1]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 12), interval=st.integers(1, 7), quantile=st.floats(0.01, 0.5))
def test_every_member_that_does_not_fail_is_trained_to_the_end(space, seed, slots, interval, quantile):
    scheduler = make_population(space, population_size=10, perturbation_interval=interval, quantile_fraction=quantile)
    calls = drive_scheduler(scheduler, seed=seed, num_trials=10, num_slots=slots, max_epochs=8, failures=0.03)
    gone = {arguments[0] for method, arguments, *_ in calls if method == "on_trial_end"}
    assert list_completed(calls, 8) == set(range(10)) - gone


@pytest.mark.parametrize(("num_trials", "fraction"), [(2, 0.1), (5, 0.25), (5, 0.5), (8, 0.3), (9, 0.5)])
def test_the_worst_and_the_best_are_those_of_ray(space, num_trials, fraction):
    rng = random.Random(num_trials)
    losses = [rng.random() for _ in range(num_trials)]
    rays = PopulationBasedTraining(
        "epoch", "loss", "min", quantile_fraction=fraction, hyperparam_mutations={"lr": [1, 2]}
    )
    rays._trial_state = {_RayTrial(trial): SimpleNamespace(last_score=-loss) for trial, loss in enumerate(losses)}
    worst, best = ({trial.number for trial in quantile} for quantile in rays._quantiles())
    chosen = set()
    for seed in range(60):
        scheduler = make_population(space, population_size=num_trials, quantile_fraction=fraction, seed=seed)
        start_trials(scheduler, num_trials)
        best_first = sorted(range(num_trials), key=losses.__getitem__)  # each is the worst when it reports
        paused = {trial for trial in best_first if scheduler.on_trial_result(trial, 2, losses[trial]) == "pause"}
        for trial in sorted(paused):
            start = scheduler.choose_trial_to_resume(can_start_trial=False)
            assert start.trial == trial
            assert (start.source is not None) == (trial in worst)
            chosen |= {start.source} - {None}
            scheduler.on_trial_resume(SegmentStart(trial))
    assert chosen == best


class _RayTrial:
    def __init__(self, number):
        self.number = number

    def is_finished(self):
        return False


def test_changes_depend_on_seed_trial_and_epoch_alone(space):
    def change(seed, epoch, first):
        scheduler = make_population(space, quantile_fraction=0.5, seed=seed, population_size=2)
        scheduler.on_trial_start(7, make_params(7))
        scheduler.on_trial_start(9, make_params(9))
        scheduler.on_trial_result(7, 6, 0.1)
        if first:
            scheduler.on_trial_result(9, 2, 0.5)
            scheduler.on_trial_resume(SegmentStart(9))
        scheduler.on_trial_result(9, epoch, 0.4)
        return scheduler.choose_trial_to_resume(can_start_trial=False)

    assert change(0, 4, first=True) == change(0, 4, first=False)
    assert len({change(seed, epoch, first=False).params["optimizer.lr"] for seed in range(9) for epoch in (2, 4)}) > 5


@pytest.mark.parametrize("seed", range(20))
def test_changed_parameters_are_values_of_the_space(write_space, seed):
    space = write_space(
        "a: tag(log, interval(0.1, 1))\nb: range(0, 10, 3)\nc: choice(x, y)\n"
        "d: range(0.0, 1.0, 0.25)\ne: choice([1], [2])\n"
    )
    explore = _Explorer(_find_mutable_params(space, list("abcde")), resample_probability=0.5)
    changed = explore({"a": 1.0, "b": 9, "c": "x", "d": 0.0, "e": [2], "fixed": 1}, random.Random(seed))
    assert 0.1 <= changed["a"] <= 1
    assert changed["b"] in (0, 3, 6, 9)
    assert changed["c"] in ("x", "y")
    assert changed["d"] in (0.0, 0.25, 0.5, 0.75)
    assert changed["e"] in ([1], [2])
    assert changed["fixed"] == 1


def test_keys_to_change_that_are_not_searched_are_told(space):
    with pytest.raises(UserError, match=r"scheduler.mutate names lr, but search_space=space searches optimizer.lr"):
        make_population(space, mutate=["lr"])


def test_a_define_by_run_space_has_no_population(write_space):
    space = write_space("def space(trial):\n    return {}\n", ".py")
    with pytest.raises(UserError, match="scheduler=pbt needs a search space in YAML"):
        make_population(space)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perturbation_interval": 0}, "scheduler.perturbation_interval=0 must be at least 1"),
        ({"perturbation_interval": 8}, "scheduler.perturbation_interval=8 .* below sweep.max_epochs=8.*pbt.yaml"),
        ({"quantile_fraction": 0.6}, "scheduler.quantile_fraction=0.6 must be above 0 and at most 0.5.*pbt.yaml"),
        ({"resample_probability": 2}, "scheduler.resample_probability=2 must be from 0 to 1"),
    ],
)
def test_values_that_do_not_go_together_are_told(space, changes, words):
    with pytest.raises(UserError, match=words):
        make_population(space, **changes)


def test_choices_that_python_considers_equal_are_neighbours_of_their_own(write_space):
    space = write_space("a: choice(0, false, 0.0)\nb: range(0, 0.5, 0.1)\nc: choice(1, 2)")
    explore = _Explorer(_find_mutable_params(space, ["a", "b"]), resample_probability=0)
    found = {repr(explore({"a": False, "b": 0.3, "c": 1}, random.Random(seed))["a"]) for seed in range(20)}
    assert found == {"0", "0.0"}
    changed = [explore({"a": 0, "b": 0.3, "c": 1}, random.Random(seed)) for seed in range(40)]
    assert {each["b"] for each in changed} <= {0.0, 0.1, 0.2, 0.3, 0.4}
    assert {repr(each["a"]) for each in changed} == {"0", "False"}
    assert repr(space.build_params({"a": "bool false", "b": 0.1, "c": 1})["a"]) == "False"
