"""Lets Ctrl-C and SIGTERM end a training or a prediction between two batches, and not in the middle of something."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from handpose.program import is_repeated_sigterm, raises_on_sigterm

_PATIENCE_S = 5.0
"""Seconds after which an interruption does not wait any longer for the next batch, which may never come."""


class _InterruptionCallback(pl.Callback):
    """Raises KeyboardInterrupt before the next batch once that has been requested."""

    def __init__(self) -> None:
        self.is_requested = False

    def raise_if_requested(self) -> None:
        """Raise KeyboardInterrupt if it has been requested."""
        if self.is_requested:
            self.is_requested = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise KeyboardInterrupt

    def on_train_batch_start(self, *_: Any) -> None:
        self.raise_if_requested()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.raise_if_requested()

    def on_predict_batch_start(self, *_: Any) -> None:
        self.raise_if_requested()


@contextmanager
def interrupt_between_batches(trainer: pl.Trainer) -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C and SIGTERM only between two batches of a Trainer, within a `with` block.

    Python raises it between any two instructions. If that is between taking the lock of a queue and the block that
    gives it back, the lock stays taken (CPython issue 74174). TensorBoard's writer has such a queue, and so have
    loaders with threads. When Lightning then closed the writer, the program would wait for ever. (Measured with Python
    3.11 and TensorBoard 2.21 on busy cores: after some ten to hundred interruptions while scalars were written.)

    If no batch begins for some seconds, or the signal comes again, the exception is raised at once. Outside the main
    thread, and for a signal that is ignored or has another handler, nothing changes.

    Args:
        trainer: what trains or predicts in the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = _InterruptionCallback()
    trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]

    def request(number: int, frame: FrameType | None) -> None:
        if is_repeated_sigterm(number):
            return
        if callback.is_requested:
            callback.raise_if_requested()
        callback.is_requested = True
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S)

    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, lambda number, frame: callback.raise_if_requested())}
    is_free = {
        signal.SIGINT: signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        signal.SIGTERM: raises_on_sigterm(),
    }
    before |= {number: signal.signal(number, request) for number, free in is_free.items() if free}
    try:
        yield
        callback.raise_if_requested()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            # Lightning ignores Ctrl-C once it shuts down. A handler that Python has not set is None.
            if signal.getsignal(number) != signal.SIG_IGN and handler is not None:
                signal.signal(number, handler)
        trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
