"""What the methods pick, counted by hand; where confirming must pay and where it cannot; and the program, tiny."""

import importlib
import json

import numpy as np
import pytest

from handpose.config import compose

selection = importlib.import_module("benchmarks.selection")
asha_modes = importlib.import_module("benchmarks.asha_modes")

Trial = selection.RecordedTrial
SWEEP = selection.ReplayedSweep(
    trials=[Trial([9.0, 5.0], 6.0), Trial([8.0, 4.0], 7.0), Trial([1.0, 1.0], 1.0)], order=[0, 1, 0, 1, 2], max_epochs=2
)


def test_the_most_trained_come_first_and_only_what_the_budget_trained_counts():
    assert SWEEP.rank_trials(5) == [(1, 4.0), (0, 5.0), (2, 1.0)]
    assert SWEEP.rank_trials(3) == [(0, 5.0), (1, 8.0)]
    assert SWEEP.rank_trials(-1) == []


def test_the_best_trial_is_taken_by_its_value_and_not_by_what_it_is_worth():
    assert selection.pick_best_trial(SWEEP, 5) == (7.0, 4.0)


def test_confirmed_is_the_truth_where_there_is_no_noise_and_is_paid_from_the_budget():
    given = {"rng": np.random.default_rng(0), "num_seeds": 1, "noise_mm": 0.0}
    assert selection.pick_confirmed(SWEEP, 5 + 3 * 2, top_k=2, **given) == (6.0, 6.0)
    assert selection.pick_confirmed(SWEEP, 5 + 4 * 2, top_k=3, **given) == (1.0, 1.0)
    assert selection.pick_confirmed(SWEEP, 5, top_k=3, **given) == (6.0, 6.0)  # nothing is left but for the default


def test_a_configuration_lies_between_its_neighbours_in_rank():
    ranked = [asha_modes.Curve({}, losses, 1.0) for losses in ((4.0, 1.0), (6.0, 3.0), (9.0, 9.0))]
    assert selection._interpolate_curve(ranked, 0.0).tolist() == [4.0, 1.0]
    assert selection._interpolate_curve(ranked, 0.25).tolist() == [5.0, 2.0]
    assert selection._interpolate_curve(ranked, 1.0).tolist() == [9.0, 9.0]


def test_the_gain_is_of_pairs_and_optimism_is_what_the_sweep_had_promised_too_much():
    Pick = selection.MethodPick  # noqa: N806
    pairs = [(Pick(3.0, 1.0), Pick(2.0, 2.5)), (Pick(5.0, 1.0), Pick(4.0, 4.5))]
    found = selection.summarise_picks(pairs, best=1.0, default=4.5)
    assert found["gain_mm"] == (1.0, 1.0, 1.0)
    assert found["methods"]["best trial"]["regret_mm"][0] == 3.0
    assert found["methods"]["best trial"]["optimism_mm"][0] == 3.0
    assert found["methods"]["best trial"]["worse_than_default"] == 0.5
    assert found["methods"]["confirmed"]["worse_than_default"] == 0.0


def test_every_case_is_replayed_with_the_settings_of_the_sweep(tmp_path, monkeypatch, capsys):
    output = tmp_path / "s.json"
    arguments = ["--repetitions", "3", "--noise", "0.4", "--budgets", "14", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["selection.py", *arguments])
    selection.main()
    found = json.loads(output.read_text())
    confirm = compose("tune", []).sweep.confirm
    assert (found["settings"]["top_k"], found["settings"]["seeds"]) == (confirm.top_k, confirm.seeds)
    assert [(case["scheduler"], case["proposals"]) for case in found["cases"]] == [
        (scheduler, proposals) for scheduler in ("fifo", "asha") for proposals in ("random", "model")
    ]
    for case in found["cases"]:
        assert case["methods"]["best trial"]["optimism_mm"][0] > case["methods"]["confirmed"]["optimism_mm"][0]
    assert "optimism, best trial" in capsys.readouterr().out


@pytest.mark.parametrize("scheduler", ["fifo", "asha"])
def test_without_noise_the_best_trial_is_what_it_looks_like(scheduler):
    ranked = [asha_modes.Curve({}, (end + 3.0, end + 1.0, end), 1.0) for end in (1.0, 2.0, 5.0)]
    rng = np.random.default_rng(0)
    given = {"crowding": 1.0, "noise_mm": 0.0, "default_rank": 0.5, "max_epochs": 3}
    sweep = selection.replay_sweep(
        ranked, rng, scheduler=selection._make_scheduler(scheduler, 3, 0), budget=60, **given
    )
    pick = selection.pick_best_trial(sweep, 60)
    assert pick.true_quality == pick.measured == min(sweep.trials[trial].true_quality for trial in set(sweep.order))
    assert sweep.trials[0].true_quality == 2.0
