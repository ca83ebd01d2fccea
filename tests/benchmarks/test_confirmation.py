"""Simulated confirmations: what is claimed of them is right often enough, and the program, tiny."""

import importlib
import json

import numpy as np
import pytest

confirmation = importlib.import_module("benchmarks.confirmation")

REPETITIONS = 1500


def compute_bound(share):
    """A share of the repetitions, with three standard errors."""
    return share + 3 * np.sqrt(share * (1 - share) / REPETITIONS)


def simulate(seed=0, **changes):
    case = confirmation.ConfirmationCase(
        **{"noise": "normal", "deviations": "equal", "num": 4, "num_seeds": 2, "means": "equal", "common_share": 0.0}
        | changes
    )
    return confirmation.simulate(case, np.random.default_rng(seed), REPETITIONS)


@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize(("num", "num_seeds"), [(2, 2), (4, 2), (4, 5), (11, 2), (11, 5)])
def test_what_is_said_of_a_winner_is_right_and_a_difference_that_is_not_there_is_seldom_claimed(num, num_seeds, share):
    found = simulate(num=num, num_seeds=num_seeds, common_share=share)
    assert 1 - found["coverage"]["ours"] < compute_bound(0.05)
    assert found["wrong_differences"] < compute_bound(0.05)
    assert 1 - found["gain_coverage"] < 0.05 + 3 * np.sqrt(0.05 * 0.95 / (REPETITIONS / num))
    assert abs(found["bias_left"]) < 0.5 * abs(found["bias"]) + 0.1


@pytest.mark.parametrize("noise", ["t5", "skewed"])
@pytest.mark.parametrize("means", ["spread", "one best"])
def test_other_means_and_noises_that_are_not_normal_are_covered(means, noise):
    for num_seeds in (2, 3):
        found = simulate(num=6, num_seeds=num_seeds, common_share=0.5, means=means, noise=noise)
        assert 1 - found["coverage"]["ours"] < compute_bound(0.07)
        assert found["wrong_differences"] < compute_bound(0.06)


def test_an_interval_that_ignores_the_choice_of_the_winner_covers_too_seldom():
    found = simulate(num=11)["coverage"]
    assert found["uncorrected"] < 0.85 < found["ours"]


def test_unequal_variances_cost_coverage_as_the_method_says():
    found = simulate(num=11, num_seeds=5, deviations="one noisy", means="one best")
    assert found["coverage"]["ours"] < 0.9
    assert simulate(num=11, deviations="one noisy")["wrong_differences"] > 0.08


def test_every_case_is_simulated_and_the_worst_of_each_group_is_printed(tmp_path, monkeypatch, capsys):
    output = tmp_path / "c.json"
    arguments = ["--repetitions", "4", "--configurations", "3", "--seeds", "2", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["confirmation.py", *arguments])
    confirmation.main()
    rows = json.loads(output.read_text())["cases"]
    assert len(rows) == 7 * 3 * 3  # noises and deviations, shares, means
    assert len({json.dumps([row[name] for name in confirmation.ConfirmationCase._fields]) for row in rows}) == len(rows)
    assert capsys.readouterr().out.count("\n| normal | one noisy | 0.5 | 2 |") == 1
