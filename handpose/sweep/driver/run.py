"""Runs a sweep: Tune asks the searcher for trials and obeys the scheduler, and the recorder logs what happens."""

import contextlib
import resource
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

from filelock import Timeout

from handpose.errors import UserError, explain_file_error, is_about_files
from handpose.locks import hold_lock
from handpose.report.notify import Notifier
from handpose.report.reasons import format_spent_budget
from handpose.report.tensorboard import TensorBoardSweepLog
from handpose.report.terminal import SweepView, format_warm_start, make_sweep_view
from handpose.report.trial_table import TrialTable
from handpose.report.weights_and_biases import WandbLog
from handpose.schedulers.scheduler import Scheduler
from handpose.search.searcher import Searcher
from handpose.search.space import Space
from handpose.sweep.controller.controller import SweepController
from handpose.sweep.controller.history import History, make_empty_table
from handpose.sweep.controller.scheduler_and_searcher import make_searcher
from handpose.sweep.controller.slots import (
    MIN_PROCESS_MB,
    Slots,
    count_slots,
    format_memory,
)
from handpose.sweep.controller.steering import SteeringChecks
from handpose.sweep.controller.stopping_rule import make_stopping_rule
from handpose.sweep.driver.cluster_use import ClusterUse
from handpose.sweep.driver.intervention_inbox import InterventionInbox
from handpose.sweep.driver.recorder import Recorder, TrialLog
from handpose.sweep.driver.resume import SPACE_FOLDER, copy_space
from handpose.sweep.driver.shutdown import SweepInterruptedError, exit_at_once, handle_interrupts
from handpose.sweep.execution.autoscaling import wait_for_node
from handpose.sweep.execution.nodes import list_live_resources, watch_head
from handpose.sweep.execution.runtime import limit_cpus, set_ray_environment, start_ray
from handpose.sweep.execution.storage_access import check_nodes
from handpose.sweep.execution.tune_bridge import (
    TuneBridge,
    build_tuner,
    run_tuner,
)
from handpose.sweep.execution.worker_start import StartWatch
from handpose.sweep.record.events import EVENTS_FILE, EventLog, SpaceRecord, read_events
from handpose.sweep.record.interventions import InterventionFiles
from handpose.sweep.record.provenance import PROCESS_MB
from handpose.sweep.record.settings import LOCK, STOP_WHEN_KEY, RaySettings, SweepSettings, format_resume_command
from handpose.sweep.record.trial_segment import make_run_name
from handpose.sweep.storage.checkpoint_files import CheckpointFiles
from handpose.sweep.storage.folder_sync import FolderSync, open_checkpoint_files
from handpose.sweep.trainable.reporting import TrialFunction
from handpose.yaml_files import read_yaml, write_yaml

_UNLIMITED = str(10**6)
_HEAD_LOST_MESSAGE = "the head of the Ray cluster no longer answers"


