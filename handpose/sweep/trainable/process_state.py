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

from handpose.sweep.trainable.reporting import UnfitWorkerError

_TOLERATED_BYTES = 64 * 2**20
"""What a library may keep on a GPU from one trial to the next, such as a table of constants."""

_is_frozen = False


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Leave the process after the block as it was before, whatever the block has set.

    Memory that an earlier block left behind is freed first. Raises WornWorkerError, at once, where that is impossible.
    """
    _free_memory()
    before = list(_read_settings())
    # What these two undo has no value that could be read.
    with warnings.catch_warnings(), torch.inference_mode(False):
        try:
            yield
        finally:
            if "torch._dynamo" in sys.modules:  # compiled code; and after a few recompilations dynamo gives up
                torch.compiler.reset()
            for setting, value in before:
                setting.restore_value(value)


def freeze_imports() -> None:
    """What has been imported is there to stay: no collection of garbage looks at it again.

    A collection is due before every trial, and takes 0.2 s after the imports of a trial, but milliseconds without them.
    """
    global _is_frozen
    _is_frozen = True
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries complain at the end that their objects were never freed


def _free_memory() -> None:
    gc.collect() if _is_frozen else freeze_imports()
    if not torch.cuda.is_initialized():
        return
    torch._C._cuda_clearCublasWorkspaces()  # they count as allocated, and are made again on use
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
        taken = torch.cuda.memory_allocated(device)
        if taken > _TOLERATED_BYTES:
            raise UnfitWorkerError(f"a trial before this one has left {taken / 1e6:.0f} MB of GPU {device} taken")


class ProcessSetting(NamedTuple):
    """Something that belongs to a process or its thread. is_same: whether two values of it are alike."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    is_same: Callable[[Any, Any], bool] = lambda first, second: bool(first == second)

    def restore_value(self, value: Any) -> None:
        """Write a value that was read, if it has changed: a precision that was never set follows the one above it."""
        try:
            is_changed = not self.is_same(self.read(), value)
        except (RuntimeError, OSError):  # as of precisions that contradict each other, or a folder that is gone
            is_changed = True
        if is_changed:
            self.write(value)


def _read_settings() -> Iterator[tuple[ProcessSetting, Any]]:
    """Settings with their values: not those that this torch lacks, or that contradict each other already."""
    for setting in _list_settings():
        with contextlib.suppress(AttributeError, RuntimeError, OSError):
            yield setting, setting.read()


def _list_settings() -> Iterator[ProcessSetting]:
    """All of them, in the order in which they are put back."""
    yield from _list_process_settings()
    yield from _list_torch_settings()
    yield from (hooks for module in (torch_modules, torch_optimizers) for hooks in _list_global_hooks(module))
    yield from _list_autocast_settings()
    yield from _list_precision_settings()
    yield from _list_backend_settings()
    yield from _list_precision_settings()  # again, since the older switches among the backends' set some of these
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
    """Those that act on every module, or every optimizer."""
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
    """Of float32 sums, from the one that others follow to those that follow."""
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
    """Of random numbers. Last, since nothing may draw afterwards; written always, since comparing takes as long."""
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
    """The same object, since others hold it."""
    for key in values.keys() - before.keys():
        del values[key]
    values.update(before)


def _read_umask() -> int:
    """It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read_logging() -> dict[logging.Logger, tuple[Any, ...]]:
    """Level and handlers of every logger that there is."""
    named = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    return {log: (log.level, log.disabled, log.propagate, [*log.handlers]) for log in (logging.root, *named)}


def _set_logging(before: dict[logging.Logger, tuple[Any, ...]]) -> None:
    for log, (level, disabled, propagate, handlers) in before.items():
        log.setLevel(level)
        log.disabled, log.propagate, log.handlers = disabled, propagate, handlers


def _read_default_device() -> torch.device | None:
    """That was set, not the one that counts where none was: every call is slower with one."""
    mode = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if mode is None else mode.device


def _is_flushing_denormals() -> bool:
    """Torch tells it nowhere."""
    return bool((torch.tensor([1e-40]) * 1.0 == 0).item())
