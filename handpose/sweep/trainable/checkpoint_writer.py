"""Saves the pictures and checkpoints of a trial.

Training waits only until a checkpoint is copied in memory, not until it is on the disk.
"""

import contextlib
import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch

from handpose.errors import UserError
from handpose.files import write_atomically
from handpose.sweep.record.events import CheckpointRecord
from handpose.sweep.storage.checkpoint_files import CheckpointFiles
from handpose.training.checkpoints import AtomicCheckpointIO

_JPEG_QUALITY = 88


class SaveResult(NamedTuple):
    """Result of the saves since the last call of `wait_for_result`.

    Attributes:
        checkpoint: the newest checkpoint; None: there is no new one.
        note: what went wrong.
    """

    checkpoint: CheckpointRecord | None = None
    note: str = ""


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """A Trainer's checkpoint_io that writes checkpoints in its own thread, one at a time.

    Lightning's AsyncCheckpointIO (2.6.6) does not say when a file is complete, and its copies stay on the GPU.

    Args:
        files: where checkpoints are kept.

    Attributes:
        is_needed: whether the trial pauses with the checkpoints saved from now on. `wait_for_result` resets it.
        earlier_epochs: number of epochs that the trial was trained with other folds.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        super().__init__(is_durable=True)  # after a crash it may be found by its name alone
        self.files = files
        self.is_needed = False
        self.earlier_epochs = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending_save: Future[CheckpointRecord] | None = None
        self._result = SaveResult()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy the checkpoint, start to write it, and return. Waits for the previous checkpoint first."""
        self._finish_save()
        copied, before = copy_to_cpu(checkpoint), self.earlier_epochs
        self._pending_save = self._thread.submit(self._save, copied, Path(path), before, self.is_needed)

    def wait_for_result(self) -> SaveResult:
        """Wait until the pending checkpoint is written, and return the result of the saves since the last call."""
        self._finish_save()
        self.is_needed = False
        written, self._result = self._result, SaveResult()
        return written

    def close(self) -> None:
        """Wait until the pending checkpoint is written, and end the thread."""
        self._thread.shutdown(wait=True)

    def _save(self, checkpoint: dict[str, Any], path: Path, earlier_epochs: int, is_needed: bool) -> CheckpointRecord:
        super().save_checkpoint(checkpoint, path)
        return self.files.commit(path, epoch=earlier_epochs + checkpoint["epoch"] + 1, is_needed=is_needed)

    def _finish_save(self) -> None:
        writing, self._pending_save = self._pending_save, None
        if writing is None:
            return
        try:
            checkpoint = writing.result()
        except UserError as error:  # for example a full disk: the previous checkpoint stays the newest
            self._result = self._result._replace(note=str(error))
            return
        if self._result.checkpoint is not None:  # it was never reported
            self.files.discard(self._result.checkpoint)
        self._result = SaveResult(checkpoint)


def copy_to_cpu(value: Any) -> Any:
    """Copy a value, with copies on the CPU of all tensors in its dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the attributes of a state_dict
        result.update((key, copy_to_cpu(item)) for key, item in value.items())
        return result
    return type(value)(copy_to_cpu(item) for item in value) if type(value) in (list, tuple) else value


def save_pictures(pictures: Mapping[str, np.ndarray], files: Mapping[str, Path]) -> None:
    """Save pictures as JPEG files. Errors of the disk are ignored: training does not depend on pictures.

    Args:
        pictures: name -> (H, W, 3) uint8 picture.
        files: name -> file to write.
    """
    with contextlib.suppress(OSError):
        for name, picture in pictures.items():
            with write_atomically(files[name]) as part:
                part.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=_JPEG_QUALITY))