class SweepHaltedError(Exception):
    """The sweep stopped because all of its first trials failed. It can be resumed when the cause is fixed."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """A sweep to run, with everything that this takes.

    Attributes:
        sweep: the settings of the sweep.
        cluster: which Ray cluster to use.
        space: the search space with which the sweep began.
        searcher: creates the searcher; it lacks only what the sweep adds, such as the space and the metric.
        make_scheduler: creates a new scheduler.
        trial_function: the function that trains a segment in a worker.
        command: returns the command line that trains a trial's parameters again; see `History`.
        description: the content of sweep.yaml; None: resume the sweep in the folder. A resumed sweep that is finished,
            or whose budget is still spent, is only read.
        preflight: checks and measures trials before the first one starts, and returns the slots to use.
        folder_sync: copies the sweep's folder to a store; None: the sweep has no store.
        on_resume: called when a sweep is about to be resumed, while its lock is held.
        on_lock: called once this process holds the lock of the sweep and the sweep has a folder.
        needs_report: whether the sweep goes on with a spent budget until a trial has reported.
        num_points: how many trials the searcher can propose; None: any number, or it is not known yet.
        notifier: sends messages about the trials; None: nothing is sent.
        checks: checks of the user's commands that need the configuration.
        load_space: makes a search space to which the user changes; None: a sweep that searches none.
        later_space: the newest search space, if the user has changed it already; None: it is still `space`.
        process_mb: main memory of a worker in MB, as far as it is known before the preflight. A resumed sweep uses the
            value that its own preflight measured.
    """

    sweep: SweepSettings
    cluster: RaySettings
    space: Space
    searcher: Callable[..., Searcher]
    make_scheduler: Callable[[], Scheduler]
    trial_function: TrialFunction
    command: Callable[..., str]
    description: Mapping[str, Any] | None
    preflight: Callable[[Slots], Slots] = lambda slots: slots
    folder_sync: FolderSync | None = None
    on_resume: Callable[[], None] = lambda: None
    on_lock: Callable[[], None] = lambda: None
    needs_report: bool = False
    num_points: int | None = None
    notifier: Notifier | None = None
    checks: SteeringChecks | None = None
    load_space: Callable[[SpaceRecord], Space] | None = None
    later_space: Space | None = None
    process_mb: float = MIN_PROCESS_MB

    @cached_property
    def files(self) -> CheckpointFiles:
        """The checkpoints of the sweep."""
        return open_checkpoint_files(self.folder_sync, self.sweep.path)

    def make_history(self) -> History:
        """Make the history of a sweep in which nothing has happened yet."""
        table = make_empty_table(self.sweep)
        return History(
            self.sweep,
            scheduler=self.make_scheduler(),
            table=table,
            files=self.files,
            command=self.command,
            load_space=self.load_space,
        )

    def make_searcher(self, folder: Path, **changes: Any) -> Searcher:
        """Make the searcher, with its study in a folder."""
        repeats = self.make_scheduler().perturbs_params
        return make_searcher(self.searcher, self.sweep, self.space, repeats=repeats, folder=folder, **changes)


@contextlib.contextmanager
def run_sweep(run: SweepRun) -> Iterator[TrialTable]:
    """Run trials until all are done or a budget is spent, and yield the table of trials.

    Ray is started unless it already runs. It is shut down at the end of the `with` block, so the code in the block can
    still use it. For a finished sweep Ray is not started, unless an intervention of the user waits.

    Raises:
        UserError: a trial does not fit into the resources of Ray, or another process already runs the sweep.
        SweepInterruptedError: the sweep was interrupted.
        SweepHaltedError: all of the first trials failed.
    """
    if run.description is not None:
        _check_searcher(run)
    else:
        history = run.make_history()
        finished = read_finished_table(run.sweep.path, history, num_points=run.num_points)
        if finished and not InterventionFiles(run.sweep.path).list_waiting(history.interventions):
            yield finished
            return
    with contextlib.ExitStack() as stack:
        slots = _prepare(run, stack)
        yield _search(run, slots)


def _check_searcher(run: SweepRun) -> None:
    """Create a temporary searcher, so that mistakes in its options are reported before Ray starts."""
    with tempfile.TemporaryDirectory() as folder:
        run.make_searcher(Path(folder), storage=None).close()


def _prepare(run: SweepRun, stack: contextlib.ExitStack) -> Slots:
    """Start Ray and lock the folder until the stack is closed; for a new sweep, run the preflight and begin its files.

    Returns:
        The slots of the sweep.
    """
    sweep, folder, is_resumed, process_mb = run.sweep, run.sweep.path, run.description is None, run.process_mb
    if is_resumed:
        stack.enter_context(_lock_sweep_folder(folder))
        run.on_resume()
        run.on_lock()
        process_mb = read_process_mb(folder)
    _start_cluster(stack, run.cluster, sweep)  # before any file is made: it may not answer
    slots = count_slots(sweep, list_live_resources(), process_mb=process_mb)
    is_estimate = process_mb == MIN_PROCESS_MB and sweep.preflight == "off"  # otherwise the preflight prints it
    if (is_resumed or is_estimate) and (line := format_memory(sweep, slots, list_live_resources())):
        print(line, flush=True)
    if run.description is not None:
        slots = run.preflight(slots)
        stack.enter_context(_lock_sweep_folder(folder))
        _write_description(folder, run.space, {**run.description, PROCESS_MB: round(slots.process_mb)})
        run.on_lock()
    return slots


def _start_cluster(stack: contextlib.ExitStack, cluster: RaySettings, sweep: SweepSettings) -> None:
    """Start or join Ray until the stack is closed, with at least one node for a trial, and check its nodes."""
    stack.enter_context(set_ray_environment())
    stack.enter_context(start_ray(limit_cpus(cluster, sweep)))
    wait_for_node(sweep, cluster)
    check_nodes(sweep)


def _search(run: SweepRun, slots: Slots) -> TrialTable:
    """Run the trials that are left, and return the table of all trials."""
    sweep, space = run.sweep, run.later_space or run.space
    with (
        contextlib.closing(run.make_searcher(sweep.path / "study", resume=run.description is None)) as searcher,
        contextlib.closing(EventLog(sweep.path / EVENTS_FILE)) as log,
    ):
        print(*map(format_warm_start, searcher.warm_start), sep="\n", end="\n" * bool(searcher.warm_start), flush=True)
        make_rule = partial(make_stopping_rule, space=space)
        state = SweepController(
            sweep,
            log=log,
            history=run.make_history(),
            searcher=searcher,
            make_stopping_rule=make_rule,
            checks=run.checks,
        )
        if searcher.num_points is not None and searcher.num_points < sweep.num_trials:
            print(
                f"search_space={space.name} has {searcher.num_points} configurations, so fewer trials are run than "
                f"sweep.num_trials={sweep.num_trials}: none is trained twice",
                flush=True,
            )
        num_trials = min(sweep.num_trials, searcher.num_points or sweep.num_trials)
        if sweep.stop_when is not None and (min_trials := make_rule(sweep).min_trials) > num_trials:
            print(
                f"sweep.stop_when={sweep.stop_when:g} has no effect on {num_trials} trials: it needs at least "
                f"{min_trials}, ten for each searched parameter of search_space={space.name}",
                flush=True,
            )
        if sweep.gpus_per_trial == "auto" and state.past_events:  # an earlier run has measured it
            slots = count_slots(
                sweep, list_live_resources(), gpus=state.history.gpus, process_mb=read_process_mb(sweep.path)
            )
        if run.folder_sync is not None:
            run.folder_sync.sync_all()
        _run_trials(run, slots, state)
    return state.history.table


def read_process_mb(folder: Path) -> float:
    """Return the main memory of a worker, in MB, that the preflight of the sweep in a folder measured."""
    return float(read_yaml(folder / "sweep.yaml").get(PROCESS_MB, MIN_PROCESS_MB))


def run_preflight_alone(
    sweep: SweepSettings,
    cluster: RaySettings,
    preflight: Callable[[Slots], Slots],
    *,
    stack: contextlib.ExitStack | None = None,
) -> Slots:
    """Run only the preflight of a sweep, with Ray set up as the sweep would use it. No file is written.

    Args:
        sweep: the settings of the sweep.
        cluster: which Ray cluster to use.
        preflight: the preflight.
        stack: keeps Ray running until it is closed; None: Ray is shut down.

    Returns:
        The slots that the preflight returns.
    """
    with contextlib.ExitStack() as started:
        _start_cluster(started, cluster, sweep)
        slots = preflight(count_slots(sweep, list_live_resources()))
        if stack is not None:
            stack.enter_context(started.pop_all())
        return slots


def read_finished_table(folder: Path, history: History, *, num_points: int | None = None) -> TrialTable | None:
    """Return the table of a sweep that has nothing left to run or whose budget is still spent.

    Args:
        folder: the folder of the sweep.
        history: an empty history; the events are replayed into it.
        num_points: how many trials the searcher can propose; None: any number.

    Returns:
        The table; None: the sweep can continue.

    Raises:
        UserError: the events are damaged, or replaying them leads to other decisions.
    """
    events = read_events(folder / EVENTS_FILE)
    num_trials = history.num_trials if num_points is None else min(history.num_trials, num_points)
    history.replay(events)
    table = history.table
    table.num_trials = history.num_trials
    # Earlier versions closed a sweep as finished when its budget was spent, although it had trials left to start.
    has_more = num_trials > history.num_trials or history.can_start_trial
    if table.end == "finished" and not has_more:
        return table
    if table.end in ("finished", "spent") and history.spent_budget is not None:
        table.end = "spent"
        return table
    return None


@contextlib.contextmanager
def _lock_sweep_folder(folder: Path) -> Iterator[None]:
    """Prevent other processes from running the same sweep. The lock of a killed process is free.

    A new folder is accessible to its owner only: its files say how to run the sweep, so whoever could write there could
    change what the sweep resumes from. A user who wants to share the folder can change its mode, which is kept.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder / LOCK, mode=0o700))
        except Timeout as error:
            raise UserError(f"the sweep in {folder} is running already, in another process") from error
        yield


