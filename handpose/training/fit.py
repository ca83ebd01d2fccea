"""From a composed configuration to a trained network, its test predictions, and the figures that describe both.

The one road for train.py, for a sweep's trials and for its retraining. Below this file there are typed arguments only.
"""

import json
import logging
import pickle
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment

from handpose.config import plain, save
from handpose.data.datamodule import HandDataModule
from handpose.errors import UserError
from handpose.evaluation.baselines import mean_pose_errors
from handpose.evaluation.predict import Predictor, measure
from handpose.evaluation.submission import write_course, write_official
from handpose.training.callbacks import ConfigInCheckpoint, Pictures, best_checkpoint
from handpose.training.module import HandPose


@dataclass(frozen=True)
class RunFolders:
    """Where a run leaves its log, its checkpoints and its predictions."""

    logs: Path
    checkpoints: Path
    predictions: Path


@dataclass(frozen=True)
class TrainingResult:
    """What a fit ended with.

    metrics: of the last validation, and the mean pose's on the validation split under baseline/. Checkpoints are None
    where none were asked for.
    """

    metrics: dict[str, float]
    best_checkpoint: Path | None
    last_checkpoint: Path | None
    epochs: int
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """A training, or none, and the test of a checkpoint; `test_metrics` is empty where the test split has no joints."""

    folders: RunFolders
    training: TrainingResult | None
    checkpoint: Path | None
    test_metrics: dict[str, float]

    def summary(self) -> str:
        """What came out, and where it lies, for a person."""
        lines = [_figures("validation", "val", self.training.metrics)] if self.training else []
        if self.test_metrics:
            lines.append(_figures("test", "test", self.test_metrics))
        elif self.checkpoint:
            lines.append("test        no joints in this split: predictions only")
        lines += [
            f"checkpoint  {self.checkpoint}",
            f"predictions {self.folders.predictions}",
            f"log         {self.folders.logs}",
        ]
        return "\n".join(lines)


def _figures(title: str, stage: str, metrics: dict[str, float]) -> str:
    pa, mean_pose = metrics[f"{stage}/pa_mpjpe_mm"], metrics["baseline/pa_mpjpe_mm"]
    return (
        f"{title:<11} PA-MPJPE {pa:.2f} mm (mean pose {mean_pose:.2f}, ratio {pa / mean_pose:.2f}), root-relative "
        f"{metrics[f'{stage}/rr_mpjpe_mm']:.2f} mm, {metrics[f'{stage}/keypoint_error_px']:.2f} px, "
        f"AUC {metrics[f'{stage}/pck_auc']:.3f}"
    )


