"""The audit finds what it is there to find: faults are planted into the files of a sound sweep."""

from dataclasses import replace

import pytest
from optuna.samplers import RandomSampler

from handpose.report.table import TrialTable
from handpose.sweep.audit import _in_csv, _in_study, audit_events
from handpose.sweep.events import Asked, Begun, Reported, Saved, read_events
from handpose.sweep.history import History
from handpose.sweep.searcher import OptunaSearcher
from handpose.sweep.state import _known
from tests.sweep.conftest import asha, make_settings
from tests.sweep.objectives import METRIC
from tests.sweep.simulation import Simulation


@pytest.fixture
def events(tmp_path):
    """Of a sweep that was killed now and then."""
    settings = make_settings(tmp_path / "sweep", num_trials=9, max_epochs=9)
    rule = asha(9, mode="promote", reduction_factor=3)
    swept = Simulation(settings, rule, lambda number, params, epoch: number % 5 + 1 / epoch)
    swept.run(kill_when=lambda num_reports: num_reports % 5 == 0)
    return read_events(swept.file)


@pytest.fixture
def found(tmp_path, events):
    """Audits events; returns the kinds of faults."""

    def audited(changed):
        settings = make_settings(tmp_path / "sweep", num_trials=9, max_epochs=9)
        rule = asha(9, mode="promote", reduction_factor=3)()
        history = History(settings, rule=rule, table=TrialTable(METRIC, "min", 9, 9))
        history.replay(events)
        lost, repeated = audit_events(changed, history)
        return bool(lost), bool(repeated)

    return audited


@pytest.fixture
def of_two(tmp_path):
    """The history and the folder of a sweep with two objectives, with its study and trials.csv."""
    settings = make_settings(tmp_path / "sweep", num_trials=9, max_epochs=9, second_objective="latency_ms")
    rule = asha(9, mode="promote", reduction_factor=3, num_objectives=2)
    swept = Simulation(settings, rule, lambda number, params, epoch: number % 5 + 1 / epoch).run()
    history = swept.state.history
    history.table.write_csv(settings.path / "trials.csv")
    return history, settings.path


@pytest.fixture
def study(of_two, write_space, tmp_path):
    space = write_space("optimizer.lr: tag(log, interval(1e-4, 1e-1))\nmodel.decoder.depth: range(1, 6)")
    kept = {"name": "test", "metric": METRIC, "mode": "min", "second_objective": "latency_ms", "max_epochs": 9}
    searcher = OptunaSearcher(
        space=space, folder=tmp_path / "study", seed=0, defaults={}, sampler=RandomSampler, resume=True, **kept
    )
    searcher.align([_known(trial) for trial in of_two[0].trials.values()])
    yield searcher.study.trials
    searcher.close()


def test_study_and_csv_of_two_objectives_have_what_the_events_say(of_two, study):
    history, folder = of_two
    assert not _in_study(study, history)
    assert not _in_csv(folder / "trials.csv", history.table)
    assert {trial.state.name for trial in study} == {"COMPLETE", "PRUNED"}


def test_a_wrong_second_value_is_found_in_the_study(of_two, study):
    study[3].values = [study[3].values[0], 99.0]
    assert [sentence[:11] for sentence in _in_study(study, of_two[0]).wrong] == ["trial 3 has"]
    study[4].user_attrs.pop("latency_ms")
    assert _in_study(study, of_two[0]).lost == ["the study lacks costs of trial 4"]


def test_a_wrong_cost_is_found_in_trials_csv(of_two):
    history, folder = of_two
    history.table.rows[2].costs = {**history.table.rows[2].costs, "latency_ms": 99.0}
    assert _in_csv(folder / "trials.csv", history.table) == ["trials.csv has not what the events say of trial 2"]


def place(events, kind, condition=lambda event: True):
    return next(i for i, event in enumerate(events) if isinstance(event, kind) and condition(event))


def test_a_sound_sweep_has_nothing(events, found):
    assert found(events) == (False, False)


def test_a_lost_report_is_found(events, found):
    i = place(events, Reported, lambda event: event.epoch == 2)
    assert found(events[:i] + events[i + 1 :]) == (True, False)


def test_a_lost_trial_is_found(events, found):
    i = place(events, Asked, lambda event: event.trial == 4)
    assert found(events[:i] + events[i + 1 :])[0]


def test_a_repeated_report_is_found(events, found):
    i = place(events, Reported, lambda event: event.epoch == 2)
    assert found([*events[: i + 1], *events[i:]]) == (False, True)


def test_a_finished_trial_that_is_begun_again_is_found(events, found):
    last = next(event for event in reversed(events) if isinstance(event, Reported) and event.decision == "complete")
    again = Begun(last.at, last.trial, 9, 0)
    assert found([*events, again]) == (False, True)


def test_work_that_is_done_again_from_an_old_checkpoint_is_found(events, found):
    i = place(events, Reported, lambda event: event.resumed_from > 0)
    assert found([*events[:i], replace(events[i], resumed_from=0), *events[i + 1 :]]) == (False, True)


def test_a_newest_checkpoint_that_was_never_saved_is_no_repetition(found):
    begun = [Asked(0, 0, {}), Begun(0, 0, 1, 0)]
    reports = [
        Reported(1, 0, 1, {}, "", 0, Saved("a", 1, 1, 1), "continue"),
        Reported(2, 0, 2, {}, "", 0, None, "continue"),
    ]
    again = [Begun(3, 0, 2, 1), Reported(4, 0, 3, {}, "", 1, None, "complete")]
    assert not found(begun + reports + again)[1]


def test_a_checkpoint_that_is_told_an_epoch_later_counts_as_of_its_own_epoch(found):
    begun = [Asked(0, 0, {}), Begun(0, 0, 1, 0)]
    reports = [
        Reported(1, 0, 1, {}, "", 0, None, "continue"),
        Reported(2, 0, 2, {}, "", 0, Saved("a", 1, 1, 1), "continue"),
    ]
    again = [Begun(3, 0, 2, 1), Reported(4, 0, 3, {}, "", 1, None, "complete")]
    assert not found(begun + reports + again)[1]
