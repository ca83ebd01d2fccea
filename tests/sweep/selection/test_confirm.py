"""The finalists of a sweep over fresh seeds: who they are, what is trained, what is said of it, how it goes on."""

import contextlib
import math
import os
import signal
import threading
import time
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from handpose.report.trial_table import TrialRow, TrialTable
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.budget.stages import ConfirmationBudget
from handpose.sweep.driver.shutdown import SweepInterruptedError
from handpose.sweep.record.events import EventLog, SegmentStarted, SweepClosed, SweepOpened, TrialSuggested, read_events
from handpose.sweep.record.settings import ConfirmSettings, RaySettings
from handpose.sweep.selection import confirm as module
from handpose.sweep.selection.confirm import (
    choose_candidates,
    choose_fresh_seeds,
    confirm_finalists,
    list_runs,
    summarise_confirmation,
)
from tests.sweep.objectives import METRIC, curve, grows_slowly, train_growing_weight
from tests.sweep.sweeps import make_settings, run_small_sweep

DEFAULTS = {"optimizer.lr": 0.1, "seed": 0}


def make_table(*trials, mode="min"):
    """Of (state, value, parameters): the learning rate, or all."""
    made = TrialTable(METRIC, mode, num_trials=len(trials), max_epochs=9)
    for number, (state, value, params) in enumerate(trials):
        params = params if isinstance(params, dict) else {"optimizer.lr": params}
        made.rows[number] = TrialRow(number, params, state, 9 if value else 0, {METRIC: value} if value else {})
    return made


SWEEP_TABLE = make_table(("complete", 5.0, 0.1), ("complete", 4.0, 0.2), ("complete", 4.5, 0.3), ("complete", 4.2, 0.4))


def make_confirm_table(chosen, seeds, values, *, mode="min", states=None):
    """The table of the runs. values: a row a candidate. states: (candidate, seed) -> another than complete."""
    made = TrialTable(METRIC, mode, num_trials=0, max_epochs=9)
    for params, (seed_index, index) in zip(
        list_runs(chosen, seeds), ((s, c) for s in range(len(seeds)) for c in range(len(chosen))), strict=True
    ):
        state = (states or {}).get((index, seeds[seed_index]), "complete")
        row = TrialRow(len(made.rows), params, state, 9, {METRIC: values[index][seed_index]}, error="")
        made.rows[row.number] = row
    return made


def test_the_best_and_the_default_run():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    assert [candidate.label for candidate in chosen] == ["trial 1", "trial 3", "default"]
    assert [candidate.params["optimizer.lr"] for candidate in chosen] == [0.2, 0.4, 0.1]
    assert chosen[-1].can_win


def test_values_that_python_considers_equal_are_of_different_runs():
    swept = make_table(
        *(("complete", value, {"optimizer.lr": lr}) for value, lr in ((1.0, 1), (2.0, True), (3.0, 1.0)))
    )
    chosen = choose_candidates(swept, defaults={"optimizer.lr": 5}, top_k=3)
    seeds, values = [1, 2], [[7.0, 7.5], [5.0, 5.5], [6.0, 6.5], [8.0, 8.5]]
    said = summarise_confirmation(chosen, seeds, make_confirm_table(chosen, seeds, values))
    assert [[*each["values"].values()] for each in said["candidates"]] == values
    assert said["winner_trial"] == 1


def test_a_default_that_is_a_finalist_runs_once():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=4)
    assert [candidate.label for candidate in chosen] == ["trial 1", "trial 3", "trial 2", "trial 0 (default)"]


def test_a_default_outside_the_space_is_a_yardstick_and_cannot_win():
    chosen = choose_candidates(SWEEP_TABLE, defaults={"optimizer.lr": 7.0}, top_k=1)
    assert (chosen[-1].params, chosen[-1].can_win) == ({}, False)
    found = summarise_confirmation(chosen, [1, 2], make_confirm_table(chosen, [1, 2], [[4, 5], [1, 2]]))
    assert (found["winner"], found["winner_trial"]) == (0, 1)
    assert found["gain_over_default"]["mean"] == pytest.approx(-3.0)


def test_a_default_that_costs_too_much_cannot_win():
    dear = make_table(("infeasible", None, 0.1), ("complete", 4.0, 0.2))
    assert not choose_candidates(dear, defaults=DEFAULTS, top_k=1)[-1].can_win


