"""Pictures and checkpoints of a trial. For these its training waits for a copy in memory, not for a disk."""

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
from handpose.sweep.record.events import CheckpointRecord
from handpose.sweep.storage.checkpoint_files import CheckpointFiles
from handpose.training.checkpoints import WholeFiles
from handpose.whole_file import whole_file

_JPEG_QUALITY = 88


class SaveResult(NamedTuple):
    """What came of the checkpoints since the question before: the newest one, and what went wrong."""

    checkpoint: CheckpointRecord | None = None
    note: str = ""


class BackgroundCheckpointIO(WholeFiles):
    """A Trainer's checkpoint_io that writes in a thread of its own, one checkpoint at a time.

    files: where they are kept. is_needed: until the next question by `written`, the trial pauses with what is saved.
    Lightning's AsyncCheckpointIO (2.6.6) does not tell when a file is whole, and copies within the GPU.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        super().__init__(is_durable=True)  # it may be found by its name alone, after a crash
        self.files = files
        self.is_needed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending_save: Future[CheckpointRecord] | None = None
        self._result = SaveResult()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy the checkpoint and return; waits for the one before."""
        self._finish_save()
        self._pending_save = self._thread.submit(self._save, copy_to_cpu(checkpoint), Path(path), self.is_needed)

    def wait_for_result(self) -> SaveResult:
        """Wait for what is being written."""
        self._finish_save()
        self.is_needed = False
        written, self._result = self._result, SaveResult()
        return written

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._thread.shutdown(wait=True)

    def _save(self, checkpoint: dict[str, Any], path: Path, is_needed: bool) -> CheckpointRecord:
        super().save_checkpoint(checkpoint, path)
        return self.files.commit(path, epoch=checkpoint["epoch"] + 1, is_needed=is_needed)

    def _finish_save(self) -> None:
        writing, self._pending_save = self._pending_save, None
        if writing is None:
            return
        try:
            checkpoint = writing.result()
        except UserError as error:  # as of a full disk: until there is another, the one before is gone on from
            self._result = self._result._replace(note=str(error))
            return
        if self._result.checkpoint is not None:  # nobody will hear of it
            self.files.discard(self._result.checkpoint)
        self._result = SaveResult(checkpoint)


def copy_to_cpu(value: Any) -> Any:
    """The value with tensors of its own on the CPU, wherever they are in dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # with the attributes that a state_dict carries
        result.update((key, copy_to_cpu(item)) for key, item in value.items())
        return result
    return type(value)(copy_to_cpu(item) for item in value) if type(value) in (list, tuple) else value


def save_pictures(pictures: Mapping[str, np.ndarray], files: Mapping[str, Path]) -> None:
    """Write (H, W, 3) uint8 pictures as JPEG, each to the file of its name; no training is lost for want of one."""
    with contextlib.suppress(OSError):
        for name, picture in pictures.items():
            with whole_file(files[name]) as part:
                part.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=_JPEG_QUALITY))
