"""What a sweep is asked to be: the schema of the configuration groups `sweep` and `ray`, whose values stand in YAML."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from handpose.metrics.target import Mode, TargetMetric
from handpose.urls import join_url

LOCK = ".lock"
"""File in the folder of a sweep, whose lock the process that runs the sweep holds."""


@dataclass(frozen=True, kw_only=True)
class ConfirmSettings:
    """The group `sweep.confirm`: the best top_k configurations are trained again with so many fresh seeds each."""

    top_k: int
    seeds: int

    @property
    def is_enabled(self) -> bool:
        return self.top_k > 0 and self.seeds > 0


class SpentBudget(NamedTuple):
    """A budget of a sweep that is used up: its configuration key, its amount, and how much of it was used."""

    key: str
    amount: float
    used: float

    @property
    def larger_override(self) -> str:
        """An override that lets the sweep go on, with as much again."""
        amount = 2 * max(self.amount, self.used)
        return f"{self.key}={amount:.0f}" if amount >= 10 else f"{self.key}={amount:.2g}"


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The group `sweep`.

    folder: all that the sweep leaves behind lies in it. resume: folder of a sweep to go on with; nothing else is read
    then. status: folder of a sweep to be shown, and nothing is done. num_trials: configurations tried. max_epochs: of a
    trial at full fidelity. workers_per_trial: processes that share the steps of a trial. cpus_per_trial,
    gpus_per_trial: of each of them; a part of a GPU is a share of its trials and of its memory; auto: the share that
    trains most in all; None: one GPU where there is one. max_concurrent: trials at a time;
    None: as many as there are slots. time_budget_s: seconds that the sweep may run. gpu_hours: GPU-hours that
    its trials may use. Both count all processes that ran the sweep; None: no limit. A sweep that has spent one can go
    on with a larger one. seed: of searcher and scheduler. metric: the validation metric
    that is optimised. mode: whether smaller or larger values of it are better; None follows the metric's own
    direction. second_objective: a cost to minimise as well; it is measured before a trial is trained.
    explosion_factor: a trial ends when its metric is worse than its best by this factor. Only a best value above 0 is
    judged so, since no factor makes 0 or a negative value worse. None: a trial ends only when its metric is not
    finite. checkpoint_every_epochs: of a trial; None: only at rungs where it may pause. checkpoint_budget_gb: of all
    trials together, in 1e9 bytes. max_retries: of a trial that failed; retry_delay_s: before the first, doubled for
    each. hang_timeout_s: a trial without a report for so long is ended and has failed; None: never. set_aside_after:
    trials that fail one after the other on a node, while others work, end its use; None: never. stop_after_failures:
    trials that fail before any has reported end the sweep. preflight: what is tried out before it. confirm: what is
    trained again before a winner is chosen. retrain: the winner, with the full schedule, on retrain_devices; None: on
    all GPUs of the driver's machine, or as many as a trial had workers. wandb_project: of Weights & Biases, for the
    trials; None: they are in TensorBoard only. storage: URL of a folder in a store, where the sweep is kept under its
    name; None: only in its folder, which all nodes share.
    """

    name: str
    folder: str
    resume: str | None
    status: str | None
    num_trials: int
    max_epochs: int
    workers_per_trial: int
    cpus_per_trial: int
    gpus_per_trial: float | Literal["auto"] | None
    max_concurrent: int | None
    time_budget_s: float | None
    gpu_hours: float | None
    seed: int
    metric: str
    mode: Mode | None
    second_objective: Literal["latency_ms", "num_parameters", "memory_mb"] | None
    explosion_factor: float | None
    checkpoint_every_epochs: int | None
    checkpoint_budget_gb: float
    max_retries: int
    retry_delay_s: float
    hang_timeout_s: float | None
    set_aside_after: int | None
    stop_after_failures: int
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
        """The metric with its direction. It decides which trial, which winner and which checkpoint is the best."""
        assert self.mode is not None, "set by __post_init__"
        return TargetMetric(self.metric, self.mode)

    def find_spent_budget(self, *, elapsed_s: float, gpu_hours: float) -> "SpentBudget | None":
        """A budget that is used up; None while there is some left of each.

        elapsed_s, gpu_hours: what the sweep has used so far.
        """
        if self.time_budget_s is not None and elapsed_s >= self.time_budget_s:
            return SpentBudget("sweep.time_budget_s", self.time_budget_s, elapsed_s)
        if self.gpu_hours is not None and gpu_hours >= self.gpu_hours:
            return SpentBudget("sweep.gpu_hours", self.gpu_hours, gpu_hours)
        return None

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def storage_url(self) -> str | None:
        """The URL of the sweep in the store; of a confirmation below that of its sweep."""
        return None if self.storage is None else join_url(self.storage, self.name)

    @property
    def resume_path(self) -> Path:
        """What sweep.resume is to name; of a confirmation the sweep that it belongs to."""
        return Path(self.resume or self.folder)


def _find_direction(metric: str) -> Mode:
    # Imported here because it brings torch, which a worker that only reads settings does without. An unknown metric is
    # refused by check_sweep before a sweep begins.
    from handpose.metrics.validation import direction

    return direction(metric) or "min"


def restore_settings(values: Mapping[str, Any], folder: Path) -> SweepSettings:
    """The settings of a sweep that is only read, from its sweep.yaml; a key that its version did not have is None.

    A recorded mode stands as it is, even where it contradicts the metric: the sweep was decided by it.
    """
    known = {field.name: values.get(field.name) for field in fields(SweepSettings)}
    budget = values.get("checkpoint_budget_gb") or 0.0
    num_workers = known["workers_per_trial"] or 1
    numbers = {"checkpoint_budget_gb": budget, "retry_delay_s": 0.0, "workers_per_trial": num_workers}
    return SweepSettings(**known | {"folder": str(folder)} | numbers)


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """The group `ray`.

    address: of a cluster to join; auto: the one this machine belongs to; None: this machine alone. num_cpus: cores for
    trials when it is alone; None: all.
    """

    address: str | None
    num_cpus: int | None