def test_trials_that_differ_in_their_seed_alone_are_one_configuration():
    same = make_table(*(("complete", 4.0 + seed, {"optimizer.lr": 0.2, "seed": seed}) for seed in range(3)))
    assert [candidate.label for candidate in choose_candidates(same, defaults=DEFAULTS, top_k=3)] == [
        "trial 0",
        "default",
    ]


def test_seeds_are_fresh_and_the_same_for_all():
    seeded = make_table(("complete", 4.0, {"optimizer.lr": 0.2, "seed": 2}))
    seeds = choose_fresh_seeds(3, seeded, DEFAULTS)
    assert seeds == [1, 3, 4]
    trained_with = list_runs(choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=1), seeds)
    for rate in (0.2, 0.1):
        assert [run["seed"] for run in trained_with if run["optimizer.lr"] == rate] == seeds


def test_seeds_of_earlier_sweeps_are_not_fresh_and_a_confirmation_keeps_its_own():
    assert choose_fresh_seeds(3, SWEEP_TABLE, DEFAULTS, used_seeds={1, 3}) == [2, 4, 5]
    assert choose_fresh_seeds(3, SWEEP_TABLE, DEFAULTS, earlier_seeds=[5, 2, 5, 2]) == [5, 2, 1]
    assert choose_fresh_seeds(2, SWEEP_TABLE, DEFAULTS, used_seeds={5}, earlier_seeds=[5, 2]) == [2, 1]


VALUES = [[5.0, 5.2, 5.1], [4.9, 5.2, 5.05], [7.0, 7.1, 7.2]]


def test_the_best_mean_wins_and_what_noise_hides_is_said():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(chosen, [1, 2, 3], make_confirm_table(chosen, [1, 2, 3], VALUES))
    first, second, default = found["candidates"]
    assert (found["winner"], found["winner_trial"]) == (1, 3)  # the sweep had ranked it second
    assert (first["distinguishable"], second["distinguishable"], default["distinguishable"]) == (False, None, True)
    assert second["values"] == {1: 4.9, 2: 5.2, 3: 5.05}
    assert first["in_sweep"] == {"value": 4.0, "epochs": 9}
    gain = found["gain_over_default"]
    assert gain == default["difference_to_winner"]
    assert gain["mean"] == pytest.approx(7.1 - 5.05)
    assert gain["low"] < gain["mean"] < gain["high"]
    assert yaml.safe_load(yaml.safe_dump(found)) == found


def test_where_more_is_better_the_gain_is_still_positive():
    chosen = choose_candidates(make_table(*SWEEP_TRIALS_BY_AUC, mode="max"), defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(
        chosen, [1, 2, 3], make_confirm_table(chosen, [1, 2, 3], [[6, 7, 8], [5, 5, 5], [1, 2, 3]], mode="max")
    )
    assert found["winner"] == 0
    assert found["candidates"][2]["difference_to_winner"]["mean"] == pytest.approx(-5.0)
    assert found["gain_over_default"]["mean"] == pytest.approx(5.0)


SWEEP_TRIALS_BY_AUC = [("complete", 1.0, 0.1), ("complete", 4.0, 0.2), ("complete", 3.5, 0.3)]


def test_a_candidate_that_diverged_with_a_seed_is_out():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    runs_of = make_confirm_table(chosen, [1, 2, 3], VALUES, states={(1, 2): "diverged"})
    found = summarise_confirmation(chosen, [1, 2, 3], runs_of)
    assert found["candidates"][1]["out"] == "diverged with seed 2"
    assert (found["candidates"][1]["mean"], found["candidates"][1]["values"][2]) == (None, None)
    assert found["winner"] == 0


def test_without_the_default_the_gain_is_not_known():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(
        chosen, [1, 2], make_confirm_table(chosen, [1, 2], VALUES, states={(2, 1): "failed"})
    )
    assert found["gain_over_default"] is None
    assert found["unknown"] == {"gain_over_default": "the default configuration is out: failed with seed 1"}
    assert (found["not_distinguishable_from"], found["not_compared"]) == (["trial 1"], ["default"])


def test_where_all_fail_nobody_wins():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=1)
    states = {(index, seed): "failed" for index in (0, 1) for seed in (1, 2)}
    found = summarise_confirmation(chosen, [1, 2], make_confirm_table(chosen, [1, 2], VALUES, states=states))
    assert (found["winner"], found["winner_trial"], found["gain_over_default"]) == (None, None, None)
    assert_nothing_is_compared(found, reason="no finalist was trained to the end")


