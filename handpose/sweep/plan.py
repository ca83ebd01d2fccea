"""The plan of a sweep: everything that its configuration asks for, checked as far as possible without starting Ray."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hydra.utils import instantiate

from handpose.budget import BudgetSettings
from handpose.config import compose, instantiate_key, override_key
from handpose.errors import UserError
from handpose.report.notify import Notifier
from handpose.report.trial_table import TrialRow, TrialTable
from handpose.schedulers.scheduler import Fifo, Scheduler
from handpose.schema import bind_arguments
from handpose.search.searcher import Searcher
from handpose.search.space import Space
from handpose.search.warm_start import find_used_seeds
from handpose.sweep.analysis.read_sweep import COMBINED_FOLDER
from handpose.sweep.budget.clock import BudgetClock
from handpose.sweep.budget.stages import ConfirmationBudget, find_retraining_end, plan_confirmation
from handpose.sweep.controller.node_quarantine import find_quarantined_nodes
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.controller.slots import Slots
from handpose.sweep.controller.steering import SteeringChecks
from handpose.sweep.driver.resume import SweepTask, check_fingerprint, make_sweep_record, save_budgets
from handpose.sweep.driver.run import SweepRun, describe_spent_budget, run_preflight_alone, run_sweep
from handpose.sweep.execution.autoscaling import wait_for_node
from handpose.sweep.execution.retrain_nodes import RetrainNodes, find_retrain_nodes
from handpose.sweep.execution.runtime import set_ray_environment, start_ray
from handpose.sweep.preflight.checks import (
    DataSummary,
    check_gpu_hours,
    check_loaders,
    check_search,
    check_sweep,
    check_validation_epochs,
    slots_here,
    summarise_data,
)
from handpose.sweep.preflight.preflight import Preflight
from handpose.sweep.record.events import EVENTS_FILE, read_events
from handpose.sweep.record.provenance import collect_provenance
from handpose.sweep.record.settings import RaySettings, RetrainSettings, SweepSettings
from handpose.sweep.selection.confirm import confirm_finalists
from handpose.sweep.selection.retrain import retrain_winner
from handpose.sweep.selection.retrain_seeds import retrain_over_seeds
from handpose.sweep.storage.folder_sync import FolderSync
from handpose.sweep.storage.stored_sweep import check_storage
from handpose.sweep.trainable.reporting import TrialFunction
from handpose.sweep.trainable.trial import TrainingFunction, TrialRecipe, make_recipe


@dataclass(frozen=True)
class SweepPlan:
    """Everything needed to run a sweep. Use `build_plan` to make one.

    Attributes:
        task: what tune.py was asked to do.
        sweep: settings of the sweep.
        cluster: settings of Ray.
        data: fingerprint and size of the data set.
        recipe: composes the configuration of a trial from its parameters.
        make_scheduler: returns a new scheduler.
        searcher: makes a searcher.
        num_points: how many trials the searcher can propose; None: any number, or it is not known yet.
        origin: provenance of the sweep, from `collect_provenance`.
        clock: counts the time that the sweep uses of its budget.
        slots: the slots that an earlier preflight has measured; None: the preflight is yet to be run.
    """

    task: SweepTask
    sweep: SweepSettings
    cluster: RaySettings
    data: DataSummary
    recipe: TrialRecipe
    make_scheduler: Callable[[], Scheduler]
    searcher: partial[Searcher]
    num_points: int | None
    origin: Mapping[str, Any]
    clock: BudgetClock
    slots: Slots | None = None

    @property
    def trial_function(self) -> TrainingFunction:
        """The function that trains a trial."""
        measures = self.sweep.second_objective is not None or any(
            (self.task.config.searcher.get("constraints") or {}).values()
        )
        return TrainingFunction.from_settings(self.recipe, self.sweep, self.make_scheduler(), needs_costs=measures)

    def run_preflight_alone(self) -> None:
        """Run only the preflight, on Ray. No files are written."""
        run_preflight_alone(self.sweep, self.cluster, self._bind_preflight(self.trial_function))

    def run_sweep(
        self,
        *,
        trial_function: TrialFunction | None = None,
        folder_sync: FolderSync | None = None,
        notifier: Notifier | None = None,
    ) -> AbstractContextManager[TrialTable]:
        """Start or resume the sweep; see `handpose.sweep.driver.run.run_sweep`.

        Args:
            trial_function: trains a trial; None: the plan's own function.
            folder_sync: keeps the sweep in an object store; None: the sweep has no store.
            notifier: sends messages about the trials; None: nothing is sent.

        Returns:
            A context manager that runs the sweep on entry and returns the table of trials.
        """
        trial_function = trial_function or self.trial_function
        run = SweepRun(
            sweep=self.sweep,
            cluster=self.cluster,
            space=self.task.spaces[0],
            searcher=bind_arguments(self.searcher, defaults=self.task.defaults, fingerprint=self.data.fingerprint),
            make_scheduler=self.make_scheduler,
            trial_function=trial_function,
            command=self.recipe.format_command,
            description=None if self.task.origin else make_sweep_record(self.task, self.origin),
            preflight=self._bind_preflight(trial_function),
            folder_sync=folder_sync,
            on_resume=partial(save_budgets, self.task),
            on_lock=self.clock.start_saving,
            needs_report=self.clock.is_limited,
            num_points=self.num_points,
            notifier=notifier,
            checks=SteeringChecks(epochs=self._check_epochs, space=self._check_space),
            load_space=self.task.load_space,
            later_space=self.task.space if self.task.earlier_spaces else None,
        )
        return run_sweep(run)

    def _check_epochs(self, max_epochs: int) -> None:
        """Raise UserError if a complete trial cannot have so many epochs."""
        changed = replace(self.sweep, max_epochs=max_epochs)
        scheduler = bind_scheduler(self.scheduler_class, changed, self.task.spaces[0])()
        interval = self.task.config.trainer.check_val_every_n_epoch
        check_validation_epochs(changed, scheduler, validation_interval=interval)

    def _check_space(self, space: Space) -> None:
        """Raise UserError if the sweep could not be resumed with a search space."""
        check_search(self.task.config, self.sweep, space, self.task.overrides, first_space=self.task.spaces[0])
        if (slots := slots_here(self.sweep, self.cluster)) is not None:
            check_loaders(self.sweep, space, self.recipe.overrides, self.data.size, slots)

    def confirm_finalists(self, table: TrialTable, *, folder_sync: FolderSync | None = None) -> dict[str, Any] | None:
        """Train the finalists again; see `handpose.sweep.selection.confirm.confirm_finalists`.

        Call this within the `with` block of `run_sweep`, so that it uses the same Ray instance.

        Args:
            table: the trials of the sweep.
            folder_sync: keeps the sweep in an object store; None: the sweep has no store.

        Returns:
            The content of confirm.yaml; None if there was nothing to confirm.
        """
        max_epochs = self.sweep.change_trial_epochs(table.max_epochs).max_epochs  # the user may have raised it
        recipe = replace(self.recipe, max_epochs=max_epochs)
        trial_function = TrainingFunction.from_settings(recipe, self.sweep, Fifo(), needs_costs=False)
        return confirm_finalists(
            table,
            sweep=self.sweep,
            cluster=self.cluster,
            space=self.task.spaces[0],
            defaults=self.task.defaults,
            trial_function=replace(trial_function, saves_last=False),
            command=recipe.format_command,
            origin=self.origin,
            folder_sync=folder_sync,
            used_seeds=find_used_seeds(self.task.config.searcher.get("warm_start") or []),
            budget=self._plan_confirmation(table) if self.clock.is_limited else None,
        )

    @property
    def retrain_settings(self) -> RetrainSettings:
        """What is trained once the winner is chosen."""
        return RetrainSettings(**self.task.config.retrain)

    def retrain_winner(self, winner: TrialRow, table: TrialTable) -> dict[str, float]:
        """Train the winner in best.yaml with its full schedule and test it, once for each of `retrain.seeds`.

        Args:
            winner: trial of best.yaml. Its speed gives the expected time of the retraining.
            table: the trials of the sweep.

        Returns:
            Name -> value of the metrics of the first seed.
        """
        sweep = self.sweep
        # A sweep in an object store has its folder on the driver's machine only.
        is_shared = self.cluster.address is not None and sweep.storage is None
        retrain = partial(
            retrain_winner,
            sweep.path,
            devices=sweep.retrain_devices,
            use_val=self.retrain_settings.use_val,
            epoch_s=sweep.workers_per_trial * winner.seconds / winner.epochs if winner.epochs else None,
            # The weights of its trial would make the seeds alike, and with folds they have seen the validation split.
            trial_epochs=winner.epochs if self.retrain_settings.seeds == 1 and sweep.folds == 1 else 0,
            repeats_shortened=self._has_longer_retraining(table),
            find_nodes=self._find_retrain_nodes if is_shared else None,
        )
        find_end = partial(find_retraining_end, table, self.clock) if self.clock.is_limited else None
        return retrain_over_seeds(sweep.path, self.retrain_settings, retrain, find_end=find_end)

    @contextlib.contextmanager
    def _find_retrain_nodes(self, batch_size: int) -> Iterator[RetrainNodes | None]:
        sweep, retrain_nodes = self.sweep, None
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(UserError):  # without the cluster, this machine retrains the winner
                stack.enter_context(set_ray_environment())
                stack.enter_context(start_ray(self.cluster))
                wait_for_node(sweep, self.cluster)
                quarantined = find_quarantined_nodes(read_events(sweep.path / EVENTS_FILE))
                retrain_nodes = find_retrain_nodes(
                    sweep, devices=sweep.retrain_devices, batch_size=batch_size, excluded_nodes=quarantined
                )
            yield retrain_nodes

    def _has_longer_retraining(self, table: TrialTable) -> bool:
        """Return whether a retraining that a budget has shortened has enough time now to be done again."""
        combined = self.sweep.path / "retrain" / COMBINED_FOLDER / "metrics.json"
        if self.retrain_settings.seeds > 1 and not combined.is_file():
            return False  # it was interrupted between its seeds, and what is left is the time of the others
        used_s = self.clock.seconds.get("retraining", 0.0)
        if not self.clock.is_limited:
            return used_s > 0  # the budget has been removed
        return find_retraining_end(table, self.clock, 1) - time.time() > 1.5 * used_s

    def describe_spent_budget(self, table: TrialTable) -> str:
        """Return a line about a spent budget of the trials, and how to resume; empty if they had enough."""
        clock = self.clock
        if not clock.is_limited:
            return describe_spent_budget(self.sweep, table)
        return describe_spent_budget(
            self.sweep,
            table,
            whole=clock.describe_limit(),
            larger_whole=clock.describe_larger(),
            planned=clock.decisions.planned_keys,
        )

    @property
    def scheduler_class(self) -> Callable[..., Scheduler]:
        """The scheduler's class with the options of the configuration, without what the sweep adds."""
        return instantiate(self.task.config.scheduler)

    @property
    def schedule_epochs(self) -> int:
        """Epochs of the retraining without a budget, over all its seeds; 0: the winner is not retrained."""
        epochs = int(self.task.config.trainer.max_epochs)
        return self.retrain_settings.seeds * epochs if self.sweep.retrain else 0

    def _plan_confirmation(self, table: TrialTable) -> ConfirmationBudget:
        given = {override_key(item) for item in self.task.overrides} - set(self.clock.decisions.planned_keys)
        sweep = self.sweep.change_trial_epochs(table.max_epochs)
        return plan_confirmation(table, sweep, self.clock, schedule_epochs=self.schedule_epochs, given=given)

    def _bind_preflight(self, trial_function: TrialFunction) -> Callable[[Slots], Slots]:
        measured = self.slots
        return self.make_preflight(trial_function).run if measured is None else lambda slots: measured

    def make_preflight(self, trial_function: TrialFunction) -> Preflight:
        """Make the preflight of the sweep.

        Args:
            trial_function: what a trial runs.
        """
        return Preflight(
            sweep=self.sweep,
            space=self.task.space,
            recipe=self.recipe,
            trial_function=trial_function,
            make_scheduler=self.make_scheduler,
            data=self.data.size,
            defaults=self.task.defaults,
            retrain_settings=self.retrain_settings,
        )


