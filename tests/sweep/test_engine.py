"""What a sweep built on the plain parts gets wrong, beside what ours does with the same reports.

Each pair runs Ray's own part as its documentation has it, and shows the fault; then ours. When a newer Ray or Optuna
mends a fault, the first half fails, and what stands here for it can go.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ray import tune
from ray.tune.execution.tune_controller import _get_max_pending_trials
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from handpose.schedulers.asha import Asha
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.record.events import EpochReported, SegmentStarted, read_events
from handpose.sweep.selection.winner import select_winner
from tests.sweep.driver.test_run import GROWING, SPACE, open_study
from tests.sweep.objectives import (
    METRIC,
    diverges_at_end,
    plain_reports_good_start,
    reports_good_start,
    slow_start,
    train_growing_weight,
)
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_asha, make_settings, run_small_sweep

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


class PlainAsha:
    """Ray's scheduler, told of trials without a cluster."""

    def __init__(self, **changes):
        values = {"time_attr": "epoch", "max_t": 27, "grace_period": 1, "reduction_factor": 3, "brackets": 1}
        self.scheduler = AsyncHyperBandScheduler(metric=METRIC, mode="min", **values | changes)
        self.trials = {}

    def report(self, number, epoch, value):
        if number not in self.trials:
            self.trials[number] = SimpleNamespace(trial_id=str(number), status=Trial.RUNNING)
            self.scheduler.on_trial_add(None, self.trials[number])
        return self.scheduler.on_trial_result(None, self.trials[number], {"epoch": epoch, METRIC: value})

    def rungs(self):
        """Epoch -> what is recorded there, of the first bracket."""
        return dict(self.scheduler._brackets[0]._rungs)


def make_plain_searcher():
    space = {"lr": tune.uniform(0, 1)}
    search = OptunaSearch(metric=METRIC, mode="min", sampler=optuna.samplers.RandomSampler(seed=0))
    search.set_search_properties(METRIC, "min", space)
    return search


@pytest.fixture
def simulate(tmp_path):
    """Runs ours without a cluster, with losses given by (trial, epoch)."""

    def run(loss, *, every=1, **changes):
        settings = make_settings(tmp_path / "ours", **{"num_trials": 9, "max_epochs": 27, **changes})
        scheduler = make_asha(settings.max_epochs, reduction_factor=3)
        return SimulatedSweep(settings, scheduler, lambda number, params, epoch: loss(number, epoch), num_slots=3).run()

    return run


def test_a_trial_without_a_number_holds_its_slot_in_plain_asha_and_not_in_ours(simulate):
    plain = PlainAsha()
    for number in range(8):
        plain.report(number, 1, 1.0)
    assert {plain.report(8, epoch, math.nan) for epoch in range(1, 27)} == {CONTINUE}
    rows = simulate(lambda number, epoch: math.nan if number == 8 else 1.0).controller.history.table.rows
    assert (rows[8].state, rows[8].epochs) == ("diverged", 1)


@pytest.mark.slow
def test_plain_search_leaves_a_diverged_trial_running_for_ever_and_ours_fails_it(sweep, write_space):
    plain = make_plain_searcher()
    plain.suggest("a")
    plain.on_trial_complete("a", {METRIC: math.nan, "training_iteration": 3})
    assert [trial.state for trial in plain._ot_study.trials] == [TrialState.RUNNING]
    _, folder = sweep(write_space(SPACE), diverges_at_end, num_trials=2, scheduler=Fifo)
    assert [trial.state for trial in open_study(folder).trials] == [TrialState.FAIL] * 2


@pytest.mark.slow
def test_plain_search_takes_a_stopped_trial_for_a_complete_one_and_ours_knows_its_fidelity(sweep, write_space):
    plain = make_plain_searcher()
    plain.suggest("a")
    plain.on_trial_result("a", {METRIC: 3.0, "training_iteration": 1})
    plain.on_trial_complete("a", {METRIC: 3.0, "training_iteration": 1})
    assert [(trial.state, trial.value) for trial in plain._ot_study.trials] == [(TrialState.COMPLETE, 3.0)]
    table, folder = sweep(write_space(GROWING), train_growing_weight, num_trials=6, max_epochs=8)
    stopped = [trial for trial in open_study(folder).trials if table.rows[trial.number].state == "stopped"]
    assert stopped
    assert all(trial.state == TrialState.PRUNED and trial.last_step < 8 for trial in stopped)


def test_a_plain_rung_takes_the_report_of_a_later_epoch_and_ours_does_not():
    plain = PlainAsha()
    for epoch in (5, 10, 15):
        plain.report(0, epoch, float(epoch))
    assert plain.rungs() == {27: {}, 9: {"0": -10.0}, 3: {"0": -5.0}, 1: {"0": -15.0}}  # kept with the sign turned
    ours = Asha(mode="stop", grace_period=1, reduction_factor=3, brackets=1, max_epochs=27, seed=0)
    for number in range(4):
        ours.on_trial_start(number, {})
    assert {ours.on_trial_result(number, 5, float(number)) for number in range(4)} == {"continue"}
    assert ours.on_trial_result(3, 9, 100.0) == "continue"  # the first at rung 9
    assert ours.on_trial_result(2, 9, 200.0) == "stop"


