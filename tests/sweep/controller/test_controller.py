"""Decisions, failures and crashes, without Ray: what a sweep that was killed knows and does."""

import math
import random
from dataclasses import replace

import pytest

from handpose.errors import UserError
from handpose.schedulers.asha import Asha
from handpose.schedulers.freeze_thaw import FreezeThaw
from handpose.schedulers.median import MedianStopping
from handpose.schedulers.population import PopulationBased
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.controller.controller import SegmentFailure
from handpose.sweep.controller.history import History, make_empty_table, snapshot_trial
from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.driver.run import describe_spent_budget, read_finished_table
from handpose.sweep.record.events import (
    CostsMeasured,
    EpochReported,
    NodeQuarantined,
    SegmentStarted,
    TrialEnded,
    read_events,
)
from handpose.sweep.storage.retention import find_newest_intact
from tests.sweep.objectives import METRIC
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_settings

SPACE = "optimizer.lr: tag(log, interval(1e-4, 1e-1))\nmodel.decoder.depth: range(1, 6)\n"


def compute_falling_loss(number, params, epoch):
    """Falls with the epochs towards a value of the trial's own; every ninth trial diverges on the way."""
    if number % 9 == 8 and epoch == 3:
        return math.nan
    generator = random.Random(f"{number} {epoch}")
    return 1.0 + abs(math.log10(params["optimizer.lr"]) + 3) + 4.0 / epoch + generator.gauss(0, 0.2)


def make_schedulers(space, max_epochs=9):
    asha = {"grace_period": 1, "reduction_factor": 3, "max_epochs": max_epochs, "seed": 5}
    return {
        "fifo": Fifo,
        "stop": lambda: Asha(mode="stop", brackets=2, **asha),
        "promote": lambda: Asha(mode="promote", brackets=1, **asha),
        "freeze-thaw": lambda: FreezeThaw(space=space, max_epochs=max_epochs, min_probability=0.05, seed=5),
        "fifo of two": Fifo,
        "stop of two": lambda: Asha(mode="stop", brackets=2, num_objectives=2, **asha),
        "promote of two": lambda: Asha(mode="promote", brackets=1, num_objectives=2, **asha),
        "median": lambda: MedianStopping(grace_period=2, min_samples_required=3),
        "population": lambda: PopulationBased(
            space=space,
            mutate=["optimizer.lr"],
            perturbation_interval=2,
            quantile_fraction=0.25,
            resample_probability=0.25,
            population_size=12,
            max_epochs=max_epochs,
            seed=5,
        ),
    }


@pytest.fixture
def simulate(tmp_path, write_space):
    """Makes a simulated sweep of 12 trials of 9 epochs."""
    count = iter(range(100))

    def made(kind, *, loss=compute_falling_loss, num_slots=3, every=1, seed=0, is_late=False, **changes):
        folder = tmp_path / f"sweep_{next(count)}"
        second = "latency_ms" if kind.endswith("of two") else None
        settings = make_settings(folder, **{"num_trials": 12, "max_epochs": 9, "second_objective": second, **changes})
        scheduler = make_schedulers(write_space(SPACE))[kind]
        return SimulatedSweep(settings, scheduler, loss, num_slots=num_slots, every=every, seed=seed, is_late=is_late)

    return made


