"""What every encoder in configs/model/encoder keeps to: feature maps, the finest first, as it says they are."""

import pytest
import torch

from handpose.config import compose, to_plain_values
from handpose.training.build import build_training
from handpose.training.checkpoints import list_architecture_overrides


def make(encoder):
    module, _ = build_training(compose("train", encoder.overrides), pretrained=False, quiet=True)
    return module.net.encoder


def test_the_maps_are_those_it_says(encoder):
    module = make(encoder).eval()
    maps = module(torch.rand(2, 3, 64, 96))
    assert [each.shape[1] for each in maps] == list(module.channels)
    expected = [(64 // reduction, 96 // reduction) for reduction in module.reductions]
    assert [each.shape[-2:] for each in maps] == expected
    assert list(module.reductions) == sorted(module.reductions)
    assert all(each.isfinite().all() for each in maps)


@pytest.mark.parametrize("size", [72, 100])
def test_pictures_of_any_size_are_taken(encoder, size):
    module = make(encoder).eval()
    sides = [each.shape[-1] for each in module(torch.rand(1, 3, size, size))]
    assert all(side * reduction >= size for side, reduction in zip(sides, module.reductions, strict=True))


def test_one_picture_does_not_see_another(encoder):
    module = make(encoder).eval()
    images = torch.rand(2, 3, 64, 64)
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(module(images), module(images[:1]), strict=True))


def test_every_parameter_is_trained(encoder):
    module = make(encoder).train()
    torch.stack([each.square().mean() for each in module(torch.rand(4, 3, 64, 64))]).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_checkpoint_remembers_its_architecture(encoder):
    config = to_plain_values(compose("train", encoder.overrides))
    found = list_architecture_overrides(config)
    assert found["model/encoder"] == encoder.name
    again = to_plain_values(compose("train", [f"{key}={value}" for key, value in found.items() if "encoder" in key]))
    assert list_architecture_overrides(again) == list_architecture_overrides(again | {"model": config["model"]})
