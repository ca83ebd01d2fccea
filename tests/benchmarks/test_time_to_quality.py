"""What a target costs, counted by hand; and a benchmark without trainings, continued."""

import importlib
import json

from benchmarks.clock import ClockedSegment
from benchmarks.sweeps import MeasuredSweep
from handpose.config import compose

quality = importlib.import_module("benchmarks.time_to_quality")


def test_a_target_costs_what_passed_until_it_was_reached_else_everything():
    course = quality.SweepCourse([(4.0, 9.0), (6.0, 7.0), (8.0, 6.0)], 10.0, [1.0, 2.0, 3.0])
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


def test_each_method_is_measured_once_with_its_side_and_its_number_of_trials(tmp_path, monkeypatch):
    """tests/benchmarks/test_slots.py trains all sides."""
    measured = []

    def measure(side, overrides):
        config = compose("tune", overrides)
        measured.append((side, config.sweep.num_trials, config.sweep.max_epochs))
        trial = ClockedSegment({"optimizer.lr": 0.1}, 1.0, 3.0, 1.0, 0.5, [(2.0, 1, 9.0), (3.0, 2, 8.0)])
        return MeasuredSweep(0.0, 4.0, 1, [trial])

    monkeypatch.setattr(quality, "make_data", lambda overrides: None)
    monkeypatch.setattr(quality, "measure_sweep", measure)
    output, methods = tmp_path / "q.json", [quality.RANDOM, quality.BASELINE]
    arguments = ["--seeds", "1", "--slots", "1", "--random-trials", "2", "--num-trials", "3", "--epochs", "2"]
    arguments += ["--output", str(output), "--courses", str(tmp_path / "courses.jsonl"), "--methods", *methods]
    monkeypatch.setattr("sys.argv", ["time_to_quality.py", *arguments])
    quality.main()
    found = json.loads(output.read_text())
    assert list(found["methods"]) == methods
    assert found["methods"][quality.RANDOM]["reached"] == 1
    assert found["methods"][quality.BASELINE]["over_baseline"] == [1, 1, 1]
    assert measured == [("ours", 2, 2), (quality.REUSING, 3, 2)]
    quality.main()
    assert json.loads(output.read_text())["methods"] == found["methods"]
    assert len(measured) == 2
