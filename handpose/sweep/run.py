"""Runs a sweep: Tune asks the searcher for trials and obeys the scheduler, the recorder writes it all down."""

import contextlib
import logging
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray import tune
from ray._private.ray_logging import stdout_deduplicator
from ray.tune.experiment import Trial

from handpose.errors import UserError
from handpose.report.table import TrialTable
from handpose.report.terminal import sweep_view, warm_start_line
from handpose.sweep.events import Closed, EventLog, read_events
from handpose.sweep.history import History
from handpose.sweep.preflight import num_cores
from handpose.sweep.provenance import write_yaml
from handpose.sweep.recorder import Recorder
from handpose.sweep.resume import keep_space
from handpose.sweep.rules import Rule
from handpose.sweep.searcher import OptunaSearcher
from handpose.sweep.settings import RaySettings, SweepSettings
from handpose.sweep.space import Params, Space
from handpose.sweep.state import SweepState
from handpose.sweep.stretch import STRETCH, Objective, make_trainable
from handpose.sweep.tuning import Conductor, StateScheduler, StateSearcher, StateStopper, stretch_of

INTERRUPTED = 75
"""Exit status of a sweep that was ended by hand and can go on; sysexits.h calls it a temporary failure."""

EVENTS = "events.jsonl"
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing but reports travels; Ray's own choice is a third of the memory

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its own table, and every error, at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its CSV, JSON and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they stand in trials.csv
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the trials with a state
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # what a trial costs is reported before it has a metric
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nothing is restored from Tune's snapshots
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # else Tune would start the trial again by itself
}
"""What Ray takes from the environment of the driver only."""

