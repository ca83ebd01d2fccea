"""Interventions of the user in a sweep without Ray: what each does, what is refused, and what a kill changes."""

import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handpose.errors import UserError
from handpose.schedulers.scheduler import Fifo
from handpose.search.searcher import Searcher
from handpose.sweep.audit.events import Expectations, replay_events
from handpose.sweep.controller.controller import SegmentFailure
from handpose.sweep.controller.history import make_empty_table, rebuild_history
from handpose.sweep.controller.steering import SteeringChecks
from handpose.sweep.driver.intervention_inbox import InterventionInbox
from handpose.sweep.record.events import (
    EpochReported,
    SegmentStarted,
    SpaceRecord,
    SweepSteered,
    TrialSteered,
    TrialSuggested,
    read_events,
)
from handpose.sweep.record.interventions import InterventionFiles, make_intervention
from tests.sweep.controller.test_controller import SPACE, compute_falling_loss, make_schedulers
from tests.sweep.simulation import FakeClock, FakeSearcher, SimulatedSweep, load_space_record
from tests.sweep.sweeps import make_settings

ONE_SCHEDULER_EACH = ["fifo", "stop", "promote", "median", "population", "freeze-thaw"]


class KilledError(BaseException):
    """The process is gone."""


class TickingClock(FakeClock):
    """Some time passes with every look at it."""

    def __call__(self):
        self.now += 0.002
        return self.now


class SteeredSweep(SimulatedSweep):
    """A simulated sweep whose folder is looked into before every step."""

    def start(self):
        limits = {} if not self.file.exists() else collect_limits(read_events(self.file))
        self.settings = self.settings.change_limits(limits)
        self.clock = self.clock if isinstance(self.clock, TickingClock) else TickingClock()
        super().start()
        self.notes = []
        self.files = InterventionFiles(self.settings.path)
        self.inbox = InterventionInbox(self.settings.path, self.controller, show_note=self.notes.append)
        self.look()

    def look(self):
        """Execute what waits, and drop the workers of trials that do not run any more."""
        self.inbox.process(at_once=True)
        for number, segment in list(self.segments.items()):
            if self.controller.is_abandoned(segment):
                del self.segments[number]
                self.untold.pop(number, None)

    def steer(self, action, **values):
        """Give a command and return its answer."""
        command = make_intervention(action, **values)
        self.files.write(command)
        self.look()
        return self.files.read_answer(command.id)

    def advance(self, num_steps=1):
        """Some reports, as far as something runs."""
        for _ in range(num_steps):
            self.look()
            self.fill()
            if self.segments:
                self.step()

    def advance_until(self, holds):
        """Reports until a condition holds."""
        for _ in range(200):
            self.fill()
            if holds():
                return
            self.advance()
        raise AssertionError("it never holds")

    def fail(self, number, kind="error"):
        """A running trial fails."""
        self.controller.process_failure(number, SegmentFailure(kind, "it broke", "Traceback", ""))
        del self.segments[number]

    def finish(self):
        """To the end."""
        for _ in range(1000):
            self.look()
            self.fill()
            if self.controller.is_over:
                break
            if not self.segments:
                assert self.controller.history.is_paused
                assert self.steer("resume").is_accepted
                continue
            self.step()
        assert self.controller.is_over
        self.controller.close("finished")
        self.log.close()
        return self

    def get_state(self, number):
        return self.controller.history.table.rows[number].state

    @property
    def events(self):
        return read_events(self.file)

    def audit(self):
        """The findings of the audit about the events."""
        expected = Expectations(None, None, 0, {}, lambda number: None, 1)
        replayed = replay_events(self.settings, expected, scheduler=self.make_scheduler(), load_space=load_space_record)
        return [each.text for each in replayed.findings]


def collect_limits(events):
    limits = {}
    for event in events:
        limits |= event.limits if isinstance(event, SweepSteered) and event.action != "epochs" else {}
    return limits


@pytest.fixture
def make_sweep(tmp_path, write_space):
    """Makes a sweep of 8 trials of 9 epochs."""
    count = itertools.count()

    def made(kind, *, loss=compute_falling_loss, num_slots=3, every=1, seed=0, is_late=False, **changes):
        folder = tmp_path / f"sweep_{next(count)}"
        folder.mkdir()
        values = {"num_trials": 8, "max_epochs": 9, **changes}
        scheduler = make_schedulers(write_space(SPACE), values["max_epochs"])[kind]
        return SteeredSweep(
            make_settings(folder, **values),
            scheduler,
            loss,
            num_slots=num_slots,
            every=every,
            seed=seed,
            is_late=is_late,
        )

    return made


