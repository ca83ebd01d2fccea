"""Train a configuration, predict its test split, and measure the results.

train.py, the trials of a sweep, and the retraining of its winner all use this module.
"""

import copy
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import distributed
from torch.utils.data import DataLoader

from handpose.budget import BudgetSettings, Deadline
from handpose.config import instantiate_key, quote_override, to_plain_values
from handpose.data.datamodule import HandDataModule
from handpose.data.sample import Annotations, HandBatch
from handpose.errors import UserError, add_file_name, join_lines
from handpose.evaluation.baselines import compute_mean_pose_errors
from handpose.evaluation.hand_pictures import write_hand_pictures
from handpose.evaluation.predict import (
    CalibrationModule,
    CalibrationSample,
    PredictionModule,
    SplitPredictions,
    calibrate,
    compute_errors,
    compute_official_pa_mpjpe_mm,
    compute_true_size_rr_mpjpe_mm,
)
from handpose.evaluation.submission import (
    EXPECTED_ERRORS_FILE,
    PREDICTIONS_FILE,
    write_course,
    write_expected_errors,
    write_official,
)
from handpose.files import write_json
from handpose.heatmaps import CameraAxes, ImageAxes
from handpose.metrics.validation import make_target_metric
from handpose.training.build import build_training
from handpose.training.calibration import Calibration
from handpose.training.callbacks import ConfiguredOptimizer
from handpose.training.checkpoints import (
    CALIBRATION_KEY,
    BestAndLastCheckpoint,
    add_to_checkpoint,
    check_architecture,
    load_weights,
    read_checkpoint,
    read_initial_weights,
)
from handpose.training.deadline import FitToDeadline
from handpose.training.interruption import interrupt_between_batches
from handpose.training.module import HandPose, make_parameter_groups
from handpose.training.results import RunFolders, RunResult, TrainingResult, check_folders, prepare_folders
from handpose.training.trainer import (
    ProcessGroup,
    apply_fast_dev_run,
    check_trainer,
    count_limited_batches,
    count_local_processes,
    explain_trainer_errors,
    make_prediction_trainer,
    make_training_trainer,
    suppress_library_output,
)


class PreparedRun(NamedTuple):
    """A network, its data, and the checkpoint with the network's weights, if any."""

    module: HandPose
    data: HandDataModule
    checkpoint: Path | None


def train_and_test(config: DictConfig, folders: RunFolders | None = None, *, quiet: bool = False) -> RunResult:
    """Train the configuration, then predict the test split with the best checkpoint. With test=true, only predict.

    With train_on_val no data is held out to select the best checkpoint, so that the last one is used. With
    trainer.fast_dev_run each stage runs a few batches only, and all files are saved in folders named fast_dev_run.

    Args:
        config: the composed configuration.
        folders: where to save files; None: new folders, which are made after all checks.
        quiet: print nothing.

    Raises:
        UserError: the configuration cannot be run on this machine or with this data.
    """
    config = apply_fast_dev_run(config)
    if folders is None:
        check_folders(config)
        _check_budget(config)
    checkpoint = _get_checkpoint_path(config)
    prepared = prepare_run(config, stage="test" if config.test else None, checkpoint=checkpoint, quiet=quiet)
    folders = folders or prepare_folders(config)
    if config.test:
        if checkpoint is not None and checkpoint.parent == folders.checkpoints:  # a run that ended before its test
            _calibrate_later(config, prepared, quiet=quiet)
        metrics = _test(config, prepared, folders, quiet=quiet)
        hand_size = describe_hand_size(prepared, prepared.data.splits.test)
        return RunResult(folders, None, checkpoint, metrics, hand_size, prepared.data.image_size)
    training = _fit(config, prepared, folders, callbacks=(), quiet=quiet)
    best = training.best_checkpoint
    if best is None:
        if config.checkpoints.enabled:
            raise UserError(_explain_missing_checkpoint(config, training))
        return RunResult(folders, training, None, {})
    load_weights(prepared.module, read_checkpoint(best), best)
    if training.is_held_out and not prepared.data.splits.val.is_flat:
        _calibrate(config, prepared._replace(checkpoint=best), quiet=quiet)
    metrics = _test(config, prepared._replace(checkpoint=best), folders, quiet=quiet)
    _synchronize_processes()
    hand_size = describe_hand_size(prepared, prepared.data.splits.test)
    return RunResult(folders, training, best, metrics, hand_size, prepared.data.image_size)


