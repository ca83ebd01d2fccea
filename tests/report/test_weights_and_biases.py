"""Trials in Weights & Biases, whose package is optional: a stand-in records what it is told."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg

from handpose.report.trial_table import TrialRow
from handpose.report.utilisation import Utilisation
from handpose.report.weights_and_biases import WandbLog

METRIC = "val/pa_mpjpe_mm"


class Run:
    """What a run of the site has been told."""

    def __init__(self, options):
        self.options, self.config, self.summary, self.history, self.exit_code = options, {}, {}, [], None
        self.config = SimpleNamespace(update=lambda params, allow_val_change: self.params.update(params))
        self.params = {}

    def log(self, values, step):
        assert not self.history or step > self.history[-1][0], "the site takes steps in ascending order only"
        self.history.append((step, values))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def site(monkeypatch):
    """The runs that were begun, in order."""
    runs = []

    def init(**options):
        runs.append(Run(options))
        return runs[-1]

    package = SimpleNamespace(init=init, Settings=SimpleNamespace, Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return runs


def make_log(folder):
    return WandbLog(folder, project="hands", group="night", run_name="trial_{:04d}".format)


def train(log, row, values, state, pictures=None):
    log.open_run(row)
    for value in values:
        row.epochs, row.metrics, row.state = row.epochs + 1, {METRIC: value}, "running"
        log.log_epoch(row, pictures or {})
    row.state = state
    log.close_run(row, ended_s=0.0)


def test_each_trial_is_a_run_of_the_sweeps_group(site, tmp_path):
    log, rows = make_log(tmp_path), [TrialRow(0, {"optimizer.lr": 0.1}), TrialRow(1, {"optimizer.lr": 9.0, "w": None})]
    train(log, rows[0], [20.0, 10.0], "complete")
    train(log, rows[1], [math.nan], "diverged")
    log.close()
    assert [(run.options["project"], run.options["group"], run.options["name"]) for run in site] == [
        ("hands", "night", "trial_0000"),
        ("hands", "night", "trial_0001"),
    ]
    assert [run.params for run in site] == [row.params for row in rows]
    assert [(step, values[METRIC]) for step, values in site[0].history] == [(1, 20.0), (2, 10.0)]
    assert [run.summary["state"] for run in site] == ["complete", "diverged"]
    assert [run.exit_code for run in site] == [0, 1]


def test_the_utilisation_is_logged_with_its_epoch(site, tmp_path):
    log, row = make_log(tmp_path), TrialRow(0, {}, epochs=1, metrics={METRIC: 5.0})
    log.open_run(row)
    log.log_utilisation(row, Utilisation({"data": 1.0, "training": 3.0}))
    log.log_epoch(row, {})
    row.epochs = 2
    log.log_epoch(row, {})
    log.close()
    assert [values.get("worker/data_percent") for _, values in site[0].history] == [25.0, None]


def test_a_sweep_that_goes_on_goes_on_with_the_same_runs(site, tmp_path):
    row = TrialRow(3, {})
    for state in ("waiting", "complete"):
        log = make_log(tmp_path)
        train(log, row, [5.0], state)
        log.close()
    first, second = site
    assert first.options["id"] == second.options["id"]
    assert second.options["resume"] == "allow"
    assert [step for run in site for step, _ in run.history] == [1, 2]
    other = make_log(tmp_path / "another sweep")
    train(other, TrialRow(3, {}), [5.0], "complete")
    other.close()
    assert site[2].options["id"] != first.options["id"]


def test_pictures_are_sent_although_their_files_are_removed_at_once(site, tmp_path):
    file = tmp_path / "p.jpg"
    file.write_bytes(simplejpeg.encode_jpeg(np.zeros((16, 24, 3), np.uint8)))
    log = make_log(tmp_path)
    train(log, TrialRow(0, {}), [1.0], "complete", {"keypoints": file})
    file.unlink()
    log.close()
    assert site[0].history[0][1]["val_pictures/keypoints"] == (24, 16)


def test_what_the_rows_say_later_does_not_change_what_was_told_before(site, tmp_path):
    log, row = make_log(tmp_path), TrialRow(0, {})
    train(log, row, [4.0, 3.0, 2.0], "complete")
    row.epochs, row.metrics = 99, {METRIC: -1.0}
    log.close()
    assert [(step, values[METRIC], values["epochs"]) for step, values in site[0].history] == [
        (1, 4.0, 1),
        (2, 3.0, 2),
        (3, 2.0, 3),
    ]


def test_a_sweep_goes_on_without_a_site_that_does_not_answer(monkeypatch, tmp_path, capsys):
    def init(**options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=SimpleNamespace))
    log = make_log(tmp_path)
    train(log, TrialRow(0, {}), [1.0, 2.0], "complete")
    log.close()
    assert capsys.readouterr().out == "wandb: no network; the sweep continues without it\n"
