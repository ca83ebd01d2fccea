"""Where the time of a training goes, on real trainings whose slow part is known."""

import time

import pytest
import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler

from handpose.config import compose
from handpose.data.datamodule import PackedHands
from handpose.report.utilisation import PHASES, combine, judge
from handpose.sweep.trainable.utilisation_meter import FetchProfiler, PhaseClock, UtilisationMeter
from handpose.training.fit import RunFolders, fit
from tests import builders

SILENT = ["logger=none", "checkpoints.enabled=false", "trainer.enable_progress_bar=false", "num_threads=1"]


def test_a_clock_adds_up_each_phase_and_starts_again():
    clock = PhaseClock(started_at=10.0, clock=iter([12.0, 15.0, 16.0, 20.0, 21.0]).__next__)
    clock.enter("training")
    clock.enter("data")
    clock.enter("training")
    assert clock.take() == {"start_up": 2, "data": 1, "training": 7, "validation": 0, "report": 0}
    assert clock.take() == dict.fromkeys(PHASES, 0) | {"training": 1}


def test_a_configured_profiler_still_sees_everything():
    configured, seen = SimpleProfiler(), []
    profiler = FetchProfiler(
        configured, on_fetch=lambda: seen.append("fetch"), on_fetched=lambda: seen.append("fetched")
    )
    for name in ("[_TrainingEpochLoop].train_dataloader_next", "[_EvaluationLoop].val_next", "run_training_batch"):
        with profiler.profile(name):
            pass
    assert seen == ["fetch", "fetched"]
    assert len(configured.recorded_durations) == 3
    assert "run_training_batch" in profiler.summary()


class EpochParts(pl.Callback):
    """Takes what was used at the end of each validation, as a trial reports it."""

    def __init__(self, meter):
        self.meter, self.parts = meter, []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.parts.append(self.meter.take())


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    root = builders.write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)
    given = [*builders.SMALL, *SILENT, "model.decoder.depth=1", f"data.root={root}"]
    given.append(f"paths.output={tmp_path_factory.mktemp('outputs')}")
    folder = tmp_path_factory.mktemp("warm")
    fit(compose("train", [*given, "trainer.max_epochs=1"]), RunFolders(folder, folder, folder), quiet=True)
    return given


@pytest.fixture
def train(overrides, tmp_path):
    """Trains a small network; returns its metrics, and what each epoch used."""

    def fitted(*more, is_measured=True, max_epochs=8):
        config = compose("train", [*overrides, f"trainer.max_epochs={max_epochs}", *more])
        folders = RunFolders(tmp_path, tmp_path, tmp_path)
        if not is_measured:
            return fit(config, folders, quiet=True).metrics, []
        with UtilisationMeter(cores=1, gpus=0.0, started_at=time.perf_counter()) as meter:
            epochs = EpochParts(meter)
            return fit(config, folders, quiet=True, callbacks=[meter, epochs]).metrics, epochs.parts

    return fitted


def slow_down_batches(monkeypatch, seconds, *, is_slow=lambda hands: True):
    read = PackedHands.__getitem__

    def read_slowly(self, images):
        if is_slow(self):
            time.sleep(seconds)
        return read(self, images)

    monkeypatch.setattr(PackedHands, "__getitem__", read_slowly)


def test_a_training_that_computes_all_the_time_is_busy(train):
    _, parts = train(max_epochs=20)
    whole = combine(parts)
    assert judge(whole).verdict == "busy"
    assert whole.get_share("data") < 0.15
    assert len(parts) == 20


def test_a_slow_data_loader_starves_a_training_of_data(train, monkeypatch):
    slow_down_batches(monkeypatch, 0.15, is_slow=lambda hands: len(hands) > 6)  # the training split
    _, parts = train(max_epochs=4)
    assert judge(combine(parts)).verdict == "starved by data"
    # Two batches an epoch; the first one of all is part of the start-up.
    assert [round(part.seconds["data"] / 0.15) for part in parts] == [1, 2, 2, 2]


@pytest.mark.slow
def test_a_large_validation_split_starves_a_training(train):
    _, parts = train("data.source.val_fraction=0.7", "data.batch_size=4", max_epochs=20)
    assert judge(combine(parts)).verdict == "starved by validation"


def test_a_short_trial_is_starved_by_its_start_up(train):
    _, parts = train(max_epochs=1)
    assert judge(combine(parts)).verdict == "starved by start-up"


def test_all_the_time_is_counted_once_and_start_up_only_in_the_first_part(train):
    began = time.perf_counter()
    _, parts = train(max_epochs=3)
    assert combine(parts).total_s == pytest.approx(time.perf_counter() - began, abs=0.5)
    assert [part.seconds["start_up"] > 0 for part in parts] == [True, False, False]
    assert [part.seconds["report"] > 0 for part in parts] == [True, True, True]
    assert all(part.memory_mb > 100 and part.cpu_percent > 0 for part in parts)
    assert all(part.gpu_percent is None for part in parts)


def test_measuring_changes_no_metric(train):
    assert train(max_epochs=2)[0] == train(max_epochs=2, is_measured=False)[0]


def test_lightning_still_profiles_the_fetching_of_batches(train, monkeypatch):
    """A Lightning that gives it another name would count all of it as training."""
    names = []
    monkeypatch.setattr(PassThroughProfiler, "start", lambda self, name: names.append(name))
    train(max_epochs=1)
    assert sum(name.endswith("].train_dataloader_next") for name in names) == 2
