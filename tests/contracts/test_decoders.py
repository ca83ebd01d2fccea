"""What every decoder in configs/model/decoder keeps to: AxisLogits of 21 joints."""

import pytest
import torch

from handpose.models.encoder import Encoder


@pytest.fixture(scope="module")
def timm_encoder():
    return Encoder(name="mobilenetv3_small_050", pretrained=False, weights=None, normalize=True, drop_path=0.0).eval()


def make(decoder, encoder):
    return decoder.make()(channels=encoder.channels, reductions=encoder.reductions)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_it_gives_logits_of_every_joint_along_three_axes_in_any_layout_of_memory(decoder, size, timm_encoder):
    torch.manual_seed(0)
    pyramid = timm_encoder(torch.rand(2, 3, *size).contiguous(memory_format=torch.channels_last))
    logits = make(decoder, timm_encoder).eval()(pyramid)
    assert all(axis.shape[:2] == (2, 21) and axis.ndim == 3 for axis in logits)
    assert all(axis.isfinite().all() for axis in logits)
    assert logits.u.shape[-1] * size[0] == logits.v.shape[-1] * size[1]  # bins are as wide as they are high


def test_every_parameter_is_trained(decoder, timm_encoder):
    pyramid = [level.detach() for level in timm_encoder(torch.rand(2, 3, 64, 64))]
    module = make(decoder, timm_encoder)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # layers that begin as nothing have a gradient behind them from the second step on
        optimizer.zero_grad()
        torch.stack([axis.square().mean() for axis in module(pyramid)]).sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_one_picture_does_not_see_another(decoder, timm_encoder):
    images = torch.rand(2, 3, 64, 64)
    module = make(decoder, timm_encoder).eval()
    both = module(timm_encoder(images))
    alone = module(timm_encoder(images[:1]))
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(both, alone, strict=True))
