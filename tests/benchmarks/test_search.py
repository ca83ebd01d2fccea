"""The simulated clock of search.py, against costs counted by hand; the surrogate, on curves that follow a formula."""

import importlib
import math

import numpy as np
import pytest

search = importlib.import_module("benchmarks.search")
curves = importlib.import_module("benchmarks.curve_surrogate")


class Surrogate:
    """Four epochs of one second; the loss falls from 4 x level to level."""

    num_epochs = 4

    def predict(self, params):
        return np.array([[each["level"] * factor for factor in (4.0, 3.0, 2.0, 1.0)] for each in params])

    def predict_epoch_seconds(self, params):
        return np.ones(len(params))

    def draw_noise(self, rng):
        return np.ones(4)


class World:
    def __init__(self):
        self.surrogate, self.targets, self.best, self.mean_training_s = Surrogate(), {100: 2.0, 400: 1.0}, 1.0, 4.0


class Planned:
    """Runs trials as planned: (trial, level or None to resume); pauses those whose (trial, epoch) is in `pauses`."""

    def __init__(self, plan, pauses=()):
        self.plan, self.pauses, self.losses = list(plan), set(pauses), []

    def next_trial(self):
        if not self.plan:
            return None
        trial, level = self.plan.pop(0)
        return trial, None if level is None else {"level": level}

    def report(self, trial, epoch, loss):
        self.losses.append((trial, epoch, loss))
        return "pause" if (trial, epoch) in self.pauses else "continue"


def simulate(method, **changed):
    arguments = {"num_slots": 1, "start_s": 0.5, "seed": 0, "max_trainings": 40} | changed
    return search.simulate(World(), method, **arguments)


def test_an_epoch_costs_its_seconds_and_each_start_what_a_start_costs():
    found = simulate(Planned([("a", 3.0), ("b", 1.0)]))
    assert found.costs == {100: 4.5 + 3.5, 400: 4.5 + 4.5}  # b is at 2 after three epochs, at 1 after four
    assert found.num_trials == 2


def test_a_resumption_costs_a_start_and_goes_on_where_the_trial_was():
    method = Planned([("a", 1.0), ("b", 3.0), ("a", None)], pauses={("a", 2)})
    assert simulate(method).costs == {100: 2.5 + 4.5 + 1.5, 400: 2.5 + 4.5 + 2.5}
    assert [(trial, epoch) for trial, epoch, _ in method.losses if trial == "a"] == [
        ("a", each) for each in (1, 2, 3, 4)
    ]


def test_slots_that_are_idle_are_paid_for():
    assert simulate(Planned([("a", 1.0)]), num_slots=4).costs == {100: 4 * 3.5, 400: 4 * 4.5}


def test_the_oracle_trains_the_best_configuration_once():
    world = World()
    world.best_params = {"level": 1.0}
    found = simulate(search.OWN_METHODS["oracle"](None, world), num_slots=16)
    assert found.costs == {100: 16 * 3.5, 400: 16 * 4.5}
    assert found.num_trials == 1


def test_a_target_that_is_not_reached_is_infinite_and_counts_as_the_whole_search():
    found = simulate(Planned([("a", 1.5)] + [(number, 3.0) for number in range(20)]), max_trainings=10)
    assert found.costs == {100: 4.5, 400: math.inf}
    rows = search.summarise({search.BASELINE: [found]}, limit_slot_s=40)
    assert rows[search.BASELINE]["target_400"]["costs"] == [40]
    assert (rows[search.BASELINE]["target_100"]["reached"], rows[search.BASELINE]["target_400"]["reached"]) == (1, 0)


def test_regret_is_that_of_the_best_of_those_trained_longest():
    found = simulate(Planned([(number, level) for number, level in enumerate([3.0, 1.5, 2.0] + [3.0] * 40)]))
    assert found.regrets[5] == pytest.approx(math.log(1.5))


def test_searches_of_earlier_calls_are_read_up_to_the_first_one_that_is_missing(tmp_path):
    found = simulate(Planned([("a", 1.5)] + [(number, 3.0) for number in range(20)]), max_trainings=10)
    first = search.SearchKey("default", 4, 16, "random", 0, 1.0, 10.0)
    written = search.CourseFile(tmp_path / "new" / "courses.jsonl")
    for seed in (1, 0, 3):
        written.add(first._replace(seed=seed), found._replace(num_trials=seed))
    read = search.CourseFile(tmp_path / "new" / "courses.jsonl")
    assert read.select(first) == [found._replace(num_trials=seed) for seed in (0, 1)]
    assert first._replace(seed=3) in read
    assert first._replace(num_recorded=5) not in read


# --- surrogate --------------------------------------------------------------------------------------------------------


SPACE = "lr: tag(log, interval(1e-4, 1e-2))\nkind: choice(a, b)"


def test_the_deviations_between_seeds_have_their_variance():
    rng = np.random.default_rng(0)
    made = [
        curves.RecordedCurve(number, {}, np.exp(number % 5 + 0.1 * rng.standard_normal(5)), 1.0)
        for number in range(2000)
        for _ in range(3)
    ]
    assert curves.compute_deviations(made).std() == pytest.approx(0.1, rel=0.03)


def make_curves(num, *, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(num):
        params = {"lr": 10 ** rng.uniform(-4, -2), "kind": str(rng.choice(["a", "b"]))}
        level = 10 + 5 * (math.log10(params["lr"]) + 3) ** 2 + 2 * (params["kind"] == "b")
        for _ in range(3 if number % 5 == 0 else 1):
            factor = math.exp(noise * rng.standard_normal())
            losses = [level * (1 + 2 / epoch) * factor for epoch in range(1, 10)]
            made.append(curves.RecordedCurve(number, params, losses, 1.0 + (params["kind"] == "b")))
    return made


def test_unseen_configurations_are_predicted_and_noise_is_that_between_seeds(write_space):
    pytest.importorskip("sklearn")
    surrogate = curves.CurveSurrogate(make_curves(60, noise=0.01), write_space(SPACE))
    unseen = make_curves(20, seed=1)
    predicted = surrogate.predict([curve.params for curve in unseen])
    np.testing.assert_allclose(predicted, [curve.losses for curve in unseen], rtol=0.05)
    seconds = surrogate.predict_epoch_seconds([curve.params for curve in unseen])
    np.testing.assert_allclose(seconds, [curve.epoch_s for curve in unseen], rtol=0.05)
    assert surrogate.noise == pytest.approx(0.01, rel=0.4)


def test_a_configuration_near_one_that_diverged_diverges(write_space):
    pytest.importorskip("sklearn")
    made = make_curves(40)
    diverged = curves.RecordedCurve(99, {"lr": 1.0, "kind": "a"}, [80.0, 90.0], 1.0)
    surrogate = curves.CurveSurrogate([*made, diverged], write_space(SPACE))
    near, far = surrogate.predict([{"lr": 0.9, "kind": "a"}, {"lr": 1e-3, "kind": "a"}])
    assert np.isfinite(near).tolist() == [True] * 2 + [False] * 7
    assert np.isfinite(far).all()


def test_folds_hold_out_configurations_with_all_their_repetitions(write_space):
    """And every fold leaves some that are repeated, whichever numbers those have."""
    pytest.importorskip("sklearn")
    quality = curves.measure_quality(make_curves(60, noise=0.01), write_space(SPACE))
    assert quality.rank_correlations[9] > 0.95
    assert quality.error < 0.05
    assert quality.noise == pytest.approx(0.01, rel=0.4)