KINDS = [
    "fifo",
    "stop",
    "promote",
    "median",
    "population",
    "fifo of two",
    "stop of two",
    "promote of two",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_sweep_decides_what_an_uninterrupted_one_decides_from_the_same_reports(simulate, kind, seed):
    whole = simulate(kind, seed=seed).run()
    generator = random.Random(seed)
    killed = simulate(kind, seed=seed).run(kill_when=lambda num_reports: generator.random() < 0.3)
    assert killed.opened >= 5
    assert killed.list_decisions() == whole.list_decisions()
    assert killed.proposer.told == whole.proposer.told


@pytest.mark.slow
def test_a_killed_sweep_keeps_the_decisions_of_a_scheduler_that_would_decide_otherwise(simulate):
    """freeze_thaw counts the time of training, which a kill changes."""
    generator = random.Random(0)
    killed = simulate("freeze-thaw").run(kill_when=lambda num_reports: generator.random() < 0.3)
    assert killed.opened >= 5
    assert any(event.decision == "complete" for event in killed.list_decisions() if isinstance(event, EpochReported))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_checkpoints_that_are_told_an_epoch_later_change_no_decision(simulate, kind, seed):
    whole = simulate(kind, seed=seed).run()
    generator = random.Random(seed)
    killed = simulate(kind, seed=seed, is_late=True).run(kill_when=lambda num_reports: generator.random() < 0.3)
    assert killed.opened >= 5
    assert killed.list_decisions() == whole.list_decisions()


def get_resumed_epoch(swept):
    """Epoch from which trial 0 goes on."""
    return swept.controller.next_segment().epoch


def report_twice(simulate, *, then):
    """Trial 0 after its second report, whose checkpoint is written but not told; then: what happens to the sweep."""
    swept = simulate("fifo", num_slots=1, is_late=True)
    swept.fill()
    swept.step()
    swept.step()
    assert [event.checkpoint and event.checkpoint.epoch for event in list_reports(swept)] == [None, 1]
    then(swept)
    return swept


def list_reports(swept):
    return [event for event in read_events(swept.file) if isinstance(event, EpochReported)]


def restart_sweep(swept):
    swept.kill()
    swept.start()


def fail_segment(swept):
    swept.controller.process_failure(0, make_failure("killed"))


@pytest.mark.parametrize("then", [restart_sweep, fail_segment])
def test_a_checkpoint_that_was_written_but_not_told_is_gone_on_from(simulate, then):
    swept = report_twice(simulate, then=then)
    assert get_resumed_epoch(swept) == 2
    assert swept.controller.history.retention.total_bytes == sum(
        file.stat().st_size for file in (swept.settings.path / "checkpoints").glob("*/*")
    )


@pytest.mark.parametrize("then", [restart_sweep, fail_segment])
def test_it_is_gone_on_from_again_if_the_next_segment_ends_before_it_reports(simulate, then):
    swept = report_twice(simulate, then=then)
    assert get_resumed_epoch(swept) == 2
    restart_sweep(swept)
    assert get_resumed_epoch(swept) == 2


@pytest.mark.parametrize("then", [restart_sweep, fail_segment])
def test_where_it_was_not_written_the_one_before_is_gone_on_from_and_the_epoch_is_told_once(simulate, then):
    def lose_and(swept):
        (swept.settings.path / swept.untold[0].file).unlink()
        then(swept)

    swept = report_twice(simulate, then=lose_and)
    swept.untold.clear()
    swept.fill()
    assert swept.epochs[0] == 1
    swept.step()
    assert [event.epoch for event in list_reports(swept)] == [1, 2, 3]


@pytest.mark.parametrize("then", [restart_sweep, fail_segment])
def test_a_checkpoint_of_an_epoch_that_was_never_reported_is_not_gone_on_from(simulate, then):
    def save_one_more_and(swept):
        swept._save_checkpoint(swept.segments[0], 3)
        then(swept)

    assert get_resumed_epoch(report_twice(simulate, then=save_one_more_and)) == 2


def test_a_trial_that_saves_seldom_is_trained_again_from_there_and_nothing_is_reported_twice(simulate):
    whole = simulate("promote", every=3).run()
    killed = simulate("promote", every=3).run(kill_when=lambda num_reports: num_reports % 4 == 0)
    reports = [(event.trial, event.epoch) for event in read_events(killed.file) if isinstance(event, EpochReported)]
    assert len(reports) == len(set(reports))
    assert killed.list_decisions() == whole.list_decisions()


@pytest.mark.parametrize("kind", KINDS)
def test_no_finished_trial_is_begun_again(simulate, kind):
    killed = simulate(kind).run(kill_when=lambda num_reports: num_reports % 3 == 0)
    over = set()
    for event in read_events(killed.file):
        if isinstance(event, SegmentStarted):
            assert event.trial not in over
        if isinstance(event, EpochReported) and event.decision in ("complete", "stop", "diverged"):
            over.add(event.trial)


@pytest.mark.parametrize("kind", KINDS)
def test_no_trial_is_left_running_in_study_or_table(simulate, kind):
    done = simulate(kind).run()
    states = {number: row.state for number, row in done.controller.history.table.rows.items()}
    changed = {number for number, trial in done.controller.history.trials.items() if trial.is_perturbed}
    assert bool(changed) == (kind == "population")
    assert done.proposer.told == {
        number: "stopped" if number in changed and state == "complete" else state for number, state in states.items()
    }
    assert all(row.is_over for row in done.controller.history.table.rows.values())
    assert kind not in ("fifo", "median") or states[8] == "diverged"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_with_a_spent_budget_leaves_its_trials_waiting_and_goes_on_as_if_it_had_had_a_larger_one(
    simulate, kind
):
    swept = simulate(kind)
    for _ in range(12):
        swept.fill()
        swept.step()
    swept.fill()
    swept.controller.close("spent")
    table = swept.controller.history.table
    assert table.end == "spent"
    assert {row.state for row in table.rows.values() if not row.is_over} <= {"waiting", "paused"}
    assert any(not row.is_over for row in table.rows.values())
    assert not list_events(swept, TrialEnded)
    assert {swept.proposer.told[number] for number, row in table.rows.items() if not row.is_over} == {"waits"}
    swept.log.close()
    swept.start()
    assert swept.controller.history.table.end == ""
    assert swept.run().list_decisions() == simulate(kind).run().list_decisions()


@pytest.fixture
def interrupted_sweep(simulate):
    """A sweep of 12 trials that was left after 10 reports, which took 10 s, for a reason."""

    def made(reason):
        swept = simulate("promote")
        for _ in range(10):
            swept.fill()
            swept.step()
        swept.controller.close(reason)
        swept.log.close()
        return swept

    return made


def read_again(swept, **changes):
    """What another process with these settings reads of a sweep with nothing to run; None where it goes on."""
    settings = replace(swept.settings, **changes)
    return read_finished_table(
        swept.settings.path, History(settings, scheduler=swept.make_scheduler(), table=make_empty_table(settings))
    )


@pytest.mark.parametrize(
    ("reason", "changes", "is_read"),
    [
        ("spent", {"time_budget_s": 10.0}, True),
        ("spent", {"time_budget_s": 10.0, "num_trials": 20}, True),
        ("spent", {"time_budget_s": 11.0}, False),
        ("spent", {"time_budget_s": None}, False),
        ("finished", {"time_budget_s": 10.0}, True),  # as earlier versions closed a sweep whose budget was spent
        ("finished", {"time_budget_s": 11.0}, False),
        ("interrupted", {"time_budget_s": None}, False),
    ],
)
def test_a_sweep_goes_on_when_its_budget_is_larger_now(interrupted_sweep, reason, changes, is_read):
    swept = interrupted_sweep(reason)
    table = read_again(swept, **changes)
    assert (table is not None) == is_read
    if table is not None:
        settings = replace(swept.settings, **changes)
        command = f"python tune.py sweep.resume={settings.path} sweep.time_budget_s=20"
        assert describe_spent_budget(settings, table).endswith(command)


def test_gpu_hours_may_be_given_anew_too(simulate):
    swept = simulate("fifo", num_slots=1, num_trials=2)
    swept.controller.open(num_slots=1, gpus=1.0)
    swept.fill()
    swept.clock.now += 3600
    swept.controller.close("spent")
    swept.log.close()
    table = read_again(swept, gpu_hours=1.0)
    limited = replace(swept.settings, gpu_hours=1.0)
    assert describe_spent_budget(limited, table).endswith("sweep.gpu_hours=2")
    whole = {"whole": "budget.gpu_hours=3", "larger_whole": "budget.gpu_hours=6"}
    assert describe_spent_budget(limited, table, **whole).endswith("sweep.gpu_hours=2")  # the user has given it
    line = describe_spent_budget(limited, table, **whole, planned=["sweep.gpu_hours"])
    assert line.startswith("budget      the part of budget.gpu_hours=3 for the trials is spent; ")
    assert line.endswith(" budget.gpu_hours=6")
    assert read_again(swept, gpu_hours=1.5) is None


def test_a_sweep_that_is_done_is_only_read_whatever_its_budget(simulate):
    swept = simulate("stop").run()
    for budget in (None, 1.0, 1e6):
        table = read_again(swept, time_budget_s=budget)
        assert table.end == "finished"
        assert describe_spent_budget(replace(swept.settings, time_budget_s=budget), table) == ""
    assert read_again(swept, num_trials=13) is None
    assert read_again(swept, num_trials=13, time_budget_s=1.0).end == "spent"


def test_a_sweep_that_has_tried_every_point_of_its_space_is_only_read(simulate):
    swept = simulate("stop", num_trials=5).run()
    settings = replace(swept.settings, num_trials=9, time_budget_s=1.0)
    for num_points, end in ((5, "finished"), (6, "spent"), (None, "spent")):
        history = History(settings, scheduler=swept.make_scheduler(), table=make_empty_table(settings))
        table = read_finished_table(settings.path, history, num_points=num_points)
        assert (table.end, table.num_trials) == (end, 5)


def test_a_spent_sweep_goes_on_with_more_trials_too(simulate):
    swept = simulate("promote")
    for _ in range(12):
        swept.fill()
        swept.step()
    swept.controller.close("spent")
    swept.log.close()
    swept.settings = replace(swept.settings, num_trials=15)
    swept.start()
    table = swept.run().controller.history.table
    assert len(table.rows) == 15
    assert all(row.is_over for row in table.rows.values())
    reports = [(event.trial, event.epoch) for event in read_events(swept.file) if isinstance(event, EpochReported)]
    assert len(set(reports)) == len(reports)  # no epoch was trained twice


def test_a_population_goes_on_with_more_trials_than_it_began_with(simulate):
    swept = simulate("population")
    for _ in range(20):
        swept.fill()
        swept.step()
    swept.kill()
    swept.settings = replace(swept.settings, num_trials=16)  # the rule keeps its size of 12
    swept.start()
    table = swept.run(kill_when=lambda num_reports: num_reports % 7 == 0).controller.history.table
    assert len(table.rows) == 16
    assert {row.state for row in table.rows.values()} <= {"complete", "diverged"}


def test_the_best_of_a_maximised_metric_is_kept_and_an_explosion_is_a_fall(simulate):
    areas = {0: [0.5, 0.4, 0.04], 1: [0.0, 0.3, 0.2]}  # trial 0 falls below a tenth of its best
    swept = simulate(
        "fifo", loss=lambda number, params, epoch: areas[number][epoch - 1], num_trials=2, max_epochs=3, mode="max"
    ).run()
    rows = swept.controller.history.table.rows
    assert {number: row.state for number, row in rows.items()} == {0: "diverged", 1: "complete"}


@pytest.mark.parametrize(
    ("mode", "values"), [("min", [0.0, 5.0, 9.0]), ("min", [-2.0, 3.0, 4.0]), ("max", [0.0, -5.0, -9.0])]
)
def test_no_factor_makes_a_best_value_of_0_or_below_worse(simulate, mode, values):
    swept = simulate(
        "fifo", loss=lambda number, params, epoch: values[epoch - 1], num_trials=1, max_epochs=3, mode=mode
    ).run()
    assert swept.controller.history.table.rows[0].state == "complete"


def test_an_interrupted_sweep_leaves_its_trials_waiting_and_goes_on(simulate):
    swept = simulate("promote")
    for _ in range(10):
        swept.fill()
        swept.step()
    swept.fill()
    swept.controller.close("interrupted")
    assert swept.controller.is_over
    assert swept.controller.next_segment() is None
    assert "running" not in swept.proposer.told.values()
    states = {row.state for row in swept.controller.history.table.rows.values()}
    assert "waiting" in states
    assert "running" not in states
    swept.log.close()
    swept.start()
    assert swept.run().list_decisions() == simulate("promote").run().list_decisions()


def test_a_sweep_that_is_finished_can_be_given_more_trials(simulate):
    short = simulate("stop", num_trials=6).run()
    short.settings = make_settings(short.settings.path, num_trials=12, max_epochs=9)
    short.start()
    assert len(short.run().controller.history.table.rows) == 12


def test_rules_that_decide_otherwise_than_the_log_are_refused(simulate):
    swept = simulate("stop").run()
    swept.make_scheduler = Fifo
    with pytest.raises(
        UserError, match=r"events\.jsonl: line \d+ records the decision 'stop' on epoch \d of trial \d+, but this"
    ):
        swept.start()


def test_the_time_of_all_processes_counts(simulate):
    swept = simulate("fifo", num_trials=3)
    for _ in range(5):
        swept.fill()
        swept.step()
    swept.kill()
    swept.clock.now += 1000  # nobody runs it
    swept.start()
    assert swept.controller.elapsed_s() == 5.0


def test_the_searcher_learns_how_long_an_epoch_takes_without_starts(simulate):
    """The first trial starts a minute later than the others, and a killed process starts them all again."""
    swept = simulate("fifo", num_trials=2, num_slots=1)
    swept.fill()
    swept.clock.now += 60
    for _ in range(3):
        swept.step()
    swept.kill()
    swept.clock.now += 1000
    swept.start()
    while swept.fill() or swept.segments:
        swept.step()
    first, second = (snapshot_trial(trial) for trial in swept.controller.history.trials.values())
    assert first.epoch_seconds == second.epoch_seconds == 1.0


def test_trials_without_a_slot_are_those_that_could_run_on_a_larger_cluster(simulate):
    swept = simulate("fifo", num_trials=8, num_slots=3)
    controller = swept.controller
    swept.fill()
    assert controller.count_trials_without_slot() == 5
    assert not controller.can_start_trials
    controller.resize(10, NodeCapacity())
    assert controller.count_trials_without_slot() == 0
    assert controller.can_start_trials
    swept.fill()
    assert not controller.can_start_trials
    swept.run()
    assert (controller.count_trials_without_slot(), controller.can_start_trials) == (0, False)


def test_no_more_trials_than_the_user_allows_are_counted(simulate):
    swept = simulate("fifo", num_trials=8, num_slots=3, max_concurrent=4)
    swept.fill()
    assert swept.controller.count_trials_without_slot() == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def make_failure(kind="error", cause="ValueError: no"):
    return SegmentFailure(kind, cause, f"Traceback ...\n{cause}")


def test_a_failed_trial_is_tried_again_from_its_newest_checkpoint_after_a_while(simulate):
    swept = simulate("fifo", num_slots=1, max_retries=2, retry_delay_s=10.0, num_trials=1)
    swept.fill()
    swept.step()
    swept.step()
    swept.controller.process_failure(0, make_failure())
    assert swept.controller.history.table.rows[0].state == "waiting"
    assert swept.proposer.told[0] == "waits"
    assert swept.controller.next_segment() is None
    swept.clock.now += 10
    segment = swept.controller.next_segment()
    assert (segment.trial, segment.segment_number, segment.epoch) == (0, 2, 2)
    swept.controller.process_failure(0, make_failure())
    swept.clock.now += 19
    assert swept.controller.next_segment() is None  # the second time it waits twice as long
    swept.clock.now += 1
    assert swept.controller.next_segment().segment_number == 3


def test_a_slot_is_not_kept_for_a_trial_that_waits_to_be_tried_again(simulate):
    swept = simulate("fifo", num_slots=1, retry_delay_s=10.0)
    swept.fill()
    swept.step()
    swept.controller.process_failure(0, make_failure())
    assert swept.controller.next_segment().trial == 1


def test_a_trial_that_keeps_failing_is_given_up_with_its_traceback(simulate):
    swept = simulate("fifo", num_slots=2, max_retries=1, retry_delay_s=0.0)
    swept.fill()
    swept.step()
    swept.step()
    for _ in range(2):
        swept.controller.process_failure(0, make_failure())
        swept.fill()
    row = swept.controller.history.table.rows[0]
    assert (row.state, row.error, row.traceback) == ("failed", "ValueError: no", "Traceback ...\nValueError: no")
    assert swept.proposer.told[0] == "failed"
    assert not swept.controller.is_over


def test_failures_count_after_a_kill_too(simulate):
    swept = simulate("fifo", num_slots=1, max_retries=1, retry_delay_s=0.0, num_trials=1)
    swept.fill()
    swept.step()
    swept.controller.process_failure(0, make_failure())
    swept.kill()
    swept.start()
    swept.fill()
    swept.controller.process_failure(0, make_failure())
    assert swept.controller.history.table.rows[0].state == "failed"


def test_out_of_gpu_memory_is_tried_again_with_twice_the_share_until_that_is_a_whole_gpu(simulate):
    swept = simulate("fifo", num_slots=1, max_retries=0, num_trials=1)
    swept.controller.history.gpus = 0.3
    swept.fill()
    shares = []
    for _ in range(3):
        swept.controller.process_failure(0, make_failure("gpu_memory"))
        segment = swept.controller.next_segment()
        shares.append(segment and segment.gpus)
    assert shares == [0.6, 1.0, None]
    assert swept.controller.history.table.rows[0].state == "failed"


@pytest.mark.parametrize("kind", ["preempted", "lost", "unfit_worker"])
def test_what_is_not_the_trials_fault_costs_it_no_try(simulate, kind):
    swept = simulate("fifo", num_slots=1, max_retries=0, num_trials=1)
    for segment in range(1, 8):
        assert swept.controller.next_segment().segment_number == segment
        swept.controller.process_failure(0, make_failure(kind))
    assert swept.controller.history.table.rows[0].state == "waiting"


def test_a_mistake_is_not_tried_again_once_trials_work(simulate):
    swept = simulate("fifo", num_slots=2, max_retries=5)
    swept.fill()
    swept.step()
    swept.controller.process_failure(1, make_failure("user_error"))
    assert swept.controller.history.table.rows[1].state == "failed"


@pytest.mark.parametrize("kind", ["error", "killed", "user_error"])
def test_a_bug_that_fails_every_first_trial_ends_the_sweep_and_nothing_is_given_up(simulate, kind):
    changes = {"max_retries": 0 if kind == "killed" else 2, "retry_delay_s": 10.0}
    swept = simulate("fifo", num_slots=2, stop_after_failures=3, **changes)
    for number in range(3):
        swept.fill()
        assert swept.controller.halted_by is None
        swept.controller.process_failure(number, make_failure(kind))
    assert swept.controller.halted_by.cause == "ValueError: no"
    assert swept.controller.next_segment() is None
    swept.log.close()
    swept.start()
    numbers = [swept.controller.next_segment().trial for _ in range(2)]
    assert numbers == ([2, 3] if kind == "killed" else [0, 1])  # without retries the first were given up at once


def test_one_report_shows_that_it_is_no_bug(simulate):
    swept = simulate("fifo", num_slots=1, stop_after_failures=2, max_retries=0)
    swept.fill()
    swept.step()
    for number in range(5):
        swept.controller.process_failure(number, make_failure())
        swept.fill()
    assert swept.controller.halted_by is None


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_slots_that_come_and_go_are_used_and_left_alone(simulate):
    swept = simulate("fifo", num_slots=1, num_trials=9)
    swept.fill()
    assert len(swept.segments) == 1
    swept.controller.resize(4, NodeCapacity())
    swept.fill()
    assert len(swept.segments) == 4
    swept.controller.resize(2, NodeCapacity())
    swept.controller.process_failure(0, make_failure("lost"))
    assert swept.controller.next_segment() is None
    swept.controller.process_failure(1, make_failure("lost"))
    assert swept.controller.next_segment() is None
    swept.controller.process_failure(2, make_failure("lost"))
    assert swept.controller.next_segment().trial == 0


@pytest.fixture
def two_node_sweep(simulate):
    """A sweep that runs on the nodes good and bad; trial 0 has reported from the good one."""
    swept = simulate("fifo", num_slots=6, max_retries=0)
    swept.controller.resize(6, NodeCapacity({"good": 3, "bad": 3}))
    swept.fill()
    swept.controller.process_report(0, 1, {METRIC: 1.0}, node="good")
    return swept


def list_events(swept, kind):
    return [event for event in read_events(swept.file) if isinstance(event, kind)]


@pytest.mark.parametrize("kind", ["error", "user_error", "killed", "gpu_memory"])
def test_a_node_that_fails_one_trial_after_the_other_is_set_aside_and_no_trial_loses_a_try(two_node_sweep, kind):
    state = two_node_sweep.controller
    for number in (1, 2, 3):
        assert not list_events(two_node_sweep, NodeQuarantined)
        state.process_failure(number, make_failure(kind)._replace(node="bad"))
        assert state.find_nodes_to_avoid(number) == ("bad",)
    assert [event.node for event in list_events(two_node_sweep, NodeQuarantined)] == ["bad"]
    assert [state.history.trials[number].num_failures for number in (1, 2, 3)] == [0, 0, 0]
    assert [state.history.table.rows[number].state for number in (1, 2, 3)] == ["waiting"] * 3
    assert state.history.table.rows[3].node == "bad"
    assert state.find_nodes_to_avoid(4) == ("bad",)  # nor does any other trial run there
    state.process_failure(5, make_failure(kind)._replace(node="bad"))  # it was running there still
    assert state.history.table.rows[5].state == "waiting"


@pytest.mark.parametrize("kind", ["error", "user_error", "killed", "gpu_memory"])
def test_a_trial_that_fails_wherever_it_runs_comes_to_its_end(two_node_sweep, kind):
    state = two_node_sweep.controller
    state.process_failure(1, make_failure(kind)._replace(node="bad"))
    assert state.history.table.rows[1].state == "waiting"
    state.process_report(2, 1, {METRIC: 1.0}, node="bad")  # so that it was not the node
    two_node_sweep.clock.now += 1000
    assert state.next_segment().trial == 1
    state.process_failure(1, make_failure(kind)._replace(node="good"))
    assert state.history.table.rows[1].state == "failed"
    assert not list_events(two_node_sweep, NodeQuarantined)


def test_a_trial_that_fails_twice_on_a_node_may_be_at_fault(two_node_sweep):
    state = two_node_sweep.controller
    state.process_failure(1, make_failure()._replace(node="bad"))
    two_node_sweep.fill()
    state.process_failure(1, make_failure()._replace(node="bad"))
    assert state.history.table.rows[1].state == "failed"


@pytest.mark.parametrize("alive", [("bad",), ("bad", "unheard of")])
def test_a_node_is_not_set_aside_where_no_other_is_known_to_work(two_node_sweep, alive):
    state = two_node_sweep.controller
    state.resize(6, NodeCapacity(dict.fromkeys(alive, 3)))
    for number in (1, 2, 3, 4):
        state.process_failure(number, make_failure()._replace(node="bad"))
    assert not list_events(two_node_sweep, NodeQuarantined)


def test_the_last_node_is_used_though_it_was_set_aside(two_node_sweep):
    state = two_node_sweep.controller
    for number in (1, 2, 3):
        state.process_failure(number, make_failure()._replace(node="bad"))
    state.resize(3, NodeCapacity({"bad": 3}))
    assert state.find_nodes_to_avoid(1) == ()


def test_what_has_several_workers_avoids_no_node_without_which_it_does_not_fit(two_node_sweep):
    state = two_node_sweep.controller
    state.resize(1, NodeCapacity({"good": 1, "bad": 1}, num_workers_needed=2))
    for number in (1, 2, 3, 4):
        state.process_failure(number, make_failure()._replace(node="bad"))
        assert state.find_nodes_to_avoid(number) == ()
    assert not list_events(two_node_sweep, NodeQuarantined)
    assert not state.can_place_without({"bad"})
    state.resize(1, NodeCapacity({"good": 1, "bad": 1, "new": 1}, num_workers_needed=2))  # one that joined
    assert state.find_nodes_to_avoid(1) == ("bad",)
    assert state.can_place_without({"bad"})


def test_a_node_that_works_in_between_is_not_set_aside(two_node_sweep):
    state = two_node_sweep.controller
    for number in (1, 2, 3, 4):
        state.process_failure(number, make_failure()._replace(node="bad"))
        state.process_report(5, number, {METRIC: 1.0}, node="bad")
    assert not list_events(two_node_sweep, NodeQuarantined)


def test_another_process_looks_at_all_nodes_anew(two_node_sweep):
    state = two_node_sweep.controller
    for number in (1, 2, 3):
        state.process_failure(number, make_failure()._replace(node="bad"))
    restart_sweep(two_node_sweep)
    two_node_sweep.controller.resize(6, NodeCapacity({"good": 3, "bad": 3}))
    assert two_node_sweep.controller.find_nodes_to_avoid(4) == ()
    assert [two_node_sweep.controller.history.trials[number].num_failures for number in (1, 2, 3)] == [0, 0, 0]


def test_gpu_hours_are_shares_times_the_time_of_stretches_and_outlive_a_kill(simulate):
    swept = simulate("fifo", num_slots=2, num_trials=2, max_retries=5)
    swept.controller.open(num_slots=2, gpus=0.5)
    swept.fill()
    swept.clock.now += 3600
    assert swept.controller.count_gpu_hours() == pytest.approx(1.0)
    swept.controller.process_failure(0, make_failure("gpu_memory"))
    swept.clock.now += 3600  # the other goes on
    assert swept.controller.count_gpu_hours() == pytest.approx(1.5)
    swept.fill()  # with a whole GPU
    swept.clock.now += 3600
    swept.controller.process_report(1, 1, {METRIC: 1.0})
    assert swept.controller.count_gpu_hours() == pytest.approx(3.0)
    swept.kill()
    swept.clock.now += 10 * 3600  # nobody runs it
    swept.start()
    swept.clock.now += 3600  # nothing runs yet
    assert swept.controller.count_gpu_hours() == pytest.approx(3.0)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "values"), [("min", [5.0, 4.0, 39.0, 41.0]), ("max", [0.5, 0.6, 0.07, 0.05])])
