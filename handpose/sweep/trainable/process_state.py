"""Restores the state of a worker process after each trial, because a worker trains one trial after another.

On the CPU, a trial in a used worker therefore gives bit for bit the same results as in a fresh one. Imported modules
stay, and so does what libraries cache.
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

from handpose.sweep.trainable.reporting import UnfitWorkerError

_TOLERATED_BYTES = 64 * 2**20
"""GPU memory that libraries may keep from one trial to the next, for example a table of constants."""

_is_frozen = False


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore the state of the process after the block, whatever the block has set.

    Memory that an earlier block left behind is freed first.

    Raises:
        UnfitWorkerError: more than a little GPU memory cannot be freed. It is raised before the block runs.
    """
    _free_memory()
    before = list(_read_settings())
    # These two restore state that cannot be read as a value.
    with warnings.catch_warnings(), torch.inference_mode(False):
        try:
            yield
        finally:
            if "torch._dynamo" in sys.modules:  # drops compiled code; dynamo gives up after a few recompilations
                torch.compiler.reset()
            for setting, value in before:
                setting.restore_value(value)


def _free_memory() -> None:
    """Free the memory that an earlier trial left behind.

    The first call excludes what has been imported so far from garbage collection, which otherwise takes 0.2 s before
    every trial instead of milliseconds.
    """
    global _is_frozen
    gc.collect()
    if not _is_frozen:
        _is_frozen = True
        gc.freeze()
        atexit.register(gc.unfreeze)  # otherwise libraries complain at exit that their objects were never freed
    if not torch.cuda.is_initialized():
        return
    torch._C._cuda_clearCublasWorkspaces()  # they count as allocated; torch makes them again on use
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
        taken = torch.cuda.memory_allocated(device)
        if taken > _TOLERATED_BYTES:
            raise UnfitWorkerError(f"an earlier trial has left {taken / 1e6:.0f} MB of GPU {device} in use")


