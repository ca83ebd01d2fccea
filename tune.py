"""Sweep, confirm, retrain, predict the test split, report: `python tune.py`, with any configuration key=value."""

import contextlib
import sys
from functools import partial

from hydra.utils import instantiate
from omegaconf import DictConfig

from handpose.config import script, task_overrides
from handpose.report.front import front_text
from handpose.report.summary import summary
from handpose.sweep.confirm import confirm
from handpose.sweep.mirror import NotKeptError, mirrored
from handpose.sweep.preflight import check_plan, check_space, check_sweep, preflight, survey
from handpose.sweep.provenance import provenance
from handpose.sweep.reporting import REPORT, check_scientific, write_report
from handpose.sweep.resume import check_data, description, new_task, task_to_resume
from handpose.sweep.retrain import retrain
from handpose.sweep.rules import Fifo
from handpose.sweep.run import INTERRUPTED, SweepHaltedError, SweepInterruptedError, swept, try_out
from handpose.sweep.scheduler import rule_maker
from handpose.sweep.select import NoWinnerError, select_winner, write_chosen
from handpose.sweep.status import print_status
from handpose.sweep.stored_sweep import check_storage
from handpose.sweep.trial import TrainingObjective, TrialRecipe, training_overrides, with_params


def main(config: DictConfig) -> None:
    """Sweep, confirm, retrain, test, and tell what came out; or go on with that."""
    if config.sweep.status:
        print_status(config.sweep.status)
        return
    with contextlib.ExitStack() as kept:
        tune(config, kept)


def tune(config: DictConfig, kept: contextlib.ExitStack) -> None:
    """The same; kept: until it is over."""
    task = task_to_resume(config, task_overrides()) if config.sweep.resume else new_task(config)
    config, space = task.config, task.space
    sweep, cluster = instantiate(config.sweep), instantiate(config.ray)
    overrides = training_overrides(task.overrides)
    check_sweep(sweep, cluster)
    check_storage(sweep)
    check_space(space, overrides, is_grid=config.searcher.sampler is None, num_workers=sweep.workers_per_trial)
    check_scientific(config.report.scientific, space)
    fresh_rule = rule_maker(instantiate(config.scheduler), sweep, space)
    data = survey(config)
    check_data(task, data.fingerprint)
    check_plan(
        sweep,
        fresh_rule(),
        validates_every=config.trainer.check_val_every_n_epoch,
        metric_names=data.metric_names,
    )
    origin = task.origin or provenance(data=data.fingerprint)
    recipe = TrialRecipe(overrides, task.locations, sweep.max_epochs, sweep.cpus_per_trial, sweep.workers_per_trial)
    measures = sweep.second_objective is not None or any(config.searcher.constraints.values())
    objective = TrainingObjective.of(recipe, sweep, fresh_rule(), measures=measures)
    tried = partial(
        preflight,
        sweep=sweep,
        space=space,
        recipe=recipe,
        objective=objective,
        make_rule=fresh_rule,
        data=data.size,
        defaults=task.defaults,
    )
    if sweep.preflight == "only":
        try_out(sweep, cluster, tried)
        return

    mirror = kept.enter_context(mirrored(sweep))
    with swept(
        sweep=sweep,
        cluster=cluster,
        space=space,
        searcher=partial(instantiate(config.searcher), defaults=task.defaults, fingerprint=data.fingerprint),
        rule=fresh_rule,
        objective=objective,
        command=recipe.command,
        description=None if task.origin else description(task, origin),
        preflight=tried,
        mirror=mirror,
    ) as table:
        confirmed = confirm(
            table,
            sweep=sweep,
            cluster=cluster,
            space=space,
            defaults=task.defaults,
            objective=TrainingObjective.of(recipe, sweep, Fifo(), measures=False),
            command=recipe.command,
            origin=origin,
            mirror=mirror,
        )

    winner = select_winner(table, folder=sweep.path, confirmed=confirmed)
    write_chosen(
        table,
        winner,
        overrides=lambda row: with_params(overrides, row.params),
        sweep=sweep,
        origin=origin,
        confirmed=confirmed,
    )
    use_val = config.retrain.use_val
    retrained = retrain(sweep.path, devices=sweep.retrain_devices, use_val=use_val) if sweep.retrain else None
    found = summary(
        table=table,
        winner=winner,
        defaults=task.defaults,
        confirmed=confirmed,
        retrained=retrained,
        use_val=use_val,
        folder=sweep.path,
    )
    print(*filter(None, [front_text(table), found]), sep="\n", flush=True)
    print(write_report([sweep.path], sweep.path / REPORT, scientific=config.report.scientific).text)


def guarded(config: DictConfig) -> None:
    """Leave with a sentence and a status of its own where the sweep came to nothing or was ended by hand."""
    try:
        main(config)
    except (NoWinnerError, SweepHaltedError) as error:
        sys.exit(f"error: {error}")
    except (SweepInterruptedError, NotKeptError) as error:
        print(error, file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    script("tune", guarded)