def test_a_trial_that_explodes_ends_at_once(simulate, mode, values):
    swept = simulate("fifo", loss=lambda number, params, epoch: values[epoch - 1], mode=mode, num_trials=1)
    swept.run()
    row = swept.controller.history.table.rows[0]
    assert (row.state, row.epochs) == ("diverged", 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trial_that_is_no_number_any_more_ends_at_once(simulate, value):
    swept = simulate("stop", loss=lambda number, params, epoch: value if epoch == 2 else 1.0, num_trials=4)
    swept.run()
    assert {(row.state, row.epochs) for row in swept.controller.history.table.rows.values()} <= {
        ("diverged", 2),
        ("stopped", 1),
    }


def test_what_is_too_expensive_is_not_trained(simulate):
    swept = simulate("fifo", num_slots=1, num_trials=2)
    swept.proposer.constraints = {"num_parameters": 1e6}
    swept.fill()
    assert not swept.controller.process_costs(0, {"num_parameters": 2e6})
    assert swept.proposer.told[0] == "infeasible"
    assert swept.controller.next_segment().trial == 1
    assert swept.controller.process_costs(1, {"num_parameters": 1e6})


def test_what_cannot_be_told_by_its_second_objective_is_not_trained(simulate):
    swept = simulate("stop of two", num_slots=1, num_trials=2)
    assert not swept.controller.process_costs(swept.controller.next_segment().trial, {"latency_ms": math.nan})
    assert swept.proposer.told[0] == "infeasible"
    assert swept.controller.process_costs(swept.controller.next_segment().trial, {"latency_ms": 3.0})


@pytest.mark.parametrize("kind", ["fifo of two", "stop of two", "promote of two"])
def test_the_front_is_that_of_the_log(simulate, kind):
    """By the definition of dominance, from the events alone, and after the sweep has been killed again and again."""
    swept = simulate(kind, num_trials=20).run(kill_when=lambda num_reports: num_reports % 5 == 0)
    costs = {
        event.trial: event.costs["latency_ms"] for event in read_events(swept.file) if isinstance(event, CostsMeasured)
    }
    complete = {each.trial: each.metrics[METRIC] for each in list_reports(swept) if each.decision == "complete"}
    points = {trial: (value, costs[trial]) for trial, value in complete.items()}
    expected = [
        trial
        for trial, point in sorted(points.items(), key=lambda item: item[1])
        if not any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points.values())
    ]
    assert [row.number for row in swept.controller.history.table.find_front()] == expected
    assert len(expected) >= 2


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_leads_to_the_one_before_it(simulate):
    swept = simulate("fifo", num_slots=1, num_trials=1, retry_delay_s=0.0)
    swept.fill()
    for _ in range(3):
        swept.step()
    newest = swept.settings.path / swept.controller.history.retention.list_checkpoints(0)[-1].file
    newest.write_text("")
    swept.kill()
    swept.start()
    segment = swept.controller.next_segment()
    assert find_newest_intact(segment.checkpoints, swept.settings.path).epoch == 2


def test_all_checkpoints_fit_into_the_budget_and_what_can_go_on_is_kept_longest(simulate):
    size_bytes = len("trial 0 epoch 1")
    swept = simulate("promote", checkpoint_budget_gb=9 * size_bytes / 1e9, num_trials=12)
    done = set()
    while True:
        swept.fill()
        if swept.controller.is_over:
            break
        swept.step()
        files = list((swept.settings.path / "checkpoints").glob("*/*"))
        assert (
            sum(file.stat().st_size for file in files)
            == swept.controller.history.retention.total_bytes
            <= 10 * size_bytes
        )
        held = {int(file.parent.name.removeprefix("trial_")) for file in files}
        rows = swept.controller.history.table.rows
        assert {number for number, row in rows.items() if row.state == "running" and row.epochs} <= held
        done |= {row.state for number, row in rows.items() if number in held}
    assert "paused" in done
