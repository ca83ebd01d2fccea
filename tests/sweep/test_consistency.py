"""One sweep, four accounts of it: trials.csv, TensorBoard, the study and the record that reports are made of.

A simulated sweep with everything that makes them differ: parameters that only some trials have, words among numbers,
divergence at an epoch's end and within it, failures with and without a retry, trials that cost too much, early
stopping, and a process that is killed on the way.
"""

import csv
import json
import math
import warnings
from dataclasses import asdict
from functools import partial

import pandas as pd
import pytest
import yaml
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from handpose.report.tensorboard import ABSENT, STATE
from handpose.report.terminal import PlainView, SweepClock
from handpose.report.trial_table import TrialTable
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.space import load_space
from handpose.search.study import PARAMS_ATTRIBUTE
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.audit.events import Expectations, replay_events
from handpose.sweep.controller.controller import SegmentFailure, SweepController
from handpose.sweep.controller.history import History
from handpose.sweep.driver.recorder import Recorder
from handpose.sweep.driver.run import open_trial_logs
from handpose.sweep.record.events import EventLog
from tests.report.test_tensorboard import get_metric_values, get_values, hparams_tab
from tests.sweep.objectives import METRIC
from tests.sweep.sweeps import make_asha, make_settings

SPACE = """
def space(trial):
    params = {"model/decoder": trial.suggest_categorical("model/decoder", ["pyramid", "effpose"]),
              "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1.0, log=True),
              "optimizer.weight_decay": trial.suggest_categorical("optimizer.weight_decay", ["none", 0.1, 0.01]),
              "optimizer.fused": trial.suggest_categorical("optimizer.fused", [None, True, False])}
    if params["model/decoder"] == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 5)
    return params
"""
NUM_TRIALS, EPOCHS = 24, 4


class SilentView(PlainView):
    def __init__(self):
        self._clock = SweepClock(time_budget_s=None)

    def show_trial_end(self, table, row):
        pass


class SweepProcess:
    """A process that runs the sweep, as run.py puts it together, but for Ray."""

    def __init__(self, settings, space, *, resume):
        self.searcher = OptunaSearcher(
            space=space,
            folder=settings.path / "study",
            name=settings.name,
            metric=METRIC,
            mode="min",
            max_epochs=EPOCHS,
            seed=0,
            defaults={},
            resume=resume,
            sampler=partial(RandomSampler),
            constraints={"latency_ms": 4.5},
        )
        self.log = EventLog(settings.path / "events.jsonl")
        self.table = TrialTable(METRIC, "min", settings.num_trials, EPOCHS)
        history = History(settings, scheduler=make_asha(EPOCHS)(), table=self.table)
        self.now = 0.0
        self.state = SweepController(
            settings, log=self.log, history=history, searcher=self.searcher, clock=lambda: self.now
        )
        logs = open_trial_logs(settings, self.table)
        view = SilentView()
        recorder = Recorder(
            self.table,
            folder=settings.path,
            retention=history.retention,
            refresh_times=self.state.refresh_times,
            view=view,
            logs=logs,
        )
        recorder.restore(self.state.past_events)
        self.state.open(num_slots=1, listener=recorder)

    def run(self, num_reports):
        """Trial after trial, until so many epochs are reported."""
        while num_reports > 0 and (segment := self.state.next_segment()) is not None:
            num_reports -= self._train(segment)

    def _train(self, segment):
        number, epoch = segment.trial, segment.epoch
        if not epoch and not self.state.process_costs(
            number, {"latency_ms": 1.0 + number % 5, "memory_mb": 50.0 + number}
        ):
            return 0
        while True:
            epoch, self.now = epoch + 1, self.now + 1.25
            if number % 7 == 3 and epoch == 1 + number % 2:
                self.state.process_failure(number, SegmentFailure("error", "=cmd: no gradient", "line one\nline two"))
                return epoch
            diverges = number % 6 == 4 and epoch == 1 + number // 6 % 2
            value = math.nan if diverges else 20.0 / epoch - number * (-1) ** number / 7
            within = number % 12 == 4 and math.isnan(value)
            metrics = {METRIC: value} if within else {METRIC: value, "val/pck_auc": 0.5 + epoch / 100}
            if not self.state.process_report(number, epoch, metrics, node="a"):
                return epoch

    def kill(self):
        """All that is not on the disk is lost."""
        self.searcher.close()
        self.log.close()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    folder.mkdir()
    (folder / "search_space").mkdir()
    (folder / "search_space" / "conditional.py").write_text(SPACE)
    space = load_space(str(folder / "search_space" / "conditional.py"))
    settings = make_settings(folder, num_trials=NUM_TRIALS, max_epochs=EPOCHS, max_retries=1, retry_delay_s=0.0)
    config = {"sweep": asdict(settings), "search_space": "conditional.py"}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"config": config}))
    with warnings.catch_warnings():
        process = SweepProcess(settings, space, resume=False)
        process.run(12)
        process.kill()
        process = SweepProcess(settings, space, resume=True)
        process.run(1000)
        process.state.close("finished")
        study = process.searcher.study.get_trials()
        process.kill()
    return folder, process.state.history, study


