"""Tune runs what the sweep's state tells it to: a searcher and a scheduler that only pass on questions and answers.

Tune's own bookkeeping is not used to decide or to restore. Each stretch of a trial is one trial of Tune's.
"""

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
from handpose.sweep.controller.controller import SegmentFailure, SweepController
from handpose.sweep.controller.slots import Slots
from handpose.sweep.execution.nodes import ActorLocation, NodeWatcher, find_actor
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
    LostWorkerError,
    TrialFunction,
    UnfitWorkerError,
)

_TRACEBACK_CHARACTERS = 20_000
_GPU_MEMORY_TEXTS = ("CUDA out of memory", "torch.OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED", "HIP out of memory")
_NODE_LOST_TEXTS = ("its node has died", "may not have been executed on the actor")
"""What Ray (2.60) says of an actor whose node was killed: by a health check that failed, some 15 s later, or when the
connection to the actor broke; there is no exception of its own for it."""
_NODES_LOST = SegmentFailure("lost", "the nodes that it could run on were lost", "")
_Answer = TypeVar("_Answer")


class TuneBridge:
    """Takes Tune's questions to the state, and ends the experiment where there is nothing to ask any more.

    An exception within Tune's calls would come out as the text of a TuneError. So it is kept as `error`, to be raised
    when Tune has ended in order. nodes: of the cluster. starts: watches that workers start. is_interrupted: whether the
    sweep is being ended by hand.
    """

    def __init__(
        self,
        controller: SweepController,
        sweep: SweepSettings,
        *,
        nodes: NodeWatcher,
        starts: StartWatch,
        is_interrupted: Callable[[], bool],
    ) -> None:
        self.controller = controller
        self.starts = starts
        self.nodes = nodes
        self.hang_timeout_s = sweep.hang_timeout_s
        self.error: Exception | None = None
        self._sweep = sweep
        self._is_interrupted = is_interrupted

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles searcher and stopper with an experiment's settings; open files do not travel

    def ask_controller(self, question: Callable[[], _Answer], *, otherwise: _Answer) -> _Answer:
        """The state's answer, or another when it has none any more."""
        if self.error is None:
            try:
                return question()
            except Exception as error:
                self.error = error
        return otherwise

    def check_start(self, trials: Collection[Trial]) -> None:
        """End the experiment where no worker can be started for any of Tune's live trials."""
        self.ask_controller(lambda: self.starts.check(trials, has_slots=self.controller.has_slots), otherwise=None)

    def release_workers(self, segment: TrialSegment) -> None:
        """Give back what a stretch holds beside what Tune knows of."""
        if self._sweep.workers_per_trial > 1:
            release_group(segment)

    def should_stop(self) -> bool:
        """Whether Tune is to end the experiment; if so, the state has been closed."""
        if self._is_interrupted():
            self.ask_controller(lambda: self.controller.close("interrupted"), otherwise=None)
        elif self._is_budget_spent():
            self.ask_controller(
                lambda: self.controller.close("finished" if self.controller.is_over else "spent"), otherwise=None
            )
        return self.error is not None or self.controller.is_closed

    def _is_budget_spent(self) -> bool:
        """Whether the sweep has used up a budget."""
        state = self.controller
        return self._sweep.find_spent_budget(elapsed_s=state.elapsed_s(), gpu_hours=state.count_gpu_hours()) is not None


class BridgeSearcher(Searcher):
    """Hands Tune the next stretch, when there is one."""

    def __init__(self, bridge: TuneBridge, *, metric: str, mode: str) -> None:
        super().__init__(metric=metric, mode=mode)
        self._bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        """The configuration of the next stretch; None: not now; FINISHED: never again."""
        bridge = self._bridge
        if bridge.should_stop():
            return Searcher.FINISHED
        bridge.nodes.refresh()
        segment = bridge.ask_controller(bridge.controller.next_segment, otherwise=None)
        if segment is not None:
            avoided = bridge.nodes.get_ids(bridge.controller.find_nodes_to_avoid(segment.trial))
            return {SEGMENT_KEY: [segment], AVOIDED_NODES_KEY: [avoided]}
        is_over = bridge.ask_controller(lambda: bridge.controller.is_over, otherwise=True)
        return Searcher.FINISHED if is_over else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has heard of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing of it is restored."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing of it is restored."""


