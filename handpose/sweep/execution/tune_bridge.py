"""Connects Ray Tune to the sweep controller: a Tune searcher and a Tune scheduler that pass on calls and decisions.

They decide nothing, and Tune's own bookkeeping is used neither to decide nor to restore. Each segment of a trial is one
Tune trial.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from handpose.errors import UserError
from handpose.report.utilisation import Utilisation
from handpose.sweep.controller.controller import SegmentFailure, SweepController
from handpose.sweep.controller.slots import Slots
from handpose.sweep.execution.nodes import NodeWatcher
from handpose.sweep.execution.ray_internals import ActorLocation, end_idle_workers, find_actor
from handpose.sweep.execution.worker_death import diagnose_worker_death
from handpose.sweep.execution.worker_group import make_trainable, release_group
from handpose.sweep.execution.worker_start import StartWatch
from handpose.sweep.record.events import FailureKind
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.trainable.reporting import (
    AVOIDED_NODES_KEY,
    CHECKPOINT_KEY,
    COSTS_KEY,
    NODE_ID_KEY,
    SEGMENT_KEY,
    UTILISATION_KEY,
    LostWorkerError,
    TrialFunction,
    UnfitWorkerError,
)

_TRACEBACK_CHARACTERS = 20_000
_GPU_MEMORY_TEXTS = ("CUDA out of memory", "torch.OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED", "HIP out of memory")
_NODE_LOST_TEXTS = ("its node has died", "may not have been executed on the actor")
"""Parts of Ray's (2.60) error message for an actor whose node was killed.

Ray notices it when a health check fails, some 15 s later, or when the connection to the actor breaks. It has no
exception class for this case.
"""
_ABANDONED_S = 10.0
"""Seconds that the worker of a trial which the user has stopped gets to report. After that its process is killed.

A worker that ends at a report can train another trial, which saves the start of a process.
"""
_NODES_LOST = SegmentFailure("lost", "the nodes that it could run on were lost", "")
_Answer = TypeVar("_Answer")


class TuneBridge:
    """Passes Tune's calls to the sweep controller, and ends Tune's experiment when the sweep is over.

    Tune would turn an exception in one of its calls into the text of a TuneError. The bridge therefore stores the first
    exception as `error`. It is raised after Tune has ended in an orderly way.

    Args:
        controller: decides what runs next and what happens after each report.
        sweep: the settings of the sweep.
        nodes: watches the nodes of the cluster.
        starts: watches that Ray starts worker processes.
        is_interrupted: returns whether the sweep has to end before it is finished.
        needs_report: whether the sweep goes on with a spent budget until a trial has reported, because it must have a
            winner.
        process_interventions: executes the interventions of the user that wait, and returns whether there were some.
        record_utilisation: takes the number of a trial and what it has used, before its report is processed.
        keeps_idle_workers: returns whether idle workers are kept for later trials although none can start now.

    Attributes:
        error: the first exception in one of Tune's calls; None: there was none.
    """

    def __init__(
        self,
        controller: SweepController,
        sweep: SweepSettings,
        *,
        nodes: NodeWatcher,
        starts: StartWatch,
        is_interrupted: Callable[[], bool],
        needs_report: bool = False,
        process_interventions: Callable[[], bool] = lambda: False,
        record_utilisation: Callable[[int, Utilisation], None] = lambda trial, used: None,
        keeps_idle_workers: Callable[[], bool] = lambda: True,
    ) -> None:
        self.controller = controller
        self.starts = starts
        self.nodes = nodes
        self.record_utilisation = record_utilisation
        self.hang_timeout_s = sweep.hang_timeout_s
        self.error: Exception | None = None
        self._sweep = sweep
        self._is_interrupted = is_interrupted
        self._needs_report = needs_report
        self._process_interventions = process_interventions
        self._is_finishing = False
        self._keeps_idle_workers = keeps_idle_workers

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles searcher and stopper with the experiment's settings; open files cannot be pickled

    def ask_controller(self, question: Callable[[], _Answer], *, otherwise: _Answer) -> _Answer:
        """Call a function that asks the controller, and store its exception as `error`.

        Args:
            question: the function to call. It is not called once there is an error.
            otherwise: returned when there is an error.

        Returns:
            What `question` returns, or `otherwise`.
        """
        if self.error is None:
            try:
                return question()
            except Exception as error:
                self.error = error
        return otherwise

    def check_start(self, trials: Collection[Trial]) -> None:
        """End the experiment if Ray starts no worker for any of Tune's live trials."""
        self.ask_controller(lambda: self.starts.check(trials, has_slots=self.controller.has_slots), otherwise=None)

    def end_idle_workers(self, tune_controller: Any) -> None:
        """End idle workers for which there is no trial now, if they are not kept."""
        if not self._keeps_idle_workers() and not self.controller.can_start_trials:
            end_idle_workers(tune_controller)

    def release_workers(self, segment: TrialSegment) -> None:
        """Free the resources of a segment that Tune does not know about."""
        if self._sweep.workers_per_trial > 1:
            release_group(segment)

    def process_interventions(self) -> None:
        """Execute the interventions that wait, unless Tune has been told that nothing is left to start."""
        if self._is_finishing:
            return
        if self.ask_controller(self._process_interventions, otherwise=False):
            self.nodes.notify()  # the number of slots may have changed

    def finish(self) -> None:
        """Let no intervention add work from now on, because Tune starts no more trials. Those that come later wait."""
        self._is_finishing = True

    def should_stop(self) -> bool:
        """Return whether Tune must end the experiment.

        Closes the controller first if the sweep was interrupted or has used up a budget.
        """
        if self._is_interrupted():
            self.ask_controller(lambda: self.controller.close("interrupted"), otherwise=None)
        elif self._is_budget_spent():
            self.ask_controller(
                lambda: self.controller.close("finished" if self.controller.is_over else "spent"), otherwise=None
            )
        return self.error is not None or self.controller.is_closed

    def _is_budget_spent(self) -> bool:
        """Return whether the sweep has used up a budget, or is not worth going on."""
        state = self.controller
        if self._needs_report and not state.history.num_reports and not state.is_over:
            return False
        return self.ask_controller(state.is_budget_spent, otherwise=False)


