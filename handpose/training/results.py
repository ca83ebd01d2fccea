"""The folders of a run, and the results that describe it."""

import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from handpose.config import save_config
from handpose.errors import UserError, explain_file_error
from handpose.files import check_writable
from handpose.metrics.official import format_official_pa_mpjpe
from handpose.skeleton import JOINT_NAMES, ROOT

_OFFICIAL = "test/pa_mpjpe_official_mm"


@dataclass(frozen=True)
class RunFolders:
    """The folders in which a run saves its log, checkpoints and predictions."""

    logs: Path
    checkpoints: Path
    predictions: Path

    def subfolders(self, name: str) -> "RunFolders":
        """Return the subfolder of this name in each folder. With an empty name, return the folders themselves."""
        return RunFolders(self.logs / name, self.checkpoints / name, self.predictions / name)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        metrics: the metrics of the last validation. Those of the mean pose on the validation split are under baseline/.
        best_checkpoint: None if there is none.
        last_checkpoint: None if there is none.
        epochs: number of epochs trained.
        seconds: duration of the training.
        is_held_out: the validation split was not used for training.
    """

    metrics: dict[str, float]
    best_checkpoint: Path | None
    last_checkpoint: Path | None
    epochs: int
    seconds: float
    is_held_out: bool
    image_size: int

    def format_validation(self) -> str:
        """Format the last validation as one line."""
        if not self.is_held_out:
            return "validation  none: train_on_val=true trains on the validation split and keeps the last checkpoint"
        return _format_metrics("validation", "val", self.metrics, image_size=self.image_size)


@dataclass(frozen=True)
class RunResult:
    """The result of a run: a training, if there was one, and the test of a checkpoint.

    Attributes:
        folders: the folders of the run.
        training: None if only the test was run.
        checkpoint: the checkpoint that was tested, if any.
        test_metrics: empty if the test split has no joints.
        hand_size: where the size of the predicted test hands comes from, in words.
    """

    folders: RunFolders
    training: TrainingResult | None
    checkpoint: Path | None
    test_metrics: dict[str, float]
    hand_size: str = ""
    image_size: int | None = None

    def format_summary(self) -> str:
        """Format the results and the folders as text."""
        lines = [self.training.format_validation()] if self.training else []
        if self.checkpoint is None:
            lines.append("test        no predictions, because checkpoints.enabled=false left no checkpoint to test")
        else:
            is_given = self.hand_size.startswith("given")
            lines.append(
                _format_metrics(
                    "test", "test", self.test_metrics, image_size=self.image_size, uses_given_hand_size=is_given
                )
            )
            if _OFFICIAL in self.test_metrics:
                lines.append(
                    f"{'':<12}to compare with papers: {format_official_pa_mpjpe(self.test_metrics[_OFFICIAL])}"
                )
            if self.hand_size and not is_given:
                lines.append(f"hand size   {self.hand_size}{self._format_true_size()}")
            lines.append(f"checkpoint  {self.checkpoint}")
            lines.append(f"predictions {self.folders.predictions}")
        return "\n".join([*lines, f"log         {self.folders.logs}"])

    def _format_true_size(self) -> str:
        name = "test/rr_mpjpe_true_size_mm"
        return (
            f"; with the true size, the root-relative error is {self.test_metrics[name]:.2f} mm"
            if name in self.test_metrics
            else ""
        )


def _format_metrics(
    title: str,
    stage: str,
    metrics: dict[str, float],
    *,
    image_size: int | None,
    uses_given_hand_size: bool = False,
) -> str:
    if f"{stage}/pa_mpjpe_mm" not in metrics and f"{stage}/keypoint_error_px" in metrics:
        error_px = metrics[f"{stage}/keypoint_error_px"]
        return (
            f"{title:<11} {error_px:.2f} px in images of {image_size} px (2-D keypoints only){_others(stage, metrics)}"
        )
    if f"{stage}/pa_mpjpe_mm" not in metrics:
        reason = (
            "predictions without errors, because this split has no joints"
            if stage == "test"
            else "none: the training ended before its first validation"
        )
        return f"{title:<11} {reason}"
    pa, mean_pose = metrics[f"{stage}/pa_mpjpe_mm"], metrics.get("baseline/pa_mpjpe_mm")
    baseline = "" if mean_pose is None else f" (mean pose {mean_pose:.2f}, ratio {pa / mean_pose:.2f})"
    which = "with the given hand size " if uses_given_hand_size else ""
    return (
        f"{title:<11} PA-MPJPE {pa:.2f} mm without reflection{baseline}, "
        f"root-relative at {JOINT_NAMES[ROOT]} {which}{metrics[f'{stage}/rr_mpjpe_mm']:.2f} mm, "
        f"{metrics[f'{stage}/keypoint_error_px']:.2f} px in images of {image_size} px, "
        f"AUC {metrics[f'{stage}/pck_auc']:.3f}{_others(stage, metrics)}"
    )


def _others(stage: str, metrics: dict[str, float]) -> str:
    """Format the metrics that a user has added."""
    own = (f"{stage}/{name}" for name in ("pa_mpjpe_mm", "rr_mpjpe_mm", "rr_mpjpe_true_size_mm", "pck_auc"))
    known = {*own, f"{stage}/keypoint_error_px", _OFFICIAL}
    added = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{stage}/")}
    return "".join(f", {name} {value:.4g}" for name, value in added.items() if f"{stage}/{name}" not in known)


def check_folders(config: DictConfig) -> None:
    """Raise UserError if the folders of a run cannot be made or written to. Nothing is made yet."""
    folders = _get_folders(config)
    for folder in (folders.logs, folders.checkpoints, folders.predictions):
        try:
            check_writable(folder)
        except OSError as error:
            raise _make_write_error(folder, error) from error


def _make_write_error(folder: Path, error: OSError) -> UserError:
    reason = explain_file_error(error, remedy="set DIR_SCRATCH to a folder that can be written")
    return UserError(f"results cannot be written to {folder} because {reason}")


def prepare_folders(config: DictConfig) -> RunFolders:
    """Make the folders of a run, named after date and time, and save the configuration in them.

    A run that starts in the same second as another one gets folders of its own. With trainer.fast_dev_run the folders
    of the run are subfolders named fast_dev_run, because the files are not those of a complete run.

    Raises:
        UserError: the folders cannot be made.
    """
    inner = "fast_dev_run" if config.trainer.get("fast_dev_run") else ""
    folders = _get_folders(config)
    if getattr(rank_zero_only, "rank", 0) != 0:  # all processes use the folders that the first one makes
        return folders.subfolders(inner)
    while not _try_to_make_folders(folders):
        if folders.logs.name != config.paths.time:
            raise UserError(f"paths.logs={folders.logs} already exists; choose another folder")
        time.sleep(0.2)
        _renew_time_stamp(config)
        folders = _get_folders(config)
    save_config(config, folders.logs / "config.yaml")
    folders = folders.subfolders(inner)
    for folder in vars(folders).values():
        folder.mkdir(exist_ok=True)
    return folders


def _get_folders(config: DictConfig) -> RunFolders:
    paths = config.paths
    return RunFolders(Path(paths.logs), Path(paths.checkpoints), Path(paths.predictions))


def _try_to_make_folders(folders: RunFolders) -> bool:
    """Make the folders. Return False if the log folder already exists."""
    try:
        folders.logs.mkdir(parents=True)
        folders.checkpoints.mkdir(parents=True, exist_ok=True)
        folders.predictions.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise _make_write_error(folders.logs, error) from error
    return True


def _renew_time_stamp(config: DictConfig) -> None:
    before, config.paths.time = config.paths.time, time.strftime("%H-%M-%S")
    for name in ("logs", "checkpoints", "predictions"):
        path = Path(config.paths[name])
        if path.name == before:
            config.paths[name] = str(path.with_name(config.paths.time))
