"""Whole sweeps over cheap curves: what the searcher is told, what stands in the table, how a sweep ends."""

import contextlib
import io
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler

from handpose.errors import UserError
from handpose.report.table import TrialTable
from handpose.sweep.run import Slots, SweepInterruptedError, count_slots, ray_runtime
from handpose.sweep.settings import RaySettings
from handpose.sweep.space import load_space
from tests.report.test_tensorboard import hparams_tab
from tests.sweep.conftest import grid, make_settings, start, tpe
from tests.sweep.objectives import METRIC, curve, endless, fails_or_diverges

SPACE = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel.decoder.depth: range(1, 4)\nheatmap.sigma: 0.02\n"


def study_of(folder):
    """The study as another process sees it."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study" / "journal.log")))
    return optuna.load_study(study_name="test", storage=storage)


DEFAULTS = {"optimizer.lr": 0.002, "model.decoder.depth": 3, "heatmap.sigma": 0.02}


class Finished(NamedTuple):
    table: TrialTable
    folder: Path
    output: str


@pytest.fixture(scope="module")
def finished(ray_started, tmp_path_factory):
    """A sweep of eight trials with ASHA and TPE, and what it printed where there is no terminal."""
    folder = tmp_path_factory.mktemp("finished")
    file = folder / "space.yaml"
    file.write_text(SPACE)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        table = start(
            make_settings(folder / "sweep", num_trials=8),
            load_space(str(file)),
            curve,
            searcher=tpe(),
            defaults=DEFAULTS,
        )
    return Finished(table, folder / "sweep", output.getvalue())


def test_study_knows_each_trials_end_and_fidelity(finished):
    trials = study_of(finished.folder).trials
    assert len(trials) == len(finished.table.rows) == 8
    assert {row.state for row in finished.table.rows.values()} == {"complete", "stopped"}
    for trial in trials:
        row = finished.table.rows[trial.number]
        assert trial.state == (TrialState.COMPLETE if row.epochs == 4 else TrialState.PRUNED)
        assert trial.last_step == row.epochs
        assert trial.value == trial.intermediate_values[row.epochs] == row.metrics[METRIC]
        assert trial.params == {key: row.params[key] for key in ("optimizer.lr", "model.decoder.depth")}


def test_trials_csv_and_study_and_tensorboard_agree(finished):
    csv = pd.read_csv(finished.folder / "trials.csv").set_index("number")
    _, groups = hparams_tab(finished.folder / "tensorboard")
    for trial in study_of(finished.folder).trials:
        row, group = csv.loc[trial.number], groups[f"trial_{trial.number:04d}"]
        assert row[METRIC] == trial.value
        assert row["optimizer.lr"] == trial.params["optimizer.lr"] == group.hparams["optimizer.lr"].number_value
        shown = next(value for value in group.metric_values if value.name.tag == METRIC)
        assert shown.training_step == row["epochs"] == trial.last_step
        assert shown.value == pytest.approx(trial.value, rel=1e-6)  # TensorBoard keeps single precision


def test_the_default_configuration_is_tried_first(finished):
    assert finished.table.rows[0].params == DEFAULTS


def test_output_without_a_terminal_is_one_line_a_trial(finished):
    head, *lines = finished.output.splitlines()
    assert head == "sweep test  ·  space"
    assert [line.split()[0] for line in lines] == [f"[{i}/8]" for i in range(1, 9)]
    assert all("PA-MPJPE" in line and " mm" in line for line in lines)


def test_diverged_and_crashed_trials_fail_in_the_study_and_the_sweep_goes_on(sweep, write_space):
    table, folder = sweep(
        write_space("model.decoder.depth: range(1, 4)"), fails_or_diverges, searcher=grid(), scheduler=FIFOScheduler()
    )
    ends = {row.params["model.decoder.depth"]: (row.state, row.epochs) for row in table.rows.values()}
    assert ends == {1: ("diverged", 2), 2: ("failed", 1), 3: ("complete", 4)}
    states = {trial.params["model.decoder.depth"]: trial.state for trial in study_of(folder).trials}
    assert states == {1: TrialState.FAIL, 2: TrialState.FAIL, 3: TrialState.COMPLETE}
    csv = pd.read_csv(folder / "trials.csv").set_index("model.decoder.depth")
    assert csv.loc[2, "error"] == "FloatingPointError: no gradient at all"
    assert math.isnan(csv.loc[1, METRIC])
    failed = next(row for row in table.rows.values() if row.state == "failed")
    assert "no gradient at all" in (folder / "trials" / f"trial_{failed.number:04d}" / "error.txt").read_text()


def test_the_same_seed_gives_the_same_sweep_with_one_trial_at_a_time(sweep, write_space):
    tables = [
        sweep(write_space(SPACE), curve, searcher=tpe(3), name=name, num_trials=7, max_concurrent=1)[0]
        for name in ("a", "b")
    ]
    first, second = ([(row.params, row.state, row.metrics) for row in table.rows.values()] for table in tables)
    assert first == second


def test_a_grid_is_tried_whole_and_each_point_once(sweep, write_space):
    space = write_space("model.decoder.depth: range(1, 4)\noptimizer.lr: choice(1e-3, 1e-2)")
    defaults = {"optimizer.lr": 1e-2, "model.decoder.depth": 2}
    table, folder = sweep(space, curve, searcher=grid(), scheduler=FIFOScheduler(), num_trials=50, defaults=defaults)
    points = [(row.params["model.decoder.depth"], row.params["optimizer.lr"]) for row in table.rows.values()]
    assert sorted(points) == [(depth, lr) for depth in (1, 2, 3) for lr in (1e-3, 1e-2)]
    assert table.rows[0].params == {"model.decoder.depth": 2, "optimizer.lr": 1e-2}
    assert all(trial.state == TrialState.COMPLETE for trial in study_of(folder).trials)


def test_a_spent_time_budget_leaves_no_trial_running(sweep, write_space):
    table, folder = sweep(
        write_space(SPACE), endless, scheduler=FIFOScheduler(), num_trials=5, max_epochs=10_000, time_budget_s=2.0
    )
    assert {row.state for row in table.rows.values()} == {"stopped"}
    assert all(trial.state in (TrialState.PRUNED, TrialState.FAIL) for trial in study_of(folder).trials)


def test_an_interrupt_ends_the_sweep_in_good_order(sweep, write_space, tmp_path):
    folder = tmp_path / "sweep"

    def interrupt():
        while not (folder / "trials.csv").is_file() or pd.read_csv(folder / "trials.csv")["epochs"].max() < 1:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SweepInterruptedError, match=str(folder)):
        sweep(write_space(SPACE), endless, scheduler=FIFOScheduler(), max_epochs=10_000)
    assert set(pd.read_csv(folder / "trials.csv")["state"]) == {"interrupted"}
    assert all(trial.state != TrialState.RUNNING for trial in study_of(folder).trials)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("has", "asked", "slots"),
    [
        ({"CPU": 8}, {"cpus_per_trial": 2}, Slots(4, 2, 0.0)),
        ({"CPU": 8}, {"cpus_per_trial": 2, "max_concurrent": 3}, Slots(3, 2, 0.0)),
        ({"CPU": 64, "GPU": 2}, {}, Slots(2, 1, 1.0)),
        ({"CPU": 64, "GPU": 2}, {"gpus_per_trial": 0.25}, Slots(8, 1, 0.25)),
        ({"CPU": 64, "GPU": 2}, {"gpus_per_trial": 0.3}, Slots(6, 1, 0.3)),
        ({"CPU": 64, "GPU": 8}, {"gpus_per_trial": 4}, Slots(2, 1, 4)),
        ({"CPU": 4, "GPU": 8}, {"gpus_per_trial": 0}, Slots(4, 1, 0)),
    ],
)
def test_there_are_as_many_slots_as_cores_and_gpus_hold(has, asked, slots, tmp_path):
    assert count_slots(make_settings(tmp_path, **asked), has) == slots


def test_a_trial_that_fits_nowhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no trial fits: sweep.cpus_per_trial=8 .* Ray has 4 cores and 0 GPUs"):
        count_slots(make_settings(tmp_path, cpus_per_trial=8), {"CPU": 4})


def test_a_cluster_that_does_not_answer_is_a_sentence_at_once(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"ray\.address=127\.0\.0\.1:1: no Ray cluster answers there"):
        ray_runtime(RaySettings(address="127.0.0.1:1", num_cpus=None)).__enter__()