def describe_state(sweep):
    """What a resumed process must know."""
    history = sweep.controller.history
    trials = {
        number: (
            "waiting" if trial.row.state == "running" else trial.row.state,
            trial.row.epochs,
            trial.is_kept,
            trial.is_added,
            trial.is_stopped_by_user,
            trial.reopened_from,
            trial.num_failures,
        )
        for number, trial in history.trials.items()
    }
    searched = sweep.proposer.space, sweep.proposer.started, history.search_changes
    return trials, history.num_trials, history.added, history.interventions, history.settings, searched


# --- any commands, kills and resumptions ------------------------------------------------------------------------------


COMMANDS = st.one_of(
    st.tuples(st.sampled_from(["stop", "retry", "keep"]), st.integers(0, 11)),
    st.tuples(st.just("add"), st.sampled_from([1e-4, 1e-3, 2e-3])),
    st.tuples(st.just("trials"), st.integers(1, 12)),
    st.tuples(st.just("epochs"), st.sampled_from([8, 12, 20])),
    st.tuples(st.just("space"), st.sampled_from(["near", "far", "few", "odd"])),
    st.tuples(st.just("slots"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["pause", "resume"]), st.none()),
    st.tuples(st.just("budget"), st.sampled_from([None, 1e6])),
)
STEPS = st.one_of(
    st.tuples(st.just("advance"), st.integers(1, 6)),
    st.tuples(st.just("command"), COMMANDS),
    st.tuples(st.just("command while it is stopped"), COMMANDS),
    st.tuples(st.just("command and kill before the answer"), COMMANDS),
    st.tuples(st.just("kill"), st.none()),
    st.tuples(st.just("failure"), st.integers(0, 7)),
)


def make_space_record(name):
    """A search space to which the user changes."""
    high = {"near": "1e-2", "far": "1e-1"}.get(name, "2e-2")
    return SpaceRecord(f"{name}.yaml", f"optimizer.lr: tag(log, interval(1e-4, {high}))\n")


def make_command(action, value):
    if action in ("stop", "retry", "keep"):
        return make_intervention(action, trial=value)
    if action == "add":
        return make_intervention(action, params={"optimizer.lr": value})
    if action == "budget":
        return make_intervention(action, limits={"time_budget_s": value})
    if action == "space":
        return make_intervention(action, space=make_space_record(value))
    names = {"trials": "num_trials", "epochs": "max_epochs", "slots": "max_concurrent"}
    limits = {names[action]: value} if action in names else {}
    return make_intervention(action, limits=limits)


def restart(sweep):
    before = describe_state(sweep)
    sweep.kill()
    sweep.start()
    return before


def perform(sweep, step, value):
    """One step. Returns the id of a command that it gives."""
    if step == "advance":
        sweep.advance(value)
    elif step == "failure" and value in sweep.segments:
        sweep.fail(value)
    elif step == "kill":
        before = restart(sweep)
        assert describe_state(sweep) == before
    if not step.startswith("command"):
        return None
    command = make_command(*value)
    if step == "command while it is stopped":
        sweep.kill()
        sweep.files.write(command)
        sweep.start()
        return command.id
    sweep.files.write(command)
    if step == "command":
        sweep.look()
        return command.id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.inbox, "_answer", raise_killed)
        with pytest.raises(KilledError):
            sweep.look()
    assert sweep.files.read_answer(command.id) is None
    before = restart(sweep)
    if command.id in before[3]:  # it was executed before the kill, and is not executed again
        assert describe_state(sweep) == before
    return command.id


def raise_killed(*_):
    raise KilledError


ANY_STEPS = {"steps": st.lists(STEPS, max_size=14), "seed": st.integers(0, 3)}
QUICKLY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("kind", ONE_SCHEDULER_EACH[:-1])
@settings(max_examples=40, **QUICKLY)
@given(**ANY_STEPS)
def test_whatever_happens_each_command_is_executed_once_or_refused(make_sweep, kind, steps, seed):
    check_commands(make_sweep(kind, seed=seed, max_retries=0, stop_after_failures=50), steps)


@pytest.mark.slow
@settings(max_examples=4, **QUICKLY)
@given(**ANY_STEPS)
def test_a_scheduler_with_a_model_changes_nothing_about_that(make_sweep, steps, seed):
    check_commands(make_sweep("freeze-thaw", seed=seed, max_retries=0, stop_after_failures=50), steps)