def _check_budget(config: DictConfig) -> None:
    budget: BudgetSettings = instantiate_key(config, "budget")
    budget.check_is_ahead()
    if budget.gpu_hours is not None:
        raise UserError(
            f"budget.gpu_hours={budget.gpu_hours:g} limits a sweep; for train.py, give budget.hours or budget.minutes"
        )


def _explain_missing_checkpoint(config: DictConfig, training: TrainingResult) -> str:
    if training.last_checkpoint is None:
        return (
            "training ended before the first checkpoint; give a larger trainer.max_steps or trainer.max_time, or leave "
            "them out"
        )
    by_value = f"no epoch gave a finite {config.checkpoints.metric}"
    reason = "the last weights are not finite" if config.train_on_val else by_value
    return f"{reason}; a smaller optimizer.lr may help"


def _synchronize_processes() -> None:
    """Wait until all processes get here, so that they exit together.

    If one process exits earlier than another, the gloo threads of the other abort it (observed).
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def fit(
    config: DictConfig,
    folders: RunFolders,
    *,
    callbacks: Sequence[pl.Callback] = (),
    quiet: bool = False,
    resume_from: Path | None = None,
    cache_data: bool = False,
    process_group: ProcessGroup | None = None,
) -> TrainingResult:
    """Train the configuration. `model.checkpoint_path` or `resume_from` resumes a training from a checkpoint.

    Args:
        config: the composed configuration.
        folders: where to save files.
        callbacks: further callbacks of the Trainer.
        quiet: print nothing.
        resume_from: the checkpoint to resume from. It takes precedence over `model.checkpoint_path`.
        cache_data: keep the training data in memory for later trainings in this process; see `build_training`.
        process_group: the processes that train together, this one included; None: Lightning starts them.

    Raises:
        UserError: the configuration does not fit the machine, the data, the model or the checkpoint.
    """
    checkpoint = resume_from or _get_checkpoint_path(config)
    prepared = prepare_run(config, stage="fit", checkpoint=checkpoint, quiet=quiet, cache_data=cache_data)
    return _fit(config, prepared, folders, callbacks=callbacks, quiet=quiet, process_group=process_group)


def test(config: DictConfig, folders: RunFolders, checkpoint: Path) -> dict[str, float]:
    """Predict the test split with a checkpoint. Write test_preds.json.gz, pred.zip and metrics.json.

    Returns:
        The metrics under test/, and those of the mean pose under baseline/. Empty if the test split has no joints.
    """
    return _test(config, prepare_run(config, stage="test", checkpoint=checkpoint), folders, quiet=False)


def prepare_run(
    config: DictConfig,
    *,
    stage: Literal["fit", "test"] | None,
    checkpoint: Path | None = None,
    quiet: bool = False,
    cache_data: bool = False,
) -> PreparedRun:
    """Build the network and the data of a run, load the weights, and check everything.

    Mistakes in a configuration are found here, before the training starts and before a folder is made.

    Args:
        config: the composed configuration.
        stage: the stage to prepare; None: both.
        checkpoint: the file with the weights of the network, if any.
        quiet: print nothing.
        cache_data: see `build_training`.

    Raises:
        UserError: the configuration does not fit the machine, the data, the model or the checkpoint.
    """
    make_target_metric(config.checkpoints.metric, config.checkpoints.mode, group="checkpoints")
    check_trainer(config)
    weights = _read_weights(config, stage, checkpoint) if checkpoint else None
    initial = read_initial_weights(config) if weights is None else None
    with suppress_library_output():
        pretrained = weights is None and initial is None
        module, data = build_training(config, pretrained=pretrained, quiet=quiet, cache_data=cache_data)
    instantiate_key(config, "test_time").check_axes(module.axes)
    if weights is not None and checkpoint is not None:
        if stage != "test":
            _check_parameter_groups(weights, module, checkpoint)
        load_weights(module, weights, checkpoint)
    if initial is not None:
        load_weights(module, initial, Path(config.model.weights))
        module.calibration = Calibration()  # that of another training
    if stage != "test":
        module.augment.check_files()
    data.setup(stage)
    data.check_shared_memory(num_processes=count_local_processes(config))
    _adapt_to_labels(config, module, data, stage)
    if weights is None and not data.training_annotations.is_flat:
        training_m = torch.from_numpy(_require_xyz_m(data.training_annotations.xyz_m)).float()
        module.axes.fit(training_m, is_trained=initial is not None)
    if stage != "test":
        _check_camera(module)
        _check_limits(config, data)
    if not quiet:
        _warn_of_ignored_limits(config)
    _check_image_size(config, module, data.test_dataloader() if stage == "test" else data.train_dataloader())
    return PreparedRun(module, data, checkpoint)


def _adapt_to_labels(
    config: DictConfig, module: HandPose, data: HandDataModule, stage: Literal["fit", "test"] | None
) -> None:
    """Choose the metrics that the labels allow, and check that the configuration does not need others.

    Raises:
        UserError: the axes or the metric need joints in 3-D, but the data set has 2-D keypoints.
    """
    name, metric = data.source.name, config.checkpoints.metric
    if isinstance(module.axes, CameraAxes) and any(
        split.rays is not None for split in (data.splits.train, data.splits.val, data.splits.test)
    ):
        raise UserError(
            f"data set {name} has hands of which only 2-D keypoints are known, but heatmap=camera_axes needs metres; "
            "give heatmap=image_axes"
        )
    if not data.splits.val.is_flat or stage == "test":
        return
    module.measure_only_in_image()
    measured = [str(key) for key in module.val_metrics.keys()]  # noqa: SIM118 (iterating does not give strings)
    if metric not in measured:
        raise UserError(
            f"checkpoints.metric={metric} needs joints in 3-D, but the validation split of data set {name} has 2-D "
            f"keypoints; give checkpoints.metric={' or '.join(measured)} (for a sweep, sweep.metric)"
        )


def _check_limits(config: DictConfig, data: HandDataModule) -> None:
    """Raise UserError if the Trainer's limits leave an epoch without batches."""
    count_limited_batches(config, "train", len(data.train_dataloader()))
    if not config.train_on_val:
        count_limited_batches(config, "val", len(data.val_dataloader()))