def _run_trials(run: SweepRun, slots: Slots, state: SweepController) -> None:
    sweep = run.sweep

    def must_end() -> bool:
        return run.folder_sync is not None and run.folder_sync.has_lost_lease

    table, retention = state.history.table, state.history.retention
    table.num_slots = slots.num_slots
    table.checkpoint_budget_bytes = retention.budget_bytes
    view = _make_view(run, state)
    _raise_open_file_limit()
    with _add_resume_command(sweep), contextlib.closing(view), handle_interrupts(sweep, must_end) as is_interrupted:
        recorder = Recorder(
            table,
            folder=sweep.path,
            retention=retention,
            refresh_times=state.refresh_times,
            view=view,
            logs=open_trial_logs(sweep, table),
            notifier=run.notifier,
        )
        recorder.restore(state.past_events)
        state.open(num_slots=slots.num_slots, gpus=slots.total_gpus, listener=recorder)
        table.num_trials = state.history.num_trials
        view.refresh(table)
        inbox = InterventionInbox(sweep.path, state, show_note=view.show_note)
        inbox.process(at_once=True)  # before the budget is checked: an intervention may raise it
        use = ClusterUse(run.cluster, slots, state, view)
        bridge = TuneBridge(
            state,
            sweep,
            nodes=use.nodes,
            starts=StartWatch(view.show_note),
            is_interrupted=is_interrupted,
            needs_report=run.needs_report,
            process_interventions=inbox.process,
            record_utilisation=recorder.add_utilisation,
            keeps_idle_workers=use.keeps_idle_workers,
        )

        def on_every_step() -> None:
            bridge.process_interventions()
            use.refresh()
            recorder.refresh()

        # By default Tune asks a custom searcher for one trial, and for the next one only when that trial has a worker.
        # Here the controller limits how many trials run at a time.
        with (
            watch_head(partial(_end_without_ray, run), is_ending=is_interrupted),
            set_ray_environment(TUNE_MAX_PENDING_TRIALS_PG=_UNLIMITED),
            contextlib.closing(use),
        ):
            run_tuner(build_tuner(sweep, slots, bridge, run.trial_function, every_step=on_every_step), bridge)
        if not is_interrupted():
            state.close("finished")
    _check_end(sweep, state, is_interrupted=is_interrupted())


