"""Trials that are trained with several folds: what they report is the mean of single trainings by train.py."""

import shlex
import time
from functools import partial
from statistics import fmean

import pytest

from handpose.config import compose
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.trainable import trial
from handpose.sweep.trainable.trial import TrainingFunction, TrialRecipe
from handpose.sweep.trainable.utilisation_meter import UtilisationMeter
from handpose.training.fit import RunFolders, fit
from tests import builders
from tests.builders import write_freihand
from tests.sweep.objectives import METRIC

EPOCHS, NUM_FOLDS = 2, 2


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    root = write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)
    small = [*builders.SMALL, "model.decoder.depth=1", "trainer.enable_progress_bar=false", "num_threads=1"]
    return [*small, f"data.root={root}", f"paths.output={tmp_path_factory.mktemp('outputs')}"]


def make_recipe(overrides=()):
    return TrialRecipe(overrides, [], max_epochs=EPOCHS, num_threads=1, folds=NUM_FOLDS)


class KilledError(Exception):
    """Ends a segment as a lost worker does."""


def run_segment_in(folder, overrides, patch, *, kill_at=None, segment_number=1, checkpoints=(), **options):
    """Run a segment of a trial in this process, up to a report; return its reports and checkpoints."""
    reports, saved = [], []

    def report(epoch, metrics, *, resumed_from, checkpoint, **more):
        reports.append((epoch, metrics, resumed_from))
        saved.extend([] if checkpoint is None else [checkpoint])
        if epoch == kill_at:
            raise KilledError

    (folder / EVENTS_FILE).touch()
    patch.setattr(trial, "_get_trial_gpus", lambda: 0.0)
    patch.setattr(trial, "report_epoch", report)
    function = TrainingFunction(make_recipe(overrides), METRIC, **{"checkpoint_every_epochs": 1} | options)
    epoch = checkpoints[-1].epoch if checkpoints else 0
    segment = TrialSegment(0, segment_number, {"optimizer.lr": 1e-3}, epoch, checkpoints, str(folder), None)
    try:
        function._train(segment, folder, time.perf_counter())
    except KilledError:
        assert kill_at is not None
    return reports, saved


@pytest.fixture
def run_segment(overrides, tmp_path, monkeypatch):
    return partial(run_segment_in, tmp_path, overrides, monkeypatch)


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory):
    """The reports of a trial that is not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        reports, _ = run_segment_in(tmp_path_factory.mktemp("whole"), overrides, patch)
    return reports


@pytest.fixture(scope="module")
def single_trainings(overrides, tmp_path_factory):
    """Fold -> metrics of the last epoch of train.py with that fold."""
    place = tmp_path_factory.mktemp("single")
    found = []
    for fold in range(NUM_FOLDS):
        given = [f"trainer.max_epochs={EPOCHS}", "optimizer.lr=1e-3", f"folds.num={NUM_FOLDS}", f"folds.index={fold}"]
        config = compose("train", [*overrides, *given, "logger=none", "checkpoints.enabled=false"])
        found.append(fit(config, RunFolders(place, place, place), quiet=True).metrics)
    return found


def test_a_trial_reports_the_mean_of_single_trainings_at_the_end_of_each_fold(whole, single_trainings):
    assert [epoch for epoch, _, _ in whole] == [1, 2, 3, 4]
    metrics = {epoch: values for epoch, values, _ in whole}
    assert metrics[2] == {name: single_trainings[0][name] for name in metrics[2]}
    assert metrics[3] == metrics[2] != metrics[1]
    assert metrics[4] == {name: fmean(each[name] for each in single_trainings) for name in metrics[2]}
    assert metrics[4][METRIC] != metrics[2][METRIC]


@pytest.mark.parametrize("kill_at", [2, 3, 4])
def test_a_trial_that_is_killed_in_a_fold_reports_the_same_when_it_is_resumed(run_segment, whole, kill_at):
    """Resumed in the first fold, at the end of it, and in the second one."""
    before, checkpoints = run_segment(kill_at=kill_at, segment_number=2)
    after, _ = run_segment(segment_number=3, checkpoints=checkpoints)
    resumed_from = checkpoints[-1].epoch
    assert resumed_from == kill_at - 1
    assert [*before[:resumed_from], *after] == [
        (epoch, metrics, resumed_from if epoch > resumed_from else 0) for epoch, metrics, _ in whole
    ]


def test_a_trial_that_pauses_after_one_fold_goes_on_with_the_next(run_segment, whole):
    _, (checkpoint,) = run_segment(kill_at=2, segment_number=2, checkpoint_every_epochs=None, rungs=(2,))
    assert checkpoint.epoch == 2
    after, _ = run_segment(segment_number=3, checkpoints=[checkpoint])
    assert after == [(epoch, metrics, 2) for epoch, metrics, _ in whole[2:]]


def test_a_trial_that_diverges_in_a_fold_trains_no_other(run_segment, overrides, monkeypatch):
    overrides = [*overrides, "lr_schedule=constant"]
    monkeypatch.setattr(TrialRecipe, "make_overrides", lambda recipe, params: [*overrides, "optimizer.lr=1e30"])
    monkeypatch.setattr(trial, "_CHECK_EVERY_STEPS", 1)
    reports, _ = run_segment()
    assert reports[-1][0] <= EPOCHS
    assert reports[-1][1][METRIC] != reports[-1][1][METRIC]


def test_costs_are_measured_once(run_segment, monkeypatch):
    measured = []
    monkeypatch.setattr(trial, "measure_costs", lambda module, latency_of: {})
    monkeypatch.setattr(trial, "report_costs", measured.append)
    run_segment(needs_costs=True)
    assert measured == [{}]


def test_a_checkpoint_is_saved_at_the_end_of_a_fold_whatever_the_interval(overrides):
    function = TrainingFunction(TrialRecipe([], [], 5, 1, folds=3), METRIC, 4, rungs=(10,), saves_last=True)
    assert [epoch for epoch in range(1, 16) if function.is_checkpoint_due(epoch)] == [4, 5, 8, 10, 12, 15]
    assert [epoch for epoch in range(1, 16) if function.may_pause_at(epoch)] == [10, 15]


def test_one_command_trains_all_folds():
    command = shlex.split(make_recipe(["seed=3"]).format_command({"optimizer.lr": 1e-3}))
    assert command[:3] == ["python", "train.py", "-m"]
    assert command[-2:] == ["folds.num=2", "folds.index=0,1"]
    config = compose("train", [*command[3:-1], "folds.index=1"])
    assert (config.trainer.max_epochs, config.folds.num, config.seed) == (EPOCHS, NUM_FOLDS, 3)


def test_the_start_of_each_fold_counts_as_start_up(overrides, tmp_path):
    used = []
    with pytest.MonkeyPatch.context() as patch:
        take = UtilisationMeter.take
        patch.setattr(UtilisationMeter, "take", lambda meter: used.append(take(meter)) or used[-1])
        run_segment_in(tmp_path, overrides, patch)
    assert [each.seconds["start_up"] > 0 for each in used] == [True, False, True, False]