def assert_nothing_is_compared(found, *, reason):
    """Nothing is compared with the winner, which stands beside it with that reason."""
    assert found["not_distinguishable_from"] is None
    assert reason in found["unknown"]["not_distinguishable_from"]
    assert all(each["distinguishable"] is None for each in found["candidates"])
    assert (found["gain_over_default"] or {"low": None})["low"] is None
    assert found["unknown"]["gain_over_default"]


def test_with_one_seed_nothing_can_be_told_apart():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(chosen, [1], make_confirm_table(chosen, [1], VALUES))
    assert_nothing_is_compared(found, reason="one seed")
    assert "one seed" in found["unknown"]["interval"]
    assert found["optimism"] is None
    assert found["gain_over_default"]["mean"] == pytest.approx(2.1)


def test_where_all_others_have_failed_the_winner_is_compared_with_nothing():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    states = {(1, 2): "failed", (2, 1): "diverged"}
    found = summarise_confirmation(chosen, [1, 2, 3], make_confirm_table(chosen, [1, 2, 3], VALUES, states=states))
    assert found["winner"] == 0
    assert_nothing_is_compared(found, reason="no other configuration")
    assert found["not_compared"] == ["trial 3", "default"]
    assert found["candidates"][0]["low"] < 5.1 < found["candidates"][0]["high"]
    assert "interval" not in found["unknown"]
    assert found["optimism"] == 0.0  # there was no choice


def test_a_winner_that_is_the_only_candidate_is_compared_with_nothing():
    chosen = choose_candidates(make_table(("complete", 5.0, 0.1)), defaults=DEFAULTS, top_k=3)
    found = summarise_confirmation(chosen, [1, 2], make_confirm_table(chosen, [1, 2], VALUES))
    assert_nothing_is_compared(found, reason="no other configuration")
    assert found["gain_over_default"] is None


@pytest.mark.parametrize("values", [[[5.0, 5.0], [4.9, 4.9], [7.0, 7.0]], [[5.1, 5.3], [4.9, 5.1], [7.0, 7.2]]])
def test_an_objective_without_noise_gives_no_certainty(values):
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(chosen, [1, 2], make_confirm_table(chosen, [1, 2], values))
    assert found["winner"] == 1
    assert_nothing_is_compared(found, reason="no noise")


def test_a_default_that_wins_has_no_gain_over_itself():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(
        chosen, [1, 2, 3], make_confirm_table(chosen, [1, 2, 3], [[5.0, 5.2, 5.1], [4.9, 5.2, 5.05], [1.0, 1.1, 1.3]])
    )
    assert (found["winner"], found["gain_over_default"]) == (2, None)
    assert found["unknown"] == {"gain_over_default": "the default configuration is the winner"}
    assert found["not_distinguishable_from"] == []  # all others are worse, which three seeds show


def test_a_run_that_ended_without_a_finite_value_puts_its_candidate_out():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(
        chosen, [1, 2], make_confirm_table(chosen, [1, 2], [[5.0, math.nan], [5.1, 5.2], [math.inf, 7.0]])
    )
    assert [each["out"] for each in found["candidates"]] == [
        f"no finite {METRIC} with seed 2",
        None,
        f"no finite {METRIC} with seed 1",
    ]
    assert_nothing_is_compared(found, reason="no other configuration")


def test_the_winner_says_how_optimistic_its_mean_is():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(chosen, [1, 2, 3], make_confirm_table(chosen, [1, 2, 3], VALUES))
    assert 0.01 < found["optimism"] < 0.1  # two of three are alike, with a standard error of 0.05
    assert "picked" in found["method"]
    assert "same variance" in found["method"]


@pytest.mark.parametrize("seed", [None, 0, 1, 5])
def test_no_seed_of_the_sweep_is_a_seed_of_the_confirmation(seed):
    """The value of a seed that has picked a finalist would pick it again."""
    own = {} if seed is None else {"seed": seed}
    made = make_table(*(("complete", 4.0 + rate, {"optimizer.lr": rate, **own}) for rate in (0.1, 0.2, 0.3)))
    fresh = choose_fresh_seeds(5, made, {"optimizer.lr": 0.1, "seed": 2})
    assert not {2, seed} & set(fresh)
    assert len(set(fresh)) == 5


