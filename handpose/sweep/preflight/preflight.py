"""The preflight: configurations are trained for a few steps before the sweep begins, with Ray."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna

from handpose.errors import UserError, free_bytes, size_text
from handpose.report.preflight import disk_line, points_table
from handpose.report.words import params_text
from handpose.schedulers.scheduler import Rule
from handpose.search.space import Params, Space, default_point
from handpose.sweep.controller.slots import LEAST_PROCESS_MB, Slots, count_slots, memory_line, num_fitting
from handpose.sweep.execution.nodes import cluster_resources, live_resources
from handpose.sweep.execution.probe_worker import Bench, Neighbours
from handpose.sweep.execution.worker_group import check_pickles
from handpose.sweep.preflight.checks import check_loaders, check_plan
from handpose.sweep.preflight.forecast import cost_lines, retraining, table_rows
from handpose.sweep.preflight.gpu_sharing import choose, cores_a_gpu
from handpose.sweep.preflight.probe import RANDOM, Probed, points_of, probe, without_effect
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.storage.retention import KEPT_A_TRIAL
from handpose.sweep.trainable.reporting import Objective
from handpose.sweep.trainable.trial import TrialRecipe
from handpose.sweep.trainable.trial_cost import DataSize
from handpose.whole_file import nearest

_BRIEF_S = 60.0


def preflight(
    slots: Slots,
    *,
    sweep: SweepSettings,
    space: Space,
    recipe: TrialRecipe,
    objective: Objective,
    make_rule: Callable[[], Rule],
    data: DataSize,
    defaults: Mapping[str, Any],
    use_val: bool = False,
    say: Callable[[str], None] = print,
) -> Slots:
    """Train points of the space for a few steps, each as trials are, and say what a trial and the sweep will cost.

    Within a running Ray. slots: that trials will have. objective: what they run. data: of the default configuration.
    defaults: as `default_point` takes them. use_val: the winner is retrained on the validation split too.
    sweep.preflight: `brief` tries the space's ends, two points at random and every option of every choice; `only` more,
    for longer, pretrained weights included; `off` nothing. Returns the slots with the memory that a trial takes, which
    may be fewer than before, and with the share of a GPU that it has found out. Raises UserError, which names the
    parameters, where a point cannot be trained, and where objective, disk, memory or GPU are not up to it.
    """
    if sweep.preflight == "off":
        return slots
    is_brief, rule, default = sweep.preflight == "brief", make_rule(), _default(space, defaults)
    points = points_of(space, num_random=2 if is_brief else 8)
    if not is_brief:
        say(f"trying {len(points)} points of {space.name} on a worker\n")
    with Bench(cpus=slots.cpus, gpus=slots.gpus, recipe=recipe, data=data) as bench:
        check_pickles(objective)  # while the worker imports what it needs
        probed = probe(
            bench,
            points,
            space=space,
            default=default,
            num_steps=3 if is_brief else 8,
            weights=not is_brief,
            time_s=_BRIEF_S if is_brief else math.inf,
        )
        idle = [] if is_brief else list(without_effect(bench, probed, default or probed.points[0].params))
    for cost in probed.costs:
        check_plan(sweep, rule, validates_every=cost.validates_every)
    lines = []
    gpus = slots.gpus
    if sweep.gpus_per_trial == "auto" and gpus:
        gpus, line = _sharing(sweep, slots, recipe, data, probed)
        lines.append(line)
        check_loaders(sweep, space, recipe.overrides, data, replace(slots, gpus=gpus))
    nodes = live_resources()
    slots = count_slots(sweep, nodes, gpus=gpus, process_mb=_process_mb(probed))
    disk, *warnings = _check_disk(sweep, slots, rule, probed)
    warnings += [*_check_gpu_share(slots, probed), *_check_objective(sweep, space, probed)]
    warnings += _warnings(space, probed, idle)
    if not is_brief:
        say(points_table(table_rows(probed)) + "\n")
    again = retraining(sweep, recipe, probed, data, use_val=use_val) if sweep.retrain else None
    lines += [*cost_lines(sweep, probed, make_rule, num_slots=slots.num_slots, retrained=again), disk]
    lines += filter(None, [memory_line(sweep, slots, nodes)])
    say("\n".join([*lines, *(f"note        {warning}" for warning in warnings)]))
    return slots


def _process_mb(probed: Probed) -> float:
    """Main memory that a worker with the most demanding point may take, in MB, as far as it is known."""
    measured = [_MEMORY_MARGIN * cost.process_mb for cost in probed.costs if math.isfinite(cost.process_mb)]
    return max([LEAST_PROCESS_MB, *measured])


def _sharing(
    sweep: SweepSettings, slots: Slots, recipe: TrialRecipe, data: DataSize, probed: Probed
) -> tuple[float, str]:
    """The share of a GPU with the highest throughput, and what was measured, in a line."""
    resources = cluster_resources()
    cores = cores_a_gpu(resources, cpus_per_trial=sweep.cpus_per_trial)
    without_gpu = replace(slots, gpus=0.0, process_mb=_process_mb(probed))
    in_memory = sum(num_fitting(without_gpu, node) for node in live_resources() if node.get("GPU", 0))
    typical = min(probed.points, key=lambda point: point.label != RANDOM)
    neighbours = Neighbours(cpus=sweep.cpus_per_trial, recipe=recipe, data=data, params=typical.params)
    choice = choose(
        max(cost.memory_share for cost in probed.costs),
        most=max(1, min(cores, int(in_memory // resources["GPU"]))),
        steps_per_s=neighbours.steps_per_s,
    )
    return choice.gpus_per_trial, choice.line()


def _default(space: Space, defaults: Mapping[str, Any]) -> Params | None:
    """Parameters of the default configuration, where it lies in the space."""
    draws = default_point(space, defaults)
    return None if draws is None else space.suggest(optuna.trial.FixedTrial(draws))


def _check_disk(sweep: SweepSettings, slots: Slots, rule: Rule, probed: Probed) -> list[str]:
    """What the disk has for checkpoints, and warnings; raises UserError where it has too little for any sweep."""
    place = nearest(sweep.path)
    free_gb = free_bytes(place) / 1e9
    largest_gb = max(cost.checkpoint_mb for cost in probed.costs) / 1e3
    running_gb = slots.num_slots * KEPT_A_TRIAL * largest_gb
    waiting_gb = sweep.num_trials * largest_gb if rule.needs_checkpoints else 0.0
    needed_gb, budget = running_gb + waiting_gb, f"sweep.checkpoint_budget_gb={sweep.checkpoint_budget_gb:g}"
    if free_gb < min(needed_gb, sweep.checkpoint_budget_gb):
        free, needed, largest = (size_text(1e9 * each) for each in (free_gb, needed_gb, largest_gb))
        raise UserError(
            f"{place} has {free} free, but the sweep's checkpoints need {needed} ({largest} each) within {budget}; "
            "make room, or set DIR_SCRATCH to a folder on another disk"
        )
    line = disk_line(
        checkpoint_mb=1e3 * largest_gb,
        needed_gb=needed_gb,
        budget_gb=sweep.checkpoint_budget_gb,
        free_gb=free_gb,
        folder=str(place),
    )
    if sweep.checkpoint_budget_gb >= needed_gb:
        return [line]
    begin = "trials that wait at a rung begin anew" if rule.needs_checkpoints else "a damaged checkpoint has no other"
    return [line, f"{budget} may be too small: the sweep may hold {needed_gb:.3g} GB, without which {begin}"]


def _check_gpu_share(slots: Slots, probed: Probed) -> list[str]:
    """Warnings where trials that share a GPU do not fit beside each other; raises UserError where none does."""
    num_sharing = int(1 / slots.gpus) if 0 < slots.gpus < 1 else 1
    shares = sorted(cost.memory_share for cost in probed.costs if cost.gpu)
    if num_sharing == 1 or not shares or shares[-1] * num_sharing <= 1:
        return []
    told = (
        f"sweep.gpus_per_trial={slots.gpus:g} puts {num_sharing} trials on a GPU, but one takes up to "
        f"{shares[-1]:.0%} of its memory; a larger sweep.gpus_per_trial or a smaller data.batch_size fits"
    )
    if shares[0] * num_sharing > 1:
        raise UserError(told)
    return [told]


def _check_objective(sweep: SweepSettings, space: Space, probed: Probed) -> list[str]:
    """Warnings where the second objective tells no trial from another; raises UserError where it cannot be measured."""
    name = sweep.second_objective
    if name is None:
        return []
    found = {float(getattr(cost, name)) for cost in probed.costs}
    if not all(map(math.isfinite, found)):
        raise UserError(f"sweep.second_objective={name} cannot be measured on this device; give num_parameters or null")
    if len(found) > 1:
        return []
    return [f"search_space={space.name}: sweep.second_objective={name} is {found.pop():g} at every point tried"]


def _warnings(space: Space, probed: Probed, idle: Sequence[str]) -> Iterator[str]:
    if probed.num_left_out:
        yield f"{probed.num_left_out} more points were not tried, to be brief; sweep.preflight=only tries them all"
    for key in dict.fromkeys(key for cost in probed.costs for key in cost.ignored):
        yield f"search_space={space.name}: {key} has no effect, because every trial has the sweep's own value"
    for key in idle:
        yield f"search_space={space.name}: {key} made no difference to the first steps of the default configuration"
    for point, cost in zip(probed.points, probed.costs, strict=True):
        if not all(map(math.isfinite, cost.trace)):
            where = params_text(point.params)
            yield f"search_space={space.name}: within a few steps of random pictures this is not finite: {where}"


_MEMORY_MARGIN = 1.1
"""A trial takes more main memory than its first steps did (5 % more after two epochs)."""
