"""The replayed sweep against sweeps counted by hand, and the road from a sweep's folder to recorded curves."""

import csv
import importlib
import json

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from handpose.schedulers.asha import Asha
from handpose.schedulers.scheduler import Fifo

asha_modes = importlib.import_module("benchmarks.asha_modes")


def make_curve(*losses, epoch_s=1.0):
    return asha_modes.Curve({}, losses, epoch_s)


def replay(scheduler, curves, *, num_slots=1, start_s=0.0, max_epochs=2):
    return asha_modes.replay_sweep(scheduler, curves, num_slots=num_slots, start_s=start_s, max_epochs=max_epochs)


def test_slots_that_wait_cost_as_much_as_those_that_train():
    done = replay(
        Fifo(), [make_curve(3, 2, epoch_s=5.0), make_curve(2, 1), make_curve(4, 3)], num_slots=2, start_s=10.0
    )
    assert [(step.slot_s / 2, step.trial, step.epoch) for step in done.steps] == [
        (11, 1, 1),
        (12, 1, 2),
        (15, 0, 1),
        (20, 0, 2),
        (23, 2, 1),
        (24, 2, 2),
    ]
    assert done.num_segments == 3


def test_the_pick_is_the_best_of_those_trained_longest_and_its_regret_that_of_the_full_budget():
    done = replay(Fifo(), [make_curve(5, 4), make_curve(1, 3), make_curve(2, 2.5)])
    assert [step.pick for step in done.steps] == [0, 0, 0, 1, 1, 2]
    assert done.compute_regret_at(2) == 1.5
    assert done.compute_regret_at(4.5) == 0.5
    assert done.compute_regret_at(0.5) == pytest.approx((1.5 + 0.5 + 0) / 3)
    assert done.compute_cost_of(0.5) == 4
    assert done.compute_cost_of(0) == 6


def test_a_trial_that_diverges_costs_its_last_epoch_and_is_as_bad_as_the_worst():
    done = replay(Fifo(), [make_curve(1), make_curve(5, 4), make_curve(5, 3)])
    assert [(step.slot_s, step.trial) for step in done.steps] == [(1, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert done.steps[1].pick == 1
    assert done.regrets_mm == [1, 1, 0]


def test_a_promoted_trial_pays_for_its_second_start():
    scheduler = Asha(mode="promote", grace_period=1, reduction_factor=2, brackets=1, max_epochs=2, seed=0)
    done = replay(scheduler, [make_curve(1, 1), make_curve(2, 2)], start_s=10.0)
    assert [(step.slot_s, step.trial, step.epoch) for step in done.steps] == [(11, 0, 1), (22, 1, 1), (33, 0, 2)]
    assert done.num_segments == 3
    assert done.compute_cost_of(0.5) == 33


def test_intervals_hold_the_mean_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    held = [low <= 0 <= high for _, low, high in (asha_modes.compute_mean(rng.normal(size=40)) for _ in range(200))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.05)


def test_the_shipped_curves_can_be_compared(tmp_path, capsys, monkeypatch):
    output = tmp_path / "modes.json"
    monkeypatch.setattr("sys.argv", ["asha_modes.py", "--seeds", "3", "--slots", "2", "--output", str(output)])
    asha_modes.main()
    printed = capsys.readouterr().out
    assert "2 slot(s)" in printed
    figures = json.loads(output.read_text())["slots"]["2"]
    assert figures["whole_sweep"]["no stopping"]["regret_mm"] == [0, 0, 0]


def test_a_finished_sweep_becomes_curves(tmp_path, monkeypatch):
    sweep, curves = tmp_path / "sweep", tmp_path / "curves" / "out.json"
    (sweep / "study").mkdir(parents=True)
    space = tmp_path / "space.yaml"
    space.write_text("model.decoder.depth: range(1, 3)\n")
    (sweep / "sweep.yaml").write_text(
        f"command_line: python tune.py search_space={space} sweep.max_epochs=2\nversions: {{}}\ndata_fingerprint: f\n"
    )
    storage = JournalStorage(JournalFileBackend(str(sweep / "study" / "journal.log")))
    study = optuna.create_study(storage=storage)
    depth = {"model.decoder.depth": optuna.distributions.IntDistribution(1, 2)}
    for state, losses in (("complete", [3.00001, 2.5]), ("running", [1.0]), ("diverged", [9.0])):
        trial = study.ask(depth)
        for epoch, loss in enumerate(losses, start=1):
            trial.report(loss, epoch)
        with (sweep / "trials.csv").open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["number", "state", "seconds"]] * (trial.number == 0) + [[trial.number, state, 4.0]])
    monkeypatch.setattr("sys.argv", ["asha_modes.py", "--record", str(sweep), "--curves", str(curves)])
    asha_modes.main()
    content = json.loads(curves.read_text())
    assert content["command"] == "python tune.py search_space=space.yaml sweep.max_epochs=2"
    assert str(tmp_path) not in curves.read_text()
    assert content["search_space"] == {"model.decoder.depth": "range(1, 3)"}
    assert [trial["losses"] for trial in content["trials"]] == [[3.0, 2.5], [9.0]]
    read, max_epochs = asha_modes.read_curves(curves)
    assert [each.losses for each in read] == [(3.0, 2.5), (9.0,)]
    assert [each.epoch_s for each in read] == [2.0, 2.0]
    assert max_epochs == 2
