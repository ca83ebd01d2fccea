"""`sweep.stop_when`: when a sweep ends because more trials are not worth it, what its files say, and how it goes on."""

from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate

from handpose.config import compose
from handpose.errors import UserError
from handpose.metrics.target import TargetMetric
from handpose.schedulers.scheduler import Fifo
from handpose.search.searcher import TrialSnapshot
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.analysis.status import print_status
from handpose.sweep.audit.audit import audit
from handpose.sweep.controller import stopping_rule
from handpose.sweep.controller.history import History, make_empty_table
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.controller.stopping_rule import StoppingRule
from handpose.sweep.driver.run import describe_spent_budget, read_finished_table
from handpose.sweep.record.events import EVENTS_FILE, SweepClosed, read_events
from handpose.sweep.record.settings import SpentBudget
from tests.sweep.whole_sweep import METRIC, RATES, WholeSweep

MANY = ["sweep.num_trials=60", "scheduler=fifo", "searcher.sampler.n_startup_trials=4"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A sweep of at most 60 trials that ends when doubling the number of trials is expected to gain less than 1 mm."""
    return WholeSweep(tmp_path_factory.mktemp("ended") / "sweep", "sweep.stop_when=1", *MANY).run(last="spent")


def test_a_sweep_ends_when_further_trials_are_expected_to_gain_little(ended):
    *_, closed = read_events(ended.folder / EVENTS_FILE)
    assert isinstance(closed, SweepClosed)
    assert (closed.reason, closed.budget.rule, closed.budget.cutoff) == ("spent", "sweep.stop_when", 1.0)
    assert closed.budget.value < 1
    assert 20 <= len(ended.table.rows) < 60  # two searched parameters
    best = min(ended.table.get_value(row) for row in ended.table.rank_trials())
    assert best < 10 + 8 / 4 + 0.3 + 1  # the least possible value, and what may be missed


def test_its_files_are_consistent_and_say_why(ended, capsys):
    assert not audit(ended.folder)
    record = read_sweep(ended.folder)
    assert record.expected_gain == ended.table.expected_gain < 1
    said = (
        f"doubling the number of trials is expected to improve the metric by only {record.expected_gain:.2g}, less than"
    )
    assert f"{said} sweep.stop_when=1; " in describe_spent_budget(ended.sweep, ended.table)
    print_status(ended.folder)
    shown = capsys.readouterr().out
    assert f"{said} sweep.stop_when=1; to resume with a smaller value:" in " ".join(shown.split())


@pytest.mark.slow
def test_an_end_that_the_configuration_does_not_give_is_found(ended, tmp_path):
    """The audit compares the recorded gain with the value of the key."""
    sweep = WholeSweep(tmp_path / "sweep", "sweep.stop_when=1", *MANY).run(last="spent")
    file = sweep.folder / EVENTS_FILE
    *_, closed = read_events(file)
    text = file.read_text()
    value = f'"value": {closed.budget.value}'
    assert value in text
    file.write_text(text.replace(value, '"value": 1.5'))
    assert any("no budget is spent" in text for text in audit(sweep.folder).wrong)


@pytest.mark.parametrize(("stop_when", "is_over"), [(1.0, True), (2.0, True), (1e-9, False), (None, False)])
def test_it_goes_on_with_a_smaller_value_only(ended, stop_when, is_over):
    settings = replace(ended.sweep, stop_when=stop_when)
    history = History(settings, scheduler=Fifo(), table=make_empty_table(settings))
    table = read_finished_table(ended.folder, history)
    assert (table is not None) == is_over
    command = describe_spent_budget(settings, table) if table else ""
    assert not is_over or command.endswith(f" sweep.stop_when={ended.table.expected_gain / 2:.2g}")


@pytest.mark.parametrize(
    ("budget", "override"),
    [
        (SpentBudget("sweep.stop_when", 1.0, 0.5), "sweep.stop_when=0.25"),
        (SpentBudget("sweep.stop_when", 1.0, 0.0), "sweep.stop_when=null"),
        (SpentBudget("sweep.stop_when", 0.1, 6e-15), "sweep.stop_when=null"),
        (SpentBudget("sweep.gpu_hours", 1.0, 1.5), "sweep.gpu_hours=3"),
    ],
)
def test_the_printed_override_is_one_that_can_be_given(budget, override):
    assert budget.resume_override == override
    compose("tune", [override])


@pytest.mark.slow
def test_a_resumed_sweep_that_is_no_longer_to_end_trains_the_rest(tmp_path):
    sweep = WholeSweep(tmp_path / "sweep", "sweep.stop_when=1", "sweep.num_trials=40", *MANY[1:])
    sweep.run(last="spent")
    sweep.resume("sweep.stop_when=null").run()
    assert len(sweep.table.rows) == 40
    assert (sweep.table.end, sweep.table.expected_gain) == ("finished", None)
    assert not audit(sweep.folder)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["scheduler=pbt"], "PopulationBased changes parameters during training"),
        (["scheduler=asha", "sweep.second_objective=latency_ms"], "latency_ms has no single best trial"),
    ],
)
def test_it_is_refused_where_trials_cannot_be_compared(write_space, overrides, reason):
    config = compose("tune", [*overrides, "sweep.stop_when=0.5"])
    with pytest.raises(UserError, match=rf"sweep\.stop_when=0\.5 needs .*{reason}"):
        bind_scheduler(instantiate(config.scheduler), instantiate(config.sweep), write_space(RATES))


# --- the rule ---------------------------------------------------------------------------------------------------------


def make_trials(num, *, num_complete, state="complete"):
    return [
        TrialSnapshot(
            number,
            state if number < num_complete else "stopped",
            {"optimizer.lr": 0.001 * (number + 1)},
            {epoch: 10.0 + number + 1 / epoch for epoch in range(1, 5 if number < num_complete else 3)},
        )
        for number in range(num)
    ]


@pytest.fixture
def rule(write_space, monkeypatch):
    """A rule whose estimates are given one by one."""
    estimates = []
    monkeypatch.setattr(stopping_rule, "estimate_gain", lambda *args, **kwargs: estimates.pop(0))
    made = StoppingRule(
        write_space("optimizer.lr: tag(log, interval(1e-4, 1e-1))\n"),
        target=TargetMetric(METRIC, "min"),
        max_epochs=4,
        seed=0,
    )
    made.estimates = estimates
    return made


def test_the_largest_estimate_counts_since_there_were_a_fifth_fewer_trials(rule):
    rule.estimates[:] = [0.1, 0.5, 0.2, 0.3, 0.4, 0.1]
    found = [rule.estimate_gain(make_trials(num, num_complete=10)) for num in (40, 44, 48, 52, 54, 80)]
    assert found == [None, None, 0.5, 0.5, 0.4, 0.1]


def test_losses_that_no_model_describes_do_not_end_a_sweep(rule, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("the matrix is not positive definite")

    monkeypatch.setattr(stopping_rule, "estimate_gain", fail)
    assert rule.estimate_gain(make_trials(40, num_complete=10)) is None


def test_losses_of_very_different_size_have_an_estimate(write_space):
    rule = StoppingRule(
        write_space("optimizer.lr: tag(log, interval(1e-4, 1e-1))\n"),
        target=TargetMetric(METRIC, "min"),
        max_epochs=4,
        seed=0,
    )
    trials = make_trials(40, num_complete=20)
    huge = [trial._replace(values=dict.fromkeys(trial.values, 1e30)) for trial in trials[::2]]
    for num in (33, 40):
        rule.estimate_gain([*huge, *trials[1::2]][:num])


def test_a_space_whose_draws_have_other_names_is_searched_too(write_space):
    space = write_space(
        'def space(trial):\n    return {"optimizer.lr": 10 ** trial.suggest_float("log_lr", -4, -1)}\n', suffix=".py"
    )
    rule = StoppingRule(space, target=TargetMetric(METRIC, "min"), max_epochs=4, seed=0)
    for num in (30, 40):
        gain = rule.estimate_gain(make_trials(num, num_complete=10))
    assert gain >= 0


def test_there_is_no_estimate_from_few_trials_or_without_complete_ones(rule):
    rule.estimates[:] = [0.0] * 9
    for trials in (make_trials(9, num_complete=9), make_trials(40, num_complete=2)):
        assert [rule.estimate_gain(trials) for _ in range(2)] == [None, None]
    diverged = make_trials(40, num_complete=40, state="diverged")
    assert [rule.estimate_gain(diverged) for _ in range(2)] == [None, None]
    assert len(rule.estimates) == 9


def test_it_is_asked_again_when_there_are_a_tenth_more_reports(rule):
    rule.estimates[:] = [0.0]
    assert rule.is_due(0)
    trials = make_trials(40, num_complete=10)  # 10 * 4 + 30 * 2 reports
    rule.estimate_gain(trials)
    assert [rule.is_due(num) for num in (100, 109, 111)] == [False, False, True]


def test_a_larger_metric_counts_as_a_smaller_loss(write_space, monkeypatch):
    seen = []
    monkeypatch.setattr(
        stopping_rule, "estimate_gain", lambda pool, candidates, curves, **kwargs: seen.append(curves) or 0.0
    )
    rule = StoppingRule(
        write_space("optimizer.lr: tag(log, interval(1e-4, 1e-1))\n"),
        target=TargetMetric("val/pck_auc", "max"),
        max_epochs=4,
        seed=0,
    )
    rule.estimate_gain(make_trials(40, num_complete=10))
    (curves,) = seen
    assert curves[3].losses[1] == -(10.0 + 3 + 1)
