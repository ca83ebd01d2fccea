"""Checkpoints: plain data that carries its configuration, written whole, and read while another run goes on writing."""

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
from handpose.errors import UserError, explain_file_error
from handpose.files import write_atomically
from handpose.metrics.target import Mode, TargetMetric

CHECKPOINT_FORMAT = 2
"""Version of a checkpoint's keys, as its `format`; checkpoints of format 1 have none."""


class ConfigInCheckpoint(pl.Callback):
    """Puts the composed configuration, as plain values, into every checkpoint under `config`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["format"] = CHECKPOINT_FORMAT


class BestAndLastCheckpoint(Checkpoint):
    """Keeps the best epoch by a validation metric, with its value in the file name, and every last one as last.ckpt.

    metric: None where no data is held out: then the last checkpoint counts as the best, unless its weights are not
    finite. mode: `min` or `max`, the better direction of the metric. every_n_epochs: between checkpoints. Lightning's
    ModelCheckpoint (2.6.6) writes last.ckpt only after an epoch that is a best one, and forgets the best checkpoint of
    the run it resumes; here that one is taken along, if the same metric chose it.
    """

    def __init__(self, folder: Path, *, metric: str | None, mode: Mode, every_n_epochs: int) -> None:
        self.folder = folder
        self.metric = None if metric is None else TargetMetric(metric, mode)
        self.every_n_epochs = every_n_epochs
        self.best: Path | None = None
        self.best_value = math.inf  # as a loss
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
        """Also after the last step of a training that is ended early, by max_steps or max_time."""
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0 or trainer.should_stop

    def _save_best(self, trainer: pl.Trainer, epochs: int, value: float) -> None:
        before = self.best
        assert self.metric is not None
        # Set before it is saved, since they are part of what is saved.
        self.best_value = self.metric.to_loss(value)
        self.best = self.folder / f"best-epoch{epochs:03d}{self._metric_in_name}{value:.3f}.ckpt"
        trainer.save_checkpoint(self.best)
        if before is not None and before != self.best and trainer.is_global_zero:
            before.unlink(missing_ok=True)

    @property
    def _metric_in_name(self) -> str:
        """The metric in the name of a best checkpoint."""
        assert self.metric is not None
        return f"-{self.metric.name.rpartition('/')[2]}"

    def state_dict(self) -> dict[str, Any]:
        is_by_value = self.best is not None and self.metric is not None
        return {"best": str(self.best) if is_by_value else None, "best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best of the run before along, as a copy, because that run may still be going on."""
        if state_dict["best"] is None:
            return
        before = Path(state_dict["best"])
        if self.metric is not None and self._metric_in_name not in before.name:  # values of two metrics do not compare
            return
        copy = self.folder / before.name
        try:
            if not copy.is_file():  # it is there where a run goes on in its own folder, maybe on another machine
                _copy_file(before, copy)
        except OSError:  # it has been replaced by a better one, or moved: the best of this run then
            return
        self.best, self.best_value = copy, state_dict["best_value"]


@rank_zero_only
def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that a reader sees the one before or the new one.

    Lightning writes to the system's temporary folder instead, and from there to another disk the move is a copy.
    is_durable: only move it when it is on the disk, so that what is there is whole after a loss of power too.
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
    """Raise what interrupted torch.save, a full disk or Ctrl-C, in place of the RuntimeError that torch raises then."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


def read_checkpoint(path: Path, *, key: str = "model.checkpoint_path") -> dict[str, Any]:
    """Read a checkpoint as data, never as code, at once and as a whole: the run that wrote it may replace or delete it.

    key: of the configuration, that names it. Raises UserError when the file is missing, is no checkpoint, or holds more
    than tensors and plain values.
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
        if error.errno == errno.EINVAL:  # a file that was cut off: torch seeks to before its beginning
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


def read_initial_weights(config: DictConfig) -> dict[str, Any] | None:
    """The checkpoint that `model.weights` names, None where it names none; raises UserError where it does not fit.

    Of it the network's weights are taken and nothing else: a training begins with them.
    """
    if config.model.weights is None:
        return None
    path = Path(config.model.weights)
    checkpoint = read_checkpoint(path, key="model.weights")
    check_architecture(checkpoint, to_plain_values(config), path)
    return checkpoint


def check_architecture(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError, with the overrides that mend it, where a checkpoint was written by another network.

    config: composed, as plain values.
    """
    theirs, ours = list_architecture_overrides(checkpoint["config"]), list_architecture_overrides(config)
    lacking = sorted(key for key in ours.keys() - theirs.keys() if key.startswith("model."))
    if lacking and theirs["model/decoder"] == ours["model/decoder"]:
        raise UserError(
            f"{path} was written by an earlier version of this project, whose network lacks {', '.join(lacking)}; use "
            "that version, or train again"
        )
    wrong = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if wrong:
        said, give = (" ".join(quote_override(key, of[key]) for key in wrong if key in of) for of in (ours, theirs))
        raise UserError(f"{path} was trained with another network than {said}; give {give}")


_NOT_ARCHITECTURE = ("sigma", "target", "read_out")
"""Of the heatmaps, what may be another one for weights that are there."""


def list_architecture_overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration the overrides that the shapes of the weights, and their meaning, depend on: key -> value."""
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


def load_weights(module: pl.LightningModule, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Give a module the weights of a checkpoint; raises UserError when they are not of its shapes."""
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {path} do not fit the configured network: {reason}") from error
