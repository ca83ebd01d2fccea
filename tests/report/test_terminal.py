"""What is shown of a sweep: nothing is cut off, the best is the best, the time left is plausible."""

import io
import math
import random

import pytest
from rich.console import Console

from handpose.report import terminal
from handpose.report.formatting import format_duration, format_metric
from handpose.report.summary import format_summary
from handpose.report.sweep_record import CombinedSeeds
from handpose.report.terminal import SweepClock, format_trial, format_warm_start, render_sweep
from handpose.report.trial_table import STATES, TrialRow, TrialTable

METRIC = "val/pa_mpjpe_mm"


def make_table(num_rows, *, num_trials=400, num_slots=1):
    table = TrialTable(METRIC, "min", num_trials, max_epochs=27, num_slots=num_slots)
    rng = random.Random(0)
    for number in range(num_rows):
        state = rng.choice(STATES)
        params = {"model/decoder": rng.choice(["pyramid", "effpose"]), "model.encoder.name": "mobilenetv3_small_050"}
        params |= {f"loss.weight_{i}": rng.random() for i in range(8)}
        value = math.nan if state == "diverged" else rng.uniform(10, 30)
        error = "FloatingPointError: " + "long " * 60 if state == "failed" else ""
        table.rows[number] = TrialRow(number, params, state, rng.randint(1, 27), {METRIC: value}, 60.0, "", error)
    return table


def render_table(table, width):
    output = io.StringIO()
    console = Console(width=width, file=output, force_terminal=True, color_system=None)
    console.print(render_sweep("sweep big  ·  everything", table, SweepClock(time_budget_s=None), width=width))
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("num_rows", [0, 1, 4, 400])
def test_the_picture_is_calm_at_any_size(width, num_rows):
    table = make_table(num_rows)
    lines = render_table(table, width)
    assert len(lines) <= 21  # of the 24 that a terminal has
    assert max(map(len, lines)) <= width
    counted = {f"{number}\N{NO-BREAK SPACE}{state}" for state, number in table.count_states().items()}
    assert all(any(text in line for line in lines) for text in counted)
    columns = next((line.split() for line in lines if line.split()[:1] == ["trial"]), [])
    assert columns[:5] == ["trial", "state", "epoch", "PA-MPJPE", "mm"]
    assert columns[-1] == "time"
    assert not any("…" in column for column in columns)


def test_the_best_trial_is_named_with_what_was_searched():
    table = make_table(0)
    table.rows[0] = TrialRow(0, {"optimizer.lr": 0.1, "fixed": 1}, "stopped", 3, {METRIC: 2.0})
    table.rows[1] = TrialRow(1, {"optimizer.lr": 0.02, "fixed": 1}, "complete", 27, {METRIC: 12.345})
    best = next(line for line in render_table(table, 120) if line.startswith("best"))
    assert best.split() == ["best", "PA-MPJPE", "12.35", "mm", "trial", "1", "at", "epoch", "27/27", "lr", "0.02"]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_value_of_the_best_trial_is_cut(width):
    table = make_table(400)
    (line,) = (line for line in render_table(table, width) if line.startswith("best"))
    names = terminal.shorten_names(terminal._list_searched_keys(table))
    best = table.rank_trials()[0]
    whole = [f"{name} {terminal.format_value(best.params[key])}" for key, name in names.items()]
    told = line.split("/27  ")[1].rstrip()
    assert told == ", ".join(whole) or told in [", ".join([*whole[:number], "..."]) for number in range(len(whole))]


def test_a_trial_that_has_ended_is_one_line():
    table = make_table(0, num_trials=3)
    table.rows[0] = TrialRow(0, {"optimizer.lr": 0.1}, "complete", 27, {METRIC: 2.0}, 10.0)
    table.rows[1] = TrialRow(1, {"optimizer.lr": 0.2}, "failed", error="ValueError: no")
    clock = SweepClock(time_budget_s=None)
    assert format_trial(table, table.rows[0], clock).startswith(
        "[2/3] trial 0 complete  epoch 27/27  PA-MPJPE 2.00 mm *  lr 0.1"
    )
    assert "trial 1 failed  epoch 0/27  ValueError: no  lr 0.2" in format_trial(table, table.rows[1], clock)


