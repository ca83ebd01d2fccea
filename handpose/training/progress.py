"""Progress of a run: one line per epoch, and a progress bar on a terminal."""

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class ProgressBar(pl.Callback):
    """Reports progress on stderr. If stderr is not a terminal, there are only the lines.

    Args:
        metric: the metric to show for each epoch, next to PA-MPJPE.
    """

    def __init__(self, *, metric: str = "val/pa_mpjpe_mm", shows_bar: bool = True) -> None:
        self.metric = metric
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, transient=True, disable=not (shows_bar and console.is_terminal))
        self.task: TaskID | None = None
        self.epoch_started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_started = time.monotonic()
        self._start_bar(trainer, _format_epoch(trainer), trainer.num_training_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._advance_bar()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=f"{_format_epoch(trainer)}, validating")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.task is not None:  # a resumed run ends its checkpoint's epoch again
            self._remove_bar()
            seconds = time.monotonic() - self.epoch_started
            print(
                f"{_format_epoch(trainer)}: {_format_metrics(trainer, self.metric)} ({seconds:.0f} s)",
                file=self.bar.console.file,
                flush=True,
            )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_bar(trainer, "predicting the test split", trainer.num_predict_batches[0])

    def on_predict_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._advance_bar()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_bar()

    def _start_bar(self, trainer: pl.Trainer, description: str, total: float) -> None:
        if trainer.is_global_zero:
            self.bar.start()
            self.task = self.bar.add_task(description, total=total)

    def _advance_bar(self) -> None:
        if self.task is not None:
            self.bar.advance(self.task)

    def _remove_bar(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.bar.stop()
        self.task = None


def _format_epoch(trainer: pl.Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"


def _format_metrics(trainer: pl.Trainer, metric: str) -> str:
    metrics = trainer.callback_metrics
    texts = {"train/loss": "loss {:.3f}", "val/pa_mpjpe_mm": "PA-MPJPE {:.2f} mm"}
    texts.setdefault(metric, f"{metric.rpartition('/')[2]} {{:.4g}}")
    return ", ".join(text.format(float(metrics[name])) for name, text in texts.items() if name in metrics)