def _make_view(run: SweepRun, state: SweepController) -> SweepView:
    parts = [f"sweep {run.sweep.name}", (run.later_space or run.space).name, *["resumed"] * bool(state.past_events)]
    return make_sweep_view("  ·  ".join(parts), time_budget_s=run.sweep.time_budget_s, used_s=state.elapsed_s())


def _check_end(sweep: SweepSettings, state: SweepController, *, is_interrupted: bool) -> None:
    """Raise an error if the sweep was interrupted or has given up."""
    if is_interrupted:
        raise SweepInterruptedError(f"the sweep was interrupted; to resume: {format_resume_command(sweep.resume_path)}")
    if state.halted_by is not None:
        raise SweepHaltedError(
            f"the first {sweep.stop_after_failures} trials failed before any had reported an epoch, the last one with: "
            f"{state.halted_by.cause} (traceback: {sweep.path / 'trials.csv'}); correct the cause and resume with "
            f"{format_resume_command(sweep.resume_path)}"
        )


def _end_without_ray(run: SweepRun) -> NoReturn:
    """End the process after Ray is gone, because the main thread may be waiting for Ray.

    Before that, everything is copied to the store except the study, which may contain a trial that no event mentions.
    """
    try:
        if run.notifier is not None:
            command = format_resume_command(run.sweep.resume_path)
            run.notifier.send("interrupted", f"{_HEAD_LOST_MESSAGE}; to resume: {command}")
            run.notifier.close()
        if run.folder_sync is not None:
            run.folder_sync.finish(timeout_s=0.0, with_study=False)
    finally:
        exit_at_once(run.sweep, _HEAD_LOST_MESSAGE)