def test_one_seed_gives_means_without_intervals_and_says_so():
    chosen = choose_candidates(SWEEP_TABLE, defaults=DEFAULTS, top_k=2)
    found = summarise_confirmation(chosen, [1], make_confirm_table(chosen, [1], VALUES))
    assert [each["mean"] for each in found["candidates"]] == [5.0, 4.9, 7.0]
    assert all(each["low"] is None and each["distinguishable"] is None for each in found["candidates"])
    assert "no intervals" in found["method"]


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.fixture
def confirm_table(tmp_path, monkeypatch, write_space):
    """Confirms a table in place of Ray; `.asked` are the runs of each time."""
    space = write_space("optimizer.lr: interval(0.1, 1)")

    @contextlib.contextmanager
    def swept(run):
        sweep = run.sweep
        points = [run.searcher().suggest(number) for number in range(sweep.num_trials)]
        log = EventLog(sweep.path / "events.jsonl")
        new = points[len(log.events) :]
        assert (run.description is None) == bool(log.events)
        for number, params in enumerate(new, start=len(log.events)):
            log.append(TrialSuggested(0.0, number, params))
        log.close()
        confirm_.suggested_params.append(new)
        confirm_.settings.append(sweep)
        trained = points[: confirm_.num_trained]
        rows = {i: TrialRow(i, params, "complete", 4, {METRIC: i}) for i, params in enumerate(trained)}
        yield TrialTable(METRIC, "min", len(points), 4, rows=rows, end="finished" if trained == points else "spent")

    monkeypatch.setattr(module, "run_sweep", swept)
    settings = make_settings(tmp_path, confirm=ConfirmSettings(top_k=1, seeds=2), max_epochs=9)

    def confirm_(of, budget=None, **changes):
        return confirm_finalists(
            of,
            sweep=replace(settings, **changes),
            cluster=RaySettings(address=None, num_cpus=1),
            space=space,
            defaults=DEFAULTS,
            trial_function=curve,
            command=str,
            origin={},
            budget=budget,
        )

    confirm_.suggested_params, confirm_.settings, confirm_.num_trained = [], [], None
    return confirm_


def test_what_confirm_yaml_says_is_returned_and_its_sweep_resumes_the_whole(confirm_table, tmp_path):
    found = confirm_table(SWEEP_TABLE)
    assert yaml.safe_load((tmp_path / "confirm" / "confirm.yaml").read_text()) == found
    (settings,) = confirm_table.settings
    assert settings.path == tmp_path / "confirm"
    assert settings.resume_path == tmp_path
    assert (settings.preflight, settings.time_budget_s, settings.num_trials) == ("off", None, 4)


BUDGET = ConfirmationBudget(top_k=1, seeds=3, time_s=60.0, gpu_hours=None)


def test_a_budget_says_how_many_finalists_and_seeds_and_how_long(confirm_table, tmp_path):
    found = confirm_table(SWEEP_TABLE, BUDGET)
    assert len(found["seeds"]) == 3
    assert confirm_table.settings[0].time_budget_s == 60
    confirm_table(SWEEP_TABLE, BUDGET)  # its time is counted from now on, as the events of the first one end at 0 s
    assert confirm_table.settings[1].time_budget_s == 60


def test_gpu_hours_of_earlier_runs_are_added_to_those_of_the_budget(confirm_table, tmp_path):
    budget = BUDGET._replace(gpu_hours=2.0)
    confirm_table(SWEEP_TABLE, budget)
    assert confirm_table.settings[0].gpu_hours == 2.0
    log = EventLog(tmp_path / "confirm" / "events.jsonl")
    log.append(SweepOpened(0.0, 2, 0.5))
    log.append(SegmentStarted(0.0, 0, 1, 0, None, None, None, None))
    log.append(SweepClosed(3600.0, "interrupted"))
    log.close()
    confirm_table(SWEEP_TABLE, budget)
    assert confirm_table.settings[1].gpu_hours == 2.5
    assert confirm_table.settings[1].time_budget_s == 3660


def test_only_seeds_that_all_were_trained_with_count_if_a_budget_ends_it(confirm_table):
    confirm_table.num_trained = 5  # the trial and the default with two seeds, and the trial with a third one
    found = confirm_table(SWEEP_TABLE, BUDGET)
    assert len(found["seeds"]) == 2
    assert [len(each["values"]) for each in found["candidates"]] == [2, 2]


