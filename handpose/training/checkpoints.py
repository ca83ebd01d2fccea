"""Checkpoints: plain data with the configuration, written atomically, so that they can be read during training."""

import contextlib
import errno
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from handpose.config import find_choice, find_target, quote_override, to_plain_values
from handpose.errors import UserError, explain_file_error, join_lines
from handpose.files import write_atomically
from handpose.metrics.target import Mode, TargetMetric
from handpose.training.calibration import Calibration
from handpose.training.module import HandPose

CHECKPOINT_FORMAT = 2
"""Version of the keys of a checkpoint, stored as `format`. Checkpoints of format 1 do not have this key."""

CALIBRATION_KEY = "calibration"
"""Key of a checkpoint's calibration, which only a checkpoint that has been tested after a training has."""


class ConfigInCheckpoint(pl.Callback):
    """Saves the composed configuration, as plain values, in every checkpoint under `config`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["format"] = CHECKPOINT_FORMAT


class BestAndLastCheckpoint(Checkpoint):
    """Keeps the best checkpoint by a validation metric, with the value in the file name, and the last one as last.ckpt.

    Lightning's ModelCheckpoint (2.6.6) writes last.ckpt only after an epoch that is the best so far, and loses track of
    the best checkpoint of the run that it resumes. This class copies that checkpoint if the same metric selected it.

    Args:
        folder: where checkpoints are saved.
        metric: the validation metric. None if no data is held out: then the last checkpoint counts as the best, unless
            its weights are not finite.
        mode: `min` or `max`, the better direction of the metric.
        every_n_epochs: number of epochs between checkpoints.
    """

    def __init__(self, folder: Path, *, metric: str | None, mode: Mode, every_n_epochs: int) -> None:
        self.folder = folder
        self.metric = None if metric is None else TargetMetric(metric, mode)
        self.every_n_epochs = every_n_epochs
        self.best: Path | None = None
        self.best_value = math.inf  # the metric as a loss: lower is better
        self.last: Path | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if self.metric is None or trainer.state.fn != "fit" or trainer.sanity_checking or not self._is_due(trainer):
            return
        value = float(trainer.callback_metrics[self.metric.name])
        if self.metric.to_loss(value) < self.best_value:
            self._save_best(trainer, epochs, value)
        self.last = self.folder / "last.ckpt"
        trainer.save_checkpoint(self.last)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.metric is None and (self._is_due(trainer) or trainer.current_epoch + 1 == trainer.max_epochs):
            self.last = self.folder / "last.ckpt"
            trainer.save_checkpoint(self.last)
            is_finite = all(bool(torch.isfinite(weights).all()) for weights in pl_module.parameters())
            self.best = self.last if is_finite else None

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether to save now. Always true after the last step of a training that max_steps or max_time ends."""
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0 or trainer.should_stop

    def _save_best(self, trainer: pl.Trainer, epochs: int, value: float) -> None:
        previous = self.best
        assert self.metric is not None
        # Set before saving, because the checkpoint contains both.
        self.best_value = self.metric.to_loss(value)
        self.best = self.folder / f"best-epoch{epochs:03d}{self._metric_in_name}{value:.3f}.ckpt"
        trainer.save_checkpoint(self.best)
        if previous is not None and previous != self.best and trainer.is_global_zero:
            previous.unlink(missing_ok=True)

    @property
    def _metric_in_name(self) -> str:
        """The part of the file name of a best checkpoint that names the metric."""
        assert self.metric is not None
        return f"-{self.metric.name.rpartition('/')[2]}"

    def state_dict(self) -> dict[str, Any]:
        is_by_value = self.best is not None and self.metric is not None
        return {"best": str(self.best) if is_by_value else None, "best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the best checkpoint of the earlier run into this folder.

        The original stays where it is, because the earlier run may still be training.
        """
        if state_dict["best"] is None:
            return
        previous = Path(state_dict["best"])
        if self.metric is not None and self._metric_in_name not in previous.name:  # the values cannot be compared
            return
        copy = self.folder / previous.name
        try:
            if not copy.is_file():  # it is if a run is resumed in its own folder, maybe on another machine
                _copy_file(previous, copy)
        except OSError:  # replaced by a better one, or moved: start without a best checkpoint
            return
        self.best, self.best_value = copy, state_dict["best_value"]


@rank_zero_only
def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in its folder and renames it. Readers find the old or the new one.

    Lightning instead writes to the system's temporary folder. Moving a file from there to another disk is a copy, not a
    rename.

    Args:
        is_durable: flush the file to the disk before the rename, so that the checkpoint is complete after a power
            failure as well.
    """

    def __init__(self, *, is_durable: bool = False) -> None:
        self._is_durable = is_durable

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with write_atomically(path) as part, part.open("wb") as file, _raise_original_error():
                torch.save(checkpoint, file)
                file.flush()
                if self._is_durable:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"the checkpoint {explain_file_error(error, path, verb='written')}") from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))