_WORKER_ENVIRONMENT = {
    # A trial that was stopped gets this long to leave its epoch, before the worker is given to the next; Ray's 2 s
    # are not enough for a Lightning loop, and the next trial fails then.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class SweepInterruptedError(Exception):
    """The sweep was ended by hand (SIGINT or SIGTERM); what it knows is kept, and it can go on."""


class SweepHaltedError(Exception):
    """The sweep gave up, since the first trials all failed; it can go on when that is mended."""


@dataclass(frozen=True)
class Slots:
    """Trials at a time, and what each of them holds."""

    num_slots: int
    cpus: int
    gpus: float


def run_sweep(
    *,
    sweep: SweepSettings,
    cluster: RaySettings,
    space: Space,
    searcher: Callable[..., OptunaSearcher],
    rule: Callable[[], Rule],
    objective: Objective,
    command: Callable[[Params], str],
    description: Mapping[str, Any] | None,
    preflight: Callable[[Slots], None] = lambda slots: None,
) -> TrialTable:
    """Try configurations from the space until all trials are done or the budget is spent; returns the table of trials.

    searcher: as configured, still without what the sweep knows. rule: makes a fresh one. objective: what a trial runs.
    command: the command line that trains parameters again. description: kept as sweep.yaml; None: the sweep in the
    folder goes on, and one that is finished is only read. preflight: what is tried before the first trial. Ray is
    started and shut down, unless it runs already. Raises UserError where a trial does not fit into what Ray has or the
    sweep runs already, SweepInterruptedError and SweepHaltedError.
    """
    folder, is_resumed = sweep.path, description is None

    def history() -> History:
        table = TrialTable(sweep.metric, sweep.mode, sweep.num_trials, sweep.max_epochs)
        return History(sweep, rule=rule(), table=table, command=command)

    asked_for = partial(
        searcher,
        space=space,
        name=sweep.name,
        metric=sweep.metric,
        mode=sweep.mode,
        max_epochs=sweep.max_epochs,
        seed=sweep.seed,
    )
    if not is_resumed:
        _rehearse(asked_for)
    elif finished := finished_table(folder, history()):
        return finished
    with contextlib.ExitStack() as stack:
        if is_resumed:
            stack.enter_context(_alone(folder))
        stack.enter_context(_environment())
        stack.enter_context(ray_runtime(_limited(cluster, sweep)))  # before any file is made: it may not answer
        slots = count_slots(sweep, ray.cluster_resources())
        if description is not None:
            preflight(slots)
            stack.enter_context(_alone(folder))
            keep_space(space, folder)
            write_yaml(folder / "sweep.yaml", description)
        asked = stack.enter_context(contextlib.closing(asked_for(folder=folder / "study", resume=is_resumed)))
        print(*map(warm_start_line, asked.warm_start), sep="\n", end="\n" * bool(asked.warm_start), flush=True)
        log = stack.enter_context(contextlib.closing(EventLog(folder / EVENTS)))
        state = SweepState(sweep, log=log, history=history(), searcher=asked)
        _run(sweep, slots, space, state, objective)
        return state.history.table


def _rehearse(searcher: Callable[..., OptunaSearcher]) -> None:
    """Begin a study that nobody keeps, so that mistakes in first points and warm starts show before Ray is started."""
    with tempfile.TemporaryDirectory() as folder:
        searcher(folder=Path(folder), storage=None).close()


def try_out(sweep: SweepSettings, cluster: RaySettings, preflight: Callable[[Slots], None]) -> None:
    """Only the preflight of a sweep, with Ray as the sweep would have it; no file is made."""
    with _environment(), ray_runtime(_limited(cluster, sweep)):
        preflight(count_slots(sweep, ray.cluster_resources()))


def finished_table(folder: Path, history: History) -> TrialTable | None:
    """The table of a sweep that came to its end, when no more trials have been asked for since; else None.

    history: empty. Raises UserError where its events are damaged or were decided by other rules.
    """
    events = read_events(folder / EVENTS)
    num_trials = history.num_trials
    history.replay(events)
    is_finished = bool(events) and isinstance(events[-1], Closed) and events[-1].reason == "finished"
    return history.table if is_finished and num_trials <= history.num_trials else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process run the same sweep; the lock of a process that was killed is free."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"the sweep in {folder} is running already, in another process") from error


def _run(sweep: SweepSettings, slots: Slots, space: Space, state: SweepState, objective: Objective) -> None:
    table, shelf = state.history.table, state.history.shelf
    table.num_slots = slots.num_slots
    table.checkpoint_budget_bytes = shelf.budget_bytes
    title = f"sweep {sweep.name}  ·  {space.name}" + ("  ·  goes on" if state.last_event else "")
    view = sweep_view(title, time_budget_s=sweep.time_budget_s, used_s=state.elapsed_s())
    with contextlib.closing(view), _interruptible(sweep) as is_interrupted:
        recorder = Recorder(table, folder=sweep.path, shelf=shelf, tick=state.tick, view=view)
        recorder.catch_up(state.last_event)
        state.open(num_slots=slots.num_slots, gpus=slots.gpus, listener=recorder)
        table.num_trials = state.history.num_trials
        view.refresh(table)
        conductor = Conductor(state, time_budget_s=sweep.time_budget_s, is_interrupted=is_interrupted)
        # Tune asks a searcher of ours for one trial, and for the next when that one has a worker.
        with _environment(TUNE_MAX_PENDING_TRIALS_PG=str(slots.num_slots)):
            _tuner(sweep, slots, conductor, objective, recorder).fit()
        if isinstance(conductor.error, (UserError, OSError)):  # as of a full disk
            raise UserError(f"{conductor.error}; to go on: {resume_command(sweep.path)}") from conductor.error
        if conductor.error is not None:
            raise conductor.error
        if not is_interrupted():
            state.close("finished")
    if is_interrupted():
        raise SweepInterruptedError(f"the sweep was interrupted; to go on: {resume_command(sweep.path)}")
    if state.halted_by is not None:
        raise SweepHaltedError(
            f"the first {sweep.stop_after_failures} trials failed before any had reported an epoch, the last one with: "
            f"{state.halted_by.cause} (traceback: {sweep.path / 'trials.csv'}); when that is mended, go on with "
            f"{resume_command(sweep.path)}"
        )


def resume_command(folder: Path) -> str:
    """The command line that goes on with the sweep in a folder."""
    return shlex.join(["python", "tune.py", f"sweep.resume={folder}"])


def _tuner(
    sweep: SweepSettings, slots: Slots, conductor: Conductor, objective: Objective, recorder: Recorder
) -> tune.Tuner:
    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        gpus = config[STRETCH][0].gpus
        return tune.PlacementGroupFactory([{"CPU": slots.cpus, "GPU": slots.gpus if gpus is None else gpus}])

    def name(trial: Trial) -> str:  # Ray copies it for every trial, so that it must hold nothing
        return stretch_of(trial).name

    return tune.Tuner(
        tune.with_resources(make_trainable(objective), resources),
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            search_alg=StateSearcher(conductor, metric=sweep.metric, mode=sweep.mode),
            scheduler=StateScheduler(conductor),
            num_samples=-1,  # the searcher says when it is over
            reuse_actors=True,  # the larger part of a short trial is a fresh process importing torch
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(sweep.path),
            stop=StateStopper(conductor),
            callbacks=[recorder],
            verbose=0,
        ),
    )


