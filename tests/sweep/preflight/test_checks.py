"""What is refused before Ray starts, and what a few steps of training tell before the first trial."""

import errno
import math
import os
import re
import shutil
import threading
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from handpose.config import compose
from handpose.errors import UserError
from handpose.report.formatting import format_duration
from handpose.resources import count_cores
from handpose.schedulers.scheduler import Fifo
from handpose.search.space import SPACES_FOLDER, load_space
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.controller.slots import Slots
from handpose.sweep.execution.worker_group import check_picklable
from handpose.sweep.preflight import preflight as module
from handpose.sweep.preflight.checks import (
    check_gpu_hours,
    check_loaders,
    check_space,
    check_sweep,
    check_validation_epochs,
    list_allowed_epochs,
    summarise_data,
)
from handpose.sweep.preflight.forecast import forecast_retraining
from handpose.sweep.preflight.gpu_sharing import GpuThroughput, TrialsPerGpuChoice
from handpose.sweep.preflight.preflight import Preflight
from handpose.sweep.preflight.probe import RANDOM, ProbePoint, ProbeResults
from handpose.sweep.record.settings import ConfirmSettings, RaySettings, RetrainSettings
from handpose.sweep.trainable.trial import TrialRecipe
from handpose.sweep.trainable.trial_cost import DataSize
from tests.builders import write_freihand
from tests.sweep.objectives import curve
from tests.sweep.preflight.test_probe import COST, FakeProbeWorker
from tests.sweep.sweeps import make_asha, make_settings
from tests.sweep.trainable.test_trial import SMALL

