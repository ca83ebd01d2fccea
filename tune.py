"""Sweep, retrain the winner, predict the test split: `python tune.py`, with any configuration key as key=value."""

import sys
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from handpose.config import script, task_overrides
from handpose.report.terminal import summary
from handpose.sweep.preflight import check_plan, check_space, check_sweep, preflight, survey
from handpose.sweep.provenance import provenance
from handpose.sweep.resume import check_data, description, new_task, recorded_task
from handpose.sweep.retrain import retrain
from handpose.sweep.run import INTERRUPTED, SweepHaltedError, SweepInterruptedError, run_sweep, try_out
from handpose.sweep.scheduler import rule_maker
from handpose.sweep.select import NoWinnerError, select_winner, write_best
from handpose.sweep.trial import TrainingObjective, TrialRecipe, training_overrides, with_params


def main(config: DictConfig) -> None:
    """Sweep, retrain, test, and print what came out; or go on with that."""
    folder = config.sweep.resume
    task = recorded_task(Path(folder).expanduser().resolve(), task_overrides()) if folder else new_task(config)
    config, space = task.config, task.space
    sweep, cluster = instantiate(config.sweep), instantiate(config.ray)
    overrides = training_overrides(task.overrides)
    check_sweep(sweep, cluster)
    check_space(space, overrides, is_grid=config.searcher.sampler is None)
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
    recipe = TrialRecipe(overrides, task.locations, sweep.max_epochs, sweep.cpus_per_trial)
    objective = TrainingObjective.of(recipe, sweep, fresh_rule(), measures=any(config.searcher.constraints.values()))
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

    table = run_sweep(
        sweep=sweep,
        cluster=cluster,
        space=space,
        searcher=partial(instantiate(config.searcher), defaults=task.defaults, fingerprint=data.fingerprint),
        rule=fresh_rule,
        objective=objective,
        command=recipe.command,
        description=None if task.origin else description(task, origin),
        preflight=tried,
    )

    # The finalists are not confirmed over seeds yet; it belongs here, between the table and the winner.
    winner = select_winner(table, folder=sweep.path)
    best = sweep.path / "best.yaml"
    write_best(
        best, table=table, row=winner, overrides=with_params(overrides, winner.params), sweep=sweep, origin=origin
    )
    retrained = retrain(sweep.path, devices=sweep.retrain_devices) if sweep.retrain else None
    print(summary(table=table, winner=winner, defaults=task.defaults, retrained=retrained, folder=sweep.path))


def guarded(config: DictConfig) -> None:
    """Leave with a sentence and a status of its own where the sweep came to nothing or was ended by hand."""
    try:
        main(config)
    except (NoWinnerError, SweepHaltedError) as error:
        sys.exit(f"error: {error}")
    except SweepInterruptedError as error:
        print(error, file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    script("tune", guarded)
