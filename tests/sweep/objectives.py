"""Cheap curves instead of networks. In a module of their own, so that a worker that runs one imports no torch."""

import json
import math
import os
import signal
import time
from pathlib import Path

from ray import tune

from handpose.errors import UserError
from handpose.report.utilisation import Utilisation
from handpose.sweep.storage.checkpoint_files import open_worker_files
from handpose.sweep.storage.retention import describe_checkpoint, find_newest_intact
from handpose.sweep.trainable.reporting import UnfitWorkerError, get_worker_context, report_costs, report_epoch

METRIC = "val/pa_mpjpe_mm"


def curve(segment):
    """Falls with the epochs towards a value that is least at lr 1e-3 and depth 1."""
    params = segment.params
    for epoch in range(1, 5):
        end = abs(math.log10(params["optimizer.lr"]) + 3) + params["model.decoder.depth"]
        report_epoch(epoch, {METRIC: end + 4 / epoch, "val/pck_auc": 0.5}, utilisation=make_utilisation(epoch))


def make_utilisation(epoch):
    """What an epoch of `curve` says that it has used."""
    seconds = {
        "start_up": 1e-3 if epoch == 1 else 0.0,
        "data": 2e-3,
        "training": 1e-3,
        "validation": 0.0,
        "report": 0.0,
    }
    return Utilisation(seconds, cpu_percent=10.0 * epoch, memory_mb=500.0)


def waits_for_a_command(segment):
    """After epoch 2, waits until the first command of a user has been answered."""
    for epoch in range(1, 5):
        report_epoch(epoch, {METRIC: 4 / epoch})
        while epoch == 2 and not list(Path(segment.folder, "control").glob("*.answer.json")):
            time.sleep(0.02)


def fails_or_diverges(segment):
    """Depth 1 diverges at epoch 2, depth 2 raises at epoch 2, depth 3 is trained."""
    depth = segment.params["model.decoder.depth"]
    report_epoch(1, {METRIC: 3.0})
    if depth == 2:
        raise FloatingPointError("no gradient at all")
    report_epoch(2, {METRIC: math.nan if depth == 1 else 1.0})
    for epoch in (3, 4):
        report_epoch(epoch, {METRIC: 1.0 / epoch})


def always_fails(segment):
    """A bug of the user's."""
    raise KeyError("no_such_layer")


def raises_user_error(segment):
    """Depth 2 cannot be trained, and that is said in a sentence; the others take a while."""
    report_epoch(1, {METRIC: 3.0})
    if segment.params["model.decoder.depth"] == 2:
        raise UserError("model.decoder.depth=2 does not fit")
    for epoch in (2, 3, 4):
        report_epoch(epoch, {METRIC: 1.0 / epoch})


def costs_by_depth(segment):
    """Says what it costs before it begins."""
    report_costs({"num_parameters": 1e6 * segment.params["model.decoder.depth"], "latency_ms": 1.0, "memory_mb": 1.0})
    curve(segment)


def shallow_is_cheap(segment):
    """Says what it costs, the less the worse it will be."""
    depth = segment.params["model.decoder.depth"]
    report_costs({"num_parameters": 1e6 * depth, "latency_ms": 1.0, "memory_mb": 1.0})
    for epoch in range(1, 5):
        report_epoch(epoch, {METRIC: abs(math.log10(segment.params["optimizer.lr"]) + 3) - 2 * depth + 4 / epoch})


def hangs_once(segment):
    """Each trial's first worker hangs after epoch 2."""
    report_epoch(1, {METRIC: 3.0})
    report_epoch(2, {METRIC: 2.0})
    if segment.segment_number == 1:
        time.sleep(600)
    for epoch in (3, 4):
        report_epoch(epoch, {METRIC: 1.0 / epoch})


used_workers = []
"""Of this process: trials that it has trained."""


def makes_worker_unfit(segment):
    """A worker is good for one trial."""
    if used_workers:
        raise UnfitWorkerError(f"trial {used_workers[0]} has left its memory taken")
    used_workers.append(segment.trial)
    curve(segment)


