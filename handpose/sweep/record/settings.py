"""Schema of the configuration groups `sweep` and `ray`. Their values are in configs/."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.metrics.target import Mode, TargetMetric
from handpose.urls import join_url

LOCK = ".lock"
"""Name of the lock file in the folder of a sweep. The process that runs the sweep holds the lock."""

LatencyOf = Literal["fp32", "fp16", "int8"] | None

_Count = Annotated[int, Field(ge=1)]
_Amount = Annotated[float, Field(gt=0)]
# handpose.schema checks these bounds when a configuration is composed.


@dataclass(frozen=True, kw_only=True)
class ConfirmSettings:
    """The configuration group `sweep.confirm`: train the finalists again before a winner is chosen.

    Attributes:
        top_k: number of best configurations to train again; 0: none.
        seeds: number of new seeds with which each of them is trained; 0: no confirmation.
    """

    top_k: Annotated[int, Field(ge=0)]
    seeds: Annotated[int, Field(ge=0)]

    @property
    def is_enabled(self) -> bool:
        """Whether finalists are trained again."""
        return self.top_k > 0 and self.seeds > 0


@dataclass(frozen=True, kw_only=True)
class RetrainSettings:
    """The configuration group `retrain`: what is trained once the winner is chosen.

    Attributes:
        use_val: whether the winner is trained on the validation split as well.
        seeds: number of seeds with which it is trained, the first of which is that of its configuration.
        predict: whose test predictions are written if there are several seeds: the mean of all networks, the network
            that is best on validation, or the first.
    """

    use_val: bool
    seeds: Annotated[int, Field(ge=1)]
    predict: Literal["ensemble", "best", "first"]

    def check(self, *, saves_checkpoints: bool) -> None:
        """Raise UserError if the networks of several seeds could not be combined."""
        if self.seeds == 1:
            return
        if self.predict == "best" and self.use_val:
            raise UserError(
                "retrain.predict=best chooses by the validation split, on which retrain.use_val=true trains; give "
                "retrain.predict=ensemble"
            )
        if not saves_checkpoints:
            raise UserError(f"retrain.seeds={self.seeds} needs checkpoints; leave out checkpoints.enabled=false")


STOP_WHEN_KEY = "sweep.stop_when"
"""Configuration key of the least gain for which a sweep goes on."""


class SpentBudget(NamedTuple):
    """A budget of a sweep that is used up, or the reason why it is not worth going on.

    Attributes:
        key: its configuration key.
        amount: its configured value.
        used: how much the sweep has used; of `sweep.stop_when`, the gain that was expected.
    """

    key: str
    amount: float
    used: float

    @property
    def resume_override(self) -> str:
        """The override with which the sweep can be resumed: twice the amount (or twice what was used, if more).

        Of `sweep.stop_when`, half the gain that was expected, or null if that was next to nothing.
        """
        if self.key == STOP_WHEN_KEY and self.used < 1e-3 * self.amount:
            return f"{self.key}=null"
        amount = self.used / 2 if self.key == STOP_WHEN_KEY else 2 * max(self.amount, self.used)
        return f"{self.key}={amount:.0f}" if amount >= 10 else f"{self.key}={amount:.2g}"


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The configuration group `sweep`.

    A sweep whose budget (`time_budget_s` or `gpu_hours`) is spent can be resumed with a larger one. Both budgets count
    all processes that have run the sweep. A sweep that `stop_when` has ended can be resumed with a smaller value.

    Attributes:
        name: name of the sweep, and of its folder.
        folder: folder that contains all files of the sweep.
        resume: folder or URL of a sweep to resume. Its configuration is read from there; None: start a new sweep.
        status: folder or URL of a sweep whose progress is printed. Nothing is run.
        num_trials: number of configurations to try.
        max_epochs: epochs of one training at full fidelity, whose learning-rate schedule ends there.
        folds: number of folds with which a trial is trained one after another, each for max_epochs. The metric is the
            mean over the folds trained so far. 1: one training with the data set's own validation split.
        workers_per_trial: number of processes that share each batch of a trial.
        cpus_per_trial: CPU cores of each worker.
        gpus_per_trial: GPUs of each worker. A fraction lets several trials share a GPU and limits the memory that each
            may use. `auto`: the preflight chooses the largest fraction whose total throughput is within 5 % of the
            best one. None: one GPU if there is one.
        max_concurrent: maximum number of trials that run at a time; None: as many as fit.
        time_budget_s: seconds that the sweep may run; None: no limit.
        gpu_hours: GPU-hours that the trials may use; None: no limit.
        stop_when: the sweep ends when doubling the number of trials is expected to improve the metric by
            less than this, in its unit; None: never.
        seed: seed of the searcher and the scheduler. It is not the seed of the training.
        metric: validation metric to optimise.
        mode: whether smaller (`min`) or larger (`max`) values of the metric are better; None: the metric's own
            direction. A new sweep accepts `min` or `max` only if it is the metric's own direction.
        second_objective: cost to minimise in addition to the metric. It is measured before a trial is trained.
        latency_of: precision of an exported network whose time for one image is latency_ms, with ONNX Runtime on the
            trial's CPU cores; None: the network in PyTorch, on the trial's device.
        divergence_factor: a trial ends when its metric is worse than its own best value by more than this factor. The
            check needs a best value above 0, since no factor makes 0 or a negative value worse. None: a trial ends
            only when its metric is not finite.
        checkpoint_every_epochs: interval between the checkpoints of a trial; None: only at rungs where the trial may
            pause.
        checkpoint_budget_gb: disk space for the checkpoints of all trials together, in units of 1e9 bytes.
        max_retries: number of times that a failed trial is retried.
        retry_delay_s: seconds before the first retry of a trial. The delay doubles with each further retry.
        hang_timeout_s: a trial that does not report for this many seconds fails, and its worker is killed; None: no
            timeout.
        quarantine_after_failures: a node is quarantined when this many different trials have failed on it since its
            last report while other nodes work; None: never.
        stop_after_failures: the sweep ends when this many different trials have failed before any trial has reported.
        preflight: what is tested before the sweep. `brief`: a few points of the search space. `only`: more points, for
            longer, without a sweep afterwards. `off`: nothing.
        confirm: how many finalists are trained again, and with how many seeds, before a winner is chosen.
        retrain: whether the winner is trained again with its full schedule.
        retrain_devices: number of devices that share each batch of the retraining. None: all GPUs of the driver's
            machine, and on a Ray cluster at least as many devices as a trial has workers. The number is lowered until
            it divides the batch size.
        wandb_project: Weights & Biases project in which trials are logged; None: they are logged to TensorBoard only.
        storage: URL of a folder in an object store, in which the sweep is kept under its name. None: the sweep is kept
            only in its folder, which all nodes must share.
    """

    name: str
    folder: str
    resume: str | None
    status: str | None
    num_trials: _Count
    max_epochs: _Count
    folds: _Count
    workers_per_trial: _Count
    cpus_per_trial: _Count
    gpus_per_trial: float | Literal["auto"] | None
    max_concurrent: _Count | None
    time_budget_s: _Amount | None
    gpu_hours: _Amount | None
    stop_when: _Amount | None
    seed: int
    metric: str
    mode: Mode | None
    second_objective: Literal["latency_ms", "num_parameters", "memory_mb"] | None
    latency_of: LatencyOf
    divergence_factor: Annotated[float, Field(gt=1)] | None
    checkpoint_every_epochs: _Count | None
    checkpoint_budget_gb: _Amount
    max_retries: Annotated[int, Field(ge=0)]
    retry_delay_s: Annotated[float, Field(ge=0)]
    hang_timeout_s: _Amount | None
    quarantine_after_failures: _Count | None
    stop_after_failures: _Count
    preflight: Literal["brief", "only", "off"]
    confirm: ConfirmSettings
    retrain: bool
    retrain_devices: int | None
    wandb_project: str | None
    storage: str | None

    def __post_init__(self) -> None:
        if self.mode is None:
            object.__setattr__(self, "mode", _find_direction(self.metric))

    @property
    def target(self) -> TargetMetric:
        """The metric with its direction. It defines the best trial, the winner and the best checkpoint."""
        assert self.mode is not None, "set by __post_init__"
        return TargetMetric(self.metric, self.mode)

    @property
    def trial_epochs(self) -> int:
        """Epochs of a complete trial, over all its folds."""
        return self.max_epochs * self.folds

    def change_trial_epochs(self, trial_epochs: int) -> "SweepSettings":
        """Return the settings with other epochs of a complete trial, over all its folds."""
        return replace(self, max_epochs=trial_epochs // self.folds)

    def find_spent_budget(
        self, *, elapsed_s: float, gpu_hours: float, expected_gain: float | None = None
    ) -> "SpentBudget | None":
        """Find a budget that is used up, or whether the sweep is not worth going on.

        Args:
            elapsed_s: seconds that the sweep has run so far.
            gpu_hours: GPU-hours that its trials have used so far.
            expected_gain: what doubling the number of trials is expected to gain; None: it is not known.

        Returns:
            The first spent budget; None if no budget is spent.
        """
        if self.time_budget_s is not None and elapsed_s >= self.time_budget_s:
            return SpentBudget("sweep.time_budget_s", self.time_budget_s, elapsed_s)
        if self.gpu_hours is not None and gpu_hours >= self.gpu_hours:
            return SpentBudget("sweep.gpu_hours", self.gpu_hours, gpu_hours)
        if self.stop_when is not None and expected_gain is not None and expected_gain < self.stop_when:
            return SpentBudget(STOP_WHEN_KEY, self.stop_when, expected_gain)
        return None

    def change_limits(self, limits: Mapping[str, float | None]) -> "SweepSettings":
        """Return the settings with other values of some fields; `limits`: name -> value."""
        values: dict[str, Any] = dict(limits)
        return replace(self, **values)

    @property
    def path(self) -> Path:
        """The folder of the sweep."""
        return Path(self.folder)

    @property
    def storage_url(self) -> str | None:
        """The URL of the sweep in the object store; None if it is kept only in its folder."""
        return None if self.storage is None else join_url(self.storage, self.name)

    @property
    def resume_path(self) -> Path:
        """The value of `sweep.resume` that resumes this sweep. For a confirmation it is the sweep it belongs to."""
        return Path(self.resume or self.folder)


def format_resume_command(place: str | Path) -> str:
    """Return the command line that resumes the sweep in a folder or at the URL of a store."""
    return shlex.join(["python", "tune.py", quote_override("sweep.resume", str(place))])


def _find_direction(metric: str) -> Mode:
    # Imported here because it imports torch, which a worker that only reads settings does not need. check_sweep rejects
    # an unknown metric before the sweep starts.
    from handpose.metrics.validation import get_direction

    return get_direction(metric) or "min"


def restore_settings(values: Mapping[str, Any], folder: Path) -> SweepSettings:
    """Restore the settings of a sweep that is only read, not run.

    A recorded mode is kept even if it contradicts the direction of the metric, because the sweep's decisions were made
    with it.

    Args:
        values: the group `sweep` from its sweep.yaml. A key that is missing, as in files of older versions, becomes
            None, or a neutral value where None is not allowed.
        folder: where the sweep is now.
    """
    field_values = {field.name: values.get(field.name) for field in fields(SweepSettings)}
    budget = values.get("checkpoint_budget_gb") or 0.0
    num_workers = field_values["workers_per_trial"] or 1
    numbers = {"checkpoint_budget_gb": budget, "retry_delay_s": 0.0, "workers_per_trial": num_workers}
    numbers["folds"] = field_values["folds"] or 1
    return SweepSettings(**field_values | {"folder": str(folder)} | numbers)


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """The configuration group `ray`.

    Attributes:
        address: address of the Ray cluster to join. `auto`: the cluster to which this machine belongs. None: start Ray
            on this machine only.
        num_cpus: CPU cores for trials if Ray runs on this machine only; None: all cores.
        autoscale: whether nodes are requested from the autoscaler of the cluster, for as many trials as can run at a
            time.
        node_timeout_s: with autoscale, how many seconds to wait for the first node on which a trial fits.
        weight: sweeps with a weight that run on the cluster at the same time divide it in proportion to their weights;
            None: this sweep uses all that is free.
    """

    address: str | None
    num_cpus: _Count | None
    autoscale: bool = False
    node_timeout_s: _Amount = 1800.0
    weight: _Amount | None = None
