"""The story of a trial, from the events: who proposed it, what was decided about it, when, where and why."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from handpose.report.formatting import format_cost, format_metric, format_params, format_value
from handpose.report.reasons import format_close_reason, format_reason
from handpose.report.sweep_record import StoryLine
from handpose.schedulers.reason import Reason
from handpose.sweep.record.events import (
    CostsMeasured,
    Decision,
    EpochReported,
    Event,
    NodeQuarantined,
    SegmentFailed,
    SegmentInterruptions,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialAction,
    TrialEnded,
    TrialSteered,
    TrialSuggested,
)

_VERBS: Mapping[Decision, str] = {
    "continue": "continues",
    "pause": "paused",
    "stop": "stopped",
    "complete": "complete",
    "diverged": "diverged",
    "infeasible": "infeasible",
}
_RULES_WITHOUT_VALUE = ("max_epochs", "all_folds", "turn", "kept_by_user")
"""Rules whose sentence has neither the epoch nor the value of the metric."""

_RULE_OF_EVERY_EPOCH = "median"

_INTERRUPTIONS = {
    "sweep_paused": "the user has paused the sweep",
    "epochs_raised": "it continues with the larger sweep.max_epochs",
}
"""Rule of `SegmentInterruptions` -> what the trial waits for."""

_STEERED: Mapping[TrialAction, str] = {
    "stop": "stopped by the user",
    "retry": "retried by the user: waits for a slot",
    "keep": "kept by the user: it trains to sweep.max_epochs",
}


class StoryEvents:
    """The events of each trial that its story needs. Of the reports that decided nothing only a few are kept."""

    def __init__(self) -> None:
        self._events: dict[int, list[Event]] = {}
        self._running: set[int] = set()
        self._complete: set[int] = set()
        self._interruptions = SegmentInterruptions()

    def add(self, event: Event) -> None:
        """Add the next event of the sweep."""
        interruption = self._interruptions.add(event)
        if isinstance(event, SweepSteered):
            self._add_sweep_steered(event)
            return
        if isinstance(event, (SweepOpened, SweepClosed)):
            for number in self._running & self._events.keys():
                self._events[number].append(event)
            self._running.clear()
            return
        if isinstance(event, NodeQuarantined):
            for number in self._events.keys() & set(event.trials):
                self._events[number].append(event)
            return
        kept = self._events.setdefault(event.trial, [])
        if len(kept) > 1 and all(map(_decides_nothing, (*kept[-2:], event))):
            kept.pop()
        kept.append(event)
        if isinstance(event, SegmentStarted):
            self._running.add(event.trial)
        elif isinstance(event, (SegmentFailed, TrialEnded)) or getattr(event, "decision", "continue") != "continue":
            self._running.discard(event.trial)
        elif isinstance(event, TrialSteered):
            self._running -= {event.trial} if event.action == "stop" else set()
        elif interruption:
            self._running.discard(event.trial)
        if getattr(event, "decision", "") == "complete":
            self._complete.add(event.trial)

    def _add_sweep_steered(self, event: SweepSteered) -> None:
        """Add a pause to the trials that run, and more epochs also to complete ones. Other changes concern no trial."""
        if event.action not in ("pause", "resume", "epochs"):
            return
        concerned = self._running | (self._complete if event.action == "epochs" else set())
        for number in concerned & self._events.keys():
            self._events[number].append(event)
        if event.action == "epochs":
            self._complete.clear()

    def get(self, trial: int) -> Sequence[Event]:
        """Return the events of a trial, in order; empty if there is no such trial."""
        return self._events.get(trial, ())

    def forget(self, trial: int) -> None:
        """Remove the events of a trial."""
        self._events.pop(trial, None)

    def restore(self, trial: int, events: Sequence[Event]) -> None:
        """Set all events of a trial that was forgotten."""
        self._events[trial] = list(events)

    def list_trials(self) -> list[int]:
        """Return the numbers of the trials, ascending."""
        return sorted(self._events)


def _decides_nothing(event: Event) -> bool:
    return isinstance(event, EpochReported) and event.decision == "continue" and event.reason is None and not event.note


def tell_story(events: Iterable[Event], metric: str) -> list[StoryLine]:
    """Tell the story of a trial.

    Args:
        events: the events of the trial, as `StoryEvents.get` returns them.
        metric: the metric of the sweep.

    Returns:
        What happened to the trial, in order. The last line says how it ended, or what it does now.
    """
    events = list(events)
    number = next((event.trial for event in events if isinstance(event, TrialSuggested)), -1)
    story = _Story(metric, number)
    for place, event in enumerate(events):
        story.add(event, node=_find_node(events[place + 1 :]) if isinstance(event, SegmentStarted) else "")
    return story.finish()


def _find_node(following: Sequence[Event]) -> str:
    """Return the node of a segment from the events after its start; empty if none has named it yet."""
    for event in following:
        if isinstance(event, SegmentStarted):
            return ""
        if isinstance(event, (EpochReported, SegmentFailed)) and event.node:
            return event.node
    return ""


@dataclass
class _Story:
    """The story of a trial so far.

    Attributes:
        metric: the metric of the sweep.
        number: number of the trial.
        lines: the lines.
        params: the parameters that the trial is trained with.
        last_report: the last report since the last other event; None if there is none.
        epoch: the last reported epoch.
        last_rule: the rule by which the last line says that the trial continues; empty if it says something else.
        note: the last note of a report.
        is_running: whether a segment of the trial is running.
        num_segments: number of segments started so far.
    """

    metric: str
    number: int
    lines: list[StoryLine] = field(default_factory=list)
    params: Mapping[str, object] = field(default_factory=dict)
    last_report: EpochReported | None = None
    epoch: int = 0
    last_rule: str = ""
    note: str = ""
    is_running: bool = False
    num_segments: int = 0
    _interruptions: SegmentInterruptions = field(default_factory=SegmentInterruptions)

    def add(self, event: Event, *, node: str) -> None:
        """Add the lines of the next event. `node` is the node of the segment that it starts."""
        interruption = self._interruptions.add(event)
        if isinstance(event, EpochReported):
            self._add_report(event, interruption)
            return
        for text in self._describe(event, node):
            self.lines.append(StoryLine(event.at, text))
        self.last_rule, self.last_report = "", None
        if isinstance(event, SegmentStarted):
            self.params = event.params if event.params is not None else self.params
            self.is_running = True
            self.num_segments += 1
        elif isinstance(event, TrialSuggested):
            self.params = event.params
        elif isinstance(event, TrialSteered):
            self.is_running = self.is_running and event.action != "stop"
        elif (
            not isinstance(event, (CostsMeasured, NodeQuarantined, SweepSteered))
            or getattr(event, "decision", "") == "infeasible"
        ):
            self.is_running = False

    def finish(self) -> list[StoryLine]:
        """Return the lines; for a running trial, the last one has its newest report."""
        last = self.last_report
        if self.is_running and last is not None and last.at > self.lines[-1].at_s:
            return [*self.lines, StoryLine(last.at, f"epoch {last.epoch}: {self._format_value(last)}; running")]
        return self.lines

    def _add_report(self, event: EpochReported, interruption: str) -> None:
        self.last_report, self.epoch = event, event.epoch
        if event.note and event.note != self.note:
            self.lines.append(StoryLine(event.at, f"epoch {event.epoch}: {event.note}"))
            self.last_rule = ""
        self.note = event.note
        if interruption:
            text = f"epoch {event.epoch}: {self._format_value(event)}; waiting: {_INTERRUPTIONS[interruption]}"
            self.lines.append(StoryLine(event.at, text))
            self.last_rule, self.is_running = "", False
            return
        if event.decision == "continue" and event.reason is None:
            return
        rule = event.reason.rule if event.reason is not None and event.decision == "continue" else ""
        if rule == self.last_rule == _RULE_OF_EVERY_EPOCH:
            self.lines.pop()
        self.lines.append(StoryLine(event.at, self._describe_report(event)))
        self.last_rule, self.is_running = rule, event.decision == "continue"

    def _describe_report(self, event: EpochReported) -> str:
        verb, reason = _VERBS[event.decision], event.reason
        text = format_reason(reason, self.metric, outcome=event.decision, epoch=event.epoch)
        value = f"epoch {event.epoch}: {self._format_value(event)}"
        if reason is None:
            return f"{value}; {verb}"
        return f"{value}; {verb}: {text}" if reason.rule in _RULES_WITHOUT_VALUE else f"{text}; {verb}"

    def _format_value(self, event: EpochReported) -> str:
        value = event.metrics.get(self.metric)
        return "no value" if value is None else format_metric(self.metric, value)

    def _describe(self, event: Event, node: str) -> Iterator[str]:
        match event:
            case TrialSuggested():
                yield f"proposed: {event.origin}" if event.origin else "proposed by the searcher"
                yield f"parameters: {format_params(event.params)}"
            case SegmentStarted():
                yield self._describe_start(event, node)
            case CostsMeasured():
                yield f"costs: {', '.join(format_cost(name, cost) for name, cost in event.costs.items())}"
                if event.decision == "infeasible":
                    yield _join("infeasible", format_reason(event.reason, self.metric, outcome=event.decision))
            case SegmentFailed():
                yield self._describe_failure(event)
            case NodeQuarantined():
                numbers = ", ".join(map(str, event.trials))
                yield f"node {event.node} is quarantined because of failures of the trials {numbers}"
            case TrialEnded():
                yield _join(event.state, event.cause or format_reason(event.reason, self.metric, outcome=event.state))
            case TrialSteered():
                yield _STEERED[event.action]
            case SweepSteered():
                yield self._describe_sweep_steered(event)
            case SweepOpened() if self.is_running:
                yield "waiting: the process that ran the sweep ended"
            case SweepClosed() if self.is_running:
                yield f"waiting: {format_close_reason(event.reason, event.budget)}"

    def _describe_sweep_steered(self, event: SweepSteered) -> str:
        if event.action != "epochs":
            return "the user has paused the sweep" if event.action == "pause" else "the user has resumed the sweep"
        text = f"the user has raised sweep.max_epochs from {event.epochs_before} to {event.limits['max_epochs']:g}"
        if self.is_running:
            return text
        if self.number not in event.trials:
            return f"{text}; stopped: {format_reason(Reason('no_checkpoint'), self.metric, outcome='stop')}"
        return f"{text}; {_VERBS[event.decisions[event.trials.index(self.number)]]}"

    def _describe_start(self, event: SegmentStarted, node: str) -> str:
        if event.source is not None:
            text = f"resumed as a copy of trial {event.source} from epoch {event.epoch}"
        elif event.epoch:
            text = f"resumed from epoch {event.epoch}"
        else:
            text = "started again from scratch" if self.num_segments else "started"
        where = f" on node {node}" if node else ""
        gpus = "" if event.gpus is None else f" with {event.gpus:g} GPUs"
        why = format_reason(event.reason, self.metric, outcome="resume", epoch=self.epoch)
        return text + where + gpus + (f" ({why})" if why else "") + self._describe_changes(event)

    def _describe_changes(self, event: SegmentStarted) -> str:
        """Describe the parameters that population based training has changed."""
        changes = [
            f"{key} {format_value(self.params.get(key))} -> {format_value(value)}"
            for key, value in (event.params or {}).items()
            if self.params.get(key) != value
        ]
        return f", with {', '.join(changes)}" if changes else ""

    def _describe_failure(self, event: SegmentFailed) -> str:
        where = f" on node {event.node}" if event.node else ""
        then = "waits for a retry" if event.retry else "failed for good"
        why = format_reason(event.reason, self.metric, outcome="retry" if event.retry else "no_retry")
        return f"failure{where} ({event.kind.replace('_', ' ')}): {event.cause}; {_join(then, why)}"


def _join(text: str, reason: str) -> str:
    return f"{text}: {reason}" if reason else text
