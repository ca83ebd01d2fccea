"""What a target costs, counted by hand; what searchers are told in a replay; and both roads, tiny."""

import importlib
import json

import pytest
from optuna.trial import TrialState

from benchmarks.clock import ClockedSegment
from benchmarks.sweeps import MeasuredSweep
from handpose.config import compose
from handpose.schedulers.asha import Asha

quality = importlib.import_module("benchmarks.time_to_quality")
asha_modes = importlib.import_module("benchmarks.asha_modes")


def make_curve(lr, *losses):
    params = {"model.decoder.depth": 2, "heatmap.sigma": 0.04, "optimizer.lr": lr}
    return asha_modes.Curve(params, losses, 1.0)


def test_a_target_costs_what_passed_until_it_was_reached_else_everything():
    course = quality.SweepCourse([(4.0, 9.0), (6.0, 7.0), (8.0, 6.0)], 10.0)
    assert course.best == 6.0
    assert course.compute_cost_of(7.0) == (6.0, True)
    assert course.compute_cost_of(5.0) == (10.0, False)


def test_the_training_until_a_target_counts_neither_starts_nor_idle_slots():
    trials = [ClockedSegment({}, 10.0, 20.0, 6.0, 2.0, []), ClockedSegment({}, 30.0, 34.0, 3.0, 1.0, [])]
    spent = [quality._sum_training(trials, at) for at in (5.0, 15.0, 25.0, 32.0, 99.0)]
    assert spent == [0.0, 4.0, 8.0, 10.0, 12.0]
    course = quality.SweepCourse([(40.0, 9.0), (60.0, 7.0)], 80.0, [4.0, 10.0])
    assert course.compute_training_of(7.0) == (10.0, True)
    assert course.compute_training_of(5.0) == (10.0, False)


def test_the_nearest_curve_that_is_left_is_trained_once():
    pool = [make_curve(1e-4, 1), make_curve(1e-3, 2), make_curve(1e-2, 3)]
    asked = [1.1e-3, 0.9e-3, 1e-3]
    chosen = quality.NearestCurves(pool, lambda number: make_curve(asked[number]).params)
    assert [chosen[number].losses for number in range(3)] == [(2,), (1,), (3,)]
    with pytest.raises(IndexError):
        chosen[3]


def replay(searcher):
    scheduler = Asha(mode="stop", grace_period=1, reduction_factor=2, brackets=1, max_epochs=2, seed=0)
    pool = [make_curve(1e-3, 5, 4), make_curve(1e-2, 9, 8), make_curve(2e-3, 3, 2)]
    for number in range(len(pool)):
        searcher.suggest(number)
    asha_modes.replay_sweep(
        quality.InformingScheduler(scheduler, searcher, 2), pool, num_slots=1, start_s=0.0, max_epochs=2
    )
    return searcher._searcher


def test_our_study_is_told_where_a_trial_was_stopped():
    searcher = quality.OurSearcher(0, 2)
    study = replay(searcher).study
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert study.trials[1].intermediate_values == {1: 9}
    searcher.close()


def test_the_plain_study_takes_a_stopped_trial_for_a_complete_one():
    study = replay(quality.RaySearcher(0, 2))._ot_study
    assert [(trial.state, trial.value) for trial in study.trials] == [
        (TrialState.COMPLETE, 4),
        (TrialState.COMPLETE, 9),
        (TrialState.COMPLETE, 2),
    ]


def test_every_method_is_replayed_on_the_shipped_curves(tmp_path, monkeypatch, capsys):
    output = tmp_path / "q.json"
    monkeypatch.setattr("sys.argv", ["time_to_quality.py", "--replay", "--seeds", "2", "--output", str(output)])
    quality.main()
    found = json.loads(output.read_text())
    assert found["methods"].keys() == quality.METHODS.keys() - {quality.PLAIN_REUSING, "freeze-thaw + curves"}
    own = found["methods"][quality.RANDOM]
    assert own["reached"] == 2
    assert own["over_random"] == [1, 1, 1]
    assert "2 seeds" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plain_side_is_really_trained_after_random_search(tmp_path, monkeypatch):
    """tests/benchmarks/test_slots.py trains our side, also with random search."""
    measure = quality.measure_sweep

    def measure_plain(side, overrides):
        if side == "plain":
            return measure(side, overrides)
        assert compose("tune", overrides).sweep.num_trials == 2
        trial = ClockedSegment({"optimizer.lr": 0.1}, 1.0, 3.0, 1.0, 0.5, [(2.0, 1, 9.0), (3.0, 2, 8.0)])
        return MeasuredSweep(0.0, 4.0, 1, [trial])

    monkeypatch.setattr(quality, "measure_sweep", measure_plain)
    output = tmp_path / "q.json"
    arguments = ["--seeds", "1", "--slots", "1", "--random-trials", "2", "--num-trials", "2", "--epochs", "2"]
    arguments += ["--batches", "2", "data.source.num_train=120", "data.source.num_eval=8", "--output", str(output)]
    methods = [quality.RANDOM, quality.PLAIN]
    monkeypatch.setattr("sys.argv", ["time_to_quality.py", *arguments, "--methods", *methods])
    quality.main()
    found = json.loads(output.read_text())
    assert list(found["methods"]) == methods
    assert found["methods"][quality.RANDOM]["reached"] == 1