def test_a_confirmation_that_ends_before_all_have_one_seed_says_so(confirm_table, tmp_path, capsys):
    confirm_table.num_trained = 1
    assert confirm_table(SWEEP_TABLE, BUDGET) is None
    assert "the budget ended it before every candidate was trained with one seed" in capsys.readouterr().out
    assert not (tmp_path / "confirm" / "confirm.yaml").exists()


def test_another_finalist_is_trained_and_what_is_known_is_not_trained_again(confirm_table):
    confirm_table(SWEEP_TABLE)
    more = make_table(
        *(("complete", row.metrics[METRIC], row.params) for row in SWEEP_TABLE.rows.values()), ("complete", 3.0, 0.9)
    )
    found = confirm_table(more)
    assert [[(run["optimizer.lr"], run["seed"]) for run in asked] for asked in confirm_table.suggested_params] == [
        [(0.2, 1), (0.1, 1), (0.2, 2), (0.1, 2)],
        [(0.9, 1), (0.9, 2)],
    ]
    assert [each["label"] for each in found["candidates"]] == ["trial 4", "default"]
    assert found["candidates"][1]["values"] == {1: 1, 2: 3}  # the runs of the first time


@pytest.mark.parametrize("off", [{"top_k": 0, "seeds": 3}, {"top_k": 3, "seeds": 0}])
def test_it_can_be_turned_off_also_afterwards(confirm_table, tmp_path, off):
    confirm_table(SWEEP_TABLE)
    assert confirm_table(SWEEP_TABLE, confirm=ConfirmSettings(**off)) is None
    assert len(confirm_table.suggested_params) == 1
    assert not (tmp_path / "confirm" / "confirm.yaml").exists()


def test_without_a_finite_value_there_is_nothing_to_confirm(confirm_table):
    assert confirm_table(make_table(("diverged", math.nan, 0.1), ("failed", None, 0.2))) is None


def test_the_share_of_a_gpu_that_was_found_out_counts(confirm_table, tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(SweepOpened(0.0, 4, gpus=0.25))
    log.close()
    confirm_table(SWEEP_TABLE, gpus_per_trial="auto")
    assert confirm_table.settings[0].gpus_per_trial == 0.25


@pytest.mark.slow
def test_a_confirmation_that_was_cut_off_goes_on_where_it_was(ray_started, write_space, tmp_path):
    folder, settings = (
        tmp_path / "sweep" / "confirm",
        make_settings(tmp_path / "sweep", confirm=ConfirmSettings(top_k=2, seeds=2), max_epochs=8),
    )
    space = write_space("optimizer.lr: choice(0.1, 0.2, 0.4)\nmodel.decoder.depth: 1")
    defaults = {"optimizer.lr": 0.1, "model.decoder.depth": 1, "seed": 0}
    swept = run_small_sweep(settings, space, train_growing_weight, sampler=None, scheduler=Fifo, defaults=defaults)

    def confirmed():
        return confirm_finalists(
            swept,
            sweep=settings,
            cluster=RaySettings(address=None, num_cpus=2),
            space=space,
            defaults=defaults,
            trial_function=grows_slowly,
            command=str,
            origin={"data_fingerprint": "f"},
        )

    def interrupt():
        while not (folder / "events.jsonl").is_file() or '"epoch": 3, ' not in (folder / "events.jsonl").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SweepInterruptedError, match=f"to resume: python tune.py sweep.resume={tmp_path / 'sweep'}$"):
        confirmed()
    assert not (folder / "confirm.yaml").exists()
    found = confirmed()
    rates = [each["params"]["optimizer.lr"] for each in found["candidates"]]
    assert rates == [0.4, 0.2, 0.1]
    assert [each["mean"] for each in found["candidates"]] == pytest.approx([10 - 8 * rate for rate in rates])
    assert found["gain_over_default"]["mean"] == pytest.approx(2.4)
    events = read_events(folder / "events.jsonl")
    assert len([event for event in events if isinstance(event, TrialSuggested)]) == 6
    assert max(event.epoch for event in events if isinstance(event, SegmentStarted)) >= 2  # from checkpoints
    csv = pd.read_csv(folder / "trials.csv")
    assert sorted(csv["seed"]) == [1, 1, 1, 2, 2, 2]
    assert confirmed() == found
    assert len(read_events(folder / "events.jsonl")) == len(events)  # read, not trained again