def check_commands(sweep, steps):
    """Perform the steps, run the sweep to its end, and check that no command was lost or executed twice."""
    given_ids = [perform(sweep, *step) for step in steps]
    sweep.finish()
    executed = Counter(event.intervention for event in sweep.events if isinstance(event, (TrialSteered, SweepSteered)))
    assert set(executed.values()) <= {1}
    for name in filter(None, given_ids):
        answer = sweep.files.read_answer(name)
        assert answer is not None, "a command was lost"
        assert answer.is_accepted == (name in executed)
    assert sweep.audit() == []
    history, again = sweep.controller.history, rebuild_history(sweep.settings, sweep.events)
    assert {number: row.state for number, row in again.table.rows.items()} == {
        number: row.state for number, row in history.table.rows.items()
    }
    assert all(row.is_over for row in history.table.rows.values())
    assert not history.added


# --- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_SCHEDULER_EACH)
def test_a_running_trial_is_stopped_and_its_slot_is_free(make_sweep, kind):
    sweep = make_sweep(kind)
    sweep.advance(2)
    number = min(sweep.segments)
    answer = sweep.steer("stop", trial=number)
    assert answer == answer.__class__(True, f"trial {number} is stopped")
    assert sweep.get_state(number) == "stopped"
    assert number not in sweep.segments
    row = sweep.controller.history.table.rows[number]
    assert row.reason == "stopped by the user"
    sweep.finish()
    assert sweep.get_state(number) == "stopped"
    assert sweep.proposer.told[number] == "stopped"
    assert sweep.audit() == []


def test_a_late_report_of_a_stopped_trial_changes_nothing(make_sweep):
    sweep = make_sweep("fifo")
    sweep.advance(3)
    segment = sweep.segments[0]
    epochs = sweep.controller.history.table.rows[0].epochs
    sweep.steer("stop", trial=0)
    assert sweep.controller.is_abandoned(segment)
    assert not sweep.controller.process_report(0, epochs + 1, {"val/pa_mpjpe_mm": 1.0})
    assert sweep.controller.history.table.rows[0].epochs == epochs


def test_the_worker_of_an_earlier_segment_is_not_that_of_the_trial_that_is_retried(make_sweep):
    sweep = make_sweep("fifo")
    sweep.advance(3)
    earlier = sweep.segments[0]
    sweep.steer("stop", trial=0)
    assert sweep.steer("retry", trial=0).is_accepted
    sweep.fill()
    assert sweep.get_state(0) == "running"
    assert sweep.controller.is_abandoned(earlier)
    assert not sweep.controller.is_abandoned(sweep.segments[0])


def test_a_paused_trial_that_is_stopped_is_not_promoted(make_sweep):
    sweep = make_sweep("promote")
    sweep.advance_until(lambda: sweep.controller.history.live["paused"])
    number = min(sweep.controller.history.live["paused"])
    assert sweep.steer("stop", trial=number).is_accepted
    sweep.finish()
    assert not any(
        isinstance(event, SegmentStarted) and event.segment > 1 and event.trial == number for event in sweep.events
    )


# --- retry ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_SCHEDULER_EACH)
def test_a_failed_trial_is_resumed_from_its_newest_checkpoint_with_all_its_retries(make_sweep, kind):
    sweep = make_sweep(kind, max_retries=1, num_trials=3)
    rows = sweep.controller.history.table.rows
    sweep.advance_until(lambda: any(rows[number].epochs for number in sweep.segments))
    number = next(number for number in sweep.segments if rows[number].epochs)
    for _ in range(2):
        sweep.fill()
        sweep.fail(number)
    assert sweep.get_state(number) == "failed"
    epochs = sweep.controller.history.table.rows[number].epochs
    answer = sweep.steer("retry", trial=number)
    assert answer.sentence == f"trial {number} is retried, and waits for a slot to go on from epoch {epochs}"
    sweep.fill()
    assert sweep.segments[number].epoch == epochs
    sweep.fail(number)
    assert sweep.get_state(number) == "waiting", "the retries count from 0"
    sweep.finish()
    assert sweep.audit() == []


