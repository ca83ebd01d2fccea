"""Tune runs what the sweep's state tells it to: a searcher and a scheduler that only pass on questions and answers.

Tune's own bookkeeping is not used to decide or to restore. Each stretch of a trial is one trial of Tune's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from handpose.errors import UserError
from handpose.sweep.events import FailureKind
from handpose.sweep.state import Failure, SweepState
from handpose.sweep.stretch import CHECKPOINT, COSTS, STRETCH, Stretch, WornWorkerError

_TRACEBACK_CHARACTERS = 20_000
_GPU_MEMORY = ("CUDA out of memory", "torch.OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED", "HIP out of memory")
_Answer = TypeVar("_Answer")


class Conductor:
    """Takes Tune's questions to the state, and ends the experiment where there is nothing to ask any more.

    An exception within Tune's calls would come out as the text of a TuneError. So it is kept as `error`, to be raised
    when Tune has ended in order. time_budget_s: of the sweep. is_interrupted: whether it is being ended by hand.
    """

    def __init__(self, state: SweepState, *, time_budget_s: float | None, is_interrupted: Callable[[], bool]) -> None:
        self.state = state
        self.error: Exception | None = None
        self._time_budget_s = time_budget_s
        self._is_interrupted = is_interrupted

    def ask(self, question: Callable[[], _Answer], *, otherwise: _Answer) -> _Answer:
        """The state's answer, or another when it has none any more."""
        if self.error is None:
            try:
                return question()
            except Exception as error:
                self.error = error
        return otherwise

    def should_stop(self) -> bool:
        """Whether Tune is to end the experiment; if so, the state has been closed."""
        if self._is_interrupted():
            self.ask(lambda: self.state.close("interrupted"), otherwise=None)
        elif self._time_budget_s is not None and self.state.elapsed_s() >= self._time_budget_s:
            self.ask(lambda: self.state.close("finished"), otherwise=None)
        return self.error is not None or self.state.is_closed


class StateSearcher(Searcher):
    """Hands Tune the next stretch, when there is one."""

    def __init__(self, conductor: Conductor, *, metric: str, mode: str) -> None:
        super().__init__(metric=metric, mode=mode)
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        """The configuration of the next stretch; None: not now; FINISHED: never again."""
        conductor = self._conductor
        if conductor.should_stop():
            return Searcher.FINISHED
        stretch = conductor.ask(conductor.state.next, otherwise=None)
        if stretch is not None:
            return {STRETCH: [stretch]}
        is_over = conductor.ask(lambda: conductor.state.is_over, otherwise=True)
        return Searcher.FINISHED if is_over else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has heard of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing of it is restored."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing of it is restored."""


class StateScheduler(FIFOScheduler):
    """Takes the reports of workers to the state, and its decisions back."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop: the stretch ends here, for good or at a rung."""
        goes_on = self._conductor.ask(lambda: self._report(stretch_of(trial).trial, result), otherwise=False)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def _report(self, number: int, result: dict[str, Any]) -> bool:
        state = self._conductor.state
        if COSTS in result and result["epoch"] == 0:
            return state.measured(number, result[COSTS][0])
        return state.reported(
            number,
            result["epoch"],
            {name: value for name, value in result.items() if _is_metric(name, value)},
            node=result.get("hostname", ""),
            resumed_from=result.get("resumed_from", 0),
            checkpoint=result.get(CHECKPOINT, [None])[0],
            note=result.get("note", ""),
        )

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A stretch that the state ended, or that came back by itself."""
        number = stretch_of(trial).trial
        self._conductor.ask(lambda: self._conductor.state.returned(number), otherwise=None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A stretch failed; Tune itself tries nothing again."""
        number, failure = stretch_of(trial).trial, failure_of(trial)
        self._conductor.ask(lambda: self._conductor.state.failed(number, failure), otherwise=None)


class StateStopper(tune.Stopper):
    """Ends Tune's experiment."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._conductor.should_stop()


def stretch_of(trial: Trial) -> Stretch:
    """What one of Tune's trials trains."""
    stretch: Stretch = trial.config[STRETCH][0]
    return stretch


def _is_metric(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, (int, float)) and not name.startswith(("config/", f"{COSTS}/"))


def failure_of(trial: Trial) -> Failure:
    """Why one of Tune's trials failed."""
    # Trial.get_error looks where the files are copied to later.
    error = cloudpickle.loads(_content(trial.pickled_error_file)) if trial.pickled_error_file else None
    text = _content(trial.error_file).decode() or str(error or "no message")
    return Failure(_kind(error, text), cause(text), text[-_TRACEBACK_CHARACTERS:])


def _content(file: str | None) -> bytes:
    return Path(file).read_bytes() if file and Path(file).is_file() else b""


def _kind(error: Exception | None, text: str) -> FailureKind:
    if isinstance(error, RayActorError):
        return "preempted" if error.preempted else "killed"
    raised = getattr(error, "cause", error)
    if isinstance(raised, WornWorkerError):
        return "worn"
    if isinstance(raised, UserError):
        return "mistake"
    return "gpu_memory" if any(said in text for said in _GPU_MEMORY) else "error"


def cause(text: str) -> str:
    """What an error says, in a line: the end of a traceback, or that the worker is gone."""
    if "The actor died" in text or "ActorDiedError" in text:
        return "the worker process died: it was killed, ran out of memory or crashed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