ALONE = RaySettings(address=None, num_cpus=None)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sweep.num_trials=0", "sweep.num_trials must be at least 1, but it is 0"),
        ("sweep.max_epochs=0", "sweep.max_epochs must be at least 1"),
        ("sweep.max_concurrent=0", "sweep.max_concurrent must be at least 1"),
        ("sweep.stop_after_failures=0", "sweep.stop_after_failures must be at least 1, but it is 0"),
        ("sweep.checkpoint_budget_gb=0.0", "sweep.checkpoint_budget_gb must be above 0, but it is 0"),
        ("sweep.max_retries=-1", "sweep.max_retries must be at least 0, but it is -1"),
        ("sweep.retry_delay_s=-0.5", "sweep.retry_delay_s must be at least 0, but it is -0.5"),
        ("sweep.divergence_factor=1.0", "sweep.divergence_factor must be above 1, but it is 1"),
        ("sweep.time_budget_s=-1.0", "sweep.time_budget_s must be above 0, but it is -1"),
        ("sweep.gpu_hours=0.0", "sweep.gpu_hours must be above 0, but it is 0"),
        ("sweep.hang_timeout_s=0.0", "sweep.hang_timeout_s must be above 0, but it is 0"),
        ("sweep.quarantine_after_failures=0", "sweep.quarantine_after_failures must be at least 1, but it is 0"),
        ("sweep.workers_per_trial=0", "sweep.workers_per_trial must be at least 1, but it is 0"),
        ("sweep.cpus_per_trial=0", "sweep.cpus_per_trial must be at least 1, but it is 0"),
        ("sweep.checkpoint_every_epochs=0", "sweep.checkpoint_every_epochs must be at least 1, but it is 0"),
        ("sweep.confirm.seeds=-1", "sweep.confirm.seeds must be at least 0, but it is -1"),
        ("ray.num_cpus=0", "ray.num_cpus must be at least 1, but it is 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_when_the_configuration_is_composed(override, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        compose("tune", ["sweep.name=test", override])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus_per_trial": 1.5}, "sweep.gpus_per_trial must be a whole number or a part of one GPU, but it is 1.5"),
        ({"gpus_per_trial": 99}, "sweep.gpus_per_trial=99, but this machine has"),
        ({"cpus_per_trial": 10_000}, f"sweep.cpus_per_trial=10000, but this machine has {count_cores()} for trials"),
        (
            {"workers_per_trial": 10_000},
            "sweep.cpus_per_trial=1 for each of sweep.workers_per_trial=10000, but this mach",
        ),
        ({"workers_per_trial": 2, "gpus_per_trial": 0.5}, "sweep.gpus_per_trial=0.5 shares a GPU among trials, but"),
        (
            {"workers_per_trial": 2, "gpus_per_trial": "auto"},
            "sweep.gpus_per_trial=auto shares a GPU among trials, but",
        ),
        (
            {"metric": "train/loss"},
            "sweep.metric=train/loss is not measured; there are val/keypoint_error_px, val/pa_mp",
        ),
        ({"metric": "val/pa_mpjpe"}, r"sweep.metric=val/pa_mpjpe is not measured; .*; did you mean val/pa_mpjpe_mm"),
        ({"metric": "val/pck_auc", "mode": "min"}, "sweep.mode=min contradicts sweep.metric=val/pck_auc"),
        ({"mode": "max"}, "sweep.mode=max contradicts sweep.metric=val/pa_mpjpe_mm"),
        ({"name": "a/b"}, "sweep.name=a/b must be the name of a folder"),
        ({"name": ".."}, "sweep.name=.. must be the name of a folder"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        check_sweep(make_settings(tmp_path / "sweep", **changes), ALONE)
    assert not (tmp_path / "sweep").exists()


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^sweep.gpus_per_trial=1, but this machine has no GPU$"):
        check_sweep(make_settings(tmp_path / "sweep", gpus_per_trial=1), ALONE)


def test_a_clusters_slots_are_not_measured_by_this_machine(tmp_path):
    settings = make_settings(tmp_path / "sweep", gpus_per_trial=99, cpus_per_trial=10_000)
    check_sweep(settings, RaySettings(address="auto", num_cpus=None))


def test_an_autoscaler_needs_a_cluster(tmp_path):
    with pytest.raises(
        UserError, match=r"^ray.autoscale=true needs a cluster with an autoscaler: give its ray.address"
    ):
        check_sweep(make_settings(tmp_path / "sweep"), RaySettings(address=None, num_cpus=None, autoscale=True))


def test_a_sweep_is_never_written_over_another(tmp_path):
    settings = make_settings(tmp_path / "sweep")
    check_sweep(settings, ALONE)
    check_sweep(settings, ALONE)  # nothing was written yet
    (tmp_path / "sweep").mkdir()
    check_sweep(settings, ALONE)
    (tmp_path / "sweep" / "trials.csv").write_text("number\n")
    with pytest.raises(UserError, match=r".* already has a sweep; choose another sweep.name"):
        check_sweep(settings, ALONE)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=r"cannot be kept in .*/file/sweep because .*/file cannot be used \(Not a directory\); set DIR_SCRATCH",
    ):
        check_sweep(make_settings(tmp_path / "file" / "sweep"), ALONE)


