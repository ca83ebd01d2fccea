"""How early epochs predict the last one, estimated from the trials that were not stopped."""

import itertools

import numpy as np
import pytest

from handpose.report.rank_agreement import MIN_AGREEMENT_TRIALS, estimate_rank_agreement


def draw_sweep(correlation, generator, *, num=60, kept=3, stops=True):
    """Values at three epochs with this correlation between neighbours; `1 / kept` of the trials go on at each."""
    values = [generator.normal(size=num)]
    for _ in range(2):
        noise = generator.normal(size=num)
        values.append(correlation * values[-1] + np.sqrt(1 - correlation**2) * noise)
    numbers = np.arange(num)
    epochs = [dict(zip(numbers.tolist(), values[0].tolist(), strict=True))]
    for before, after in itertools.pairwise(values):
        if stops:
            numbers = numbers[np.argsort(before[numbers])][: max(MIN_AGREEMENT_TRIALS, len(numbers) // kept)]
        epochs.append({int(number): float(after[number]) for number in numbers})
    return epochs


@pytest.mark.parametrize("correlation", [0.3, 0.7, 0.95])
def test_the_interval_holds_the_correlation_of_all_trials_although_most_were_stopped(correlation):
    generator = np.random.default_rng(0)
    found = [estimate_rank_agreement(draw_sweep(correlation, generator)) for _ in range(60)]
    held = [each.low <= correlation**2 <= each.high for each in found]
    assert np.mean(held) >= 0.87  # 95 % less three standard errors of 60 draws


def test_a_high_correlation_is_not_called_low_for_the_survivors_sake():
    """Among the survivors alone it lies below 0.3 in a third of these sweeps."""
    generator = np.random.default_rng(1)
    found = [draw_sweep(0.9, generator) for _ in range(60)]
    among_survivors = []
    for first, _, last in found:
        among_survivors.append(np.corrcoef([first[number] for number in last], list(last.values()))[0, 1])
    assert np.mean(np.array(among_survivors) < 0.3) > 0.15
    assert not any(estimate_rank_agreement(each).high < 0.3 for each in found)


def test_without_early_stopping_it_is_the_ordinary_correlation():
    epochs = draw_sweep(0.8, np.random.default_rng(2), num=200, stops=False)
    found = estimate_rank_agreement([epochs[0], epochs[2]])
    assert found.correlation == pytest.approx(
        np.corrcoef(list(epochs[0].values()), list(epochs[2].values()))[0, 1], abs=0.05
    )
    assert found.num_trials == 200


@pytest.mark.parametrize("num_epochs", [2, 7, 12])
def test_the_last_epoch_counts_however_many_epochs_are_compared(num_epochs):
    """With 9 trials at the last epoch not all the others can be in the regression; the last one must be."""
    values = np.random.default_rng(4).normal(size=(num_epochs, 30))
    epochs = [dict(enumerate(each.tolist())) for each in values[:-1]] + [dict(enumerate(values[-1, :9].tolist()))]
    assert estimate_rank_agreement(epochs).num_trials == 9


def test_a_single_outlier_does_not_decide():
    epochs = draw_sweep(0.9, np.random.default_rng(3), num=100, stops=False)
    epochs[2][0] = 1e9
    assert estimate_rank_agreement(epochs).low > 0.5


@pytest.mark.parametrize("num_bad", [30, 45])
def test_many_trials_that_are_equally_bad_do_not_hide_that_the_others_agree(num_bad):
    """As with a choice that spoils every trial: the spread of all values is that of the bad ones then."""
    generator = np.random.default_rng(4)
    values = {number: 17.0 if number < num_bad else float(generator.uniform(10, 14)) for number in range(80)}
    first, last = ({number: value + generator.normal(0, 0.1) for number, value in values.items()} for _ in range(2))
    survivors = sorted(first, key=first.__getitem__)[:20]
    assert estimate_rank_agreement([first, {number: last[number] for number in survivors}]).low > 0.8


def test_few_trials_and_equal_values_say_nothing_or_little():
    values = {number: float(number) for number in range(MIN_AGREEMENT_TRIALS - 1)}
    assert estimate_rank_agreement([values, values]) is None
    assert estimate_rank_agreement([values]) is None
    equal = dict.fromkeys(range(20), 1.0)
    found = estimate_rank_agreement([equal, equal])
    assert found is None or -1 <= found.low <= found.high <= 1