@rank_zero_only
def _warn_of_ignored_limits(config: DictConfig) -> None:
    for key in ("limit_test_batches", "limit_predict_batches"):
        limit = config.trainer.get(key)
        if limit is not None and not (isinstance(limit, float) and limit == 1.0):  # the integer 1 means one batch
            print(
                f"trainer.{key}={limit} is ignored: predictions cover the whole test split",
                file=sys.stderr,
                flush=True,
            )


def _check_camera(module: HandPose) -> None:
    """Raise UserError if the augmentation changes the camera, but the network is trained for one camera."""
    given = {f"augment.{name}": value for name, value in module.augment.camera_options.items()}
    if isinstance(module.axes, CameraAxes) and given:
        raise UserError(
            f"{', '.join(f'{key}={value:g}' for key, value in given.items())} changes the camera, but a network with "
            "heatmap=camera_axes is trained for one camera, so its labels would "
            f"be wrong; give {' '.join(f'{key}=0' for key in given)}, or heatmap=image_axes"
        )


def _read_weights(config: DictConfig, stage: Literal["fit", "test"] | None, path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    check_architecture(checkpoint, to_plain_values(config), path)
    epochs = checkpoint["epoch"] + 1
    if stage is None and epochs >= config.trainer.max_epochs:  # a trial may resume from a checkpoint of the last epoch
        raise UserError(
            f"{path} was trained for {epochs} epochs and trainer.max_epochs={config.trainer.max_epochs}; give a larger "
            "trainer.max_epochs to continue, or test=true to test it"
        )
    steps, max_steps = checkpoint.get("global_step", 0), config.trainer.get("max_steps", -1)
    if stage is None and 0 < max_steps <= steps:
        raise UserError(
            f"{path} was trained for {steps} steps and trainer.max_steps={max_steps}; give a larger "
            f"trainer.max_steps to continue, or test=true to test it"
        )
    return checkpoint


def _check_parameter_groups(checkpoint: dict[str, Any], module: HandPose, path: Path) -> None:
    """Raise UserError if the parameter groups of the checkpoint's optimizer differ from those of this network."""
    groups = [len(group["params"]) for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    if groups and groups != [len(group["params"]) for group in make_parameter_groups(module.net)]:
        raise UserError(
            f"{path} was written by another version, whose optimizer grouped the weights in {len(groups)}; give "
            f"model.weights={path} to start a training with its weights"
        )


@torch.no_grad()
def _check_image_size(config: DictConfig, module: HandPose, loader: DataLoader[HandBatch]) -> None:
    """Run a copy of the network on black images.

    Some encoders accept only one image size, and some sizes leave a 1 x 1 feature map.
    """
    size = loader.dataset.packed.image_size  # type: ignore[attr-defined]
    pictures = torch.zeros(min(2, config.data.batch_size), 3, size, size)
    try:
        with torch.random.fork_rng(devices=[]):
            copy.deepcopy(module.net).train()(pictures)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = join_lines(error)[:200]
        encoder = config.model.encoder
        named = f"model.encoder.name={encoder.name}" if "name" in encoder else f"the encoder {encoder._target_}"
        raise UserError(
            f"{named} with this decoder does not take {len(pictures)} images of "
            f"{size} px ({reason}); choose another data.image_size, data.batch_size or encoder"
        ) from error


def _fit(
    config: DictConfig,
    prepared: PreparedRun,
    folders: RunFolders,
    *,
    callbacks: Sequence[pl.Callback],
    quiet: bool,
    process_group: ProcessGroup | None = None,
) -> TrainingResult:
    started = time.monotonic()
    if prepared.checkpoint is not None:
        callbacks = [*callbacks, ConfiguredOptimizer()]
    deadline = Deadline(instantiate_key(config, "budget"))
    if deadline.is_limited:
        num_passes = instantiate_key(config, "test_time").num_passes
        num_test_batches = math.ceil(num_passes * len(prepared.data.splits.test) / config.data.batch_size)
        callbacks = [*callbacks, FitToDeadline(deadline, num_test_batches=num_test_batches)]
    with (
        suppress_library_output(),
        explain_trainer_errors(config),
        add_file_name(folders.logs),  # errors about checkpoints name their own file
    ):
        trainer = make_training_trainer(config, folders, callbacks=callbacks, quiet=quiet, process_group=process_group)
        try:
            with interrupt_between_batches(trainer):
                trainer.fit(prepared.module, datamodule=prepared.data, ckpt_path=prepared.checkpoint, weights_only=True)
        except (KeyboardInterrupt, SystemExit) as error:  # Lightning exits with status 1 after Ctrl-C
            raise KeyboardInterrupt(_explain_how_to_resume(config, trainer)) from error
    saved, splits = _find_checkpoint_callback(trainer), prepared.data.splits
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not config.train_on_val:
        metrics |= _compute_baseline(splits.train.xyz_m, splits.val.xyz_m)
    return TrainingResult(
        metrics=metrics,
        # With several processes, the paths of the first one, whose files exist.
        best_checkpoint=trainer.strategy.broadcast(saved.best) if saved else None,
        last_checkpoint=trainer.strategy.broadcast(saved.last) if saved else None,
        epochs=trainer.current_epoch,
        seconds=time.monotonic() - started,
        is_held_out=not config.train_on_val,
        image_size=prepared.data.image_size,
    )


def _find_checkpoint_callback(trainer: pl.Trainer) -> BestAndLastCheckpoint | None:
    return next(
        (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestAndLastCheckpoint)), None
    )


def _explain_how_to_resume(config: DictConfig, trainer: pl.Trainer) -> str:
    saved = _find_checkpoint_callback(trainer)
    if saved is None or saved.last is None:
        return "interrupted before a checkpoint was written; start again with the same command"
    weights_override = " model.weights=null" if config.model.weights is not None else ""
    checkpoint = shlex.quote(quote_override("model.checkpoint_path", str(saved.last)))
    return f"interrupted; to resume, give the same command and {checkpoint}{weights_override}"


def _calibrate_later(config: DictConfig, prepared: PreparedRun, *, quiet: bool) -> None:
    """Calibrate a network whose training has ended without it, if a validation split was held out."""
    if config.train_on_val or prepared.module.calibration != Calibration():
        return
    prepared.data.setup("fit")
    if not prepared.data.splits.val.is_flat:
        _calibrate(config, prepared, quiet=quiet)


def _calibrate(config: DictConfig, prepared: PreparedRun, *, quiet: bool) -> None:
    """Calibrate the expected errors of a network on the validation split, also in its checkpoint."""
    assert prepared.checkpoint is not None
    predictor = CalibrationModule(prepared.module)
    sample = CalibrationSample(*_predict(config, prepared, predictor, prepared.data.val_dataloader(), quiet=quiet))
    prepared.module.calibration = calibrate(sample)
    rank_zero_only(add_to_checkpoint)(prepared.checkpoint, CALIBRATION_KEY, prepared.module.calibration.to_plain())


def _test(config: DictConfig, prepared: PreparedRun, folders: RunFolders, *, quiet: bool) -> dict[str, float]:
    predicted = predict_loader(config, prepared, prepared.data.test_dataloader(), quiet=quiet)
    metrics = _compute_test_metrics(prepared, predicted.xyz_m)
    views = {key: value for key, value in to_plain_values(config)["test_time"].items() if key != "_target_"}
    record = {
        "checkpoint": str(prepared.checkpoint),
        "test_time": views,
        "hand_size": describe_hand_size(prepared, prepared.data.splits.test),
        "metrics": metrics,
    }
    _write_predictions(folders.predictions, prepared.data, predicted, record)
    return metrics


def write_test_results(
    config: DictConfig, checkpoint: Path, folder: Path, predicted: SplitPredictions, about: Mapping[str, Any]
) -> None:
    """Write predictions of the test split that do not come from one network, with their metrics.

    Args:
        config: the configuration of the networks.
        checkpoint: a checkpoint of one of them, for the data and the size of its hands.
        folder: where test_preds.json.gz, pred.zip and metrics.json are written.
        predicted: the predictions.
        about: what else metrics.json contains.
    """
    prepared = prepare_run(config, stage="test", checkpoint=checkpoint, quiet=True)
    record = {
        **about,
        "hand_size": describe_hand_size(prepared, prepared.data.splits.test),
        "metrics": _compute_test_metrics(prepared, predicted.xyz_m),
    }
    _write_predictions(folder, prepared.data, predicted, record)


@rank_zero_only
def _write_predictions(folder: Path, data: HandDataModule, predicted: SplitPredictions, record: dict[str, Any]) -> None:
    if not data.splits.test.is_flat:  # without a camera, predictions in metres would have no meaning
        write_course(folder / PREDICTIONS_FILE, predicted.xyz_m)
        write_official(folder / "pred.zip", predicted.xyz_m)
        write_expected_errors(folder / EXPECTED_ERRORS_FILE, predicted.error_m)
    write_hand_pictures(folder, data.test_dataloader().dataset, predicted)  # type: ignore[arg-type]
    write_json(folder / "metrics.json", record, indent=2)


def predict_loader(
    config: DictConfig, prepared: PreparedRun, loader: DataLoader[HandBatch], *, quiet: bool
) -> SplitPredictions:
    """Predict all images of a loader.

    Args:
        config: the composed configuration.
        prepared: the network.
        loader: batches of a split.
        quiet: print nothing.
    """
    predictor = PredictionModule(prepared.module, views=instantiate_key(config, "test_time"))
    return SplitPredictions(*_predict(config, prepared, predictor, loader, quiet=quiet))


def _predict(
    config: DictConfig,
    prepared: PreparedRun,
    predictor: pl.LightningModule,
    loader: DataLoader[HandBatch],
    *,
    quiet: bool,
) -> list[np.ndarray]:
    """Run a predictor, whose first value is the positions of the images in the split, on all images of a loader.

    Returns:
        Its other values, in the order of the split.
    """
    with suppress_library_output():
        try:
            trainer = make_prediction_trainer(config, quiet=quiet)
            with interrupt_between_batches(trainer):
                batches = trainer.predict(predictor, loader)
        except (KeyboardInterrupt, SystemExit) as error:
            checkpoint = shlex.quote(quote_override("model.checkpoint_path", str(prepared.checkpoint)))
            how = f"give the same command with test=true {checkpoint}"
            raise KeyboardInterrupt(f"interrupted; to predict the test split, {how}") from error
    assert batches is not None, "Lightning returns predictions unless it is told not to"
    found = [torch.cat(parts).cpu() for parts in zip(*batches, strict=True)]
    if distributed.is_available() and distributed.is_initialized():
        shares: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, found)
        found = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    position, *values = found
    order = position.argsort()
    return [value[order].double().numpy() for value in values]