class BridgeSearcher(Searcher):
    """Gives Tune the next segment to train."""

    def __init__(self, bridge: TuneBridge, *, metric: str, mode: str) -> None:
        super().__init__(metric=metric, mode=mode)
        self._bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        """Return the Tune configuration of the next segment.

        Returns:
            The configuration; None: there is nothing to start now; `Searcher.FINISHED`: there never will be again.
        """
        bridge = self._bridge
        bridge.process_interventions()
        if bridge.should_stop():
            bridge.finish()
            return Searcher.FINISHED
        bridge.nodes.refresh()
        segment = bridge.ask_controller(bridge.controller.next_segment, otherwise=None)
        if segment is not None:
            avoided = bridge.nodes.get_ids(bridge.controller.find_nodes_to_avoid(segment.trial))
            return {SEGMENT_KEY: [segment], AVOIDED_NODES_KEY: [avoided]}
        is_over = bridge.ask_controller(lambda: bridge.controller.is_over, otherwise=True)
        if is_over:
            bridge.finish()
        return Searcher.FINISHED if is_over else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `BridgeScheduler` handles the end of a segment."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the searcher has no state of its own."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the searcher has no state of its own."""


class BridgeScheduler(FIFOScheduler):
    """Passes the reports of workers to the controller, and its decisions to Tune."""

    def __init__(self, bridge: TuneBridge) -> None:
        super().__init__()
        self._bridge = bridge
        self._hung: set[str] = set()
        self._abandoned_at: dict[str, float] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Process a report of a worker.

        Returns:
            CONTINUE, or STOP if the segment ends here: the trial is over, or pauses at a rung.
        """
        segment = get_segment(trial)
        goes_on = not self._bridge.controller.is_abandoned(segment) and self._bridge.ask_controller(
            lambda: self._process_result(segment.trial, result), otherwise=False
        )
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def _process_result(self, number: int, result: dict[str, Any]) -> bool:
        state = self._bridge.controller
        if COSTS_KEY in result and result["epoch"] == 0:
            return state.process_costs(number, result[COSTS_KEY][0])
        used: Utilisation | None = result.get(UTILISATION_KEY, [None])[0]
        if used is not None:
            self._bridge.record_utilisation(number, used)
        return state.process_report(
            number,
            result["epoch"],
            {name: value for name, value in result.items() if _is_metric(name, value)},
            node=self._bridge.nodes.get_name(result.get(NODE_ID_KEY, "")),
            resumed_from=result.get("resumed_from", 0),
            checkpoint=result.get(CHECKPOINT_KEY, [None])[0],
            note=result.get("note", ""),
        )

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Process the end of a segment that the controller stopped or that returned by itself."""
        segment = get_segment(trial)
        self._bridge.release_workers(segment)
        if self._bridge.controller.is_current(segment):
            self._bridge.ask_controller(lambda: self._bridge.controller.process_return(segment.trial), otherwise=None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Process the failure of a segment. The controller decides about retries; Tune itself never retries."""
        self._bridge.release_workers(get_segment(trial))
        if self._bridge.controller.is_abandoned(get_segment(trial)):  # its worker was killed on purpose
            return
        nodes, failure, actor = self._bridge.nodes, describe_failure(trial), trial.temporary_state.ray_actor
        found = find_actor(actor._actor_id.hex()) if actor is not None else ActorLocation()
        nodes.refresh(at_once=True)  # the trial's node may be gone, which leaves fewer slots
        # Ray may learn of a worker's death too late to report it as such. If the node is alive, only the worker died.
        if failure.kind == "lost" and found.is_dead and nodes.is_alive(found.node_id):
            failure = failure._replace(kind="killed")
        if trial.trial_id in self._hung:
            failure = failure._replace(cause=f"no report for {self._bridge.hang_timeout_s:g} s, so it was ended")
        on = failure.node or found.node_id or (trial.last_result or {}).get(NODE_ID_KEY, "")
        failure = failure._replace(node=nodes.get_name(on))
        self._bridge.ask_controller(
            lambda: self._bridge.controller.process_failure(get_segment(trial).trial, failure), otherwise=None
        )
        nodes.notify()  # a node may have been quarantined

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Process a segment that was withdrawn before it started."""
        if not self._bridge.controller.is_current(get_segment(trial)):
            return
        self._bridge.ask_controller(
            lambda: self._bridge.controller.process_failure(get_segment(trial).trial, _NODES_LOST), otherwise=None
        )

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Return None, so that Tune starts trials in the order in which they were suggested.

        Tune calls this in every step. The method also withdraws waiting segments that can run on none of the remaining
        nodes, because they must avoid all of them; the controller sends them again. And it kills workers that hang, or
        that train a trial which the user has stopped. The method of FIFOScheduler is not used because it searches all
        trials of the experiment in every step.
        """
        nodes, limit_s = self._bridge.nodes, self._bridge.hang_timeout_s
        nodes.refresh()
        live = list(tune_controller.get_live_trials())
        if not any(trial.status == Trial.PENDING for trial in live):  # which an idle worker would train
            self._bridge.end_idle_workers(tune_controller)
        self._bridge.check_start(live)
        for trial in live:
            if self._bridge.controller.is_abandoned(get_segment(trial)):
                self._end_abandoned(tune_controller, trial)
                continue
            avoided = set(map(nodes.get_name, trial.config[AVOIDED_NODES_KEY][0]))
            if avoided and trial.status == Trial.PENDING and not self._bridge.controller.can_place_without(avoided):
                tune_controller.stop_trial(trial)
            elif limit_s is not None and trial.trial_id not in self._hung and _count_silent_seconds(trial) > limit_s:
                self._hung.add(trial.trial_id)
                ray.kill(trial.temporary_state.ray_actor)

    def _end_abandoned(self, tune_controller: Any, trial: Trial) -> None:
        """Withdraw a segment whose trial the user has stopped, or kill its worker if that has had time to report."""
        since = self._abandoned_at.setdefault(trial.trial_id, time.monotonic())
        if trial.status == Trial.PENDING:
            tune_controller.stop_trial(trial)
        elif time.monotonic() - since > _ABANDONED_S and trial.temporary_state.ray_actor is not None:
            self._abandoned_at[trial.trial_id] = math.inf
            ray.kill(trial.temporary_state.ray_actor)