class ProcessSetting(NamedTuple):
    """A setting of the process or of its thread.

    Attributes:
        read: returns the value.
        write: sets the value.
        is_same: whether two values are equal.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    is_same: Callable[[Any, Any], bool] = lambda first, second: bool(first == second)

    def restore_value(self, value: Any) -> None:
        """Set the value again if it has changed.

        An unchanged value is not written: a precision that was never set follows its parent, and must not become fixed.
        """
        try:
            is_changed = not self.is_same(self.read(), value)
        except (RuntimeError, OSError):  # for example precisions that contradict each other, or a deleted folder
            is_changed = True
        if is_changed:
            self.write(value)


def _read_settings() -> Iterator[tuple[ProcessSetting, Any]]:
    """Yield settings with their values, except those that this torch lacks or that already contradict each other."""
    for setting in _list_settings():
        with contextlib.suppress(AttributeError, RuntimeError, OSError):
            yield setting, setting.read()


def _list_settings() -> Iterator[ProcessSetting]:
    """List all settings in the order in which they are restored."""
    yield from _list_process_settings()
    yield from _list_torch_settings()
    yield from (hooks for module in (torch_modules, torch_optimizers) for hooks in _list_global_hooks(module))
    yield from _list_autocast_settings()
    yield from _list_precision_settings()
    yield from _list_backend_settings()
    yield from _list_precision_settings()  # again, since older settings of the backends change some of these
    yield from _list_generator_settings()


def _list_process_settings() -> Iterator[ProcessSetting]:
    yield ProcessSetting(os.environ.copy, partial(_refill, os.environ))
    yield ProcessSetting(os.getcwd, os.chdir)
    yield ProcessSetting(_read_umask, os.umask)
    yield ProcessSetting(sys.path.copy, lambda path: sys.path.__setitem__(slice(None), path))
    yield ProcessSetting(_read_logging, _set_logging)
    yield ProcessSetting(np.geterr, lambda errors: np.seterr(**errors))


def _list_torch_settings() -> Iterator[ProcessSetting]:
    yield ProcessSetting(torch.get_num_threads, torch.set_num_threads)
    yield ProcessSetting(torch.get_default_dtype, torch.set_default_dtype)
    yield ProcessSetting(_read_default_device, torch.set_default_device)
    yield ProcessSetting(torch.is_grad_enabled, torch.set_grad_enabled)
    yield ProcessSetting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    )
    yield _make_attribute_setting(torch.utils.deterministic, "fill_uninitialized_memory")
    yield ProcessSetting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.set_anomaly_enabled(*value),
    )
    yield ProcessSetting(_is_flushing_denormals, torch.set_flush_denormal)
    if torch.cuda.is_initialized():
        yield ProcessSetting(torch.cuda.current_device, torch.cuda.set_device)


def _list_global_hooks(module: ModuleType) -> Iterator[ProcessSetting]:
    """List the hooks that act on every module or every optimizer."""
    for name, hooks in vars(module).items():
        if name.startswith("_global_") and isinstance(hooks, dict):
            yield ProcessSetting(hooks.copy, partial(_refill, hooks))
        elif name.startswith("_global_is_"):
            yield _make_attribute_setting(module, name)


def _list_autocast_settings() -> Iterator[ProcessSetting]:
    for device in ("cpu", "cuda"):
        yield ProcessSetting(partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device))
        yield ProcessSetting(partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device))
    yield ProcessSetting(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)


def _list_precision_settings() -> Iterator[ProcessSetting]:
    """List the precisions of float32 sums: first those that others inherit, then those that inherit."""
    cudnn: Any = backends.cudnn
    mkldnn: Any = backends.mkldnn
    followers = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)
    yield from (_make_attribute_setting(owner, "fp32_precision") for owner in (backends, cudnn, mkldnn, *followers))


def _list_backend_settings() -> Iterator[ProcessSetting]:
    yield ProcessSetting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    for name in ("enabled", "benchmark", "benchmark_limit", "deterministic", "allow_tf32"):
        yield _make_attribute_setting(backends.cudnn, name)
    for name in ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation", "tf32"):
        yield _make_attribute_setting(backends.cuda.matmul, f"allow_{name}")
    for name in ("enabled", "deterministic"):
        yield _make_attribute_setting(backends.mkldnn, name)
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        yield ProcessSetting(
            getattr(backends.cuda, f"{name}_sdp_enabled"), getattr(backends.cuda, f"enable_{name}_sdp")
        )


def _list_generator_settings() -> Iterator[ProcessSetting]:
    """List the random number generators.

    They come last, since nothing may draw numbers after they are restored. They are always written, since a comparison
    takes as long.
    """
    yield ProcessSetting(random.getstate, random.setstate, _is_never_same)
    yield ProcessSetting(np.random.get_state, np.random.set_state, _is_never_same)
    yield ProcessSetting(torch.get_rng_state, torch.set_rng_state, _is_never_same)
    if torch.cuda.is_initialized():
        yield ProcessSetting(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, _is_never_same)


def _is_never_same(first: object, second: object) -> bool:
    return False


def _make_attribute_setting(holder: Any, name: str) -> ProcessSetting:
    return ProcessSetting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value))


def _refill(values: MutableMapping[Any, Any], before: Mapping[Any, Any]) -> None:
    """Restore the contents of the same object, since others hold a reference to it."""
    for key in values.keys() - before.keys():
        del values[key]
    values.update(before)


def _read_umask() -> int:
    """Read the umask, which is possible only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read_logging() -> dict[logging.Logger, tuple[Any, ...]]:
    """Read the level and the handlers of every logger."""
    named = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    return {log: (log.level, log.disabled, log.propagate, [*log.handlers]) for log in (logging.root, *named)}


def _set_logging(before: dict[logging.Logger, tuple[Any, ...]]) -> None:
    for log, (level, disabled, propagate, handlers) in before.items():
        log.setLevel(level)
        log.disabled, log.propagate, log.handlers = disabled, propagate, handlers


def _read_default_device() -> torch.device | None:
    """Return the default device that was set, or None. Setting one explicitly would slow down every call."""
    mode = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if mode is None else mode.device


def _is_flushing_denormals() -> bool:
    """Return whether denormals are flushed to zero; torch has no function for it."""
    return bool((torch.tensor([1e-40]) * 1.0 == 0).item())