def _compute_test_metrics(prepared: PreparedRun, predicted_m: np.ndarray) -> dict[str, float]:
    data, axes = prepared.data, prepared.module.axes
    tested: Any = data.test_dataloader().dataset
    truth, camera = tested.annotations.xyz_m, tested.intrinsics.numpy()
    if tested.annotations.is_flat:
        errors = compute_errors(predicted_m, tested.annotations.rays, camera, only_in_image=True)
        return {f"test/{name}": value for name, value in errors.items()}
    if truth is None:
        return {}
    measured = compute_errors(predicted_m, truth, camera)
    measured["pa_mpjpe_official_mm"] = compute_official_pa_mpjpe_mm(predicted_m, truth)
    if isinstance(axes, ImageAxes) and not data.splits.test.is_scale_given:
        measured["rr_mpjpe_true_size_mm"] = compute_true_size_rr_mpjpe_mm(predicted_m, truth, axes.scale_m.item())
    baseline = _compute_baseline(data.training_annotations.xyz_m, truth)
    return {f"test/{name}": value for name, value in measured.items()} | baseline


def describe_hand_size(prepared: PreparedRun, split: Annotations) -> str:
    """Describe in words where the size of the predicted hands of a split comes from."""
    if isinstance(prepared.module.axes, CameraAxes):
        return "as predicted, in millimetres of the camera frame"
    if split.is_scale_given and split.scale_m is not None:
        return "given: the length of the reference bone of each hand, from the data set's scale file"
    if split.is_flat:
        return "not predicted: the split has 2-D keypoints only"
    length_mm = 1000.0 * prepared.module.axes.scale_m.item()
    return f"assumed: the mean length of the reference bone in training, {length_mm:.1f} mm (there is no scale file)"


def _compute_baseline(train_xyz_m: np.ndarray | None, xyz_m: np.ndarray | None) -> dict[str, float]:
    if train_xyz_m is None or xyz_m is None:
        return {}
    return {f"baseline/{name}": value for name, value in compute_mean_pose_errors(train_xyz_m, xyz_m).items()}


def _require_xyz_m(xyz_m: np.ndarray | None) -> np.ndarray:
    assert xyz_m is not None, "readers give joints for every split but test"
    return xyz_m


def _get_checkpoint_path(config: DictConfig) -> Path | None:
    path = config.model.checkpoint_path
    if path is not None and config.model.weights is not None:
        raise UserError(
            f"model.weights={config.model.weights} starts a training and model.checkpoint_path={path} resumes "
            "one; give only one of them (model.weights=null to resume)"
        )
    if path is None and (config.test or config.resume):
        raise UserError("resume=true and test=true need a checkpoint: give model.checkpoint_path=FILE")
    return Path(path) if path else None