def train_growing_weight(segment, *, seconds=0.05, dies=False):
    """A weight that grows by the learning rate each epoch and travels in the checkpoint; the further, the better.

    dies: each trial's first worker is killed after epoch 3.
    """
    weight, epoch = 0.0, 0
    newest = find_newest_intact(segment.checkpoints, Path(segment.folder))
    if newest is not None:
        weight, epoch = json.loads((Path(segment.folder) / newest.file).read_text())
    assert epoch < 8, "a trial that is whole must not be sent on"
    resumed_from = epoch
    while epoch < 8:
        epoch += 1
        weight += segment.params["optimizer.lr"] / segment.params["model.decoder.depth"]
        time.sleep(seconds)
        file = segment.make_checkpoint_path(epoch)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([weight, epoch]))
        checkpoint = describe_checkpoint(file, folder=Path(segment.folder), epoch=epoch)
        report_epoch(epoch, {METRIC: 10.0 - weight}, resumed_from=resumed_from, checkpoint=checkpoint)
        if dies and segment.segment_number == 1 and epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def dies_once(segment):
    """The same, from a worker that is killed once a trial."""
    train_growing_weight(segment, seconds=0.0, dies=True)


def grows_slowly(segment):
    """The same, with time to be interrupted."""
    train_growing_weight(segment, seconds=0.3)


def grows_in_a_store(segment):
    """A weight that grows, and travels in checkpoints that are kept where the sweep keeps them."""
    with open_worker_files(segment, scratch=Path.cwd()) as files:
        newest = files.fetch_newest(segment.checkpoints)
        weight, epoch = json.loads(newest[1].read_text()) if newest else (0.0, 0)
        resumed_from = epoch
        while epoch < 4:
            epoch += 1
            weight += segment.params["optimizer.lr"] / segment.params["model.decoder.depth"]
            file = files.get_local_path(segment.make_checkpoint_name(epoch))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([weight, epoch]))
            checkpoint = files.commit(file, epoch=epoch, is_needed=True)
            report_epoch(epoch, {METRIC: 10.0 - weight}, resumed_from=resumed_from, checkpoint=checkpoint)
            if segment.segment_number == 1 and epoch == 2 and segment.trial == 1:
                os.kill(os.getpid(), signal.SIGKILL)


def trains_in_step(segment):
    """Two workers leave word of the epochs that they begin, the second one after the first. Depth 2: the second one
    dies in epoch 2, the first time; depth 3: it says then that the trial cannot be trained."""
    rank, depth = get_worker_context().rank, segment.params["model.decoder.depth"]
    for epoch in range(1, 5):
        own, other = (Path(segment.folder, f"{segment.name}-{each}-{epoch}") for each in (rank, 1 - rank))
        if rank == 0:
            own.touch()
        while not other.exists():
            time.sleep(0.05)
        own.touch()
        if rank == 1 and epoch == 2:
            if depth == 2 and segment.segment_number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if depth == 3:
                raise UserError("model.decoder.depth=3 does not fit")
        if rank == 0 and epoch == 2 and depth in (2, 3) and segment.segment_number == 1:
            time.sleep(600)  # as a step that is shared waits for the other one
        report_epoch(epoch, {METRIC: depth + 1 / epoch if rank == 0 else -1.0})


def diverges_at_end(segment):
    """Has no number after its second epoch."""
    report_epoch(1, {METRIC: 1.0})
    report_epoch(2, {METRIC: math.nan})


def slow_start(segment):
    """Reports nothing for a second, as a trial that loads its data."""
    time.sleep(1.0)
    for epoch in range(1, 5):
        report_epoch(epoch, {METRIC: 1.0})


def reports_good_start(segment):
    """At lr 1 trains one epoch, which looks better than all four at lr 2."""
    lr = segment.params["optimizer.lr"]
    for epoch in range(1, 5 if lr == 2.0 else 2):
        report_epoch(epoch, {METRIC: lr})


def plain_reports_good_start(config):
    """The same, as Ray's own sweeps have their trials."""
    for epoch in range(1, 5 if config["lr"] == 2.0 else 2):
        tune.report({"epoch": epoch, METRIC: config["lr"]})