@pytest.mark.parametrize("has_started", [False, True])
def test_a_checkpoint_that_was_not_reported_is_not_lost_when_its_trial_is_stopped_and_the_sweep_is_resumed(
    make_sweep, has_started
):
    """The crash drill with commands found this: the trial was trained again from an older checkpoint."""
    sweep = make_sweep("fifo", num_slots=1, num_trials=2, is_late=True)
    sweep.advance(4)
    restart(sweep)
    if has_started:
        sweep.fill()
    files = sorted(file.name for file in (sweep.settings.path / "checkpoints/trial_0000").iterdir())
    assert files == ["epoch_0003_segment_1.ckpt", "epoch_0004_segment_1.ckpt"]
    assert sweep.steer("stop", trial=0).is_accepted
    restart(sweep)
    assert sorted(file.name for file in (sweep.settings.path / "checkpoints/trial_0000").iterdir()) == files
    answer = sweep.steer("retry", trial=0)
    assert answer.sentence == "trial 0 is retried, and waits for a slot to go on from epoch 4"
    sweep.finish()
    assert set(list_trained(sweep).values()) == {1}
    assert sweep.audit() == []


# --- keep -------------------------------------------------------------------------------------------------------------


def compute_rising_loss(number, params, epoch):
    """The later a trial starts, the worse it is."""
    return 10.0 + number - 0.01 * epoch


@pytest.mark.parametrize("kind", ["stop", "promote", "median", "population", "freeze-thaw"])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_trial_that_is_kept_trains_to_the_end_whatever_the_scheduler_decides(make_sweep, kind, restarts):
    sweep = make_sweep(kind, loss=compute_rising_loss, num_trials=12)
    sweep.advance_until(lambda: 5 in sweep.segments)
    assert sweep.steer("keep", trial=5).is_accepted
    if restarts:
        restart(sweep)
    sweep.finish()
    assert sweep.get_state(5) == "complete"
    reports = [event for event in sweep.events if isinstance(event, EpochReported) and event.trial == 5]
    assert {event.decision for event in reports[:-1]} <= {"continue", "pause"}
    if kind in ("stop", "median"):
        assert any(event.reason is not None and event.reason.subject == "stop" for event in reports)
    assert sweep.audit() == []


def test_a_paused_trial_that_is_kept_goes_on_at_once(make_sweep):
    sweep = make_sweep("promote", loss=compute_rising_loss)
    sweep.advance_until(lambda: 2 in sweep.controller.history.live["paused"])
    assert sweep.steer("keep", trial=2).sentence.startswith(
        "trial 2 trains to sweep.max_epochs=9, and waits for a slot"
    )
    sweep.finish()
    assert sweep.get_state(2) == "complete"
    assert sweep.audit() == []


@pytest.mark.parametrize("kind", ["stop", "median", "promote"])
def test_a_stopped_trial_with_a_checkpoint_can_be_kept(make_sweep, kind):
    sweep = make_sweep(kind, loss=compute_rising_loss)
    sweep.finish()
    number = next(number for number, row in sweep.controller.history.table.rows.items() if row.state == "stopped")
    sweep.start()
    assert sweep.steer("keep", trial=number).is_accepted
    sweep.finish()
    assert sweep.get_state(number) == "complete"
    assert sweep.audit() == []


def test_a_stopped_trial_without_a_checkpoint_cannot_be_kept(make_sweep):
    sweep = make_sweep("stop", loss=compute_rising_loss, every=100)
    sweep.advance_until(lambda: "stopped" in {row.state for row in sweep.controller.history.table.rows.values()})
    number = next(number for number, row in sweep.controller.history.table.rows.items() if row.state == "stopped")
    assert "has no checkpoint left" in sweep.steer("keep", trial=number).sentence


def test_a_kept_trial_that_diverges_ends(make_sweep):
    sweep = make_sweep("promote", loss=lambda number, params, epoch: math.nan if epoch == 4 else 5.0)
    sweep.advance()
    sweep.steer("keep", trial=0)
    sweep.finish()
    assert sweep.get_state(0) == "diverged"


# --- epochs -----------------------------------------------------------------------------------------------------------


def list_trained(sweep):
    """The epochs that were trained, each as often as it was."""
    trained, at = Counter(), {}
    for event in sweep.events:
        if isinstance(event, SegmentStarted):
            at[event.trial] = event.epoch
        elif isinstance(event, EpochReported):
            trained.update((event.trial, epoch) for epoch in range(at[event.trial] + 1, event.epoch + 1))
            at[event.trial] = event.epoch
    return trained


def find_last_epochs(sweep):
    return {number: (row.epochs, row.state) for number, row in sweep.controller.history.table.rows.items()}