def count_slots(sweep: SweepSettings, resources: Mapping[str, float]) -> Slots:
    """How many trials fit into what Ray has; raises UserError where none does."""
    gpus = sweep.gpus_per_trial if sweep.gpus_per_trial is not None else float(resources.get("GPU", 0) >= 1)
    num_slots = int(resources.get("CPU", 0) // sweep.cpus_per_trial)
    if gpus:
        num_slots = min(num_slots, _gpu_slots(resources.get("GPU", 0), gpus))
    if num_slots < 1:
        raise UserError(
            f"no trial fits: sweep.cpus_per_trial={sweep.cpus_per_trial} and sweep.gpus_per_trial={gpus:g}, but Ray "
            f"has {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs"
        )
    num_slots = num_slots if sweep.max_concurrent is None else min(num_slots, sweep.max_concurrent)
    return Slots(num_slots, sweep.cpus_per_trial, gpus)


def _gpu_slots(num_gpus: float, per_trial: float) -> int:
    return int(num_gpus * int(1 / per_trial) if per_trial < 1 else num_gpus // per_trial)


@contextlib.contextmanager
def ray_runtime(cluster: RaySettings) -> Iterator[None]:
    """Ray, without its noise, for the length of a block; one that runs already is used, and left running."""
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        num_cpus = cluster.num_cpus or num_cores()
        settings = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        settings["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        _check_answers(cluster.address)
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            **settings,
        )
    except (OSError, RuntimeError, ValueError) as error:
        if cluster.address is None:
            raise
        raise UserError(
            f"ray.address={cluster.address}: no Ray cluster answers there; `ray start --head` begins one, and without "
            "ray.address the sweep runs on this machine"
        ) from error
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # What became of a worker stands in trials.csv. Ray's switch for it, RAY_DEDUP_LOGS_SKIP_REGEX, is read on import.
    stdout_deduplicator.skip_re = re.compile("A worker died or was killed")
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Ray itself tries an address that nobody listens on for minutes, and tells each try; raises OSError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _limited(cluster: RaySettings, sweep: SweepSettings) -> RaySettings:
    """Alone on a machine max_concurrent limits the cores too: what runs of a population its scheduler chooses."""
    if cluster.address is not None or sweep.max_concurrent is None:
        return cluster
    num_cpus = min(cluster.num_cpus or num_cores(), sweep.max_concurrent * sweep.cpus_per_trial)
    return replace(cluster, num_cpus=num_cpus)


@contextlib.contextmanager
def _environment(**more: str) -> Iterator[None]:
    """Ray's switches, set for the length of a sweep; what the user has set counts before them."""
    added = {name: value for name, value in (_ENVIRONMENT | more).items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _interruptible(sweep: SweepSettings) -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM end the sweep in good order, which takes some seconds; a second one leaves at once.

    Yields whether there was one. Whatever is lost by leaving at once is lost by a SIGKILL too: nothing that was
    reported.
    """
    is_requested = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal is_requested
        if is_requested:
            cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the live view has hidden it
            told = f"{cursor}\nleft at once; to go on: {resume_command(sweep.path)}\n"
            os.write(sys.stderr.fileno(), told.encode())
            os._exit(INTERRUPTED)
        is_requested = True

    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: is_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
