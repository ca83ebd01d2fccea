"""The preflight: trains configurations for a few steps with Ray before the sweep starts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna

from handpose.errors import UserError, format_size, get_free_bytes
from handpose.files import find_nearest_existing
from handpose.report.formatting import format_params
from handpose.report.preflight import format_disk_use, format_points_table
from handpose.schedulers.scheduler import Scheduler
from handpose.search.space import Params, Space, find_default_point
from handpose.sweep.controller.slots import MIN_PROCESS_MB, Slots, count_fitting_workers, count_slots, format_memory
from handpose.sweep.execution.nodes import list_live_resources, sum_resources
from handpose.sweep.execution.probe_worker import GpuThroughputBenchmark, ProbeWorker
from handpose.sweep.execution.worker_group import check_picklable
from handpose.sweep.preflight.checks import check_loaders, check_validation_epochs
from handpose.sweep.preflight.forecast import (
    describe_trial_cost,
    forecast_retraining,
    format_cost_lines,
    make_point_rows,
)
from handpose.sweep.preflight.gpu_sharing import choose_trials_per_gpu, count_trials_per_gpu
from handpose.sweep.preflight.probe import (
    RANDOM,
    ProbeResults,
    choose_probe_points,
    find_ineffective_params,
    probe_points,
)
from handpose.sweep.record.settings import RetrainSettings, SweepSettings
from handpose.sweep.storage.retention import NUM_KEPT_PER_TRIAL
from handpose.sweep.trainable.reporting import TrialFunction
from handpose.sweep.trainable.trial import TrialRecipe
from handpose.sweep.trainable.trial_cost import DataSize

_BRIEF_S = 60.0
_MEMORY_MARGIN = 1.1
"""Margin for main memory: a trial takes more than in its first steps (5 % more after two epochs)."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The preflight of a sweep; `sweep.preflight` says how much is tried.

    - `brief`: the ends of the space, two random points, and every option of every choice while there is time.
    - `only`: more random points and more steps, with pretrained weights, and without a time limit. Also looks for
      parameters that have no effect.
    - `off`: nothing.

    Attributes:
        sweep: settings of the sweep.
        space: search space.
        recipe: makes the overrides of a trial.
        trial_function: what a trial runs.
        make_scheduler: returns a new scheduler.
        data: size of the data of the default configuration.
        defaults: default configuration as `find_default_point` takes it.
        retrain_settings: what is trained once the winner is chosen.
        brief_s: seconds after which a brief preflight tries no further point.
        plan_budget: plans the sweep from the measured points and the slots, if it has a budget. Returns the planned
            settings and lines that describe the plan.
        print_text: receives the text for the terminal.
    """

    sweep: SweepSettings
    space: Space
    recipe: TrialRecipe
    trial_function: TrialFunction
    make_scheduler: Callable[[], Scheduler]
    data: DataSize
    defaults: Mapping[str, Any]
    retrain_settings: RetrainSettings
    brief_s: float = _BRIEF_S
    plan_budget: Callable[[ProbeResults, Slots], tuple[SweepSettings, list[str]]] | None = None
    print_text: Callable[[str], None] = print

    def run(self, slots: Slots) -> Slots:
        """Train points of the space for a few steps on a worker, and print what a trial and the sweep will cost.

        Ray must be running.

        Args:
            slots: slots that the trials will have.

        Returns:
            The slots, with the measured memory per worker and, for `sweep.gpus_per_trial=auto`, with the chosen
            fraction of a GPU. There may be fewer slots than before.

        Raises:
            UserError: a point cannot be trained (the message names its parameters), the trial function cannot be
                pickled, the resources do not suffice, or the second objective cannot be measured.
        """
        sweep, scheduler = self.sweep, self.make_scheduler()
        if sweep.preflight == "off":
            return slots
        probed, ineffective_keys = self._probe_points(slots)
        for cost in probed.costs:
            check_validation_epochs(sweep, scheduler, validation_interval=cost.validation_interval)
        lines, gpus = [], slots.gpus
        if sweep.gpus_per_trial == "auto" and gpus:
            gpus, line = self._choose_gpus_per_trial(slots, probed)
            lines.append(line)
            check_loaders(sweep, self.space, self.recipe.overrides, self.data, replace(slots, gpus=gpus))
        nodes = list_live_resources()
        slots = count_slots(sweep, nodes, gpus=gpus, process_mb=_get_process_mb(probed))
        sweep, cost_lines = self._describe_cost(probed, slots)
        disk, *warnings = _check_disk(sweep, slots, scheduler, probed)
        warnings += [*_check_gpu_memory(slots, probed), *_check_second_objective(sweep, self.space, probed)]
        warnings += _list_warnings(self.space, probed, ineffective_keys)
        if sweep.preflight == "only":
            self.print_text(format_points_table(make_point_rows(probed)) + "\n")
        lines += [*cost_lines, disk, *filter(None, [format_memory(sweep, slots, nodes)])]
        self.print_text("\n".join([*lines, *(f"note        {warning}" for warning in warnings)]))
        return slots

    def _describe_cost(self, probed: ProbeResults, slots: Slots) -> tuple[SweepSettings, list[str]]:
        """Return the settings, after planning if there is a budget, and lines about what the sweep will cost."""
        if self.plan_budget is not None:
            sweep, lines = self.plan_budget(probed, slots)
            return sweep, [describe_trial_cost(probed), *lines]
        sweep, retraining = self.sweep, None
        if sweep.retrain:
            retraining = forecast_retraining(sweep, self.recipe, probed, self.data, self.retrain_settings)
        return sweep, format_cost_lines(
            sweep, probed, self.make_scheduler, num_slots=slots.num_slots, retraining=retraining
        )

    def _probe_points(self, slots: Slots) -> tuple[ProbeResults, list[str]]:
        """Measure points of the space, and list the parameters without an effect if the preflight is thorough."""
        is_brief, default = self.sweep.preflight == "brief", _find_default_params(self.space, self.defaults)
        points = choose_probe_points(self.space, num_random=2 if is_brief else 8)
        if not is_brief:
            self.print_text(f"trying {len(points)} points of {self.space.name} on a worker\n")
        probe = ProbeWorker(
            cpus=slots.cpus,
            gpus=slots.gpus,
            recipe=self.recipe,
            data=self.data,
            latency_of=self.sweep.latency_of,
        )
        with probe as worker:
            check_picklable(self.trial_function)  # meanwhile the worker runs its imports
            probed = probe_points(
                worker,
                points,
                space=self.space,
                default=default,
                num_steps=3 if is_brief else 8,
                weights=not is_brief,
                time_s=self.brief_s if is_brief else math.inf,
            )
            if is_brief:
                return probed, []
            return probed, list(find_ineffective_params(worker, probed, default or probed.points[0].params))

    def _choose_gpus_per_trial(self, slots: Slots, probed: ProbeResults) -> tuple[float, str]:
        """Find the fraction of a GPU per trial with the highest throughput; return it and a line that describes it."""
        resources, cpus = sum_resources(), self.sweep.cpus_per_trial
        cores = count_trials_per_gpu(resources, cpus_per_trial=cpus)
        without_gpu = replace(slots, gpus=0.0, process_mb=_get_process_mb(probed))
        nodes = [node for node in list_live_resources() if node.get("GPU", 0)]
        in_memory = sum(count_fitting_workers(without_gpu, node) for node in nodes)
        typical = min(probed.points, key=lambda point: point.label != RANDOM)
        benchmark = GpuThroughputBenchmark(cpus=cpus, recipe=self.recipe, data=self.data, params=typical.params)
        choice = choose_trials_per_gpu(
            max(cost.gpu_memory_fraction for cost in probed.costs),
            max_trials=max(1, min(cores, int(in_memory // resources["GPU"]))),
            measure_steps_per_s=benchmark.measure_steps_per_s,
        )
        return choice.gpus_per_trial, choice.format_line()


def _get_process_mb(probed: ProbeResults) -> float:
    """Return the main memory in MB to reserve for a worker, as far as it was measured."""
    measured = [_MEMORY_MARGIN * cost.process_mb for cost in probed.costs if math.isfinite(cost.process_mb)]
    return max([MIN_PROCESS_MB, *measured])


def _find_default_params(space: Space, defaults: Mapping[str, Any]) -> Params | None:
    """Return the parameters of the default configuration; None if it does not lie in the space."""
    draws = find_default_point(space, defaults)
    return None if draws is None else space.sample(optuna.trial.FixedTrial(draws))


def _check_disk(sweep: SweepSettings, slots: Slots, scheduler: Scheduler, probed: ProbeResults) -> list[str]:
    """Describe the disk space for checkpoints in a line, followed by warnings.

    Raises:
        UserError: the disk has less free space than the checkpoints need within their budget.
    """
    place = find_nearest_existing(sweep.path)
    free_gb = get_free_bytes(place) / 1e9
    largest_gb = max(cost.checkpoint_mb for cost in probed.costs) / 1e3
    running_gb = slots.num_slots * NUM_KEPT_PER_TRIAL * largest_gb
    waiting_gb = sweep.num_trials * largest_gb if scheduler.needs_checkpoints else 0.0
    needed_gb, budget = running_gb + waiting_gb, f"sweep.checkpoint_budget_gb={sweep.checkpoint_budget_gb:g}"
    if free_gb < min(needed_gb, sweep.checkpoint_budget_gb):
        free, needed, largest = (format_size(1e9 * each) for each in (free_gb, needed_gb, largest_gb))
        raise UserError(
            f"{place} has {free} free, but the sweep's checkpoints need {needed} ({largest} each) within {budget}; "
            "make room, or set DIR_SCRATCH to a folder on another disk"
        )
    line = format_disk_use(
        checkpoint_mb=1e3 * largest_gb,
        needed_gb=needed_gb,
        budget_gb=sweep.checkpoint_budget_gb,
        free_gb=free_gb,
        folder=str(place),
    )
    if sweep.checkpoint_budget_gb >= needed_gb:
        return [line]
    begin = (
        "paused trials may have to start again"
        if scheduler.needs_checkpoints
        else "a damaged checkpoint may have no copy"
    )
    return [line, f"{budget} may be too small: the sweep may need {needed_gb:.3g} GB; with less, {begin}"]


def _check_gpu_memory(slots: Slots, probed: ProbeResults) -> list[str]:
    """Return a warning if the most demanding trials do not fit onto a shared GPU together.

    Raises:
        UserError: not even the least demanding ones fit.
    """
    num_sharing = int(1 / slots.gpus) if 0 < slots.gpus < 1 else 1
    shares = sorted(cost.gpu_memory_fraction for cost in probed.costs if cost.gpu)
    if num_sharing == 1 or not shares or shares[-1] * num_sharing <= 1:
        return []
    message = (
        f"sweep.gpus_per_trial={slots.gpus:g} puts {num_sharing} trials on a GPU, but one takes up to "
        f"{shares[-1]:.0%} of its memory; a larger sweep.gpus_per_trial or a smaller data.batch_size fits"
    )
    if shares[0] * num_sharing > 1:
        raise UserError(message)
    return [message]


def _check_second_objective(sweep: SweepSettings, space: Space, probed: ProbeResults) -> list[str]:
    """Return a warning if the second objective has the same value at every point that was tried.

    Raises:
        UserError: it cannot be measured on this device.
    """
    name = sweep.second_objective
    if name is None:
        return []
    found = {float(getattr(cost, name)) for cost in probed.costs}
    if not all(map(math.isfinite, found)):
        raise UserError(f"sweep.second_objective={name} cannot be measured on this device; give num_parameters or null")
    if len(found) > 1:
        return []
    return [f"search_space={space.name}: sweep.second_objective={name} is {found.pop():g} at every point tried"]


def _list_warnings(space: Space, probed: ProbeResults, ineffective_keys: Sequence[str]) -> Iterator[str]:
    if probed.num_left_out:
        yield f"{probed.num_left_out} more points were not tried, to save time; sweep.preflight=only tries all of them"
    for key in dict.fromkeys(key for cost in probed.costs for key in cost.ignored):
        yield f"search_space={space.name}: {key} has no effect, because every trial has the sweep's own value"
    for key in ineffective_keys:
        yield f"search_space={space.name}: {key} made no difference to the first steps of the default configuration"
    for point, cost in zip(probed.points, probed.costs, strict=True):
        if not all(map(math.isfinite, cost.trace)):
            where = format_params(point.params)
            yield f"search_space={space.name}: not finite within a few steps on random pictures: {where}"
