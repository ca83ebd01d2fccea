"""Cheap curves instead of networks. In a module of their own, so that a worker that runs one imports no torch."""

import json
import math
import tempfile
import time
from pathlib import Path

from ray import tune

METRIC = "val/pa_mpjpe_mm"


def curve(params):
    """Falls with the epochs towards a value that is least at lr 1e-3 and depth 1."""
    for epoch in range(1, 5):
        end = abs(math.log10(params["optimizer.lr"]) + 3) + params["model.decoder.depth"]
        tune.report({"epoch": epoch, METRIC: end + 4 / epoch, "val/pck_auc": 0.5})


def fails_or_diverges(params):
    """Depth 1 diverges at epoch 2, depth 2 raises at epoch 2, depth 3 is trained."""
    tune.report({"epoch": 1, METRIC: 3.0})
    if params["model.decoder.depth"] == 2:
        raise FloatingPointError("no gradient at all")
    value = math.nan if params["model.decoder.depth"] == 1 else 1.0
    tune.report({"epoch": 2, METRIC: value})
    if math.isfinite(value):
        for epoch in (3, 4):
            tune.report({"epoch": epoch, METRIC: 1.0 / epoch})


def endless(params):
    """Half a minute, or until it is ended."""
    for epoch in range(1, 600):
        time.sleep(0.05)
        tune.report({"epoch": epoch, METRIC: 1.0 / epoch})


def population(params):
    """A weight that grows by the learning rate each epoch and travels in the checkpoint; the further, the better."""
    weight, epoch = 0.0, 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            weight, epoch = json.loads((Path(directory) / "state.json").read_text())
        assert epoch < 8, "a trial that is whole must not be sent on"
    while epoch < 8:
        epoch += 1
        weight += params["optimizer.lr"] / params["model.decoder.depth"]
        time.sleep(0.05)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "state.json").write_text(json.dumps([weight, epoch]))
            saved = tune.Checkpoint.from_directory(directory)
            tune.report({"epoch": epoch, METRIC: 10.0 - weight}, checkpoint=saved)
