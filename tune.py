"""Sweep, confirm, retrain, predict the test split, report: `python tune.py`, with any configuration key=value."""

import sys

from omegaconf import DictConfig

from handpose.config import script, task_overrides
from handpose.report.front import front_text
from handpose.report.summary import summary
from handpose.sweep.analysis.report import REPORT, write_report
from handpose.sweep.analysis.status import print_status
from handpose.sweep.driver.resume import held_line, new_task, task_to_resume
from handpose.sweep.driver.run import SweepHaltedError, going_on
from handpose.sweep.driver.shutdown import INTERRUPTED, SweepInterruptedError
from handpose.sweep.plan import Plan, planned
from handpose.sweep.selection.winner import NoWinnerError, select_winner, write_chosen
from handpose.sweep.storage.folder_sync import Mirror, NotKeptError, mirrored
from handpose.sweep.trainable.trial import with_params


def main(config: DictConfig) -> None:
    """Sweep, confirm, retrain, test, and tell what came out; or go on with that."""
    if config.sweep.status:
        print_status(config.sweep.status)
        return
    task = task_to_resume(config, task_overrides()) if config.sweep.resume else new_task(config)
    plan = planned(task)
    if line := held_line(task):
        print(line, flush=True)
    if plan.sweep.preflight == "only":
        plan.try_out()
        return
    with mirrored(plan.sweep) as mirror:
        run(plan, mirror)


def run(plan: Plan, mirror: Mirror | None) -> None:
    """From the first trial to the report. mirror: that keeps the sweep in a store."""
    with plan.swept(mirror=mirror) as table:
        spent = going_on(plan.sweep, table)
        if spent:
            print(spent, flush=True)
        confirmed = plan.confirmed(table, mirror=mirror)

    sweep, folder, use_val = plan.sweep, plan.sweep.path, plan.task.config.retrain.use_val
    winner = select_winner(table, folder=folder, confirmed=confirmed)
    write_chosen(
        table,
        winner,
        overrides=lambda row: with_params(plan.recipe.overrides, row.params),
        sweep=sweep,
        origin=plan.origin,
        confirmed=confirmed,
    )
    retrained = plan.retrained(use_val=use_val) if sweep.retrain else None
    found = summary(
        table=table,
        winner=winner,
        defaults=plan.task.defaults,
        confirmed=confirmed,
        retrained=retrained,
        use_val=use_val,
        folder=folder,
    )
    print(*filter(None, [front_text(table), found, spent]), sep="\n", flush=True)
    print(write_report([folder], folder / REPORT, scientific=plan.task.config.report.scientific).text)


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
