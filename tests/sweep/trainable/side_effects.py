"""What a bad trial does to its process. `python -m tests.sweep.trainable.side_effects DATA FOLDER` trains in two.

It prints the hash of the weights after a training in a fresh process, and after a training in a process that has run
other trainings and all that is in SIDE_EFFECTS. Both are forks of a process that has imported everything.
"""

import contextlib
import hashlib
import logging
import os
import random
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.optim.optimizer as optimizers
from torch import backends, nn

from handpose.config import compose
from handpose.sweep.trainable.process_state import preserve_process_state
from handpose.training.fit import fit
from handpose.training.results import RunFolders
from tests import builders

SMALL = [
    *builders.SMALL,
    "model.decoder.depth=1",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "checkpoints.enabled=false",
]


def fail_on_hook(module, inputs, output):
    """A hook that no training survives."""
    return output * 2 if isinstance(output, torch.Tensor) else output


def change_precisions():
    children = (backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return [owner.fp32_precision for owner in (backends, backends.cudnn, backends.cuda.matmul, *children)]


def infer():
    mode = torch.inference_mode()
    mode.__enter__()
    left_open.append(mode)


left_open = []


def change_contradicting_settings():
    backends.fp32_precision = "tf32"
    backends.cudnn.conv.fp32_precision = "ieee"


def draw_numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def make_small_number():
    return float(torch.tensor([1e-40]) * 1.0)


SIDE_EFFECTS = {
    "environment": (
        lambda: (os.environ.update(OMP_NUM_THREADS="7", HOME="/nowhere"), os.environ.pop("PATH")),
        lambda: dict(os.environ),
    ),
    "folder": (partial(os.chdir, "/"), os.getcwd),
    "umask": (partial(os.umask, 0o077), lambda: (os.umask(0o022), os.umask(0o022))[0]),
    "path": (lambda: sys.path.insert(0, "/nowhere"), sys.path.copy),
    "warnings": (partial(warnings.simplefilter, "ignore"), lambda: [*warnings.filters]),
    "log level": (lambda: logging.getLogger("py.warnings").setLevel(1), lambda: logging.getLogger("py.warnings").level),
    "log handler": (lambda: logging.root.addHandler(logging.NullHandler()), lambda: [*logging.root.handlers]),
    "numpy errors": (lambda: np.seterr(all="raise"), np.geterr),
    "threads": (lambda: torch.set_num_threads(3 if torch.get_num_threads() != 3 else 2), torch.get_num_threads),
    "dtype": (partial(torch.set_default_dtype, torch.float64), torch.get_default_dtype),
    "device": (partial(torch.set_default_device, "meta"), torch.get_default_device),
    "gradients": (partial(torch.set_grad_enabled, False), torch.is_grad_enabled),
    "inference": (infer, torch.is_inference_mode_enabled),
    "determinism": (
        partial(torch.use_deterministic_algorithms, True, warn_only=True),
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
    ),
    "fill": (
        lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
    ),
    "anomalies": (partial(torch.autograd.set_detect_anomaly, True), torch.is_anomaly_enabled),
    "denormals": (partial(torch.set_flush_denormal, True), make_small_number),
    "forward hook": (
        lambda: nn.modules.module.register_module_forward_hook(fail_on_hook),
        lambda: nn.Identity()(torch.ones(())),
    ),
    "parameter hook": (
        lambda: nn.modules.module.register_module_parameter_registration_hook(lambda *_: None),
        lambda: len(nn.modules.module._global_parameter_registration_hooks),
    ),
    "optimizer hook": (
        lambda: optimizers.register_optimizer_step_pre_hook(lambda *_: None),
        lambda: len(optimizers._global_optimizer_pre_hooks),
    ),
    "autocast": (partial(torch.set_autocast_enabled, "cpu", True), lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype),
    "autocast dtype": (
        partial(torch.set_autocast_dtype, "cpu", torch.float16),
        partial(torch.get_autocast_dtype, "cpu"),
    ),
    "autocast cache": (partial(torch.set_autocast_cache_enabled, False), torch.is_autocast_cache_enabled),
    "matmul precision": (
        partial(torch.set_float32_matmul_precision, "medium"),
        lambda: (torch.get_float32_matmul_precision(), change_precisions()),
    ),
    "matmul tf32": (
        lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
        lambda: (backends.cuda.matmul.allow_tf32, change_precisions()),
    ),
    "cudnn tf32": (
        lambda: setattr(backends.cudnn, "allow_tf32", False),
        lambda: (backends.cudnn.allow_tf32, change_precisions()),
    ),
    "cudnn": (
        lambda: backends.cudnn.set_flags(_enabled=False, _benchmark=True, _deterministic=True),
        lambda: (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
    ),
    "mkldnn": (lambda: backends.mkldnn.set_flags(False), lambda: backends.mkldnn.enabled),
    "attention": (partial(backends.cuda.enable_flash_sdp, False), backends.cuda.flash_sdp_enabled),
    "seeds": (lambda: (random.seed(1), np.random.seed(1), torch.manual_seed(1)), draw_numbers),
    "contradicting precisions": (change_contradicting_settings, change_precisions),
}


class Weights(pl.Callback):
    """Keeps the hash of the weights; fails: in the middle of the training."""

    def __init__(self, *, fails):
        self.fails = fails
        self.digest = hashlib.sha256()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.fails:
            raise FloatingPointError

    def on_train_end(self, trainer, pl_module):
        for _, value in sorted(pl_module.state_dict().items()):
            self.digest.update(value.numpy().tobytes())


def train_and_hash_weights(data, folder, *overrides, fails=False):
    """Hash of the weights after a short training."""
    given = [*SMALL, f"data.root={data}", f"paths.output={folder}", *overrides]
    kept = Weights(fails=fails)
    with preserve_process_state():
        fit(compose("train", given), RunFolders(folder, folder, folder), callbacks=[kept], quiet=True)
        if overrides:
            for make_dirty, _ in SIDE_EFFECTS.values():
                make_dirty()
    return kept.digest.hexdigest()


def hash_weights_in_fork(data, folder, *, is_used):
    """Train in a fork of this process."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        if is_used:
            train_and_hash_weights(data, folder, "seed=5", "num_threads=3", "augment=none")
            with contextlib.suppress(FloatingPointError):
                train_and_hash_weights(data, folder, "seed=6", fails=True)
        os.write(write, train_and_hash_weights(data, folder).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        digest = file.read()
    os.wait()
    return digest


if __name__ == "__main__":
    data, folder = sys.argv[1], Path(sys.argv[2])
    print(hash_weights_in_fork(data, folder / "fresh", is_used=False))
    print(hash_weights_in_fork(data, folder / "used", is_used=True))
