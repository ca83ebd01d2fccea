"""A training uses fewer threads while other programs use the same cores."""

from typing import Any

import pytorch_lightning as pl
import torch

from handpose.openmp import ContentionWatch


class FreeCores(pl.Callback):
    """Reduces the number of torch threads by the cores that other programs take, for as long as they take them.

    All threads of an operation wait for the slowest one. With as many threads as cores, a single busy process therefore
    slows all of them down, and fewer threads are faster. Sums are rounded differently with another number of threads.

    Args:
        watch: watches the cores of this process.
    """

    def __init__(self, watch: ContentionWatch) -> None:
        self._watch = watch
        self._num_threads = torch.get_num_threads()

    def on_train_batch_start(self, *_: Any) -> None:
        self._adapt()

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        self._adapt()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        torch.set_num_threads(self._num_threads)

    def _adapt(self) -> None:
        num_threads = max(1, round(self._num_threads - self._watch.lost_cores))
        if num_threads != torch.get_num_threads():
            torch.set_num_threads(num_threads)
