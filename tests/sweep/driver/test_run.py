"""Whole sweeps over cheap curves: what the searcher is told, what stands in the table, how a sweep ends."""

import contextlib
import io
import math
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import optuna
import pandas as pd
import pytest
import ray
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from handpose.errors import UserError
from handpose.program import exit_on_user_error
from handpose.report.trial_table import TrialTable
from handpose.resources import measure_memory
from handpose.schedulers.population import PopulationBased
from handpose.schedulers.scheduler import Fifo
from handpose.search.space import load_space
from handpose.sweep.controller.slots import count_slots
from handpose.sweep.driver.run import SweepHaltedError, read_process_mb
from handpose.sweep.driver.shutdown import SweepInterruptedError
from handpose.sweep.execution.nodes import list_live_resources
from handpose.sweep.execution.runtime import start_ray
from handpose.sweep.preflight.checks import check_sweep
from handpose.sweep.record.events import EpochReported, SegmentFailed, SegmentStarted, read_events
from handpose.sweep.record.settings import RaySettings
from handpose.sweep.record.utilisation_file import read_utilisation
from tests.report.test_tensorboard import hparams_tab
from tests.sweep.objectives import (
    METRIC,
    always_fails,
    costs_by_depth,
    curve,
    dies_once,
    fails_or_diverges,
    grows_slowly,
    hangs_once,
    makes_worker_unfit,
    raises_user_error,
    shallow_is_cheap,
    train_growing_weight,
)
from tests.sweep.sweeps import make_asha, make_settings, make_tpe, run_small_sweep

SPACE = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel.decoder.depth: range(1, 4)\nheatmap.sigma: 0.02\n"
GROWING = "optimizer.lr: tag(log, interval(0.01, 1.0))\nmodel.decoder.depth: choice(1, 2, 4)\n"


def open_study(folder):
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
        table = run_small_sweep(
            make_settings(folder / "sweep", num_trials=8),
            load_space(str(file)),
            curve,
            sampler=make_tpe(),
            defaults=DEFAULTS,
        )
    return Finished(table, folder / "sweep", output.getvalue())


def test_study_knows_each_trials_end_and_fidelity(finished):
    trials = open_study(finished.folder).trials
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
    for trial in open_study(finished.folder).trials:
        row, group = csv.loc[trial.number], groups[f"trial_{trial.number:04d}"]
        assert row[METRIC] == trial.value
        assert row["optimizer.lr"] == trial.params["optimizer.lr"] == group.hparams["optimizer.lr"].number_value
        shown = next(value for value in group.metric_values if value.name.tag == METRIC)
        assert shown.training_step == row["epochs"] == trial.last_step
        assert shown.value == pytest.approx(trial.value, rel=1e-6)  # TensorBoard keeps single precision


def test_what_trials_used_is_recorded_next_to_the_events(finished):
    used = read_utilisation(finished.folder / "utilisation.jsonl")
    assert {number: [each.epoch for each in parts] for number, parts in used.items()} == {
        number: list(range(1, row.epochs + 1)) for number, row in finished.table.rows.items()
    }
    for number, parts in used.items():
        assert [each.used.cpu_percent for each in parts] == [10.0 * each.epoch for each in parts]
        assert parts[0].used.seconds["start_up"] > 1e-3  # the worker's start, which it cannot see itself
        total_s = sum(each.used.total_s for each in parts)
        assert total_s == pytest.approx(finished.table.rows[number].seconds, abs=0.01)
    assert b"cpu_percent" not in (finished.folder / "events.jsonl").read_bytes()


def test_the_default_configuration_is_tried_first(finished):
    assert finished.table.rows[0].params == DEFAULTS


def test_output_without_a_terminal_is_one_line_a_trial(finished):
    head, *lines = finished.output.splitlines()
    assert head == "sweep test  ·  space"
    assert [line.split()[0] for line in lines] == [f"[{i}/8]" for i in range(1, 9)]
    assert all("PA-MPJPE" in line and " mm" in line for line in lines)