def build_plan(task: SweepTask, *, data: DataSummary | None = None, measured_slots: Slots | None = None) -> SweepPlan:
    """Check everything that a task asks for, and prepare its data.

    Args:
        task: what tune.py was asked to do.
        data: the description of the data, if they have been prepared already.
        measured_slots: the slots that an earlier preflight has measured.

    Raises:
        UserError: something in the configuration cannot work.
    """
    config, space = task.config, task.space
    sweep, cluster = instantiate(config.sweep), instantiate(config.ray)
    budget: BudgetSettings = instantiate_key(config, "budget")
    budget.check_is_ahead()
    clock = BudgetClock(budget, sweep.path)
    check_sweep(sweep, cluster)
    check_storage(sweep)
    first_space = task.spaces[0] if task.earlier_spaces else None
    overrides, scheduler, searcher, num_points = check_search(
        config, sweep, space, task.overrides, first_space=first_space
    )
    recipe = make_recipe(sweep, overrides, task.locations)
    data = data or summarise_data(compose("train", [*overrides, *recipe.list_fold_overrides()]))
    check_fingerprint(task, data.fingerprint)
    if (slots := slots_here(sweep, cluster)) is not None:
        check_gpu_hours(budget.gpu_hours, slots)
        check_loaders(sweep, space, overrides, data.size, slots)
    RetrainSettings(**config.retrain).check(saves_checkpoints=config.checkpoints.enabled)
    origin = task.origin or collect_provenance(data=data.fingerprint)
    return SweepPlan(task, sweep, cluster, data, recipe, scheduler, searcher, num_points, origin, clock, measured_slots)