@contextlib.contextmanager
def _add_resume_command(sweep: SweepSettings) -> Iterator[None]:
    """Add the command that resumes the sweep to the error when a file cannot be written, for example on a full disk."""
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not is_about_files(error):
            raise
        said = explain_file_error(error, error.filename or sweep.path) if isinstance(error, OSError) else error
        raise UserError(f"{said}; to resume: {format_resume_command(sweep.resume_path)}") from error


def _write_description(folder: Path, space: Space, description: Mapping[str, Any]) -> None:
    """Write the space and sweep.yaml of a new sweep. If that fails, the name of the sweep remains free."""
    try:
        copy_space(space, folder)
        write_yaml(folder / "sweep.yaml", description)
    except OSError:
        shutil.rmtree(folder / SPACE_FOLDER, ignore_errors=True)
        raise


def _raise_open_file_limit() -> None:
    """Raise the limit of open files as far as allowed.

    Each running trial has a log and a connection, and a limit of 1,024 is common.
    """
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def open_trial_logs(sweep: SweepSettings, table: TrialTable) -> list[TrialLog]:
    """Open TensorBoard and the other logs that the settings ask for.

    The runs of a confirmation are not in the HParams tab: their seeds would be a column that no other trial has.

    Args:
        sweep: the settings of the sweep.
        table: the trials so far.
    """
    in_tab = sweep.resume_path == sweep.path
    rows = table.rows.values()
    logs: list[TrialLog] = [
        TensorBoardSweepLog(sweep.path / "tensorboard", run_name=make_run_name, in_tab=in_tab, rows=rows)
    ]
    if sweep.wandb_project is not None:
        logs.append(WandbLog(sweep.path, project=sweep.wandb_project, group=sweep.name, run_name=make_run_name))
    return logs


def describe_spent_budget(
    sweep: SweepSettings, table: TrialTable, *, whole: str = "", larger_whole: str = "", planned: Collection[str] = ()
) -> str:
    """Return a line that says how to resume a sweep whose budget is spent; empty for any other sweep.

    Args:
        sweep: settings of the sweep.
        table: its trials.
        whole: the budget of the whole run, if there is one.
        larger_whole: overrides that give a larger one.
        planned: keys whose values are parts of this budget.
    """
    budget = sweep.change_limits(table.changed_limits).find_spent_budget(
        elapsed_s=table.elapsed_s, gpu_hours=table.gpu_hours, expected_gain=table.expected_gain
    )
    if table.end != "spent" or budget is None:
        return ""
    num_over = sum(row.is_over for row in table.rows.values())
    if budget.key == STOP_WHEN_KEY:
        return (
            f"ended       {format_spent_budget(*budget)}; {num_over} of {table.num_trials} trials have ended. "
            f"To go on: {format_resume_command(sweep.resume_path)} {budget.resume_override}"
        )
    is_part = bool(whole) and budget.key in planned
    what = f"the part of {whole} for the trials" if is_part else f"{budget.key}={budget.amount:g}"
    return (
        f"budget      {what} is spent; {num_over} of {table.num_trials} trials have ended. To resume with a larger "
        f"one: {format_resume_command(sweep.resume_path)} {larger_whole if is_part else budget.resume_override}"
    )