class BridgeStopper(tune.Stopper):
    """Ends Tune's experiment when the bridge says so."""

    def __init__(self, bridge: TuneBridge) -> None:
        self._bridge = bridge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._bridge.should_stop()


def get_segment(trial: Trial) -> TrialSegment:
    """Return the segment that a Tune trial trains."""
    segment: TrialSegment = trial.config[SEGMENT_KEY][0]
    return segment


def _count_silent_seconds(trial: Trial) -> float:
    """Return the seconds since a running segment started or last reported; 0 if it does not run."""
    metadata = trial.run_metadata
    if trial.status != Trial.RUNNING or trial.temporary_state.ray_actor is None:
        return 0.0
    return time.time() - max(metadata.start_time or 0.0, metadata.last_result_time)


def _is_metric(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, (int, float)) and not name.startswith(("config/", f"{COSTS_KEY}/"))


def describe_failure(trial: Trial) -> SegmentFailure:
    """Describe why a Tune trial failed."""
    # Not Trial.get_error: it looks in the folder that the files are copied to only later.
    error = cloudpickle.loads(_read_file(trial.pickled_error_file)) if trial.pickled_error_file else None
    text = _read_file(trial.error_file).decode() or str(error or "no message")
    node_id = getattr(getattr(error, "cause", error), "node_id", "")  # set for trials with several workers
    return SegmentFailure(
        _classify_failure(error, text), summarise_error_text(text), text[-_TRACEBACK_CHARACTERS:], node=str(node_id)
    )