@pytest.mark.parametrize("kind", ["fifo", "stop", "promote"])
def test_a_finished_sweep_that_is_raised_has_the_rungs_of_one_with_all_epochs_from_the_start(make_sweep, kind):
    whole = make_sweep(kind, num_slots=1, num_trials=27, max_epochs=27)
    whole.finish()
    raised = make_sweep(kind, num_slots=1, num_trials=27, max_epochs=9)
    raised.finish()
    raised.start()
    answer = raised.steer("epochs", limits={"max_epochs": 27})
    assert answer.sentence.startswith("a complete trial has 27 epochs instead of 9; of those that were complete, ")
    raised.finish()
    assert find_last_epochs(raised) == find_last_epochs(whole)
    assert raised.controller.history.rungs == whole.controller.history.rungs
    assert set(list_trained(raised).values()) == {1}
    assert raised.audit() == []


@pytest.mark.parametrize("kind", ONE_SCHEDULER_EACH)
def test_a_running_sweep_is_raised_and_no_epoch_is_trained_twice(make_sweep, kind):
    sweep = make_sweep(kind, num_trials=12)
    sweep.advance_until(lambda: sweep.controller.history.list_complete_trials())
    assert sweep.steer("epochs", limits={"max_epochs": 20}).is_accepted
    assert not sweep.controller.history.list_complete_trials()
    sweep.finish()
    assert max(row.epochs for row in sweep.controller.history.table.rows.values()) == 20
    assert {row.epochs for row in sweep.controller.history.table.rows.values() if row.state == "complete"} == {20}
    assert set(list_trained(sweep).values()) == {1}
    assert sweep.audit() == []


def test_a_running_segment_ends_at_its_next_checkpoint_and_goes_on_to_the_new_epoch(make_sweep):
    sweep = make_sweep("fifo", num_slots=1, num_trials=1, every=3)
    sweep.advance(4)
    sweep.steer("epochs", limits={"max_epochs": 12})
    sweep.advance(1)
    assert sweep.get_state(0) == "running"
    sweep.step()
    row = sweep.controller.history.table.rows[0]
    assert (row.state, row.reason) == ("waiting", "the user has raised sweep.max_epochs to 12: continues")
    sweep.fill()
    assert (sweep.segments[0].epoch, sweep.segments[0].max_epochs) == (6, 12)


def test_a_segment_without_checkpoints_ends_at_the_former_last_epoch(make_sweep):
    sweep = make_sweep("fifo", num_slots=1, num_trials=1, every=100)
    sweep.advance(4)
    sweep.steer("epochs", limits={"max_epochs": 12})
    sweep.finish()
    starts = [(event.segment, event.epoch) for event in sweep.events if isinstance(event, SegmentStarted)]
    assert starts == [(1, 0), (2, 0)]
    assert find_last_epochs(sweep) == {0: (12, "complete")}
    assert sweep.audit() == []


def test_a_complete_trial_without_a_checkpoint_ends_and_its_result_counts_at_the_rung(make_sweep):
    sweep = make_sweep("promote", loss=compute_rising_loss, num_slots=1)
    sweep.finish()
    complete = sweep.controller.history.list_complete_trials()
    lost = complete[0]
    for file in (sweep.settings.path / "checkpoints" / f"trial_{lost:04d}").iterdir():
        file.unlink()
    sweep.start()
    answer = sweep.steer("epochs", limits={"max_epochs": 27})
    assert answer.sentence.endswith("1 are stopped because they have no checkpoint")
    row = sweep.controller.history.table.rows[lost]
    assert (row.state, row.epochs) == ("stopped", 9)
    assert row.reason.startswith("it has no checkpoint to continue from")
    sweep.finish()
    ranked = [event.reason for event in sweep.events if isinstance(event, SegmentStarted) and event.epoch == 9]
    assert all(reason.num_compared == len(complete) for reason in ranked if reason is not None)
    assert sweep.audit() == []


@pytest.mark.parametrize("max_epochs", [1, 9])
def test_epochs_cannot_be_lowered(make_sweep, max_epochs):
    sweep = make_sweep("promote")
    assert (
        "a complete trial has 9 epochs; give more" in sweep.steer("epochs", limits={"max_epochs": max_epochs}).sentence
    )


def test_the_epochs_of_a_sweep_with_folds_cannot_be_raised(make_sweep):
    answer = make_sweep("promote", folds=3, max_epochs=3).steer("epochs", limits={"max_epochs": 9})
    assert not answer.is_accepted
    assert answer.sentence.startswith("a trial of this sweep has 3 folds of 3 epochs (sweep.folds), each with its own")


def test_a_typing_error_does_not_raise_the_epochs(make_sweep):
    answer = make_sweep("promote").steer("epochs", limits={"max_epochs": 901})
    assert answer.sentence == "a complete trial has 9 epochs; at most 100 times as many can be given at once"