def test_a_folder_that_says_it_can_be_written_to_is_tried(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EROFS, "Read-only file system")

    check_sweep(make_settings(tmp_path / "new" / "sweep"), ALONE)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        UserError,
        match=rf"cannot be kept in .* because {tmp_path} cannot be written \(Read-only file system\); set DIR_SCRATCH",
    ):
        check_sweep(make_settings(tmp_path / "new" / "sweep"), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_goes_on_has_its_folder(tmp_path):
    (tmp_path / "trials.csv").write_text("number\n")
    check_sweep(make_settings(tmp_path, resume=str(tmp_path)), ALONE)


@pytest.mark.parametrize("file", sorted(SPACES_FOLDER.iterdir()), ids=lambda file: file.name)
def test_every_shipped_space_composes(file):
    if file.suffix in (".yaml", ".py"):
        check_space(load_space(str(file)), [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optimizer.lrr: interval(0.1, 1)", r"space.yaml: there is no configuration key optimizer.lrr; .*optimizer.lr"),
        ("model.decoder.depth: interval(1, 4)", r"space.yaml: model.decoder.depth=1.0: .*integer"),
        ("model/decoder: choice(pyramid, efpose)", r"space.yaml: model/decoder=efpose: .* did you mean effpose"),
        ("model.decoder.depth: range(-3, 2)", r"space.yaml: model.decoder.depth must be at least 0, but it is -3"),
    ],
)
def test_a_space_that_no_configuration_can_have_is_refused_with_its_file(write_space, text, reason):
    with pytest.raises(UserError, match=reason):
        check_space(write_space(text), [])


def test_a_missing_data_set_is_told_before_ray_starts(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        summarise_data(compose("train", ["data=freihand", f"data.root={tmp_path / 'nowhere'}"]))


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_scheduler(*rungs, needs_checkpoints=False):
    """Stops nobody, but says that it compares at these epochs."""
    made = Fifo()
    made.rungs, made.needs_checkpoints = rungs, needs_checkpoints
    return made


def test_a_plan_that_is_validated_is_sound(tmp_path):
    settings = make_settings(tmp_path, max_epochs=6)
    check_validation_epochs(settings, make_scheduler(), validation_interval=1)
    check_validation_epochs(settings, make_scheduler(2, 4), validation_interval=2)


@pytest.mark.parametrize(
    ("changes", "rungs", "every", "reason"),
    [
        (
            {},
            (1, 3),
            2,
            r"^trainer.check_val_every_n_epoch=2 validates no trial at epoch 1, .* 1, 3.*scheduler.grace",
        ),
        ({}, (2, 5), 2, r"^trainer.check_val_every_n_epoch=2 validates no trial at epoch 5, "),
        ({"max_epochs": 5}, (2, 4), 2, r"^sweep.max_epochs=5 must be a multiple of trainer.check_val_every_n_epoch=2"),
    ],
)
def test_a_plan_that_is_not_validated_is_refused(tmp_path, changes, rungs, every, reason):
    settings = make_settings(tmp_path, **{"max_epochs": 6} | changes)
    with pytest.raises(UserError, match=reason):
        check_validation_epochs(settings, make_scheduler(*rungs), validation_interval=every)


def test_gpu_hours_of_a_budget_need_trials_on_gpus():
    check_gpu_hours(None, Slots(2, 1, 0.0))
    check_gpu_hours(200.0, Slots(2, 1, 0.5))
    with pytest.raises(UserError, match=r"^budget.gpu_hours=200 limits nothing: trials use no GPU; give budget.hours"):
        check_gpu_hours(200.0, Slots(2, 1, 0.0))


@pytest.mark.parametrize(
    ("scheduler", "intervals", "allowed"),
    [
        (["fifo"], [1], [1, 2, 3, 4, 5, 6]),
        (["fifo"], [1, 2], [2, 4, 6]),
        (["pbt"], [1], [3, 4, 5, 6]),  # the perturbation interval is 2
        (["pbt"], [2], [4, 6]),
        (["asha", "scheduler.grace_period=3"], [1], [3, 4, 5, 6]),
    ],
)
def test_the_scheduler_and_the_validation_allow_only_some_numbers_of_epochs(tmp_path, scheduler, intervals, allowed):
    sweep, space = make_settings(tmp_path, max_epochs=6), load_space("default")
    name, *options = scheduler
    make_scheduler_class = instantiate(compose("tune", [f"scheduler={name}", *options]).scheduler)
    bind = partial(bind_scheduler, make_scheduler_class, space=space)
    assert list_allowed_epochs(sweep, bind, validation_intervals=intervals) == allowed


# --- what is sent to workers ------------------------------------------------------------------------------------------


@dataclass
class Locked:
    lock: object = field(default_factory=threading.Lock)

    def __call__(self, segment):
        pass


@dataclass
class Forgetful:
    kept: int = 1

    def __call__(self, segment):
        pass

    def __getstate__(self):
        return {"kept": 0}


@dataclass
class Heavy:
    load: bytes

    def __call__(self, segment):
        pass


def test_what_can_be_sent_is_sent():
    check_picklable(curve)
    check_picklable(Heavy(b"1"))


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (Locked(), r"^Locked cannot be sent to a worker: TypeError: cannot pickle"),
        (Heavy(bytes(51_000_000)), r"^Heavy has 51 MB, which would be sent to every worker"),
        (Forgetful(), r"^Forgetful changes when it is sent to a worker"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_sent_is_named(objective, reason):
    with pytest.raises(UserError, match=reason):
        check_picklable(objective)


# --- what the measurements tell, on paper -----------------------------------------------------------------------------

SLOTS = Slots(2, 1, 0.0)


@pytest.fixture
def run_paper_preflight(tmp_path, write_space, monkeypatch):
    """A preflight whose measurements are made up; returns what it says."""

    def done(measured=lambda params: COST, *, slots=SLOTS, rule=make_scheduler, nodes=None, num_seeds=1, **changes):
        gpus = slots.num_slots * slots.gpus
        nodes = nodes or [{"CPU": float(slots.num_slots), "GPU": gpus, "memory": 1e12}]
        monkeypatch.setattr(module, "list_live_resources", lambda: nodes)

        class PaperWorker(FakeProbeWorker):
            def __init__(self, *, cpus, gpus, recipe, data, latency_of):
                super().__init__(measured, gpus=gpus)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(module, "ProbeWorker", PaperWorker)
        said = []
        Preflight(
            sweep=make_settings(tmp_path / "sweep", **{"num_trials": 8, "preflight": "brief"} | changes),
            space=write_space("optimizer.lr: interval(0.1, 0.9)"),
            recipe=TrialRecipe([], [], max_epochs=4, num_threads=1),
            trial_function=curve,
            make_scheduler=rule,
            data=DataSize(32, 10, 5),
            defaults={"optimizer.lr": 0.5},
            retrain_settings=RetrainSettings(use_val=False, seeds=num_seeds, predict="ensemble"),
            print_text=said.append,
        ).run(slots)
        return "\n".join(said)

    return done


def test_a_preflight_that_is_off_says_nothing(run_paper_preflight):
    assert run_paper_preflight(lambda params: 1 / 0, preflight="off") == ""


def test_the_costs_of_a_sweep_are_sums_that_can_be_checked(run_paper_preflight):
    # A trial: 1 s to start, 4 epochs of 10 * 9 s + 2 * 4.5 s. Eight of them in two slots.
    cost = COST._replace(step_s=9.0, validation_batch_s=4.5)
    told = run_paper_preflight(lambda params: cost)
    assert "a trial     about 7 min" in told  # 397 s
    assert f"8 trials in 2 slots: {8 * 397 / 3600:.2g} slot-hours, {4 * 397 / 60:.0f} min\n" in told
    assert "with it" not in told
    halved = run_paper_preflight(lambda params: cost, rule=make_asha(4, grace_period=1, reduction_factor=100))
    assert "min with it" in halved


def test_a_time_budget_that_ends_the_sweep_is_told(run_paper_preflight):
    assert "sweep.time_budget_s ends it after 10 s" in run_paper_preflight(time_budget_s=10.0)
    assert "sweep.time_budget_s" not in run_paper_preflight(time_budget_s=1000.0)


def test_the_retraining_and_the_total_are_told(run_paper_preflight):
    # An epoch of a trial: 10 steps of 9 s and 2 batches of 4.5 s to validate; a start of 1 s.
    cost = COST._replace(step_s=9.0, validation_batch_s=4.5)
    full = compose("train", []).trainer.max_epochs
    retraining_s = 1 + full * 99
    told = run_paper_preflight(lambda params: cost, confirm=ConfirmSettings(top_k=1, seeds=2))
    assert (
        f"to retrain  {full} epochs on 1 device, afterwards: about {format_duration(retraining_s, is_rough=True)}"
        in told
    )
    sweep_s, confirmation_s = 4 * 397, 2 * 397  # 8 and 4 trials in 2 slots
    whole = format_duration(sweep_s + confirmation_s + retraining_s, is_rough=True)
    assert f"in all      {12 * 397 / 3600:.2g} slot-hours and the retraining: about {whole}" in told


def test_the_retraining_with_several_seeds_takes_as_many_times_as_long(run_paper_preflight):
    full = compose("train", []).trainer.max_epochs
    seconds = 3 * (1 + full * 99)
    said = run_paper_preflight(lambda params: COST._replace(step_s=9.0, validation_batch_s=4.5), num_seeds=3)
    expected = (
        f"to retrain  {3 * full} epochs with 3 seeds on 1 device, afterwards: about "
        f"{format_duration(seconds, is_rough=True)}"
    )
    assert expected in said


def test_a_retraining_that_is_off_is_not_told(run_paper_preflight):
    assert "to retrain" not in run_paper_preflight(retrain=False)
    assert "in all" not in run_paper_preflight(retrain=False)
    assert "in all" in run_paper_preflight(retrain=False, confirm=ConfirmSettings(top_k=1, seeds=1))


@pytest.mark.parametrize(
    ("changes", "use_val", "seconds"),
    [
        ({}, False, 1 + 30 * (10 * 9.0 + 2 * 4.5)),
        ({"retrain_devices": 2}, False, 1 + 30 * (10 * 9.0 + 2 * 4.5) / 2),
        ({"retrain_devices": 3}, False, 1 + 30 * (10 * 9.0 + 2 * 4.5) / 2),  # 3 devices do not share 8 images equally
        ({"workers_per_trial": 2, "retrain_devices": 1}, False, 1 + 30 * 2 * (10 * 9.0 + 2 * 4.5)),
        ({}, True, 1 + 30 * 10 * 9.0 * 15 / 10),  # on 10 + 5 images, and nothing is validated
    ],
)
def test_a_retraining_has_the_full_schedule_on_its_devices(tmp_path, changes, use_val, seconds):
    cost = COST._replace(step_s=9.0, validation_batch_s=4.5)
    probed = ProbeResults([ProbePoint(RANDOM, {"optimizer.lr": 0.1})], [cost])
    recipe = TrialRecipe(["trainer.max_epochs=30", "data.batch_size=8"], [], max_epochs=4, num_threads=1)
    settings = RetrainSettings(use_val=use_val, seeds=1, predict="ensemble")
    data = DataSize(32, num_train=10, num_val=5)
    found = forecast_retraining(make_settings(tmp_path, **changes), recipe, probed, data, settings)
    assert (found.epochs, found.wall_s) == (30, pytest.approx(seconds))


def test_a_searched_interval_that_misses_a_rung_is_refused(run_paper_preflight):
    every = {0.1: 1, 0.9: 3}
    with pytest.raises(UserError, match=r"sweep.max_epochs=4 must be a multiple of trainer.check_val_every_n_epoch=3"):
        run_paper_preflight(lambda params: COST._replace(validation_interval=every.get(params["optimizer.lr"], 1)))


def test_a_disk_that_is_too_small_is_refused(run_paper_preflight, monkeypatch):
    free = SimpleNamespace(free=0.07e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"has 70 MB free, but the sweep's checkpoints need 80 MB .20 MB each"):
        run_paper_preflight()
    run_paper_preflight(checkpoint_budget_gb=0.06)  # never holds more than that
    free.free = 0.2e9
    run_paper_preflight()
    with pytest.raises(UserError, match=r"need 240 MB"):  # 2 slots * 2, and 8 that may wait
        run_paper_preflight(rule=lambda: make_scheduler(1, 2, needs_checkpoints=True))


def test_a_budget_that_cannot_hold_all_that_wait_is_told(run_paper_preflight):
    pausing = {"rule": lambda: make_scheduler(1, 2, needs_checkpoints=True)}
    assert "sweep.checkpoint_budget_gb=0.1 may be too small" in run_paper_preflight(**pausing, checkpoint_budget_gb=0.1)
    assert "too small" not in run_paper_preflight(**pausing, checkpoint_budget_gb=0.3)


@pytest.mark.parametrize(("gpus", "largest", "outcome"), [(0.5, 0.4, ""), (0.5, 0.6, "note"), (1.0, 0.9, "")])
def test_trials_that_share_a_gpu_are_held_against_its_memory(run_paper_preflight, gpus, largest, outcome):
    slots = Slots(2, 1, gpus)
    shares = {0.9: largest}
    told = run_paper_preflight(
        lambda params: COST._replace(gpu="A100", gpu_memory_fraction=shares.get(params["optimizer.lr"], 0.3)),
        slots=slots,
    )
    assert "on A100" in told
    assert ("sweep.gpus_per_trial=0.5 puts 2 trials on a GPU, but one takes up to 60%" in told) is bool(outcome)


def test_a_share_of_a_gpu_that_no_trial_fits_into_is_refused(run_paper_preflight):
    slots = Slots(4, 1, 0.25)
    with pytest.raises(UserError, match=r"^sweep.gpus_per_trial=0.25 puts 4 trials on a GPU, but one takes up to 30%"):
        run_paper_preflight(lambda params: COST._replace(gpu="A100", gpu_memory_fraction=0.3), slots=slots)


def test_what_is_odd_is_noted(run_paper_preflight):
    told = run_paper_preflight(lambda params: COST._replace(ignored=("trainer.max_epochs",), trace=(float("nan"),)))
    assert "note        search_space=space: trainer.max_epochs has no effect, because every trial" in told
    assert "not finite within a few steps on random pictures: lr 0.1" in told


def test_slots_that_memory_cannot_hold_are_not_used(run_paper_preflight):
    """64 slots of 1.1 GB on a machine of 23 GB; the most demanding point counts."""
    took = {0.1: 800.0, 0.9: 1000.0}  # and a tenth more is left to it

    def measured(params):
        return COST._replace(process_mb=took.get(params["optimizer.lr"], 900.0))

    machine = {"CPU": 64.0, "memory": 22e9}
    told = run_paper_preflight(measured, nodes=[machine], num_trials=64)
    assert "64 trials in 20 slots" in told
    assert "the memory  the process of a trial may take 1.1 GB, and 22.0 GB of memory are free for trials: " in told
    assert "20 run at a time instead of 64; a smaller data.batch_size" in told
    with pytest.raises(
        UserError, match=r"^no trial fits: .* may take 1.1 GB, but only 1.0 GB of memory are free for trial"
    ):
        run_paper_preflight(measured, nodes=[machine | {"memory": 1e9}])


def test_memory_that_is_enough_is_not_mentioned(run_paper_preflight):
    assert "the memory" not in run_paper_preflight(nodes=[{"CPU": 2.0, "memory": 2.3e9}])
    assert "the memory" not in run_paper_preflight(nodes=[{"CPU": 64.0, "memory": 4.5e9}], max_concurrent=4)
    assert "3 run at a time instead of 4" in run_paper_preflight(
        nodes=[{"CPU": 64.0, "memory": 3.5e9}], max_concurrent=4
    )
    assert "2 slots" in run_paper_preflight(lambda params: COST._replace(process_mb=math.nan))


def test_trials_that_share_a_gpu_are_held_against_main_memory_too(run_paper_preflight, monkeypatch):
    mosts = []

    def choose(memory_share, *, max_trials, measure_steps_per_s):
        mosts.append(max_trials)
        return TrialsPerGpuChoice(max_trials, [GpuThroughput(max_trials, 1.0)], memory_share)

    monkeypatch.setattr(module, "choose_trials_per_gpu", choose)
    node = {"CPU": 32.0, "GPU": 2.0, "memory": 11.5e9}
    monkeypatch.setattr(module, "sum_resources", lambda: node)
    told = run_paper_preflight(slots=Slots(2, 1, 1.0), nodes=[node], gpus_per_trial="auto")
    assert mosts == [5]  # 10 processes of 1 GB on 2 GPUs, not 16 for as many cores
    assert "10 slots" in told


def test_a_second_objective_that_is_the_same_everywhere_is_noted(run_paper_preflight):
    def measured(params):
        return COST._replace(latency_ms=params["optimizer.lr"])

    assert "at every point tried" not in run_paper_preflight(measured, second_objective="latency_ms")
    told = run_paper_preflight(lambda params: COST._replace(latency_ms=3.0), second_objective="latency_ms")
    assert "sweep.second_objective=latency_ms is 3 at every point tried" in told


def test_a_second_objective_that_cannot_be_measured_is_refused(run_paper_preflight):
    with pytest.raises(UserError, match="second_objective=memory_mb cannot be measured on this device"):
        run_paper_preflight(lambda params: COST._replace(memory_mb=math.nan), second_objective="memory_mb")


def test_a_thorough_preflight_has_a_table_of_its_points(run_paper_preflight):
    lines = run_paper_preflight(
        lambda params: COST._replace(trace=(params["optimizer.lr"],)), preflight="only"
    ).splitlines()
    assert lines[:2] == ["trying 10 points of space on a worker", ""]
    lines = lines[2:]
    assert lines[0].split()[:4] == ["point", "lr", "parameters", "step"]
    assert lines[1].split() == ["lower", "end", "0.1", "1,000,000", "100", "0:05", "100", "5", "20.0"]
    assert [line.startswith("random") for line in lines[3:11]] == [True] * 8
    assert lines[11] == ""
    assert lines[12].startswith("a trial")


def test_only_the_thorough_preflight_looks_for_parameters_that_do_nothing(run_paper_preflight):
    assert "no difference" not in run_paper_preflight()
    assert "note        search_space=space: optimizer.lr made no difference to the first steps" in run_paper_preflight(
        preflight="only"
    )


# --- and in a worker --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)
    return [
        *SMALL,
        f"data.root={root}",
        f"paths.output={tmp_path_factory.mktemp('outputs')}",
        "trainer.accelerator=cpu",
    ]


@pytest.fixture
def run_in_worker(ray_started, small, tmp_path, write_space):
    def done(text, **changes):
        said = []
        Preflight(
            sweep=make_settings(tmp_path / "sweep", **changes),
            space=write_space(text),
            recipe=TrialRecipe(small, [], max_epochs=4, num_threads=1),
            trial_function=curve,
            make_scheduler=make_asha(4),
            data=summarise_data(compose("train", small)).size,
            defaults={"optimizer.lr": 0.005, "model.decoder.width": 48},
            retrain_settings=RetrainSettings(use_val=False, seeds=1, predict="ensemble"),
            print_text=said.append,
        ).run(SLOTS)
        assert not (tmp_path / "sweep").exists()
        return "\n".join(said)

    return done


def test_the_data_is_surveyed_as_it_is_trained_on(small):
    found = summarise_data(compose("train", small))
    assert found.size == DataSize(image_size=64, num_train=18, num_val=6)
    assert found.fingerprint == summarise_data(compose("train", small)).fingerprint


@pytest.mark.slow
def test_real_networks_are_measured(run_in_worker):
    text = "optimizer.lr: interval(0.001, 0.01)\nmodel.decoder.width: range(16, 65, 16)"
    told = run_in_worker(text, preflight="brief", confirm=ConfirmSettings(top_k=3, seeds=2))
    lines = [line for line in told.splitlines() if not line.startswith("note")]  # a busy machine tries fewer points
    assert [line[:12] for line in lines] == [
        *("a trial     ", "the sweep   ", "to confirm  ", "to retrain  ", "in all      ", "the disk    ")
    ]
    assert "6 trials in 2 slots:" in told
    assert "8 runs at most" in told
    assert " with it" in told


@pytest.mark.slow
def test_the_parameter_that_cannot_be_trained_is_named(run_in_worker):
    text = "optimizer.lr: interval(0.001, 0.01)\nmodel.decoder.width: choice(48, 1000000000000)"
    named = r"space.yaml: model.decoder.width=1000000000000 cannot be trained, because there is not enough memory"
    with pytest.raises(UserError, match=named):
        run_in_worker(text, preflight="brief")


@pytest.mark.parametrize("text", ["optimizer.lr: interval(0.1, 1)", "train_on_val: choice(true, false)"])
def test_trials_cannot_be_chosen_by_what_they_are_trained_on(write_space, text):
    given = [] if "train_on_val" in text else ["train_on_val=true"]
    with pytest.raises(
        UserError, match=r"train_on_val=true leaves no validation split to compare trials by; retrain\.use_val=true"
    ):
        check_space(write_space(text), given)


@pytest.mark.parametrize("given", ["folds.num=5", "folds.index=1"])
def test_a_sweep_has_folds_of_its_own(write_space, given):
    with pytest.raises(UserError, match=r"are for train\.py; .* if you give sweep\.folds"):
        check_space(write_space("optimizer.lr: interval(0.1, 1)"), [given])


@pytest.mark.parametrize("given", ["test=true", "resume=true"])
def test_what_only_tests_or_resumes_one_training_is_no_sweep(write_space, given):
    with pytest.raises(UserError, match=r"test=true and resume=true are for train\.py; .* sweep\.resume=FOLDER"):
        check_space(write_space("optimizer.lr: interval(0.1, 1)"), [given])


def test_loaders_of_all_trials_are_compared_with_shared_memory(tmp_path, write_space, monkeypatch):
    usage = SimpleNamespace(total=64e6, used=0, free=16_000_000)
    monkeypatch.setattr("handpose.data.shared_memory.shutil.disk_usage", lambda path: usage)
    settings, data = make_settings(tmp_path), DataSize(image_size=100, num_train=100, num_val=10)
    given = ["data=freihand", "data.batch_size=16", "data.num_workers=2"]
    four, two = (Slots(num_slots=num_slots, cpus=1, gpus=0.0) for num_slots in (4, 2))
    check_loaders(settings, write_space("optimizer.lr: choice(0.1, 0.2)"), given, data, four)
    space = write_space("data.batch_size: choice(16, 64)")
    check_loaders(settings, space, given[:2], data, four)
    check_loaders(settings, space, given, data, two)
    told = r"data\.num_workers=2 needs 31\.2 MB .*\(4 trials at a time x 2 workers x 2 batches of 1\.9\d MB\)"
    with pytest.raises(UserError, match=told):
        check_loaders(settings, space, given, data, four)


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("+trainer.fast_dev_run=true", "it is for train.py; sweep.preflight=only"),
        ("+trainer.fast_dev_run=3", "it is for train.py; sweep.preflight=only"),
        ("+trainer.max_steps=3", "give sweep.max_epochs for the trials, trainer.max_epochs for the retraining"),
        ("+trainer.max_time='00:00:01:00'", "sweep.time_budget_s limits the whole sweep"),
        ("+trainer.max_time={minutes:1}", "sweep.time_budget_s limits the whole sweep"),
        ("+trainer.detect_anomaly=true", "use it with train.py"),
        ("+trainer.profiler=simple", "give it to train.py"),
        ("+trainer.num_nodes=2", "sweep.workers_per_trial"),
        ("+trainer.strategy=ddp", "sweep.workers_per_trial"),
        ("trainer.devices=2", "sweep.workers_per_trial for the trials and sweep.retrain_devices for the retraining"),
        ("trainer.devices=[0,1]", "sweep.workers_per_trial for the trials"),
    ],
)
def test_what_trials_cannot_have_is_refused_with_what_to_give_instead(write_space, argument, remedy):
    name = argument.lstrip("+").partition("=")[0]
    with pytest.raises(UserError, match=rf"{re.escape(name)}=.* is not supported in a sweep: .*{re.escape(remedy)}"):
        check_space(write_space("optimizer.lr: interval(0.1, 1)"), [argument])


def test_what_trials_cannot_have_is_refused_where_it_is_searched(write_space):
    with pytest.raises(UserError, match=r"trainer\.max_steps=\d is not supported in a sweep"):
        check_space(write_space("+trainer.max_steps: choice(5, 9)"), [])


@pytest.mark.parametrize("off", ["+trainer.fast_dev_run=0", "+trainer.max_steps=-1", "+trainer.profiler=null"])
def test_what_is_off_is_no_obstacle(write_space, off):
    check_space(write_space("optimizer.lr: interval(0.1, 1)"), [off])
