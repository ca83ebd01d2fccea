"""Hyper-parameter search: sweep, confirm, retrain, predict the test split, report. `python tune.py key=value ...`"""

import contextlib
import sys

from omegaconf import DictConfig

from handpose.errors import UserError
from handpose.program import list_task_overrides, run_script
from handpose.report.budget import format_budget_use
from handpose.report.notify import Notifier, format_result, notify_of_end, open_addresses
from handpose.report.pareto_front import format_front
from handpose.report.summary import format_summary
from handpose.sweep.analysis.read_sweep import read_combined_seeds
from handpose.sweep.analysis.report import REPORT_FILE, write_report
from handpose.sweep.analysis.status import print_status
from handpose.sweep.budgeted_plan import plan_within_budget, resolve_auto_budget, resolve_finish_by
from handpose.sweep.driver.resume import describe_fixed_params, load_task_to_resume, make_new_task
from handpose.sweep.driver.run import SweepHaltedError
from handpose.sweep.driver.shutdown import INTERRUPTED_STATUS, SweepInterruptedError
from handpose.sweep.plan import SweepPlan, build_plan
from handpose.sweep.resumed_budget import limit_resumed_plan
from handpose.sweep.selection.winner import NoWinnerError, select_winner, write_winner
from handpose.sweep.storage.folder_sync import FolderSync, SyncIncompleteError, sync_sweep_folder
from handpose.sweep.trainable.trial import add_param_overrides


def main(config: DictConfig) -> None:
    """Start or resume a sweep, with its confirmation, retraining and report."""
    if config.sweep.status:
        print_status(config.sweep.status)
        return
    addresses = open_addresses()
    is_new = not config.sweep.resume
    task = resolve_auto_budget(make_new_task(config)) if is_new else load_task_to_resume(config, list_task_overrides())
    plan = build_plan(resolve_finish_by(task))
    if line := describe_fixed_params(task):
        print(line, flush=True)
    options = task.config.notify
    notifier = Notifier(addresses, events=options.events, gap_s=options.gap_s, name=plan.sweep.name)
    interruptions = (SweepInterruptedError, SyncIncompleteError)
    with notify_of_end(notifier, interruptions=interruptions), contextlib.ExitStack() as ray_stack:
        if is_new and plan.clock.is_limited:
            plan = plan_within_budget(plan, ray_stack)
        elif plan.sweep.preflight == "only":
            plan.run_preflight_alone()
        if plan.sweep.preflight == "only":
            return
        plan = plan if is_new else limit_resumed_plan(plan)
        with sync_sweep_folder(plan.sweep) as mirror, plan.clock.close_at_end():
            run_steps(plan, mirror, ray_stack, notifier)


def run_steps(
    plan: SweepPlan, folder_sync: FolderSync | None, ray_stack: contextlib.ExitStack, notifier: Notifier
) -> None:
    """Run all steps from the first trial to the report.

    Args:
        plan: the plan of the sweep.
        folder_sync: keeps the sweep in an object store; None: the sweep has no store.
        ray_stack: keeps Ray running if it has been started already. It is closed before the retraining.
        notifier: sends messages about the sweep.
    """
    clock = plan.clock
    clock.enter("trials")
    with ray_stack, plan.run_sweep(folder_sync=folder_sync, notifier=notifier) as table:
        clock.start_saving()  # a sweep without trials left has not been locked
        spent = plan.describe_spent_budget(table)
        if spent:
            print(spent, flush=True)
        clock.enter("confirmation")
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
    clock.enter("retraining")
    retrained, combined, problem = None, None, None
    if sweep.retrain:
        try:
            retrained, combined = plan.retrain_winner(winner, table), read_combined_seeds(folder / "retrain")
        except UserError as error:  # the result of the trials is reported all the same
            problem = error
    clock.enter("report")
    found = format_summary(
        table=table,
        winner=winner,
        defaults=plan.task.defaults,
        confirmed=confirmed,
        retrained=retrained,
        combined=combined,
        train_on_val=use_val,
        folder=folder,
    )
    print(*filter(None, [format_front(table), found, spent]), sep="\n", flush=True)
    print(write_report([folder], folder / REPORT_FILE, scientific=plan.task.config.report.scientific).text)
    if problem is not None:
        raise problem
    measured = retrained if combined is None else combined.mean
    notifier.send("finished", format_result(table, winner, measured, folder / REPORT_FILE))
    if clock.is_limited:
        clock.count_used_s()
        print(format_budget_use(clock.seconds, limit=clock.describe_limit()))


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
