"""What a sweep is asked to be: the schema of the configuration groups `sweep` and `ray`, whose values stand in YAML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The group `sweep`.

    folder: all that the sweep leaves behind lies in it. num_trials: configurations tried. max_epochs: of a trial at
    full fidelity. cpus_per_trial, gpus_per_trial: a slot; a part of a GPU is a share of its trials, no limit of
    memory; None: one GPU where there is one. max_concurrent: trials at a time; None: as many as there are slots.
    time_budget_s: the sweep ends then. seed: of searcher and scheduler. checkpoint_every_epochs: of a trial; None:
    never. retrain: the winner, with the full schedule.
    """

    name: str
    folder: str
    num_trials: int
    max_epochs: int
    cpus_per_trial: int
    gpus_per_trial: float | None
    max_concurrent: int | None
    time_budget_s: float | None
    seed: int
    metric: str
    mode: Literal["min", "max"]
    checkpoint_every_epochs: int | None
    retrain: bool

    @property
    def path(self) -> Path:
        return Path(self.folder)


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """The group `ray`.

    address: of a cluster to join; auto: the one this machine belongs to; None: this machine alone. num_cpus: cores for
    trials when it is alone; None: all.
    """

    address: str | None
    num_cpus: int | None