def test_plain_brackets_depend_on_the_global_generator_and_ours_on_the_seed():
    def plain(seed):
        np.random.seed(seed)
        scheduler = PlainAsha(brackets=3, grace_period=1)
        for number in range(30):
            scheduler.report(number, 1, 1.0)
        brackets = scheduler.scheduler._brackets
        return [brackets.index(scheduler.scheduler._trial_info[str(number)]) for number in range(30)]

    assert plain(0) != plain(1)

    def ours(seed, noise):
        np.random.seed(noise)
        rule = Asha(mode="stop", grace_period=1, reduction_factor=3, brackets=3, max_epochs=27, seed=seed)
        decisions = []
        for number in range(30):
            rule.on_trial_start(number, {})
            decisions.append(rule.on_trial_result(number, 1, float(number)))
        return decisions

    assert ours(0, noise=0) == ours(0, noise=1)
    assert ours(0, noise=0) != ours(1, noise=0)


@pytest.mark.slow
def test_a_plain_searcher_is_asked_for_one_trial_at_a_time_and_ours_for_all_slots(ray_started, write_space, tmp_path):
    assert _get_max_pending_trials(SearchGenerator(make_plain_searcher())) == 1
    run_small_sweep(make_settings(tmp_path / "sweep", num_trials=2), write_space(SPACE), slow_start, scheduler=Fifo)
    events = read_events(tmp_path / "sweep" / "events.jsonl")
    begun = [event.at for event in events if isinstance(event, SegmentStarted)]
    first_report = min(event.at for event in events if isinstance(event, EpochReported))
    assert begun[1] - begun[0] < 0.5 < first_report - begun[1]


@pytest.mark.slow
def test_the_plain_best_result_compares_fidelities_and_our_winner_does_not(sweep, write_space, tmp_path):
    """At lr 1 the one epoch that was trained looks better than all four at lr 2."""
    run_config = tune.RunConfig(name="plain", storage_path=str(tmp_path), verbose=0)
    space = {"lr": tune.grid_search([1.0, 2.0])}
    best = (
        tune.Tuner(plain_reports_good_start, param_space=space, run_config=run_config)
        .fit()
        .get_best_result(METRIC, "min")
    )
    assert best.metrics["epoch"] == 1
    table, folder = sweep(
        write_space("optimizer.lr: choice(1.0, 2.0)"), reports_good_start, sampler=None, scheduler=Fifo, max_epochs=4
    )
    assert {row.params["optimizer.lr"]: row.epochs for row in table.rows.values()} == {1.0: 1, 2.0: 4}
    assert select_winner(table, folder=folder).params["optimizer.lr"] == 2.0


PLAIN = """
import json, sys, tempfile, time
from pathlib import Path
import optuna, ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

folder, action = sys.argv[1:]

def trial(config):
    start = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            start = json.loads((Path(directory) / "state.json").read_text())
    for epoch in range(start + 1, 10):
        time.sleep(0.3)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "state.json").write_text(json.dumps(epoch))
            tune.report({"epoch": epoch, "start": start, "loss": config["lr"]},
                        checkpoint=tune.Checkpoint.from_directory(directory))
            with open(folder + "/reports", "a") as file:
                file.write(f"{start} {epoch}\\n")

def scheduler():
    return AsyncHyperBandScheduler(time_attr="epoch", max_t=9, grace_period=1, reduction_factor=3)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
if action == "run":
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(folder + "/study.log"))
    search = OptunaSearch(space={"lr": optuna.distributions.FloatDistribution(0, 1)}, metric="loss", mode="min",
                          storage=storage, study_name="plain")
    tuner = tune.Tuner(trial, tune_config=tune.TuneConfig(
        metric="loss", mode="min", num_samples=5, max_concurrent_trials=2, search_alg=search, scheduler=scheduler()),
        run_config=tune.RunConfig(name="plain", storage_path=folder, verbose=0))
    tuner.fit()
else:
    tuner = tune.Tuner.restore(folder + "/plain", trial, resume_unfinished=True)
    rungs = tuner._local_tuner._tune_config.scheduler._brackets[0]._rungs
    print(json.dumps({str(rung): len(recorded) for rung, recorded in rungs}))
"""


@pytest.mark.slow
def test_a_plain_sweep_that_was_killed_forgets_its_rungs_and_newest_checkpoints(tmp_path):
    """Killed after four seconds, with reports of some epochs: no snapshot has been written, every 10 s is one."""
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    environment = {**os.environ, "RAY_AIR_NEW_OUTPUT": "0"}
    command = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen([*command, "run"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    reports = tmp_path / "reports"
    while not reports.is_file() or len(reports.read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "restore"], env=environment, capture_output=True, text=True, timeout=120)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    states = [trial.state for trial in optuna.load_study(study_name="plain", storage=storage).trials]
    assert TrialState.RUNNING in states
    assert done.returncode != 0 or set(json.loads(done.stdout.splitlines()[-1]).values()) == {0}