def test_diverged_and_crashed_trials_fail_in_the_study_and_the_sweep_goes_on(sweep, write_space):
    space, alone = write_space("model.decoder.depth: range(1, 4)"), {"max_concurrent": 1, "max_retries": 0}
    table, folder = sweep(space, fails_or_diverges, sampler=None, scheduler=Fifo, **alone)
    ends = {row.params["model.decoder.depth"]: (row.state, row.epochs) for row in table.rows.values()}
    assert ends == {1: ("diverged", 2), 2: ("failed", 1), 3: ("complete", 4)}
    states = {trial.params["model.decoder.depth"]: trial.state for trial in open_study(folder).trials}
    assert states == {1: TrialState.FAIL, 2: TrialState.FAIL, 3: TrialState.COMPLETE}
    csv = pd.read_csv(folder / "trials.csv").set_index("model.decoder.depth")
    assert csv.loc[2, "error"] == "FloatingPointError: no gradient at all"
    assert "raise FloatingPointError" in csv.loc[2, "traceback"]
    assert math.isnan(csv.loc[1, METRIC])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_sweep_with_one_trial_at_a_time(sweep, write_space):
    tables = [
        sweep(write_space(SPACE), curve, sampler=make_tpe(), seed=3, name=name, num_trials=7, max_concurrent=1)[0]
        for name in ("a", "b")
    ]
    first, second = ([(row.params, row.state, row.metrics) for row in table.rows.values()] for table in tables)
    assert first == second


def test_a_grid_is_tried_whole_and_each_point_once(sweep, write_space):
    space = write_space("model.decoder.depth: range(1, 4)\noptimizer.lr: choice(1e-3, 1e-2)")
    defaults = {"optimizer.lr": 1e-2, "model.decoder.depth": 2}
    changes = {"num_trials": 50, "max_concurrent": 1}
    table, folder = sweep(space, curve, sampler=None, scheduler=Fifo, defaults=defaults, **changes)
    points = [(row.params["model.decoder.depth"], row.params["optimizer.lr"]) for row in table.rows.values()]
    assert sorted(points) == [(depth, lr) for depth in (1, 2, 3) for lr in (1e-3, 1e-2)]
    assert table.rows[0].params == {"model.decoder.depth": 2, "optimizer.lr": 1e-2}
    assert all(trial.state == TrialState.COMPLETE for trial in open_study(folder).trials)


@pytest.mark.slow
def test_a_spent_time_budget_leaves_no_trial_running_and_a_larger_one_lets_the_sweep_go_on(sweep, write_space):
    space = write_space(GROWING)
    changes = {"max_epochs": 8, "num_trials": 3, "time_budget_s": 2.0}
    table, folder = sweep(space, grows_slowly, scheduler=Fifo, **changes)
    assert table.end == "spent"
    assert {row.state for row in table.rows.values()} <= {"waiting", "complete"}
    assert all(trial.state in (TrialState.WAITING, TrialState.COMPLETE) for trial in open_study(folder).trials)
    before = (folder / "events.jsonl").read_bytes()
    run_small_sweep(make_settings(folder, **changes), space, grows_slowly, scheduler=Fifo, resume=True)  # still spent
    assert (folder / "events.jsonl").read_bytes() == before

    settings = make_settings(folder, **changes | {"time_budget_s": 600.0})
    table = run_small_sweep(settings, space, grows_slowly, scheduler=Fifo, resume=True)
    assert {(row.state, row.epochs) for row in table.rows.values()} == {("complete", 8)}
    epochs = [event.epoch for event in read_events(folder / "events.jsonl") if isinstance(event, EpochReported)]
    assert sorted(epochs) == sorted([*range(1, 9)] * 3)  # no epoch was trained twice


