"""Trials of real networks, on a data set written on the fly: what is trained is what train.py trains."""

import math
import shlex
import time

import pytest
import pytorch_lightning as pl
from simplejpeg import decode_jpeg_header

from handpose.config import compose
from handpose.errors import UserError
from handpose.metrics.target import TargetMetric
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.record.events import CostsMeasured, EpochReported, SegmentStarted, read_events
from handpose.sweep.record.trial_segment import TrialSegment, find_pictures
from handpose.sweep.storage.checkpoint_files import FolderFiles
from handpose.sweep.trainable import trial
from handpose.sweep.trainable.reporting import WorkerContext, set_worker_context
from handpose.sweep.trainable.trial import (
    TrainingFunction,
    TrialRecipe,
    TrialReportCallback,
    add_checkpoint_metric,
    add_param_overrides,
    select_training_overrides,
)
from handpose.sweep.trainable.utilisation_meter import UtilisationMeter
from handpose.training.fit import RunFolders, fit
from tests import builders
from tests.builders import write_freihand
from tests.sweep.objectives import METRIC
from tests.sweep.sweeps import make_asha, make_settings, run_small_sweep

SMALL = [
    *builders.SMALL,
    "model.decoder.depth=1",
    "trainer.enable_progress_bar=false",
]
SILENT = ["logger=none", "checkpoints.enabled=false"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    root = write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)
    return [*SMALL, f"data.root={root}", f"paths.output={tmp_path_factory.mktemp('outputs')}"]


@pytest.fixture
def train(overrides, tmp_path):
    """Fits the small configuration in this process; returns its metrics."""

    def fitted(*more, callbacks=(), resume_from=None):
        config = compose("train", [*overrides, "num_threads=1", *SILENT, *more])
        folders = RunFolders(tmp_path, tmp_path, tmp_path)
        return fit(config, folders, callbacks=callbacks, quiet=True, resume_from=resume_from).metrics

    return fitted


def reproduce_metrics(row, tmp_path):
    """Metrics of the row's command, trained in this process as far as the row says."""
    config = compose("train", [*shlex.split(row.command)[2:], *SILENT])
    epochs = Epochs(row.epochs)
    fit(config, RunFolders(tmp_path, tmp_path, tmp_path), quiet=True, callbacks=[epochs])
    return {name: epochs.metrics[name] for name in row.metrics}


AUC = TargetMetric("val/pck_auc", "max")


def test_a_trial_measures_the_latency_that_the_sweep_names(tmp_path):
    settings = make_settings(tmp_path, latency_of="int8")
    function = TrainingFunction.from_settings(TrialRecipe([], [], 4, 1), settings, Fifo(), needs_costs=True)
    assert function.latency_of == "int8"


def test_the_best_checkpoint_is_chosen_by_the_metric_of_the_sweep():
    given = ["optimizer.lr=0.01"]
    assert add_checkpoint_metric(given, compose("train", given), AUC) == [*given, "checkpoints.metric=val/pck_auc"]
    assert add_checkpoint_metric(given, compose("train", given), TargetMetric("val/pa_mpjpe_mm", "min")) == given


def test_a_metric_for_checkpoints_that_was_given_stays():
    given = ["checkpoints.metric=val/rr_mpjpe_mm"]
    assert add_checkpoint_metric(given, compose("train", given), AUC) == given


def test_a_mode_for_checkpoints_that_contradicts_the_metric_of_the_sweep_is_refused():
    given = ["checkpoints.mode=min"]
    with pytest.raises(UserError, match=r"checkpoints\.mode=min contradicts checkpoints\.metric=val/pck_auc"):
        add_checkpoint_metric(given, compose("train", given), AUC)