class BridgeScheduler(FIFOScheduler):
    """Takes the reports of workers to the state, and its decisions back."""

    def __init__(self, bridge: TuneBridge) -> None:
        super().__init__()
        self._bridge = bridge
        self._hung: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop: the stretch ends here, for good or at a rung."""
        goes_on = self._bridge.ask_controller(
            lambda: self._process_result(get_segment(trial).trial, result), otherwise=False
        )
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def _process_result(self, number: int, result: dict[str, Any]) -> bool:
        state = self._bridge.controller
        if COSTS_KEY in result and result["epoch"] == 0:
            return state.process_costs(number, result[COSTS_KEY][0])
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
        """A stretch that the state ended, or that came back by itself."""
        self._bridge.release_workers(get_segment(trial))
        number = get_segment(trial).trial
        self._bridge.ask_controller(lambda: self._bridge.controller.process_return(number), otherwise=None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A stretch failed; Tune itself tries nothing again."""
        self._bridge.release_workers(get_segment(trial))
        nodes, failure, actor = self._bridge.nodes, describe_failure(trial), trial.temporary_state.ray_actor
        found = find_actor(actor._actor_id.hex()) if actor is not None else ActorLocation()
        nodes.refresh(at_once=True)  # it may be gone, and then there are fewer slots
        if failure.kind == "lost" and found.is_dead and nodes.is_alive(found.node_id):
            failure = failure._replace(kind="killed")  # of its death Ray heard too late to say so
        if trial.trial_id in self._hung:
            failure = failure._replace(cause=f"no report for {self._bridge.hang_timeout_s:g} s: it was ended")
        on = failure.node or found.node_id or (trial.last_result or {}).get(NODE_ID_KEY, "")
        failure = failure._replace(node=nodes.get_name(on))
        self._bridge.ask_controller(
            lambda: self._bridge.controller.process_failure(get_segment(trial).trial, failure), otherwise=None
        )
        nodes.notify()  # one may have been set aside

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A stretch that had not begun was taken back."""
        self._bridge.ask_controller(
            lambda: self._bridge.controller.process_failure(get_segment(trial).trial, _NODES_LOST), otherwise=None
        )

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Tune's own choice: what was asked for first. Called in every step.

        Before it, stretches that wait for a node while all that are left are those they are not to run on are taken
        back, to be sent again, and workers that hang are ended. FIFOScheduler looks through all trials there have been,
        in every step.
        """
        nodes, limit_s = self._bridge.nodes, self._bridge.hang_timeout_s
        nodes.refresh()
        self._bridge.check_start(tune_controller.get_live_trials())
        for trial in list(tune_controller.get_live_trials()):
            avoided = set(map(nodes.get_name, trial.config[AVOIDED_NODES_KEY][0]))
            if avoided and trial.status == Trial.PENDING and not self._bridge.controller.can_place_without(avoided):
                tune_controller.stop_trial(trial)
            elif limit_s is not None and trial.trial_id not in self._hung and _count_silent_seconds(trial) > limit_s:
                self._hung.add(trial.trial_id)
                ray.kill(trial.temporary_state.ray_actor)


class BridgeStopper(tune.Stopper):
    """Ends Tune's experiment."""

    def __init__(self, bridge: TuneBridge) -> None:
        self._bridge = bridge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._bridge.should_stop()


def get_segment(trial: Trial) -> TrialSegment:
    """What one of Tune's trials trains."""
    segment: TrialSegment = trial.config[SEGMENT_KEY][0]
    return segment


