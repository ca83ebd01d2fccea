"""Where slot-seconds went, counted by hand; and all sides, tiny, train the same."""

import importlib
import json
import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY

slots = importlib.import_module("benchmarks.slots")
sweeps = importlib.import_module("benchmarks.sweeps")


def make_trained(first_step, last, *, train_s=1.0, val_s=0.5, value=9.0, lr=0.1):
    return sweeps.ClockedSegment({"optimizer.lr": lr}, first_step, last, train_s, val_s, [(last, 1, value)])


def test_every_slot_second_is_accounted_for_once():
    trials = [make_trained(104, 106), make_trained(105, 109), make_trained(107, 110)]
    found = slots.account_slot_time(sweeps.MeasuredSweep(100, 112, 2, trials))
    assert found.slot_s == 24
    assert (found.train_s, found.val_s) == (3.0, 1.5)
    assert found.first_starts_s == 4 + 5
    assert found.later_starts_s == found.start_s == 107 - 106
    assert found.between_s == (2 + 4 + 3) - 4.5
    assert found.at_end_s == (112 - 110) + (112 - 109)
    assert found.efficiency == 4.5 / 24
    parts = ("train_s", "val_s", "first_starts_s", "later_starts_s", "between_s", "at_end_s")
    assert sum(getattr(found, part) for part in parts) == found.slot_s


def test_a_slot_that_never_trained_is_idle():
    found = slots.account_slot_time(sweeps.MeasuredSweep(0, 10, 2, [make_trained(2, 8)]))
    assert found.at_end_s == 2 + 10
    assert found.start_s == 0


def test_values_are_compared_at_the_same_parameters_and_epoch():
    one = sweeps.MeasuredSweep(0, 9, 1, [make_trained(1, 2, value=5.0, lr=0.1), make_trained(3, 4, value=6.0, lr=0.2)])
    other = sweeps.MeasuredSweep(
        0, 9, 1, [make_trained(1, 2, value=6.25, lr=0.2), make_trained(3, 4, value=100.0, lr=0.3)]
    )
    assert slots.find_largest_difference(one, other) == 0.25


def test_proposals_are_those_of_the_sweep_and_begin_with_the_default():
    points = slots.list_proposals(["searcher=random", "sweep.num_trials=3"])
    assert len(points) == 3
    assert points[0]["model.decoder.depth"] == 3
    assert points == slots.list_proposals(["searcher=random", "sweep.num_trials=3"])


@pytest.mark.slow
def test_all_sides_train_the_same_and_all_of_it_is_clocked(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "slots.py")]
    command += ["data.source.num_train=120", "data.source.num_eval=8", "data.image_size=64"]
    command += [f"paths.data={tmp_path}/data", f"paths.packed={tmp_path}/packed", "--output", str(tmp_path / "s.json")]
    command += ["--num-trials", "2", "--epochs", "2", "--batches", "2", "--slots", "1", "--repeats", "1"]
    command += ["--schedulers", "fifo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())["schedulers"]["fifo"]
    assert found["trials"] == {"ours": [2], "plain": [2], "plain + reuse_actors": [2]}
    assert found["differences"] == {"plain": 0, "plain + reuse_actors": 0}
    for side in found["trials"]:
        run = found["runs"][side][0]
        assert run["epochs"] == 4
        assert 0 < run["efficiency"] < 1
        assert min(run.values()) >= 0