def test_a_sweep_ends_when_its_space_has_no_other_point_and_says_so(sweep, write_space, capsys):
    space = write_space("model.decoder.depth: range(1, 4)\noptimizer.lr: choice(1e-3, 1e-2)")
    table, folder = sweep(space, curve, sampler=make_tpe(), num_trials=50, max_concurrent=1)
    assert table.num_trials == len(table.rows) == 6
    assert len({tuple(row.params.values()) for row in table.rows.values()}) == 6
    assert len(open_study(folder).trials) == 6
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search_space=space has 6")]
    assert len(said) == 1


@pytest.mark.slow
def test_a_population_is_as_large_as_it_was_asked_for_in_a_space_with_fewer_points(sweep, write_space):
    space = write_space("optimizer.lr: choice(0.02, 0.3)\nmodel.decoder.depth: 1")
    values = {"perturbation_interval": 1, "quantile_fraction": 0.5, "resample_probability": 0.5, "max_epochs": 4}

    def rule():
        return PopulationBased(mutate=["optimizer.lr"], population_size=4, seed=0, space=space, **values)

    table, _ = sweep(space, train_growing_weight, scheduler=rule, num_trials=4)
    assert len(table.rows) == 4


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_nothing_running_and_goes_on_where_it_was(sweep, write_space, tmp_path):
    folder, space = tmp_path / "sweep", write_space(GROWING)

    def are_under_way():
        """Whether all trials that run have reported, since where the machine is busy one may be done before."""
        if not (folder / "trials.csv").is_file():
            return False
        rows = pd.read_csv(folder / "trials.csv")
        running = rows[rows["state"] == "running"]
        return len(running) > 0 and running["epochs"].min() >= 1 and rows["epochs"].max() >= 3

    def interrupt():
        while not are_under_way():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SweepInterruptedError, match=f"to resume: python tune.py sweep.resume={folder}"):
        sweep(space, grows_slowly, scheduler=Fifo, max_epochs=8, num_trials=3)
    assert signal.getsignal(signal.SIGTERM) is handler
    before = pd.read_csv(folder / "trials.csv").set_index("number")
    assert set(before["state"]) <= {"waiting", "complete"}
    assert all(trial.state != TrialState.RUNNING for trial in open_study(folder).trials)

    settings = make_settings(folder, max_epochs=8, num_trials=3)
    table = run_small_sweep(settings, space, grows_slowly, scheduler=Fifo, resume=True)
    assert {row.state for row in table.rows.values()} == {"complete"}
    for number in before.index:
        row, params = table.rows[number], before.loc[number]
        assert row.params["optimizer.lr"] == params["optimizer.lr"]
    for row in table.rows.values():  # the weight of all eight epochs has come along
        assert row.metrics[METRIC] == pytest.approx(
            10 - 8 * row.params["optimizer.lr"] / row.params["model.decoder.depth"]
        )
    assert [trial.state for trial in open_study(folder).trials] == [TrialState.COMPLETE] * 3
    resumed = [
        event
        for event in read_events(folder / "events.jsonl")
        if isinstance(event, SegmentStarted) and event.segment > 1
    ]
    assert resumed
    assert all(event.epoch > 0 for event in resumed)
    again = run_small_sweep(settings, space, grows_slowly, scheduler=Fifo, resume=True)  # it is finished: read, not run
    assert {number: row.metrics for number, row in again.rows.items()} == {
        number: row.metrics for number, row in table.rows.items()
    }


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_and_its_trial_tried_again(sweep, write_space):
    table, folder = sweep(write_space(GROWING), hangs_once, scheduler=Fifo, num_trials=2, hang_timeout_s=5.0)
    assert {row.state for row in table.rows.values()} == {"complete"}
    failed = [event for event in read_events(folder / "events.jsonl") if isinstance(event, SegmentFailed)]
    assert {(event.kind, event.cause) for event in failed} == {("killed", "no report for 5 s, so it was ended")}