def test_lines_of_trials_take_no_more_than_a_part_of_the_time(monkeypatch, capsys):
    table = make_table(9, num_trials=9)
    now = iter(range(100))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now) / 10)  # each look at the clock is 0.1 s later
    view = terminal.PlainView("title", SweepClock(time_budget_s=None))
    for row in [*table.rows.values()] * 5:
        view.show_trial_end(table, row)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    told = [line for line in lines if line.startswith("[")]
    left_out = [int(line.split()[2]) for line in lines if line.startswith("...")]
    assert 1 < len(told) < 10
    assert sum(left_out) + len(told) + view._num_left_out == 45


@pytest.fixture
def set_clock(monkeypatch):
    """Sets the clock."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_time_left_is_what_the_trials_to_come_will_take(set_clock):
    set_clock(0.0)
    clock = SweepClock(time_budget_s=None)
    table = TrialTable(METRIC, "min", num_trials=10, max_epochs=4, num_slots=2)
    assert math.isnan(clock.estimate_left_s(table))
    table.rows[0] = TrialRow(0, {}, "running", 2, {METRIC: 1.0}, seconds=20.0)
    assert clock.estimate_left_s(table) == pytest.approx((9 * 40 + 20) / 2)  # 10 s an epoch
    table.rows[0] = TrialRow(0, {}, "complete", 4, {METRIC: 1.0}, seconds=30.0)
    table.rows[1] = TrialRow(1, {}, "running", 1, {METRIC: 1.0}, seconds=12.0)
    assert clock.estimate_left_s(table) == pytest.approx((8 * 30 + 18) / 2)


def test_the_last_trial_takes_the_time_that_it_takes_however_many_slots_are_idle(set_clock):
    set_clock(0.0)
    table = TrialTable(METRIC, "min", num_trials=2, max_epochs=4, num_slots=8)
    table.rows[0] = TrialRow(0, {}, "complete", 4, {METRIC: 1.0}, seconds=40.0)
    table.rows[1] = TrialRow(1, {}, "running", 1, {METRIC: 1.0}, seconds=10.0)
    assert SweepClock(time_budget_s=None).estimate_left_s(table) == pytest.approx(30.0)


def test_time_left_is_never_more_than_the_budget(set_clock):
    set_clock(0.0)
    clock = SweepClock(time_budget_s=100.0)
    table = TrialTable(METRIC, "min", num_trials=1000, max_epochs=4)
    table.rows[0] = TrialRow(0, {}, "complete", 4, {METRIC: 1.0}, seconds=30.0)
    set_clock(70.0)
    assert clock.estimate_left_s(table) == pytest.approx(30.0)
    set_clock(170.0)
    assert clock.estimate_left_s(table) == 0.0


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [(3.9, "0:03", "10 s"), (75, "1:15", "80 s"), (725, "12:05", "12 min"), (7384, "2:03:04", "2.1 h")],
)
def test_durations_read_well(seconds, exact, rough):
    assert format_duration(seconds) == exact
    assert format_duration(seconds, is_rough=True) == rough


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (METRIC, "PA-MPJPE 12.35 mm"),
        ("val/keypoint_error_px", "KEYPOINT-ERROR 12.35 px"),
        ("val/pck_auc", "PCK-AUC 12.35"),
    ],
)
def test_metrics_are_written_as_people_write_them(metric, text):
    assert format_metric(metric, 12.345678) == text


def test_the_summary_tells_winner_changes_and_the_test_beside_the_mean_pose(tmp_path):
    table = make_table(0)
    winner = TrialRow(
        7, {"optimizer.lr": 0.002, "heatmap.sigma": 0.0123, "model.decoder.skips": "add"}, "complete", 27, {METRIC: 9.5}
    )
    defaults = {"optimizer.lr": 0.001, "heatmap.sigma": 0.0123}
    retrained = {"val/pa_mpjpe_mm": 8.0, "test/pa_mpjpe_mm": 9.0, "baseline/pa_mpjpe_mm": 18.0}
    retrained["test/pa_mpjpe_official_mm"] = 8.7
    text = format_summary(table=table, winner=winner, defaults=defaults, retrained=retrained, folder=tmp_path)
    assert "winner      trial 7: validation PA-MPJPE 9.50 mm after 27 epochs" in text
    assert "changed     optimizer.lr 0.001 -> 0.002, model.decoder.skips add\n" in text
    assert "test PA-MPJPE 9.00 mm without reflection, mean pose 18.00 mm, ratio 0.50" in text
    assert (
        "            to compare with papers: PA-MPJPE 8.70 mm, aligned as in FreiHAND's official eval.py, which allows "
        "a reflection; the sweep optimised PA-MPJPE without reflection\n"
    ) in text
    assert f"tensorboard --logdir {tmp_path}" in text
    assert f"python train.py best={tmp_path}/best.yaml" in text


def make_combined(**changes):
    values = {
        "seeds": [0, 1, 2],
        "mean": {"test/pa_mpjpe_mm": 9.25},
        "deviation": {"test/pa_mpjpe_mm": 0.125},
        "predict": "ensemble",
        "predicted_by": [0, 1, 2],
        "metrics": {"test/pa_mpjpe_mm": 8.5},
    }
    return CombinedSeeds(**values | changes)


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({}, "the mean of the 3 networks"),
        ({"predict": "best", "predicted_by": [2]}, "the network with seed 2, the best on validation"),
        ({"predict": "first", "predicted_by": [0]}, "the network with seed 0, the first"),
    ],
)
def test_the_summary_of_several_seeds_has_their_mean_and_what_predicts(tmp_path, changes, which):
    retrained = {"test/pa_mpjpe_mm": 9.0, "baseline/pa_mpjpe_mm": 18.5}
    text = format_sweep_summary(tmp_path, retrained=retrained, combined=make_combined(**changes))
    assert "test PA-MPJPE 9.25 mm without reflection, mean pose 18.50 mm, ratio 0.50" in text
    line = f"            means of the seeds 0, 1, 2, with a standard deviation of 0.12 mm; {which}: PA-MPJPE 8.50 mm\n"
    assert line in text
    assert f"            and the same in seed_1/, seed_2/ and, of {which}, combined/" in text


def test_the_summary_says_when_the_default_won_and_when_there_is_no_truth(tmp_path):
    winner = TrialRow(0, {"optimizer.lr": 0.002}, "complete", 27, {METRIC: 9.5})
    retrained = {"val/pa_mpjpe_mm": 8.0, "baseline/pa_mpjpe_mm": 16.0}
    text = format_summary(
        table=make_table(0), winner=winner, defaults={"optimizer.lr": 0.002}, retrained=retrained, folder=tmp_path
    )
    assert "the default configuration won" in text
    assert "validation (the test split has no joints) PA-MPJPE 8.00 mm without reflection, mean pose 16.00 mm" in text
    assert "to compare with papers" not in text
    assert "optimistic, because this split chose the winner" in text


def test_a_warm_start_is_told_in_a_line():
    account = {
        "sweep": "first",
        "brought": 5,
        "not_comparable": {"its schedule ends at epoch 4": 3},
        "dropped_out_of_range": {"optimizer.lr": 2},
        "tried_first": 3,
    }
    assert format_warm_start(account) == (
        "warm start  first: 5 trials used, 3 left out (its schedule ends at epoch 4), "
        "2 outside the range of optimizer.lr, its best 3 are tried first"
    )


def make_confirmed_content(**changes):
    """What confirm.yaml says of a winner, one that is alike, the default, and one that is out."""
    names = ("label", "mean", "low", "high", "distinguishable", "out")
    rows = [
        ("trial 7", 9.8, 9.6, 10.0, None, None),
        ("trial 3", 9.9, 9.7, 10.1, False, None),
        ("default", 11.0, 10.8, 11.2, True, None),
        ("trial 5", None, None, None, None, "diverged with seed 2"),
    ]
    content = {
        "metric": METRIC,
        "epochs": 27,
        "seeds": [1, 2, 3],
        "candidates": [dict(zip(names, row, strict=True)) for row in rows],
        "winner": 0,
        "gain_over_default": {"mean": 1.2, "low": 0.9, "high": 1.5},
        "optimism": 0.07,
        "not_distinguishable_from": ["trial 3"],
        "not_compared": ["trial 5"],
        "unknown": {},
    }
    return content | changes


def format_sweep_summary(tmp_path, **given):
    winner = TrialRow(7, {"optimizer.lr": 0.002}, "complete", 27, {METRIC: 9.5})
    return format_summary(
        table=make_table(0),
        winner=winner,
        defaults={},
        **{"retrained": None, "confirmed": None} | given,
        folder=tmp_path,
    )


def test_the_summary_says_what_the_confirmation_found(tmp_path):
    text = format_sweep_summary(tmp_path, confirmed=make_confirmed_content())
    assert "confirmed   mean PA-MPJPE 9.80 mm [9.60, 10.00] after 27 epochs, seeds 1, 2, 3\n" in text
    assert "not distinguishable from trial 3 (9.90): the runs do not show which is better\n" in text
    assert "the best of several means is too good on average, here by about PA-MPJPE 0.07 mm\n" in text
    assert "gain        PA-MPJPE 1.20 mm [0.90, 1.50] over the default\n" in text
    assert "trial 5 is excluded: diverged with seed 2\n" in text


def test_the_summary_says_where_nothing_was_confirmed(tmp_path):
    assert "not confirmed (sweep.confirm): the best of" in format_sweep_summary(tmp_path)
    nobody = make_confirmed_content(winner=None, gain_over_default=None)
    assert "confirmed   nothing: no finalist completed all its runs" in format_sweep_summary(tmp_path, confirmed=nobody)


def test_the_summary_says_that_one_seed_tells_nothing_of_the_noise(tmp_path):
    alone = {"label": "trial 7", "mean": 9.8, "low": None, "high": None, "distinguishable": None, "out": None}
    reason = "one seed does not show how much the values vary between seeds"
    content = make_confirmed_content(
        candidates=[alone],
        seeds=[1],
        gain_over_default={"mean": 1.0, "low": None, "high": None},
        optimism=None,
        not_distinguishable_from=None,
        unknown=dict.fromkeys(("interval", "not_distinguishable_from", "gain_over_default"), reason),
    )
    text = format_sweep_summary(tmp_path, confirmed=content)
    assert "mean PA-MPJPE 9.80 mm after 27 epochs, seeds 1\n" in text
    assert f"unknown whether it is better than the others: {reason}\n" in text
    assert "too good" not in text
    assert "gain        PA-MPJPE 1.00 mm over the default\n" in text


def test_the_summary_says_why_the_gain_is_not_known(tmp_path):
    content = make_confirmed_content(gain_over_default=None, unknown={"gain_over_default": "the default is the winner"})
    assert "gain        unknown: the default is the winner\n" in format_sweep_summary(tmp_path, confirmed=content)


def test_the_summary_says_that_the_validation_split_was_trained_on(tmp_path):
    tested = {"test/pa_mpjpe_mm": 9.0, "baseline/pa_mpjpe_mm": 18.0}
    text = format_sweep_summary(tmp_path, retrained=tested, train_on_val=True)
    assert (
        "retrained   on the training and validation splits, last checkpoint: test PA-MPJPE 9.00 mm without reflection, "
        "mean pose 18.00 mm"
    ) in text
    text = format_sweep_summary(tmp_path, retrained={"train/loss": 1.0}, train_on_val=True)
    assert "no errors, because the test split has no joints" in text


def test_fractions_have_three_digits_in_means_and_intervals_alike(tmp_path):
    """An area under a curve differs in the third one."""
    means = {"trial 7": (0.714, 0.711, 0.717), "trial 3": (0.712, 0.709, 0.715)}
    content = make_confirmed_content(
        metric="val/pck_auc", gain_over_default={"mean": 0.005, "low": 0.002, "high": 0.008}
    )
    content["candidates"] = [
        each | dict(zip(("mean", "low", "high"), means[each["label"]], strict=True))
        for each in content["candidates"]
        if each["label"] in means
    ]
    text = format_sweep_summary(tmp_path, confirmed=content)
    assert "mean PCK-AUC 0.714 [0.711, 0.717]" in text
    assert "not distinguishable from trial 3 (0.712)" in text
    assert "PCK-AUC 0.005 [0.002, 0.008] over the default" in text


def test_what_the_defaults_lack_or_only_equal_is_a_change(tmp_path):
    winner = TrialRow(0, {"a": None, "b": True, "c": 1.0}, "complete", 27, {METRIC: 9.5})
    text = format_summary(
        table=make_table(0), winner=winner, defaults={"b": 1, "c": 1}, retrained=None, folder=tmp_path
    )
    assert "changed     a null, b 1 -> true\n" in text