def test_the_simulation_has_all_that_makes_accounts_differ(swept):
    _, history, _ = swept
    states = set(history.table.count_states())
    assert states == {"complete", "stopped", "diverged", "infeasible", "failed"}
    diverged = [row for row in history.table.rows.values() if row.state == "diverged"]
    assert {row.epochs for row in diverged} == {1, 2}
    assert {len(row.metrics) for row in diverged} == {1, 2}  # within an epoch, and at its end
    assert {row.epochs for row in history.table.rows.values() if row.state == "failed"} >= {0}
    expected = Expectations(NUM_TRIALS, None, 0, {"latency_ms": 4.5}, lambda number: None, 1)
    replayed = replay_events(history.settings, expected, scheduler=make_asha(EPOCHS)())
    assert replayed.findings == []


def test_trials_csv_says_what_the_events_say(swept):
    folder, history, _ = swept
    with (folder / "trials.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == len((folder / "trials.csv").read_text().splitlines()) == 1 + NUM_TRIALS
    table = pd.read_csv(folder / "trials.csv", keep_default_na=False).set_index("number")
    for number, row in history.table.rows.items():
        cells = table.loc[number]
        assert (cells["state"], cells["epochs"]) == (row.state, row.epochs)
        for name in (METRIC, "val/pck_auc"):
            assert cells[name] == (repr(row.metrics[name]) if name in row.metrics else "")
        assert {name: float(cells[name]) for name in ("latency_ms", "memory_mb")} == row.costs
        assert cells["error"].strip() == row.error
        assert cells["reason"] == row.reason
        assert bool(row.reason) == row.is_over
        assert float(cells["seconds"]) == pytest.approx(row.seconds, abs=0.006)


def test_the_hparams_tab_says_what_trials_csv_says(swept):
    folder, history, _ = swept
    _, groups = hparams_tab(folder / "tensorboard")
    table = pd.read_csv(folder / "trials.csv", keep_default_na=False, dtype=str).set_index("number")
    assert set(groups) == {f"trial_{number:04d}" for number in history.table.rows}
    params = ["model/decoder", "optimizer.lr", "optimizer.weight_decay", "optimizer.fused", "model.decoder.depth"]
    for number, cells in table.iterrows():
        group = groups[f"trial_{int(number):04d}"]
        shown, metrics = get_values(group), get_metric_values(group)
        assert shown.pop(STATE) == cells["state"]
        for key in params:
            written = "" if shown[key] == ABSENT else str(shown[key])
            assert written.lower() == cells[key].lower(), key
        assert metrics["work/epochs"] == (int(cells["epochs"]), float(cells["epochs"]))
        assert metrics["work/seconds"][1] == pytest.approx(float(cells["seconds"]), abs=0.006)
        assert metrics["work/latency_ms"][1] == float(cells["latency_ms"])
        if int(cells["epochs"]):
            step, value = metrics[METRIC]
            assert step == int(cells["epochs"])
            assert value == pytest.approx(float(cells[METRIC]), rel=1e-6, nan_ok=True)
        else:
            assert METRIC not in metrics


def test_the_texts_of_tensorboard_are_the_stories_of_the_record(swept):
    folder, _, _ = swept
    for trial in read_sweep(folder).trials:
        log = EventAccumulator(str(folder / "tensorboard" / f"trial_{trial.number:04d}")).Reload()
        text = log.Tensors("story/text_summary")[-1].tensor_proto.string_val[0].decode()
        assert [line.partition(" ")[2].partition(" ")[2] for line in text.splitlines()] == [
            line.text for line in trial.story
        ]


def test_scalars_and_study_have_the_same_curves(swept):
    folder, history, study = swept
    for number, trial in history.trials.items():
        scalars = EventAccumulator(str(folder / "tensorboard" / f"trial_{number:04d}")).Reload()
        curve = {e.step: e.value for e in scalars.Scalars(METRIC)} if METRIC in scalars.Tags()["scalars"] else {}
        assert curve == pytest.approx(trial.values, rel=1e-6, nan_ok=True)
        finite = {epoch: value for epoch, value in trial.values.items() if math.isfinite(value)}
        assert study[number].intermediate_values == finite


def test_the_study_says_what_the_table_says(swept):
    _, history, study = swept
    states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "infeasible": TrialState.PRUNED}
    assert [trial.number for trial in study] == list(history.table.rows)
    for trial in study:
        row = history.table.rows[trial.number]
        assert trial.state == states.get(row.state, TrialState.FAIL)
        assert trial.user_attrs.get(PARAMS_ATTRIBUTE, trial.params) == row.params
        assert {name: trial.user_attrs[name] for name in row.costs} == row.costs
        if trial.state == TrialState.COMPLETE:
            assert trial.values == [history.table.get_value(row)]
            assert trial.last_step == row.epochs


def test_the_record_says_what_the_table_says(swept):
    folder, history, _ = swept
    record = read_sweep(folder)
    assert record.ranked == [row.number for row in history.table.rank_trials()]
    for trial in record.trials:
        row = history.table.rows[trial.number]
        assert (trial.state, trial.epochs, trial.params, trial.error) == (
            row.state,
            row.epochs,
            row.params,
            row.error,
        )
        assert trial.costs == row.costs
        assert trial.reason == row.reason
        assert row.reason.split("; ")[-1] in trial.story[-1].text
        assert trial.seconds == pytest.approx(row.seconds, abs=1e-3)
        assert json.dumps(trial.metrics, sort_keys=True) == json.dumps(row.metrics, sort_keys=True)
        assert trial.curve == pytest.approx(history.trials[trial.number].values, nan_ok=True)