def test_a_scheduler_that_cannot_go_on_refuses(make_sweep):
    class Short(Fifo):
        on_max_epochs = property()

    sweep = make_sweep("fifo")
    sweep.controller.history._scheduler = Short()
    assert sweep.steer("epochs", limits={"max_epochs": 20}).sentence == (
        "the scheduler Short cannot go on with more epochs"
    )


def test_a_number_of_epochs_that_cannot_be_validated_is_refused_before_anything_changes(make_sweep):
    def check(max_epochs):
        raise UserError(f"{max_epochs} is odd")

    sweep = make_sweep("promote")
    sweep.controller._checks = SteeringChecks(epochs=check)
    assert sweep.steer("epochs", limits={"max_epochs": 21}).sentence == "21 is odd"
    assert sweep.controller.history.rungs == (1, 3)


# --- another search space ---------------------------------------------------------------------------------------------


def list_suggested(sweep):
    return {event.trial: event.params for event in sweep.events if isinstance(event, TrialSuggested)}


@pytest.mark.parametrize("kind", [kind for kind in ONE_SCHEDULER_EACH if kind != "population"])
def test_trials_are_proposed_from_another_space(make_sweep, kind):
    sweep, plain = make_sweep(kind), make_sweep(kind)
    sweep.advance(2)
    num_before = len(sweep.controller.history.trials)
    answer = sweep.steer("space", space=make_space_record("far"))
    assert answer.is_accepted
    assert answer.sentence == (
        "trials are proposed from far.yaml from now on; the sweep has 8 trials, of which "
        f"{num_before} have been started"
    )
    sweep.finish()
    plain.finish()
    suggested, without = list_suggested(sweep), list_suggested(plain)
    assert [number for number in suggested if suggested[number] != without[number]] == list(range(num_before, 8))
    assert [sweep.controller.history.count_spaces(number) for number in range(8)] == [0] * num_before + [1] * (
        8 - num_before
    )
    assert sweep.audit() == []


def test_a_resumed_sweep_tells_its_searcher_of_epochs_and_spaces_in_their_order(make_sweep, monkeypatch):
    sweep = make_sweep("promote")
    told = []
    monkeypatch.setattr(FakeSearcher, "on_max_epochs", lambda self, max_epochs: told.append(max_epochs))
    on_space = FakeSearcher.on_space
    monkeypatch.setattr(
        FakeSearcher, "on_space", lambda self, *values: (told.append(values[0].name), on_space(self, *values))
    )
    for action, values in [
        ("space", {"space": make_space_record("far")}),
        ("epochs", {"limits": {"max_epochs": 12}}),
        ("space", {"space": make_space_record("near")}),
        ("epochs", {"limits": {"max_epochs": 20}}),
    ]:
        sweep.advance(2)
        assert sweep.steer(action, **values).is_accepted
    assert told == ["far", 12, "near", 20]
    told.clear()
    before = restart(sweep)
    assert told == ["far", 12, "near", 20]
    assert describe_state(sweep) == before


def test_a_space_with_few_configurations_limits_the_trials_until_another_one_has_more(make_sweep):
    sweep = make_sweep("fifo")
    sweep.advance(2)
    num_before = len(sweep.controller.history.trials)
    assert sweep.steer("space", space=make_space_record("few")).is_accepted
    assert sweep.controller.history.num_trials == num_before + 2
    sweep.steer("trials", limits={"num_trials": 8})
    assert sweep.steer("space", space=make_space_record("far")).is_accepted
    assert sweep.finish().controller.history.num_trials == 8
    assert sweep.audit() == []


def test_the_configuration_checks_a_space_before_anything_changes(make_sweep):
    def check(space):
        raise UserError(f"{space.name} has no key that exists")

    sweep = make_sweep("promote")
    sweep.controller._checks = SteeringChecks(space=check)
    assert sweep.steer("space", space=make_space_record("far")).sentence == "far has no key that exists"
    assert sweep.steer("space", space=SpaceRecord("wrong.yaml", "optimizer.lr: interval(2")).sentence.startswith(
        "wrong.yaml: cannot read optimizer.lr"
    )
    assert not sweep.controller.history.search_changes
    assert sweep.proposer.space == ""


def test_a_searcher_that_knows_one_space_only_refuses(make_sweep, monkeypatch):
    monkeypatch.setattr(FakeSearcher, "check_space", Searcher.check_space)
    assert make_sweep("fifo").steer("space", space=make_space_record("far")).sentence == (
        "FakeSearcher cannot go on with another search space"
    )


