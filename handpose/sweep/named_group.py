"""Ray Train's trainer, with a placement group that can be found, and so removed, when its trial was ended."""

from collections.abc import Callable
from functools import partial
from typing import Any

import ray.train.v2._internal.execution.worker_group.worker_group as worker_groups
from ray.train import torch as train_torch
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import placement_group

_TorchTrainer: Any = train_torch.TorchTrainer  # of Train V2, while type checkers are shown the class of V1


class NamedGroupTrainer(_TorchTrainer):
    """A TorchTrainer whose workers are held by a placement group of this name.

    Ray (2.60) keeps a placement group that an actor has made until the job ends. So Train has an actor that removes it
    when the run was ended from outside, as Tune ends a trial; but that one asks the dashboard. Without one, as here,
    every trial that was stopped would keep its cores and GPUs, and a process that asks for ever.
    """

    def __init__(self, name: str, train_loop: Callable[[], None], **settings: Any) -> None:
        super().__init__(train_loop, **settings)
        self._group_name = name

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]
        return [*kept, _Naming(self._group_name)]


class _Naming(WorkerGroupCallback):
    """Runs in the process that makes the group, which has no setting for a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        worker_groups.placement_group = partial(placement_group, name=self._name)