@pytest.mark.slow
def test_a_killed_worker_costs_the_work_since_its_checkpoint_and_no_more(sweep, write_space):
    table, folder = sweep(write_space(GROWING), dies_once, scheduler=Fifo, max_epochs=8, num_trials=3)
    assert {(row.state, row.epochs) for row in table.rows.values()} == {("complete", 8)}
    for row in table.rows.values():
        assert row.metrics[METRIC] == pytest.approx(
            10 - 8 * row.params["optimizer.lr"] / row.params["model.decoder.depth"]
        )
    failures = [event for event in read_events(folder / "events.jsonl") if isinstance(event, SegmentFailed)]
    assert {(event.kind, event.cause[:18]) for event in failures} == {("killed", "the worker process")}
    begun = [event.epoch for event in read_events(folder / "events.jsonl") if isinstance(event, SegmentStarted)]
    assert sorted(begun) == [0, 0, 0, 3, 3, 3]


def test_paused_trials_are_promoted_from_their_checkpoints(sweep, write_space):
    scheduler = make_asha(8, mode="promote", reduction_factor=2)
    table, folder = sweep(write_space(GROWING), train_growing_weight, scheduler=scheduler, max_epochs=8, num_trials=6)
    reached = sorted(row.epochs for row in table.rows.values())
    assert reached[-1] == 8
    assert set(reached) <= {1, 2, 4, 8}
    best = min(table.rows.values(), key=lambda row: 10 - row.params["optimizer.lr"] / row.params["model.decoder.depth"])
    assert best.epochs == 8
    for row in table.rows.values():
        grown_by = row.epochs * row.params["optimizer.lr"] / row.params["model.decoder.depth"]
        assert row.metrics[METRIC] == pytest.approx(10 - grown_by)
    states = {trial.number: trial.state for trial in open_study(folder).trials}
    assert states == {
        row.number: TrialState.COMPLETE if row.epochs == 8 else TrialState.PRUNED for row in table.rows.values()
    }


@pytest.fixture(scope="module")
def population(ray_started, tmp_path_factory):
    """A population of four on two slots, its first learning rates proposed: its table, and its study's trials."""
    folder = tmp_path_factory.mktemp("population")
    (folder / "space.yaml").write_text(GROWING)
    space = load_space(str(folder / "space.yaml"))
    values = {"perturbation_interval": 2, "quantile_fraction": 0.5, "resample_probability": 0.0, "population_size": 4}
    scheduler = partial(PopulationBased, space=space, mutate=["optimizer.lr"], max_epochs=8, seed=0, **values)
    settings = make_settings(folder / "sweep", num_trials=4, max_epochs=8)
    table = run_small_sweep(settings, space, train_growing_weight, scheduler=scheduler)
    return table, {trial.number: trial for trial in open_study(folder / "sweep").trials}


@pytest.mark.slow
def test_a_population_goes_on_from_its_best(population):
    table, trials = population
    assert all((row.state, row.epochs) == ("complete", 8) for row in table.rows.values())
    changed = [row for row in table.rows.values() if row.params != trials[row.number].params]
    assert changed
    for row in changed:
        first = trials[row.number].params
        alone = 10.0 - 8 * first["optimizer.lr"] / first["model.decoder.depth"]
        assert row.metrics[METRIC] != pytest.approx(alone)
        assert row.command == ""


@pytest.mark.slow
def test_the_study_hears_of_no_value_that_a_proposal_did_not_earn(population):
    for trial in population[1].values():
        rate = trial.params["optimizer.lr"] / trial.params["model.decoder.depth"]
        earned = {epoch: 10.0 - epoch * rate for epoch in range(1, trial.last_step + 1)}
        assert trial.intermediate_values == pytest.approx(earned)
        assert trial.state == (TrialState.COMPLETE if trial.last_step == 8 else TrialState.PRUNED)