def _read_file(file: str | None) -> bytes:
    return Path(file).read_bytes() if file and Path(file).is_file() else b""


def _classify_failure(error: Exception | None, text: str) -> FailureKind:
    if isinstance(error, RayActorError):
        if error.preempted:
            return "preempted"
        return "lost" if _is_node_lost(text) else "killed"
    raised = getattr(error, "cause", error)
    if isinstance(raised, UnfitWorkerError):
        return "unfit_worker"
    if isinstance(raised, LostWorkerError):
        is_lost = raised.kind == "killed" and _is_node_lost(text)  # before any worker of the trial had started
        return "lost" if is_lost else raised.kind
    if isinstance(raised, UserError):
        return "user_error"
    return "gpu_memory" if any(part in text for part in _GPU_MEMORY_TEXTS) else "error"


def _is_node_lost(text: str) -> bool:
    return any(part in text for part in _NODE_LOST_TEXTS)


def summarise_error_text(text: str) -> str:
    """Summarise an error in one line: the last line of its traceback, or how the worker process died."""
    if _is_node_lost(text):
        return "its node was lost"
    if "The actor died" in text or "ActorDiedError" in text:
        return diagnose_worker_death(text).sentence
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


class EveryStep(tune.Callback):
    """Calls a function after each step of Tune's loop, several times a second."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with the experiment's settings; open files cannot be pickled

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        self._function()


def build_tuner(
    sweep: SweepSettings,
    slots: Slots,
    bridge: TuneBridge,
    objective: TrialFunction,
    *,
    every_step: Callable[[], None],
) -> tune.Tuner:
    """Build Tune's experiment for a sweep.

    Args:
        sweep: the settings of the sweep.
        slots: the resources of a trial.
        bridge: connects the experiment to the controller.
        objective: the function that trains a segment in a worker.
        every_step: called several times a second while the experiment runs.
    """

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        gpus = config[SEGMENT_KEY][0].gpus
        bundle = {"CPU": slots.cpus, "GPU": slots.gpus if gpus is None else gpus, "memory": slots.process_bytes}
        if slots.num_workers > 1:  # the workers reserve their own resources; Tune demands a bundle that is not empty
            bundle = {"memory": 1.0}
        avoided = config[AVOIDED_NODES_KEY][0]
        if not avoided:
            return tune.PlacementGroupFactory([bundle])
        elsewhere = {"ray.io/node-id": f"!in({','.join(avoided)})"}
        return tune.PlacementGroupFactory([bundle], bundle_label_selector=[elsewhere])

    def name(trial: Trial) -> str:  # Ray copies this function for every trial, so it must capture nothing
        return get_segment(trial).name

    return tune.Tuner(
        tune.with_resources(make_trainable(objective, slots), resources),
        tune_config=tune.TuneConfig(
            metric=sweep.target.name,
            mode=sweep.target.mode,
            search_alg=BridgeSearcher(bridge, metric=sweep.target.name, mode=sweep.target.mode),
            scheduler=BridgeScheduler(bridge),
            num_samples=-1,  # no limit: the searcher ends the experiment
            # In a fresh process the import of torch takes most of the time of a short trial. But the workers of a group
            # end with their actor.
            reuse_actors=slots.num_workers == 1,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(sweep.path),
            stop=BridgeStopper(bridge),
            callbacks=[EveryStep(every_step)],
            verbose=0,
        ),
    )


def run_tuner(tuner: tune.Tuner, bridge: TuneBridge) -> None:
    """Run the experiment.

    Raises:
        Exception: the original error of the bridge if there is one, instead of what Tune makes of it.
    """
    try:
        tuner.fit()
    except Exception as error:  # for example, Tune reads a file that it could not write before
        raise bridge.error or error from None
    if bridge.error is not None:
        raise bridge.error