def test_the_same_space_and_one_in_which_an_added_configuration_would_get_lost_are_refused(make_sweep):
    sweep = make_sweep("fifo")
    assert sweep.steer("space", space=make_space_record("far")).is_accepted
    assert "already" in sweep.steer("space", space=make_space_record("far")).sentence
    sweep.fill()
    sweep.steer("add", params={"optimizer.lr": 1e-3})
    assert "has not started yet" in sweep.steer("space", space=make_space_record("near")).sentence


# --- add, trials, slots, budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_a_configuration_that_is_added_is_tried_next(make_sweep, restarts):
    sweep = make_sweep("fifo")
    sweep.advance(2)
    assert sweep.steer("add", params={"optimizer.lr": 1e-3}).sentence.endswith("the sweep has 8 trials")
    if restarts:
        restart(sweep)
    sweep.finish()
    suggested = [event for event in sweep.events if isinstance(event, TrialSuggested)]
    assert [event.trial for event in suggested if event.added_by] == [3]
    assert suggested[3].params["optimizer.lr"] == 1e-3
    assert len(suggested) == 8
    assert sweep.audit() == []


def test_a_configuration_that_is_added_to_a_sweep_that_has_started_all_trials_is_one_more(make_sweep):
    sweep = make_sweep("promote", num_trials=3)
    sweep.advance_until(lambda: len(sweep.controller.history.trials) == 3)
    for number, rate in enumerate([1e-3, 2e-3], start=4):
        assert sweep.steer("add", params={"optimizer.lr": rate}).sentence.endswith(f"the sweep has {number} trials")
    restart(sweep)
    sweep.finish()
    assert len(sweep.controller.history.trials) == 5
    assert sweep.audit() == []


def test_the_searcher_checks_what_is_added(make_sweep):
    answer = make_sweep("fifo").steer("add", params={"model.decoder.depth": 3})
    assert answer == answer.__class__(False, "only the learning rate can be given")


def test_the_number_of_trials_changes(make_sweep):
    sweep = make_sweep("fifo", num_trials=4)
    sweep.advance(2)
    assert (
        sweep.steer("trials", limits={"num_trials": 6}).sentence
        == "the sweep has 6 trials, of which 3 have been started"
    )
    assert "has 3 trials already" in sweep.steer("trials", limits={"num_trials": 2}).sentence
    restart(sweep)
    sweep.finish()
    assert len(sweep.controller.history.trials) == 6
    assert sweep.audit() == []


def test_fewer_slots_end_no_trial_and_more_slots_are_used_at_once(make_sweep):
    sweep = make_sweep("fifo")
    sweep.advance()
    assert len(sweep.segments) == 3
    sweep.steer("slots", limits={"max_concurrent": 1})
    assert len(sweep.segments) == 3
    sweep.advance_until(lambda: len(sweep.controller.history.live["running"]) == 1)
    for _ in range(12):
        sweep.advance()
        assert len(sweep.controller.history.live["running"]) <= 1
    sweep.steer("slots", limits={"max_concurrent": 3})
    sweep.fill()
    assert len(sweep.segments) == 3


def test_a_budget_changes_and_counts(make_sweep):
    sweep = make_sweep("fifo", time_budget_s=1000.0)
    sweep.advance(3)
    assert not sweep.controller.is_budget_spent()
    assert sweep.steer("budget", limits={"time_budget_s": 2.0}).sentence == "sweep.time_budget_s=2"
    assert sweep.controller.is_budget_spent()
    assert sweep.steer("budget", limits={"time_budget_s": None}).sentence == "sweep.time_budget_s=null"
    assert not sweep.controller.is_budget_spent()
    assert "trials use no GPU" in sweep.steer("budget", limits={"gpu_hours": 2.0}).sentence
    assert sweep.steer("budget", limits={"stop_when": 0.1}).is_accepted


# --- pause and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_SCHEDULER_EACH)
def test_a_paused_sweep_ends_its_segments_at_a_checkpoint_and_goes_on_where_they_ended(make_sweep, kind):
    sweep = make_sweep(kind, every=2)
    sweep.advance(2)
    assert sweep.steer("pause").is_accepted
    num_started = sum(isinstance(event, SegmentStarted) for event in sweep.events)
    sweep.advance(40)
    assert not sweep.segments
    assert not sweep.controller.is_over
    assert sum(isinstance(event, SegmentStarted) for event in sweep.events) == num_started
    waiting = sweep.controller.history.live["waiting"]
    assert all(
        sweep.controller.history.table.rows[number].reason == "the user has paused the sweep" for number in waiting
    )
    epochs = {number: sweep.controller.history.table.rows[number].epochs for number in waiting}
    assert "paused already" in sweep.steer("pause").sentence
    assert sweep.steer("resume").is_accepted
    sweep.fill()
    assert all(sweep.segments[number].epoch == epochs[number] for number in waiting & set(sweep.segments))
    sweep.finish()
    assert sweep.audit() == []


