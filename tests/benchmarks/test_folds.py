"""The comparison of folds with a single split: errors are made up here, of which the truth is known."""

import importlib
import json

import numpy as np
import pytest

folds = importlib.import_module("benchmarks.folds")

NOISE_MM = 1.0


def make_errors(num, num_folds=5, seed=0):
    """Configurations whose worth is spread as widely as the noise of a single validation."""
    rng = np.random.default_rng(seed)
    worth = 10 + rng.normal(0, 1.0, num)
    return folds.Errors(worth[:, None] + rng.normal(0, NOISE_MM, (num, num_folds + 1)), worth)


def test_the_mean_over_folds_chooses_better_than_a_noisy_single_split():
    regrets = {
        name: np.mean(
            [
                folds.compute_regret(make_errors(60, seed=seed), name, 30, np.random.default_rng(seed), num_subsets=20)
                for seed in range(30)
            ]
        )
        for name in folds.CHOICES
    }
    assert regrets["folds"] < regrets["folds, early"] < regrets["single"]


def test_a_regret_lies_in_its_interval():
    for row in folds.summarise(make_errors(24), num_draws=60):
        low, high = row["interval_mm"]
        assert low <= high
        assert 0 <= row["regret_mm"] < high + 1.0


def test_without_noise_every_choice_is_the_best_of_all():
    exact = make_errors(20)
    exact = exact._replace(validation=np.repeat(exact.test[:, None], 4, axis=1))
    rng = np.random.default_rng(0)
    for name in folds.CHOICES:
        assert folds.compute_regret(exact, name, 20, rng, num_subsets=3) == 0.0


@pytest.mark.parametrize(("name", "expected"), [("single", 9), ("folds", 45), ("folds, early", 9 + 3 * 4)])
def test_a_choice_costs_its_trainings(name, expected):
    assert folds.count_trainings(name, 9, 5) == expected


def test_at_equal_cost_no_choice_has_more_trainings_than_another_may_have():
    for comparison, sizes in folds.list_comparisons(40, 5):
        costs = [folds.count_trainings(name, num, 5) for name, num in sizes.items()]
        if comparison == "equal cost":
            assert max(costs) == sizes["single"]
            assert min(costs) >= 0.8 * sizes["single"]
        else:
            assert len(set(sizes.values())) == 1


def test_an_interrupted_file_is_continued_and_a_diverged_configuration_is_left_out(tmp_path):
    trainings = [
        folds.Training(number, {"x": number}, *kind)
        for number in range(3)
        for kind in ((-1, 0), (0, 0), (1, 0), (-1, 1), (-1, 2))
    ]
    file = tmp_path / "folds.jsonl"
    folds.append_line(file, {"epochs": 1})
    for place, training in enumerate(trainings):
        error = None if training.number == 1 and training.fold == 0 else float(place)
        folds.append_line(file, {**training._asdict(), "validation": error, "test": error})
    file.write_text(file.read_text() + json.dumps({"number": 3})[:5])
    errors = folds.read_errors(file, trainings)
    assert errors.validation.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert errors.test.tolist() == [3.5, 13.5]
    with pytest.raises(SystemExit, match="was recorded with"):
        folds.train_missing(file, trainings, [], {"epochs": 2}, num_jobs=1)
    folds.train_missing(file, trainings, [], {"epochs": 1}, num_jobs=1)  # nothing is missing