@pytest.mark.slow
def test_a_bug_in_every_trial_ends_the_sweep_after_a_few_with_one_sentence(sweep, write_space, tmp_path):
    with pytest.raises(
        SweepHaltedError, match=r"the first 3 trials failed before any .* with: KeyError: 'no_such_layer'"
    ):
        sweep(write_space(SPACE), always_fails, num_trials=50, retry_delay_s=30.0)
    csv = pd.read_csv(tmp_path / "sweep" / "trials.csv")
    assert len(csv) <= 4
    assert all("KeyError" in text for text in csv["traceback"].dropna())
    assert all(trial.state != TrialState.RUNNING for trial in open_study(tmp_path / "sweep").trials)


@pytest.mark.slow
def test_a_mistake_in_one_configuration_is_not_tried_again(sweep, write_space):
    table, folder = sweep(
        write_space("model.decoder.depth: range(1, 4)"), raises_user_error, sampler=None, scheduler=Fifo
    )
    states = {row.params["model.decoder.depth"]: row.state for row in table.rows.values()}
    assert states == {1: "complete", 2: "failed", 3: "complete"}
    failures = [event.kind for event in read_events(folder / "events.jsonl") if isinstance(event, SegmentFailed)]
    assert failures == ["user_error"]


@pytest.mark.slow
def test_a_trial_that_gets_an_unfit_worker_gets_another_without_losing_a_try(sweep, write_space):
    table, folder = sweep(write_space(SPACE), makes_worker_unfit, scheduler=Fifo, num_trials=4, max_retries=0)
    assert {(row.state, row.epochs) for row in table.rows.values()} == {("complete", 4)}
    failures = [event for event in read_events(folder / "events.jsonl") if isinstance(event, SegmentFailed)]
    assert {event.kind for event in failures} == {"unfit_worker"}


def test_what_costs_too_much_is_told_the_sampler_and_not_trained(ray_started, write_space, tmp_path):
    settings = make_settings(tmp_path / "sweep", num_trials=6)
    limits = {"num_parameters": 2.5e6}
    space = write_space("model.decoder.depth: range(1, 5)\noptimizer.lr: choice(1e-3, 1e-2)")
    table = run_small_sweep(settings, space, costs_by_depth, scheduler=Fifo, constraints=limits)
    for trial in open_study(tmp_path / "sweep").trials:
        row = table.rows[trial.number]
        is_feasible = row.params["model.decoder.depth"] <= 2
        assert row.state == ("complete" if is_feasible else "infeasible")
        assert (max(trial.constraints.values()) <= 0) == is_feasible


@pytest.mark.slow
def test_a_sweep_with_two_objectives_goes_on_and_has_one_front_in_table_study_and_file(
    ray_started, write_space, tmp_path
):
    folder, text = tmp_path / "sweep", SPACE.replace("heatmap.sigma: 0.02", "")
    scheduler = make_asha(4, mode="stop", reduction_factor=2, num_objectives=2)
    for num_trials in (6, 9):
        settings = make_settings(folder, num_trials=num_trials, second_objective="num_parameters", max_concurrent=1)
        space = write_space(text)
        table = run_small_sweep(
            settings, space, shallow_is_cheap, sampler=make_tpe(), scheduler=scheduler, resume=num_trials > 6
        )
        assert len(table.rows) == num_trials
        front = {row.number for row in table.find_front()}
        assert {trial.number for trial in open_study(folder).best_trials} == front
        for trial in open_study(folder).trials:
            row = table.rows[trial.number]
            assert trial.values == [row.metrics[METRIC], row.costs["num_parameters"]]
        read = pd.read_csv(folder / "trials.csv").set_index("number")
        assert read["num_parameters"].to_dict() == {n: row.costs["num_parameters"] for n, row in table.rows.items()}
    assert {row.state for row in table.rows.values()} == {"complete", "stopped"}


