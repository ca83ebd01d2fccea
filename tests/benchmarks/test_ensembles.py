"""The comparison of ensembles measures what it says; which method is best is not tested."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from handpose.heatmaps import AxisLogits, soft_argmax
from handpose.training.checkpoints import read_checkpoint

ensembles = importlib.import_module("benchmarks.ensembles")


def make_output(seed):
    generator = torch.Generator().manual_seed(seed)
    return AxisLogits(*(torch.randn(2, 21, 16, generator=generator, dtype=torch.float64) for _ in range(3)))


def test_the_soft_argmax_of_mean_heatmaps_is_the_mean_of_the_soft_argmaxes():
    outputs = [make_output(seed) for seed in range(3)]
    mean = ensembles.average_heatmaps(outputs)
    for axis in range(3):
        expected = torch.stack([soft_argmax(each[axis]) for each in outputs]).mean(0)
        assert torch.allclose(soft_argmax(mean[axis]), expected)


def test_the_geometric_mean_multiplies_probabilities():
    outputs = [make_output(seed) for seed in range(2)]
    mean = torch.softmax(ensembles.average_heatmaps(outputs, geometric=True).u, dim=-1)
    product = torch.sqrt(torch.softmax(outputs[0].u, -1) * torch.softmax(outputs[1].u, -1))
    assert torch.allclose(mean, product / product.sum(-1, keepdim=True))


def test_greedy_selection_takes_the_best_first_and_stops_when_nothing_helps():
    values = {Path("a"): 3.0, Path("b"): -2.5, Path("c"): 9.0}

    def measure(chosen):
        return abs(np.mean([values[each] for each in chosen]))

    assert ensembles.choose_greedily(list(values), measure, 5) == [Path("b"), Path("a")]  # |0.25|, and a third is worse
    assert ensembles.choose_greedily(list(values), measure, 1) == [Path("b")]


def test_a_soup_has_the_mean_weights(write_checkpoint, tmp_path):
    paths = [write_checkpoint(f"seed={seed}") for seed in (0, 1)]
    soup = read_checkpoint(ensembles.write_soup(paths, tmp_path / "soup.ckpt"))["state_dict"]
    first, second = (read_checkpoint(path)["state_dict"] for path in paths)
    name = next(name for name, value in first.items() if value.ndim == 4)
    assert torch.allclose(soup[name], (first[name] + second[name]) / 2)
    assert all(soup[name].dtype == first[name].dtype for name in first)


def test_ratios_are_paired_over_hands():
    rng = np.random.default_rng(0)
    single = [rng.gamma(2.0, 5.0, 100) for _ in range(3)]
    rows = ensembles.summarise({"single": single, "joints": [0.9 * np.mean(single, axis=0)]})
    assert rows[1]["ratio"] == pytest.approx(0.9)
    assert rows[1]["interval"] == pytest.approx([0.9, 0.9])
    assert rows[0]["deviation_mm"] == pytest.approx(np.std(np.mean(single, axis=1), ddof=1))
    assert "0.900" in ensembles.format_table(rows)


def test_the_best_recorded_configurations_are_compared():
    best = ensembles.find_best_params("photographs")
    assert len(best) == 6
    assert all("optimizer.lr" in params for params in best)