def fit(
    config: DictConfig,
    folders: RunFolders,
    *,
    callbacks: Sequence[pl.Callback] = (),
    quiet: bool = False,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train the configuration; `model.checkpoint_path` or resume_from goes on from a checkpoint.

    quiet: nothing on the terminal. Raises UserError where data, model or checkpoint do not fit.
    """
    started = time.monotonic()
    checkpoint = resume_from or _checkpoint_path(config)
    module, data = build(config, checkpoint=checkpoint, quiet=quiet)
    data.prepare_data()
    data.setup("fit")
    train_xyz_m = _xyz_m(data.splits.train.xyz_m)
    if checkpoint is None:
        module.axes.fit(torch.from_numpy(train_xyz_m).float())
    with _calm():
        trainer = _trainer(config, folders, callbacks=callbacks, quiet=quiet)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:  # Lightning leaves with status 1 after Ctrl-C
            raise KeyboardInterrupt from error
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    saver = trainer.checkpoint_callback if config.checkpoints.enabled else None
    return TrainingResult(
        metrics=metrics | _baseline(train_xyz_m, data.splits.val.xyz_m),
        best_checkpoint=_path(getattr(saver, "best_model_path", "")),
        last_checkpoint=_path(getattr(saver, "last_model_path", "")),
        epochs=trainer.current_epoch,
        seconds=time.monotonic() - started,
    )


def test(config: DictConfig, folders: RunFolders, checkpoint: Path) -> dict[str, float]:
    """Predict the test split with a checkpoint, write test_preds.json.gz and pred.zip, and measure where there is truth.

    Returns the metrics under test/ and the mean pose's under baseline/; empty where the test split has no joints.
    """
    module, data = build(config, checkpoint=checkpoint)
    load_weights(module, config, checkpoint)
    data.prepare_data()
    data.setup("test")
    predicted_m = predict(module, data, config)
    write_course(folders.predictions / "test_preds.json.gz", predicted_m)
    write_official(folders.predictions / "pred.zip", predicted_m)
    metrics = _test_metrics(data, predicted_m)
    record = {"checkpoint": str(checkpoint), "test_time": config.test_time, "metrics": metrics}
    (folders.predictions / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    return metrics


def predict(module: HandPose, data: HandDataModule, config: DictConfig) -> np.ndarray:
    """Joints of the whole test split in metres in the camera frame, (N, K, 3)."""
    predictor = Predictor(module, test_time=config.test_time, num_rotations=config.num_rotations)
    with _calm():
        trainer = hydra.utils.instantiate(
            config.trainer,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            plugins=[LightningEnvironment()],
        )
        batches = trainer.predict(predictor, dataloaders=data.test_dataloader())
    return torch.cat(batches).double().cpu().numpy()


def build(
    config: DictConfig, *, checkpoint: Path | None = None, quiet: bool = False
) -> tuple[HandPose, HandDataModule]:
    """Make the module and the data module of a configuration, seeded; no data is read yet.

    With a checkpoint no pretrained weights are fetched, since the checkpoint brings its own.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if checkpoint is not None:
        read_checkpoint(config, checkpoint)
    module = HandPose(
        net=_net(config, pretrained=checkpoint is None),
        axes=hydra.utils.instantiate(config.heatmap),
        loss=hydra.utils.instantiate(config.loss),
        augment=hydra.utils.instantiate(config.augment),
        optimizer=hydra.utils.instantiate(config.optimizer),
        lr_schedule=hydra.utils.instantiate(config.lr_schedule),
        seed=config.seed,
    )
    data = HandDataModule(
        hydra.utils.instantiate(config.data.source),
        image_size=config.data.image_size,
        batch_size=config.data.batch_size,
        pack_folder=config.paths.packed,
        seed=config.seed,
        num_workers=config.data.num_workers,
        progress=not quiet,
    )
    return module, data


def read_checkpoint(config: DictConfig, path: Path) -> dict[str, Any]:
    """Read a checkpoint as data, never as code, and hold its architecture against the configuration's.

    Raises UserError when the file is missing, is no checkpoint, holds more than tensors and plain values, or was
    written by another network.
    """
    if not path.is_file():
        raise UserError(f"model.checkpoint_path: there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        theirs = checkpoint["config"]
        checkpoint["state_dict"]
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this project, or not a whole one") from error
    ours = plain(config)
    for key, mine in _architecture(ours).items():
        if (written := _architecture(theirs).get(key)) != mine:
            raise UserError(
                f"{path} was trained with {key}={written}, but the configuration says {mine}; give {key}={written}"
            )
    return checkpoint


def load_weights(module: HandPose, config: DictConfig, path: Path) -> None:
    """Give a module the weights of a checkpoint; raises UserError as `read_checkpoint` does."""
    try:
        module.load_state_dict(read_checkpoint(config, path)["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {path} do not fit the configured network: {reason}") from error


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What the shapes of the weights, and their meaning, depend on."""
    encoder, decoder = config["model"]["encoder"], config["model"]["decoder"]
    decoder = {f"model.decoder.{key}": value for key, value in decoder.items()}
    heatmap = {f"heatmap.{key}": value for key, value in config["heatmap"].items() if key != "sigma"}
    return {"model.encoder.name": encoder["name"]} | decoder | heatmap


def _net(config: DictConfig, *, pretrained: bool) -> torch.nn.Module:
    model = plain(config.model)
    del model["checkpoint_path"]
    if not pretrained:
        model["encoder"] |= {"pretrained": False, "weights": None}
    net: torch.nn.Module = hydra.utils.instantiate(model)
    return net.to(memory_format=torch.channels_last)  # measured on two cores: 1.4 times the images a second


def _checkpoint_path(config: DictConfig) -> Path | None:
    if config.model.checkpoint_path is None and (config.test or config.resume):
        raise UserError("a checkpoint to go on from, or to test, is asked for: give model.checkpoint_path=FILE")
    return _path(config.model.checkpoint_path or "")


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _trainer(config: DictConfig, folders: RunFolders, *, callbacks: Sequence[pl.Callback], quiet: bool) -> pl.Trainer:
    every = [*callbacks, ConfigInCheckpoint(plain(config))]
    if config.checkpoints.enabled:
        saving = config.checkpoints
        every.append(
            best_checkpoint(
                folders.checkpoints, metric=saving.metric, mode=saving.mode, every_n_epochs=saving.every_n_epochs
            )
        )
    logger = _logger(config, folders)
    if logger and config.pictures.every_n_steps > 0:
        every.append(Pictures(every_n_steps=config.pictures.every_n_steps, num_hands=config.pictures.num_hands))
    silence = {"enable_progress_bar": False} if quiet else {}
    return hydra.utils.instantiate(
        config.trainer,
        callbacks=every,
        logger=logger,
        enable_checkpointing=config.checkpoints.enabled,
        default_root_dir=str(folders.logs),
        use_distributed_sampler=False,  # the loader's own sampler shares the batches out
        plugins=[LightningEnvironment()],  # Lightning's Slurm detection goes wrong inside a trial (lightning #6389)
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **silence,
    )


_NOT_FOR_USERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6.6 on torch 2.15
    r".*does not have many workers",  # a batch is one gather
    r".*is smaller than the logging interval",
    r".*exists and is not empty",  # a retraining's checkpoints lie beside its log
)


@contextmanager
def _calm() -> Iterator[None]:
    """Keep back what libraries tell that a user can do nothing with: hints, hardware that is not there, deprecations."""
    log = logging.getLogger("pytorch_lightning")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _NOT_FOR_USERS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        log.setLevel(level)


def _logger(config: DictConfig, folders: RunFolders) -> Logger | bool:
    if config.logger.name == "none":
        return False
    if config.logger.name == "tensorboard":
        return TensorBoardLogger(save_dir=str(folders.logs), name="", version="tensorboard")
    return _wandb_logger(config, folders)


def _wandb_logger(config: DictConfig, folders: RunFolders) -> Logger:
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError("logger=wandb needs the package wandb, which is not installed: pip install wandb") from error
    from pytorch_lightning.loggers import WandbLogger

    folders.logs.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        project=config.logger.project, name=config.logger.run_name, save_dir=str(folders.logs), config=plain(config)
    )


def _xyz_m(xyz_m: np.ndarray | None) -> np.ndarray:
    assert xyz_m is not None, "readers give joints for every split but test"
    return xyz_m


def _baseline(train_xyz_m: np.ndarray, xyz_m: np.ndarray | None) -> dict[str, float]:
    if xyz_m is None:
        return {}
    return {f"baseline/{name}": value for name, value in mean_pose_errors(train_xyz_m, xyz_m).items()}


def _test_metrics(data: HandDataModule, predicted_m: np.ndarray) -> dict[str, float]:
    truth = data.splits.test.xyz_m
    if truth is None:
        return {}
    measured = measure(predicted_m, truth, data.test_dataloader().dataset.intrinsics.numpy())
    return {f"test/{name}": value for name, value in measured.items()} | _baseline(
        _xyz_m(data.splits.train.xyz_m), truth
    )


def prepare_folders(config: DictConfig) -> RunFolders:
    """Make the dated folders of a run, its own even when two start in one second, and save its configuration there."""
    while True:
        folders = RunFolders(Path(config.paths.logs), Path(config.paths.checkpoints), Path(config.paths.predictions))
        try:
            folders.logs.mkdir(parents=True)
            break
        except FileExistsError:
            time.sleep(0.2)
            _stamp_again(config)
        except OSError as error:
            raise UserError(
                f"the folder {folders.logs} cannot be made ({error.strerror}); set DIR_SCRATCH to one that can"
            ) from error
    folders.checkpoints.mkdir(parents=True, exist_ok=True)
    folders.predictions.mkdir(parents=True, exist_ok=True)
    save(config, folders.logs / "config.yaml")
    return folders


def _stamp_again(config: DictConfig) -> None:
    stamp = time.strftime("%H-%M-%S")
    for name in ("logs", "checkpoints", "predictions"):
        config.paths[name] = str(Path(config.paths[name]).with_name(stamp))


def train_and_test(config: DictConfig, folders: RunFolders, *, quiet: bool = False) -> RunResult:
    """Fit the configuration and predict the test split with its best checkpoint; with test=true only the latter."""
    checkpoint = _checkpoint_path(config)
    if config.test and checkpoint is not None:
        return RunResult(folders, None, checkpoint, test(config, folders, checkpoint))
    training = fit(config, folders, quiet=quiet)
    best = training.best_checkpoint
    return RunResult(folders, training, best, test(config, folders, best) if best else {})