def test_two_processes_cannot_run_one_sweep(sweep, write_space, tmp_path):
    (tmp_path / "sweep").mkdir()
    with FileLock(tmp_path / "sweep" / ".lock"), pytest.raises(UserError, match="is running already"):
        sweep(write_space(SPACE), curve)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_the_sweep_can_go_on(sweep, write_space, tmp_path, monkeypatch):
    written = []

    def full(file, data, place):
        if len(written) == 12:
            raise OSError(28, "No space left on device")
        written.append(1)
        return pwrite(file, data, place)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    space = write_space(GROWING)
    with pytest.raises(
        UserError,
        match=r"events.jsonl cannot be written \(No space left on device: .* free are not enough\); .*; to resume: ",
    ):
        sweep(space, train_growing_weight, scheduler=Fifo, max_epochs=8, num_trials=3)
    monkeypatch.undo()
    table = run_small_sweep(
        make_settings(tmp_path / "sweep", max_epochs=8, num_trials=3),
        space,
        train_growing_weight,
        scheduler=Fifo,
        resume=True,
    )
    assert {(row.state, row.epochs) for row in table.rows.values()} == {("complete", 8)}


def test_a_cluster_that_does_not_answer_is_a_sentence_at_once(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"ray\.address=127\.0\.0\.1:1: no Ray cluster answers there"):
        start_ray(RaySettings(address="127.0.0.1:1", num_cpus=None)).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes", [2**14, 2**16])
def test_a_disk_that_fills_up_ends_the_sweep_with_one_sentence(sweep, write_space, disk, capfd, num_bytes):
    """Whichever file is the first that does not fit: TensorBoard's, the study's, the events, the table of trials."""
    folder = disk(num_bytes)
    with exit_on_user_error(), pytest.raises(UserError, match=r"No space left on device.*; to resume: ") as raised:
        sweep(write_space(GROWING), train_growing_weight, name="disk", scheduler=Fifo, max_epochs=8, num_trials=40)
    assert f"{folder}/" in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not list(folder.rglob("*.part"))


def test_a_sweep_that_cannot_be_written_down_leaves_its_name_free(ray_started, write_space, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("handpose.sweep.driver.run.write_yaml", full)
    settings = make_settings(tmp_path / "sweep")
    with pytest.raises(OSError, match="No space left on device"):
        run_small_sweep(settings, write_space(GROWING), train_growing_weight, scheduler=Fifo)
    check_sweep(settings, RaySettings(address=None, num_cpus=4))


def test_ray_has_less_memory_for_trials_than_the_machine(ray_started):
    assert 0 < ray.cluster_resources()["memory"] < 0.95 * measure_memory().total


@pytest.mark.slow
def test_trials_run_at_a_time_as_memory_allows_also_when_the_sweep_goes_on(ray_started, tmp_path, write_space, capfd):
    """Two cores, but memory for one: what the preflight measured is kept for the resume."""
    process_mb = 0.6e-6 * ray.cluster_resources()["memory"]
    space, settings = write_space(SPACE), make_settings(tmp_path / "sweep", num_trials=2, preflight="brief")

    def preflight(slots):
        assert slots.num_slots == 2
        return count_slots(settings, list_live_resources(), process_mb=process_mb)

    table = run_small_sweep(settings, space, curve, preflight=preflight)
    assert table.num_slots == 1
    assert read_process_mb(settings.path) == pytest.approx(process_mb, abs=1)
    assert "the memory" not in capfd.readouterr().out  # a real preflight says it
    more = make_settings(tmp_path / "sweep", num_trials=3)
    assert run_small_sweep(more, space, curve, resume=True).num_slots == 1
    assert "the memory  the process of a trial may take" in capfd.readouterr().out
    greedy = replace(make_settings(tmp_path / "greedy"), num_trials=1)
    with pytest.raises(UserError, match=r"^no trial fits: the process of a trial may take .* of memory are free"):
        run_small_sweep(greedy, space, curve, process_mb=2 * process_mb)
    assert not (tmp_path / "greedy").exists()