class Epochs(pl.Callback):
    """Keeps the metrics of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_validation_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epoch:
            self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


SPACE = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nmodel.decoder.skips: choice(none, add)"


@pytest.mark.slow
def test_each_trial_of_two_at_a_time_is_reproduced_alone_from_its_row(ray_started, overrides, write_space, tmp_path):
    """Paused at every rung, and promoted from its checkpoint in another worker; constraints are measured before."""
    recipe = TrialRecipe(overrides, [], max_epochs=4, num_threads=1)
    settings = make_settings(tmp_path / "sweep", num_trials=4, max_epochs=4)
    scheduler = make_asha(4, mode="promote", reduction_factor=2)
    objective = TrainingFunction.from_settings(recipe, settings, scheduler(), needs_costs=True)
    table = run_small_sweep(
        settings,
        write_space(SPACE),
        objective,
        scheduler=scheduler,
        command=recipe.format_command,
        constraints={"num_parameters": 1e9},
    )
    events = read_events(tmp_path / "sweep" / "events.jsonl")
    assert sorted(row.epochs for row in table.rows.values()) == [1, 1, 2, 4]
    assert any(event.segment > 1 and event.epoch > 0 for event in events if isinstance(event, SegmentStarted))
    for row in table.rows.values():
        assert reproduce_metrics(row, tmp_path) == row.metrics
    assert {event.costs["num_parameters"] > 1e5 for event in events if isinstance(event, CostsMeasured)} == {True}
    saved = {event.epoch: event.checkpoint is not None for event in events if isinstance(event, EpochReported)}
    # At rungs, where a trial may pause, and at the end, where it goes on if the user raises sweep.max_epochs.
    assert saved == {1: True, 2: True, 3: False, 4: True}


def test_a_commands_values_take_the_place_of_the_users():
    recipe = TrialRecipe(["model/decoder=effpose", "optimizer.lr=1", "seed=3"], [], max_epochs=4, num_threads=2)
    command = recipe.format_command({"model/decoder": "pyramid", "optimizer.lr": 0.002})
    assert shlex.split(command) == [
        "python",
        "train.py",
        "seed=3",
        "model/decoder=pyramid",
        "optimizer.lr=0.002",
        "trainer.max_epochs=4",
        "num_threads=2",
    ]


def test_overrides_of_the_sweep_are_not_for_train_py():
    kept = ["data=freihand", "optimizer.lr=1e-3", "+experiment=x", "sweeping=1"]
    gone = ["sweep.name=x", "scheduler=asha", "search_space=default", "ray.address=auto", "searcher.sampler.seed=1"]
    assert select_training_overrides([*gone, *kept, "++sweep.seed=2", "hydra.run.dir=."]) == kept


def test_params_replace_overrides_of_the_same_key():
    assert add_param_overrides(["a=1", "b=2"], {"a": 3, "c": [1, 2]}) == ["b=2", "a=3", "c=[1,2]"]


@pytest.fixture
def make_callback(overrides, tmp_path):
    """Makes the callback of a trial, which writes its checkpoints in the folder of a sweep."""

    callbacks = []

    def made(metric=METRIC, every=None, rungs=(), compared_at=(), num_hands=0, meter=None):
        segment, files = TrialSegment(0, 1, {}, 0, [], str(tmp_path), None), FolderFiles(tmp_path)
        objective = TrainingFunction(TrialRecipe([], [], 4, 1), metric, every, rungs, comparison_epochs=compared_at)
        options = {"files": files, "resumed_from": 0, "num_hands": num_hands, "meter": meter}
        callbacks.append(TrialReportCallback(segment, objective, **options))
        return callbacks[-1]

    yield made
    for callback in callbacks:
        callback.close()


def test_a_metric_that_is_not_validated_is_told_with_those_that_are(train, make_callback):
    with pytest.raises(
        UserError, match=r"sweep.metric=val/nothing is not measured in validation; there are .*val/pa_mpjpe_mm"
    ):
        train("trainer.max_epochs=1", callbacks=[make_callback("val/nothing")])


@pytest.mark.parametrize("look_every", [1, 20])
def test_a_diverged_trial_ends_itself_after_the_report(train, make_callback, monkeypatch, look_every):
    """Within the epoch where it looks often enough, else after it."""
    reports = []
    monkeypatch.setattr(trial, "_CHECK_EVERY_STEPS", look_every)
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, **_: reports.append((epoch, metrics)))
    train("trainer.max_epochs=4", "optimizer.lr=1e30", "lr_schedule=constant", callbacks=[make_callback()])
    assert not math.isfinite(reports[-1][1][METRIC])
    assert all(math.isfinite(metrics[METRIC]) for _, metrics in reports[:-1])
    assert len(reports) < 4
    assert (len(reports[-1][1]) == 1) == (look_every == 1)


def test_a_checkpoint_that_cannot_be_written_is_noted_and_training_goes_on(train, make_callback, monkeypatch, tmp_path):
    reports = []
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, **more: reports.append((epoch, more)))
    (tmp_path / "checkpoints").write_text("in the way of a folder")
    metrics = train("trainer.max_epochs=2", callbacks=[make_callback(every=1)])
    assert [(epoch, more["checkpoint"]) for epoch, more in reports] == [(1, None), (2, None)]
    assert "epoch_0001_segment_1.ckpt cannot be written" in reports[1][1]["note"]
    assert metrics[METRIC] == train("trainer.max_epochs=2")[METRIC]


def test_a_checkpoint_is_told_with_the_next_epoch_and_at_a_rung_at_once(train, make_callback, monkeypatch):
    reports = []
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, checkpoint, **_: reports.append(checkpoint))
    train("trainer.max_epochs=4", callbacks=[make_callback(every=1)])
    assert [checkpoint and checkpoint.epoch for checkpoint in reports] == [None, 1, 2, 3]
    reports.clear()
    train("trainer.max_epochs=4", callbacks=[make_callback(every=1, rungs=(2,))])
    assert [checkpoint and checkpoint.epoch for checkpoint in reports] == [None, 2, None, 3]


def test_a_trial_that_is_stopped_saves_no_more(train, make_callback, monkeypatch, tmp_path):
    def stop_at_two(epoch, metrics, **_):
        if epoch == 2:
            raise SystemExit(0)  # as Ray ends a stretch

    monkeypatch.setattr(trial, "report_epoch", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        train("trainer.max_epochs=4", callbacks=[make_callback(every=1)])
    assert [file.name for file in tmp_path.glob("checkpoints/*/*")] == ["epoch_0001_segment_1.ckpt"]


def test_pictures_are_drawn_where_a_trial_may_end_and_change_nothing(train, make_callback, monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, **_: None)
    given = ["trainer.max_epochs=3", "ema_decay=0.9"]
    assert train(*given, callbacks=[make_callback(compared_at=(1,), num_hands=2)]) == train(*given)
    names = {"keypoints", "skeletons", "heatmaps"}
    drawn = {epoch: find_pictures(tmp_path, 0, epoch) for epoch in (1, 2, 3)}
    assert [set(drawn[epoch]) for epoch in drawn] == [names, set(), names]
    sizes = [[decode_jpeg_header(drawn[epoch][name].read_bytes())[:2] for name in names] for epoch in (1, 3)]
    assert sizes[0] == sizes[1]


def test_each_report_has_what_was_used_since_the_last_one(train, make_callback, monkeypatch):
    reports = []
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, utilisation, **_: reports.append(utilisation))
    with UtilisationMeter(cores=1, gpus=0.0, started_at=time.perf_counter()) as meter:
        train("trainer.max_epochs=3", callbacks=[meter, make_callback(every=1, meter=meter)])
    assert [used.seconds["start_up"] > 0 for used in reports] == [True, False, False]
    assert all(used.seconds["training"] > 0 and used.seconds["validation"] > 0 for used in reports)


@pytest.mark.parametrize(("rank", "is_measured"), [(0, True), (1, False)])
def test_of_several_workers_the_one_that_reports_measures(rank, is_measured):
    training = TrainingFunction(TrialRecipe([], [], 4, 1), METRIC, None)
    context = set_worker_context(WorkerContext(rank, 2, lambda values: None))
    with context, training._measure_utilisation(0.0, time.perf_counter()) as meter:
        assert (meter is not None) == is_measured


class Rates(pl.Callback):
    """Learning rate of every step."""

    def __init__(self):
        self.values = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def test_a_trial_goes_on_from_a_checkpoint_with_the_new_learning_rate(train, make_callback, monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, **_: None)
    old, new = ["trainer.max_epochs=3", "optimizer.lr=1e-3"], ["trainer.max_epochs=3", "optimizer.lr=2e-4"]
    whole = train(*old, callbacks=[make_callback(every=2)])
    checkpoint = tmp_path / "checkpoints" / "trial_0000" / "epoch_0002_segment_1.ckpt"
    again = train(*old, resume_from=checkpoint)
    assert again[METRIC] == whole[METRIC]
    fresh, gone_on = Rates(), Rates()
    train(*new, callbacks=[fresh])
    train(*new, callbacks=[gone_on], resume_from=checkpoint)
    assert min(gone_on.values) > 0
    assert gone_on.values == pytest.approx({step: fresh.values[step] for step in gone_on.values})


def test_a_trial_with_averaged_weights_pauses_and_goes_on(train, make_callback, monkeypatch, tmp_path):
    """What is validated and reported after the pause is what it would have been, with weights that began elsewhere."""
    monkeypatch.setattr(trial, "report_epoch", lambda epoch, metrics, **_: None)
    begun = tmp_path / "begun.ckpt"
    train("trainer.max_epochs=2", callbacks=[make_callback(rungs=(1,))])
    (tmp_path / "checkpoints/trial_0000/epoch_0001_segment_1.ckpt").rename(begun)
    given = ["trainer.max_epochs=3", "ema_decay=0.9", "encoder_lr_factor=0.3", f"model.weights={begun}"]
    whole = train(*given, callbacks=[make_callback(rungs=(2,))])
    again = train(*given, resume_from=tmp_path / "checkpoints/trial_0000/epoch_0002_segment_1.ckpt")
    assert again[METRIC] == whole[METRIC]


def test_a_folder_for_packed_images_may_depend_on_the_node(monkeypatch):
    """As $TMPDIR, which a cluster's scheduler sets on each."""
    monkeypatch.setenv("TMPDIR", "/driver")
    recipe = TrialRecipe(["paths.packed='${oc.env:TMPDIR,/tmp}/handpose'"], ["paths.packed=/driver/handpose"], 4, 1)
    monkeypatch.setenv("TMPDIR", "/node")
    assert compose("train", recipe.make_worker_overrides({})).paths.packed == "/node/handpose"


@pytest.mark.parametrize(("may_pause", "rungs"), [(True, (1, 3, 9)), (False, ())])
def test_a_segment_of_a_trial_with_more_epochs_trains_to_the_new_last_one(monkeypatch, may_pause, rungs):
    """With its schedule, and with checkpoints where it may pause, also if the scheduler had no rungs before."""
    trained = []
    monkeypatch.setattr(TrainingFunction, "_train", lambda self, *args, **named: trained.append(self))
    recipe = TrialRecipe([], [], max_epochs=1, num_threads=1)
    function = TrainingFunction(recipe, METRIC, None, saves_last=True)
    segment = TrialSegment(0, 2, {}, 1, [], "", None, max_epochs=27, rungs=(1, 3, 9), may_pause=may_pause)
    with set_worker_context(WorkerContext(0, 2, lambda values: None)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "_make_process_group", lambda: None)
        function(segment)
    (raised,) = trained
    assert raised.recipe.max_epochs == 27
    assert [epoch for epoch in range(1, 28) if raised.is_checkpoint_due(epoch)] == [*rungs, 27]
    assert [epoch for epoch in range(1, 28) if raised.may_pause_at(epoch)] == [*rungs, 27]
    assert raised.comparison_epochs == (1, 3, 9)
