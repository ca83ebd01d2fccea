"""Hyper-parameter search: sweep, confirm, retrain, predict the test split, report. `python tune.py key=value ...`"""

import sys

from omegaconf import DictConfig

from handpose.program import list_task_overrides, run_script
from handpose.report.pareto_front import format_front
from handpose.report.summary import format_summary
from handpose.sweep.analysis.report import REPORT_FILE, write_report
from handpose.sweep.analysis.status import print_status
from handpose.sweep.driver.resume import describe_fixed_params, load_task_to_resume, make_new_task
from handpose.sweep.driver.run import SweepHaltedError, describe_spent_budget
from handpose.sweep.driver.shutdown import INTERRUPTED_STATUS, SweepInterruptedError
from handpose.sweep.plan import SweepPlan, build_plan
from handpose.sweep.selection.winner import NoWinnerError, select_winner, write_winner
from handpose.sweep.storage.folder_sync import FolderSync, SyncIncompleteError, sync_sweep_folder
from handpose.sweep.trainable.trial import add_param_overrides


def main(config: DictConfig) -> None:
    """Start or resume a sweep, with its confirmation, retraining and report."""
    if config.sweep.status:
        print_status(config.sweep.status)
        return
    task = load_task_to_resume(config, list_task_overrides()) if config.sweep.resume else make_new_task(config)
    plan = build_plan(task)
    if line := describe_fixed_params(task):
        print(line, flush=True)
    if plan.sweep.preflight == "only":
        plan.run_preflight_alone()
        return
    with sync_sweep_folder(plan.sweep) as mirror:
        run_steps(plan, mirror)


def run_steps(plan: SweepPlan, folder_sync: FolderSync | None) -> None:
    """Run all steps from the first trial to the report.

    Args:
        plan: the plan of the sweep.
        folder_sync: keeps the sweep in an object store; None: the sweep has no store.
    """
    with plan.run_sweep(folder_sync=folder_sync) as table:
        spent = describe_spent_budget(plan.sweep, table)
        if spent:
            print(spent, flush=True)
        confirmed = plan.confirm_finalists(table, folder_sync=folder_sync)

    sweep, folder, use_val = plan.sweep, plan.sweep.path, plan.task.config.retrain.use_val
    winner = select_winner(table, folder=folder, confirmed=confirmed)
    write_winner(
        table,
        winner,
        overrides=lambda row: add_param_overrides(plan.recipe.overrides, row.params),
        sweep=sweep,
        origin=plan.origin,
        confirmed=confirmed,
    )
    retrained = plan.retrain_winner(winner, use_val=use_val) if sweep.retrain else None
    found = format_summary(
        table=table,
        winner=winner,
        defaults=plan.task.defaults,
        confirmed=confirmed,
        retrained=retrained,
        train_on_val=use_val,
        folder=folder,
    )
    print(*filter(None, [format_front(table), found, spent]), sep="\n", flush=True)
    print(write_report([folder], folder / REPORT_FILE, scientific=plan.task.config.report.scientific).text)


def exit_on_sweep_error(config: DictConfig) -> None:
    """Exit with a message and a status if the sweep failed, was interrupted, or could not be copied to its store."""
    try:
        main(config)
    except (NoWinnerError, SweepHaltedError) as error:
        sys.exit(f"error: {error}")
    except (SweepInterruptedError, SyncIncompleteError) as error:
        print(error, file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)


if __name__ == "__main__":
    run_script("tune", exit_on_sweep_error)