def test_a_trial_that_saves_no_checkpoint_is_not_interrupted(make_sweep):
    sweep = make_sweep("fifo", every=100)
    sweep.advance()
    sweep.steer("pause")
    sweep.advance(60)
    assert {row.state for row in sweep.controller.history.table.rows.values()} == {"complete"}
    assert len(sweep.controller.history.trials) == 3
    assert not sweep.controller.is_over


def test_a_resumed_process_ends_a_pause(make_sweep):
    sweep = make_sweep("fifo")
    sweep.steer("pause")
    restart(sweep)
    assert not sweep.controller.history.is_paused


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "action", "sentence"),
    [
        ("complete", "stop", "only a trial that has not ended can be stopped"),
        ("complete", "retry", "only a trial that has failed, or that you have stopped, can be retried"),
        ("complete", "keep", "only a trial that has not ended, or was stopped, can be kept"),
        ("diverged", "retry", "trial 1 is diverged"),
        ("running", "retry", "is running; only a trial that has failed"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence_and_leaves_no_event(make_sweep, state, action, sentence):
    sweep = make_sweep("fifo", loss=lambda number, params, epoch: math.nan if number == 1 else 5.0)
    rows = sweep.controller.history.table.rows
    sweep.advance_until(lambda: {"complete", "diverged", "running"} <= {row.state for row in rows.values()})
    before = sweep.file.read_bytes()
    number = next(number for number, row in rows.items() if row.state == state)
    answer = sweep.steer(action, trial=number)
    assert not answer.is_accepted
    assert sentence in answer.sentence
    assert sweep.file.read_bytes() == before


def test_a_trial_that_does_not_exist_is_named(make_sweep):
    sweep = make_sweep("fifo")
    assert sweep.steer("stop", trial=0).sentence == "the sweep has no trial 0; it has not started a trial yet"
    sweep.fill()
    assert sweep.steer("stop", trial=17).sentence == "the sweep has no trial 17; its trials are 0 to 2"


def test_a_command_is_not_executed_after_the_end_and_waits(make_sweep):
    sweep = make_sweep("fifo").finish()
    command = make_intervention("trials", limits={"num_trials": 9})
    sweep.files.write(command)
    sweep.inbox.process(at_once=True)
    assert sweep.files.read_answer(command.id) is None
    assert sweep.files.list_waiting(sweep.controller.history.interventions) == [command.id]


def test_an_answer_without_its_event_does_not_count(make_sweep):
    """The machine was lost with the last second of the events, but not with the answer."""
    sweep = make_sweep("fifo")
    sweep.advance(2)
    whole = sweep.file.read_bytes()
    sweep.steer("stop", trial=0)
    sweep.kill()
    sweep.file.write_bytes(whole)
    sweep.start()
    assert sweep.get_state(0) == "stopped"


def test_events_with_an_intervention_that_is_not_possible_are_refused(make_sweep):
    sweep = make_sweep("fifo")
    sweep.advance(2)
    sweep.steer("stop", trial=0)
    sweep.kill()
    line = json.loads(sweep.file.read_text().splitlines()[-1])
    with sweep.file.open("a") as log:
        log.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"executes the intervention {line['intervention']} again"):
        sweep.start()
    lines = sweep.file.read_text().splitlines()[:-1]
    sweep.file.write_text("\n".join([*lines, json.dumps(line | {"intervention": "another"})]) + "\n")
    with pytest.raises(UserError, match="only a trial that has not ended can be stopped"):
        sweep.start()


def test_a_status_that_does_not_repeat_decisions_shows_the_same(make_sweep):
    sweep = make_sweep("promote")
    sweep.advance(3)
    sweep.steer("keep", trial=0)
    sweep.steer("stop", trial=1)
    history = rebuild_history(sweep.settings, sweep.events)
    assert history.table.rows[1].reason == "stopped by the user"
    assert history.trials[0].is_kept
    assert isinstance(Fifo(), Fifo)
    assert make_empty_table(sweep.settings).changed_limits == {}
