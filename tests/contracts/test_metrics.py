"""What every metric in configs/metrics keeps to."""

import inspect
import math

import pytest
import torch

from handpose.metrics.validation import get_direction, make_metrics


def samples(num, seed=0):
    """Inputs of metrics for `num` hands in float32, about 2 cm and 20 px apart."""
    noise = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.002, 0.04, num)[:, None, None]  # so that a mean of batch means would be another number
    target_m = 0.05 * torch.randn(num, 21, 3, generator=noise) + torch.tensor([0.0, 0.0, 0.7])
    target_uv = 50.0 * torch.randn(num, 21, 2, generator=noise) + 100.0
    return {
        "predicted_m": target_m + spread * torch.randn(target_m.shape, generator=noise),
        "target_m": target_m,
        "predicted_uv": target_uv + 1000.0 * spread * torch.randn(target_uv.shape, generator=noise),
        "target_uv": target_uv,
    }


def make(metric):
    return make_metrics()[metric.name]


def value(metric, inputs, batches=None):
    names = inspect.signature(metric.update).parameters
    parts = {name: inputs[name].split(batches or len(inputs[name])) for name in names}
    for number in range(len(next(iter(parts.values())))):
        metric.update(**{name: each[number] for name, each in parts.items()})
    return float(metric.compute())


def test_its_direction_is_known_by_its_name(metric):
    assert get_direction(f"val/{metric.name}") == ("max" if make(metric).higher_is_better else "min")


def test_uneven_batches_are_one_batch(metric):
    inputs = samples(20)
    assert value(make(metric), inputs, [1, 16, 3]) == pytest.approx(value(make(metric), inputs), rel=1e-14)


def test_reset_forgets(metric):
    used = make(metric)
    value(used, samples(5, seed=1))
    used.reset()
    assert value(used, samples(8)) == value(make(metric), samples(8))


def test_metrics_of_two_processes_merge(metric):
    inputs = samples(20)
    first, second = make(metric), make(metric)
    names = inspect.signature(first.update).parameters
    first.update(**{name: inputs[name][:7] for name in names})
    second.update(**{name: inputs[name][7:] for name in names})
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(value(make(metric), inputs), rel=1e-14)
    assert {reduction.__name__ for reduction in first._reductions.values()} == {"dim_zero_sum"}


def test_a_network_in_bfloat16_does_not_round_it(metric):
    network = torch.nn.ModuleDict({"metric": make(metric)}).to(torch.bfloat16)
    assert value(network["metric"], samples(20), [5] * 4) == pytest.approx(value(make(metric), samples(20)), rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_prediction_that_is_not_finite_is_not_hidden(metric, bad):
    good = value(make(metric), samples(4))
    inputs = samples(4)
    for name in ("predicted_m", "predicted_uv"):
        inputs[name][0] = bad
    found = value(make(metric), inputs)
    assert math.isnan(found) or (found < good if make(metric).higher_is_better else found > good)


def test_the_truth_scores_best(metric):
    inputs = samples(4)
    truth = inputs | {"predicted_m": inputs["target_m"], "predicted_uv": inputs["target_uv"]}
    best, found = value(make(metric), truth), value(make(metric), inputs)
    assert best > found if make(metric).higher_is_better else best < found
