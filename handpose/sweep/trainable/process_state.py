"""A worker trains one trial after another, and each leaves the process as it found it.

So a trial in a used worker gives, on the CPU, bit for bit what it gives in a fresh one. What a trial has imported
stays, and so does what libraries keep for themselves.
"""

import atexit
import contextlib
import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.modules.module as torch_modules
import torch.optim.optimizer as torch_optimizers
from torch import backends

from handpose.sweep.trainable.reporting import WornWorkerError

_TOLERATED_BYTES = 64 * 2**20
"""What a library may keep on a GPU from one trial to the next, such as a table of constants."""

_is_frozen = False


@contextlib.contextmanager
def clean_process() -> Iterator[None]:
    """Leave the process after the block as it was before, whatever the block has set.

    Memory that an earlier block left behind is freed first. Raises WornWorkerError, at once, where that is impossible.
    """
    _free_memory()
    before = list(_readable())
    # What these two undo has no value that could be read.
    with warnings.catch_warnings(), torch.inference_mode(False):
        try:
            yield
        finally:
            if "torch._dynamo" in sys.modules:  # compiled code; and after a few recompilations dynamo gives up
                torch.compiler.reset()
            for setting, value in before:
                setting.put_back(value)


def settle() -> None:
    """What has been imported is there to stay: no collection of garbage looks at it again.

    A collection is due before every trial, and takes 0.2 s after the imports of a trial, but milliseconds without them.
    """
    global _is_frozen
    _is_frozen = True
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries complain at the end that their objects were never freed


def _free_memory() -> None:
    gc.collect() if _is_frozen else settle()
    if not torch.cuda.is_initialized():
        return
    torch._C._cuda_clearCublasWorkspaces()  # they count as allocated, and are made again on use
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
        taken = torch.cuda.memory_allocated(device)
        if taken > _TOLERATED_BYTES:
            raise WornWorkerError(f"a trial before this one has left {taken / 1e6:.0f} MB of GPU {device} taken")


class Setting(NamedTuple):
    """Something that belongs to a process or its thread. is_same: whether two values of it are alike."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    is_same: Callable[[Any, Any], bool] = lambda first, second: bool(first == second)

    def put_back(self, value: Any) -> None:
        """Write a value that was read, if it has changed: a precision that was never set follows the one above it."""
        try:
            is_changed = not self.is_same(self.read(), value)
        except (RuntimeError, OSError):  # as of precisions that contradict each other, or a folder that is gone
            is_changed = True
        if is_changed:
            self.write(value)


def _readable() -> Iterator[tuple[Setting, Any]]:
    """Settings with their values: not those that this torch lacks, or that contradict each other already."""
    for setting in _settings():
        with contextlib.suppress(AttributeError, RuntimeError, OSError):
            yield setting, setting.read()


def _settings() -> Iterator[Setting]:
    """All of them, in the order in which they are put back."""
    yield from _of_the_process()
    yield from _of_torch()
    yield from (hooks for module in (torch_modules, torch_optimizers) for hooks in _global_hooks(module))
    yield from _autocast()
    yield from _precisions()
    yield from _backends()
    yield from _precisions()  # again, since the older switches among the backends' set some of these
    yield from _generators()


def _of_the_process() -> Iterator[Setting]:
    yield Setting(os.environ.copy, partial(_refill, os.environ))
    yield Setting(os.getcwd, os.chdir)
    yield Setting(_umask, os.umask)
    yield Setting(sys.path.copy, lambda path: sys.path.__setitem__(slice(None), path))
    yield Setting(_logging, _set_logging)
    yield Setting(np.geterr, lambda errors: np.seterr(**errors))


def _of_torch() -> Iterator[Setting]:
    yield Setting(torch.get_num_threads, torch.set_num_threads)
    yield Setting(torch.get_default_dtype, torch.set_default_dtype)
    yield Setting(_default_device, torch.set_default_device)
    yield Setting(torch.is_grad_enabled, torch.set_grad_enabled)
    yield Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    )
    yield _attribute(torch.utils.deterministic, "fill_uninitialized_memory")
    yield Setting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.set_anomaly_enabled(*value),
    )
    yield Setting(_flushes_denormals, torch.set_flush_denormal)
    if torch.cuda.is_initialized():
        yield Setting(torch.cuda.current_device, torch.cuda.set_device)


def _global_hooks(module: ModuleType) -> Iterator[Setting]:
    """Those that act on every module, or every optimizer."""
    for name, hooks in vars(module).items():
        if name.startswith("_global_") and isinstance(hooks, dict):
            yield Setting(hooks.copy, partial(_refill, hooks))
        elif name.startswith("_global_is_"):
            yield _attribute(module, name)


def _autocast() -> Iterator[Setting]:
    for device in ("cpu", "cuda"):
        yield Setting(partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device))
        yield Setting(partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device))
    yield Setting(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)


def _precisions() -> Iterator[Setting]:
    """Of float32 sums, from the one that others follow to those that follow."""
    cudnn: Any = backends.cudnn
    mkldnn: Any = backends.mkldnn
    followers = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)
    yield from (_attribute(owner, "fp32_precision") for owner in (backends, cudnn, mkldnn, *followers))


def _backends() -> Iterator[Setting]:
    yield Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    for name in ("enabled", "benchmark", "benchmark_limit", "deterministic", "allow_tf32"):
        yield _attribute(backends.cudnn, name)
    for name in ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation", "tf32"):
        yield _attribute(backends.cuda.matmul, f"allow_{name}")
    for name in ("enabled", "deterministic"):
        yield _attribute(backends.mkldnn, name)
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        yield Setting(getattr(backends.cuda, f"{name}_sdp_enabled"), getattr(backends.cuda, f"enable_{name}_sdp"))


def _generators() -> Iterator[Setting]:
    """Of random numbers. Last, since nothing may draw afterwards; written always, since comparing takes as long."""
    yield Setting(random.getstate, random.setstate, _never)
    yield Setting(np.random.get_state, np.random.set_state, _never)
    yield Setting(torch.get_rng_state, torch.set_rng_state, _never)
    if torch.cuda.is_initialized():
        yield Setting(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, _never)


def _never(first: object, second: object) -> bool:
    return False


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _refill(values: MutableMapping[Any, Any], before: Mapping[Any, Any]) -> None:
    """The same object, since others hold it."""
    for key in values.keys() - before.keys():
        del values[key]
    values.update(before)


def _umask() -> int:
    """It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _logging() -> dict[logging.Logger, tuple[Any, ...]]:
    """Level and handlers of every logger that there is."""
    named = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    return {log: (log.level, log.disabled, log.propagate, [*log.handlers]) for log in (logging.root, *named)}


def _set_logging(before: dict[logging.Logger, tuple[Any, ...]]) -> None:
    for log, (level, disabled, propagate, handlers) in before.items():
        log.setLevel(level)
        log.disabled, log.propagate, log.handlers = disabled, propagate, handlers


def _default_device() -> torch.device | None:
    """That was set, not the one that counts where none was: every call is slower with one."""
    mode = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if mode is None else mode.device


def _flushes_denormals() -> bool:
    """Torch tells it nowhere."""
    return bool((torch.tensor([1e-40]) * 1.0 == 0).item())
