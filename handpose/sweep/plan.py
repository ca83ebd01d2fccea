"""A sweep as it is going to run: all that its task asks for, checked as far as that can be without Ray."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra.utils import instantiate

from handpose.errors import UserError
from handpose.report.table import TrialTable
from handpose.schedulers.scheduler import Fifo, Rule
from handpose.search.points import most_trials
from handpose.search.warm_start import training_seeds
from handpose.sweep.analysis.report import check_scientific
from handpose.sweep.controller.node_quarantine import set_aside
from handpose.sweep.controller.scheduler_factory import rule_maker
from handpose.sweep.controller.slots import Slots
from handpose.sweep.driver.resume import Task, check_data, description, keep_budgets
from handpose.sweep.driver.run import swept, try_out
from handpose.sweep.execution.retrain_nodes import Crew, find_crew
from handpose.sweep.execution.runtime import environment, ray_runtime
from handpose.sweep.preflight.checks import (
    Survey,
    check_loaders,
    check_plan,
    check_space,
    check_sweep,
    slots_here,
    survey,
)
from handpose.sweep.preflight.preflight import preflight
from handpose.sweep.record.events import EVENTS, read_events
from handpose.sweep.record.provenance import provenance
from handpose.sweep.record.settings import RaySettings, SweepSettings
from handpose.sweep.selection.confirm import confirm
from handpose.sweep.selection.retrain import retrain
from handpose.sweep.storage.folder_sync import Mirror
from handpose.sweep.storage.stored_sweep import check_storage
from handpose.sweep.trainable.reporting import Objective
from handpose.sweep.trainable.trial import TrainingObjective, TrialRecipe, training_overrides, with_target


@dataclass(frozen=True)
class Plan:
    """What runs a task. rule: makes a fresh one. origin: as `provenance` gives it."""

    task: Task
    sweep: SweepSettings
    cluster: RaySettings
    data: Survey
    recipe: TrialRecipe
    rule: Callable[[], Rule]
    origin: Mapping[str, Any]

    @property
    def objective(self) -> TrainingObjective:
        """What a trial runs."""
        measures = self.sweep.second_objective is not None or any(self.task.config.searcher.constraints.values())
        return TrainingObjective.of(self.recipe, self.sweep, self.rule(), measures=measures)

    def try_out(self) -> None:
        """The preflight alone, within Ray; no file is made."""
        try_out(self.sweep, self.cluster, self._preflight(self.objective))

    def swept(
        self, *, objective: Objective | None = None, mirror: Mirror | None = None
    ) -> AbstractContextManager[TrialTable]:
        """Run the sweep, or go on with it: `run.swept`. objective: in place of its own."""
        objective = objective or self.objective
        searcher = instantiate(self.task.config.searcher)
        return swept(
            sweep=self.sweep,
            cluster=self.cluster,
            space=self.task.space,
            searcher=partial(searcher, defaults=self.task.defaults, fingerprint=self.data.fingerprint),
            rule=self.rule,
            objective=objective,
            command=self.recipe.command,
            description=None if self.task.origin else description(self.task, self.origin),
            preflight=self._preflight(objective),
            mirror=mirror,
            on_resume=partial(keep_budgets, self.task),
            num_points=self._num_points,
        )

    def confirmed(self, table: TrialTable, *, mirror: Mirror | None = None) -> dict[str, Any] | None:
        """Train the finalists of its table again, within `swept`: `confirm`."""
        return confirm(
            table,
            sweep=self.sweep,
            cluster=self.cluster,
            space=self.task.space,
            defaults=self.task.defaults,
            objective=TrainingObjective.of(self.recipe, self.sweep, Fifo(), measures=False),
            command=self.recipe.command,
            origin=self.origin,
            mirror=mirror,
            used_seeds=training_seeds(self.task.config.searcher.warm_start or []),
        )

    def retrained(self, *, use_val: bool) -> dict[str, float]:
        """Train the winner in best.yaml with its full schedule, and test it: `retrain`."""
        sweep = self.sweep
        # In a store the folder is the driver's alone.
        is_shared = self.cluster.address is not None and sweep.storage is None
        return retrain(
            sweep.path,
            devices=sweep.retrain_devices,
            use_val=use_val,
            cluster=self._crew if is_shared else None,
        )

    @contextlib.contextmanager
    def _crew(self, batch_size: int) -> Iterator[Crew | None]:
        sweep, crew = self.sweep, None
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(UserError):  # where the cluster is gone this machine does it
                stack.enter_context(environment())
                stack.enter_context(ray_runtime(self.cluster))
                aside = set_aside(read_events(sweep.path / EVENTS))
                crew = find_crew(sweep, devices=sweep.retrain_devices, batch_size=batch_size, without=aside)
            yield crew

    def _num_points(self) -> int | None:
        is_grid = self.task.config.searcher.sampler is None
        return most_trials(self.task.space, is_grid=is_grid, repeats=self.rule().perturbs)

    def _preflight(self, objective: Objective) -> Callable[[Slots], Slots]:
        return partial(
            preflight,
            sweep=self.sweep,
            space=self.task.space,
            recipe=self.recipe,
            objective=objective,
            make_rule=self.rule,
            data=self.data.size,
            defaults=self.task.defaults,
            use_val=self.task.config.retrain.use_val,
        )


def planned(task: Task) -> Plan:
    """Look at all that a task names, and make its data ready; raises UserError for what cannot work."""
    config, space = task.config, task.space
    sweep, cluster = instantiate(config.sweep), instantiate(config.ray)
    check_sweep(sweep, cluster)
    overrides = with_target(training_overrides(task.overrides), config, sweep.target)
    check_storage(sweep)
    check_space(space, overrides, is_grid=config.searcher.sampler is None, num_workers=sweep.workers_per_trial)
    check_scientific(config.report.scientific, space)
    rule = rule_maker(instantiate(config.scheduler), sweep, space)
    data = survey(config)
    check_data(task, data.fingerprint)
    if (slots := slots_here(sweep, cluster)) is not None:
        check_loaders(sweep, space, overrides, data.size, slots)
    validates_every = config.trainer.check_val_every_n_epoch
    check_plan(sweep, rule(), validates_every=validates_every)
    recipe = TrialRecipe(overrides, task.locations, sweep.max_epochs, sweep.cpus_per_trial, sweep.workers_per_trial)
    origin = task.origin or provenance(data=data.fingerprint)
    return Plan(task, sweep, cluster, data, recipe, rule, origin)