@contextlib.contextmanager
def _raise_original_error() -> Iterator[None]:
    """Raise the error that interrupted torch.save, such as a full disk or Ctrl-C, instead of torch's RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


def read_checkpoint(path: Path, *, key: str = "model.checkpoint_path") -> dict[str, Any]:
    """Read a whole checkpoint into memory as data, without executing code.

    Reading it at once matters because the run that wrote it may replace or delete the file.

    Args:
        path: the file.
        key: the configuration key that names the file, for error messages.

    Raises:
        UserError: the file is missing, is not a checkpoint, or contains more than tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        list_architecture_overrides(checkpoint["config"])
        checkpoint["state_dict"], checkpoint["epoch"]
    except FileNotFoundError as error:
        others = sorted(other.name for other in path.parent.glob("*.ckpt") if other.exists())
        hint = f"; its folder has {' and '.join(others)}" if others else ""
        raise UserError(f"{key}: there is no file {path}{hint}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is not a checkpoint of this project: it is a folder; give a file in it") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a truncated file: torch seeks to a position before its start
            raise UserError(f"{path} is not a checkpoint of this project, or it is incomplete") from error
        raise UserError(f"{key}={explain_file_error(error, path, verb='read')}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this project, or it is incomplete") from error
    if checkpoint.get("format", 1) > CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} is of format {checkpoint['format']}, but this version of the project reads formats up to "
            f"{CHECKPOINT_FORMAT}: use the later version that wrote it"
        )
    return checkpoint


def add_to_checkpoint(path: Path, key: str, value: Any) -> None:
    """Add a value to a checkpoint that has been written. Readers find the file without or with it."""
    checkpoint = read_checkpoint(path)
    AtomicCheckpointIO().save_checkpoint({**checkpoint, key: value}, path)


def read_best_loss(path: Path) -> float:
    """Read the validation metric of a best checkpoint, as a loss: lower is better. NaN if no metric selected it."""
    saved = read_checkpoint(path)["callbacks"][BestAndLastCheckpoint.__qualname__]
    return math.nan if saved["best"] is None else float(saved["best_value"])


def read_initial_weights(config: DictConfig) -> dict[str, Any] | None:
    """Read the checkpoint that `model.weights` names; None if it names none.

    Only the network's weights are used, as the initial weights of a training.

    Raises:
        UserError: the checkpoint does not fit the configuration.
    """
    if config.model.weights is None:
        return None
    path = Path(config.model.weights)
    checkpoint = read_checkpoint(path, key="model.weights")
    check_architecture(checkpoint, to_plain_values(config), path)
    return checkpoint


def check_architecture(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint was written by the configured network.

    Args:
        checkpoint: the checkpoint.
        config: the composed configuration as plain values.
        path: the file of the checkpoint, for the error message.

    Raises:
        UserError: the networks differ. The message gives the overrides that select the network of the checkpoint.
    """
    saved, configured = list_architecture_overrides(checkpoint["config"]), list_architecture_overrides(config)
    missing = sorted(key for key in configured.keys() - saved.keys() if key.startswith("model."))
    if missing and saved["model/decoder"] == configured["model/decoder"]:
        raise UserError(
            f"{path} was written by an earlier version of this project, whose network lacks {', '.join(missing)}; use "
            "that version, or train again"
        )
    different = [key for key in {**saved, **configured} if saved.get(key) != configured.get(key)]
    if different:
        configured_text, saved_text = (
            " ".join(quote_override(key, overrides[key]) for key in different if key in overrides)
            for overrides in (configured, saved)
        )
        raise UserError(f"{path} was trained with another network than {configured_text}; give {saved_text}")


_NOT_ARCHITECTURE = ("sigma", "target", "read_out")
"""Options of the heatmaps that may differ from those a checkpoint was trained with."""


def list_architecture_overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """List the overrides that determine the shapes and the meaning of the weights.

    Args:
        config: the composed configuration as plain values.

    Returns:
        Key -> value.
    """
    model = config["model"]
    encoder = find_target("model/encoder", model["encoder"]["_target_"])
    depends_on_size = getattr(encoder, "depends_on_image_size", lambda options: False)(model["encoder"])
    size = {"data.image_size": config["data"]["image_size"]} if depends_on_size else {}
    left_out = getattr(encoder, "training_options", ())
    return {
        **size,
        **_list_choice_and_values(
            "model/encoder", {key: value for key, value in model["encoder"].items() if key not in left_out}
        ),
        **_list_choice_and_values("model/decoder", model["decoder"]),
        **_list_choice_and_values(
            "heatmap", {key: value for key, value in config["heatmap"].items() if key not in _NOT_ARCHITECTURE}
        ),
    }


def _list_choice_and_values(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    own = {f"{group.replace('/', '.')}.{key}": value for key, value in values.items() if not key.startswith("_")}
    return {group: find_choice(group, values["_target_"]), **own}


def load_weights(module: HandPose, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into a module, and its calibration. Without one, the module is not calibrated.

    Raises:
        UserError: the shapes of the weights do not match.
    """
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = join_lines(error)[:200]
        raise UserError(f"the weights in {path} do not fit the configured network: {reason}") from error
    kept = checkpoint.get(CALIBRATION_KEY)
    module.calibration = Calibration() if kept is None else Calibration.from_plain(kept)