def _count_silent_seconds(trial: Trial) -> float:
    """Seconds since a stretch that runs began, or has reported."""
    metadata = trial.run_metadata
    if trial.status != Trial.RUNNING or trial.temporary_state.ray_actor is None:
        return 0.0
    return time.time() - max(metadata.start_time or 0.0, metadata.last_result_time)


def _is_metric(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, (int, float)) and not name.startswith(("config/", f"{COSTS_KEY}/"))


def describe_failure(trial: Trial) -> SegmentFailure:
    """Why one of Tune's trials failed."""
    # Trial.get_error looks where the files are copied to later.
    error = cloudpickle.loads(_read_file(trial.pickled_error_file)) if trial.pickled_error_file else None
    text = _read_file(trial.error_file).decode() or str(error or "no message")
    node_id = getattr(getattr(error, "cause", error), "node_id", "")  # of one worker of several
    return SegmentFailure(
        _classify_failure(error, text), summarise_error_text(text), text[-_TRACEBACK_CHARACTERS:], node=str(node_id)
    )


def _read_file(file: str | None) -> bytes:
    return Path(file).read_bytes() if file and Path(file).is_file() else b""


def _classify_failure(error: Exception | None, text: str) -> FailureKind:
    if isinstance(error, RayActorError):
        if error.preempted:
            return "preempted"
        return "lost" if any(said in text for said in _NODE_LOST_TEXTS) else "killed"
    raised = getattr(error, "cause", error)
    if isinstance(raised, UnfitWorkerError):
        return "worn"
    if isinstance(raised, LostWorkerError):
        is_gone = raised.kind == "killed" and any(
            said in text for said in _NODE_LOST_TEXTS
        )  # before any worker had begun
        return "lost" if is_gone else raised.kind
    if isinstance(raised, UserError):
        return "mistake"
    return "gpu_memory" if any(said in text for said in _GPU_MEMORY_TEXTS) else "error"


def summarise_error_text(text: str) -> str:
    """What an error says, in a line: the end of a traceback, or how the worker process died."""
    if any(said in text for said in _NODE_LOST_TEXTS):
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
        return {}  # Tune pickles callbacks with an experiment's settings; open files do not travel

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
    """Tune's experiment for a sweep. every_step: called several times a second while it runs."""

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        gpus = config[SEGMENT_KEY][0].gpus_per_device
        bundle = {"CPU": slots.cpus, "GPU": slots.gpus if gpus is None else gpus, "memory": slots.process_bytes}
        if slots.num_workers > 1:  # which hold that themselves; Tune insists on something
            bundle = {"memory": 1.0}
        avoided = config[AVOIDED_NODES_KEY][0]
        if not avoided:
            return tune.PlacementGroupFactory([bundle])
        elsewhere = {"ray.io/node-id": f"!in({','.join(avoided)})"}
        return tune.PlacementGroupFactory([bundle], bundle_label_selector=[elsewhere])

    def name(trial: Trial) -> str:  # Ray copies it for every trial, so that it must hold nothing
        return get_segment(trial).name

    return tune.Tuner(
        tune.with_resources(make_trainable(objective, slots), resources),
        tune_config=tune.TuneConfig(
            metric=sweep.target.name,
            mode=sweep.target.mode,
            search_alg=BridgeSearcher(bridge, metric=sweep.target.name, mode=sweep.target.mode),
            scheduler=BridgeScheduler(bridge),
            num_samples=-1,  # the searcher says when it is over
            # The larger part of a short trial is a fresh process importing torch. But a group ends with its actor.
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
    """Run the sweep, and raise what went wrong within Tune's calls in place of what Tune makes of it."""
    try:
        tuner.fit()
    except Exception as error:  # such as of files that Tune cannot read since it could not write them
        raise bridge.error or error from None
    if bridge.error is not None:
        raise bridge.error
