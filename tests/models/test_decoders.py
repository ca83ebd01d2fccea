"""The contract of every decoder in configs/model/decoder: AxisLogits of 21 joints, for every depth and pyramid."""

from pathlib import Path

import hydra
import pytest
import torch

from handpose.config import CONFIGS, compose, plain
from handpose.errors import UserError
from handpose.models.encoder import Encoder
from handpose.models.pose_net import PoseNet

NAMES = sorted(path.stem for path in Path(CONFIGS / "model/decoder").glob("*.yaml"))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(name="mobilenetv3_small_050", pretrained=False, weights=None, normalize=True, drop_path=0.0).eval()


def decoder(name, encoder, **values):
    config = plain(compose("train", [f"model/decoder={name}"]))["model"]["decoder"] | values
    return hydra.utils.instantiate(config)(channels=encoder.channels, reductions=encoder.reductions)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [0, 1, 3, 5])
def test_depth_doubles_the_bins_along_u_and_v(name, depth, encoder):
    pyramid = encoder(torch.rand(2, 3, 64, 96))
    logits = decoder(name, encoder, depth=depth).eval()(pyramid)
    assert logits.u.shape == (2, 21, 3 * 2**depth)
    assert logits.v.shape == (2, 21, 2 * 2**depth)
    assert logits.depth.shape[:2] == (2, 21)
    assert all(axis.isfinite().all() for axis in logits)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_decoder_is_trained(name, encoder):
    pyramid = encoder(torch.rand(2, 3, 64, 64))
    module = decoder(name, encoder)
    torch.stack([axis.square().mean() for axis in module(pyramid)]).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_one_picture_does_not_see_another(name, encoder):
    images = torch.rand(2, 3, 64, 64)
    module = decoder(name, encoder).eval()
    both = module(encoder(images))
    alone = module(encoder(images[:1]))
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(both, alone, strict=True))


def test_the_marginals_of_the_pyramid_are_of_one_distribution(encoder):
    module = decoder("pyramid", encoder).eval()
    seen = {}
    module.heatmaps.register_forward_hook(lambda _, __, output: seen.update(logits=output))
    logits = module(encoder(torch.rand(1, 3, 64, 64)))
    joint = torch.softmax(seen["logits"].flatten(2), dim=-1).view(1, 21, 16, 16)
    assert torch.allclose(torch.softmax(logits.u, -1), joint.sum(2), atol=1e-5)
    assert torch.allclose(torch.softmax(logits.v, -1), joint.sum(3), atol=1e-5)


def test_skips_change_what_the_pyramid_sees(encoder):
    assert len(decoder("pyramid", encoder, depth=4, skips="add").skips) == 4
    assert len(decoder("pyramid", encoder, depth=5, skips="add").skips) == 4  # the encoder has no map at full size
    assert len(decoder("pyramid", encoder, depth=4, skips="none").skips) == 0


def test_effpose_is_the_original_design(encoder):
    """Two branches, four 4 x 4 stride-2 transposed convolutions each, the first dense, the rest depthwise separable."""
    module = decoder("effpose", encoder)
    for branch in (module.xy_branch, module.z_branch):
        ups = [layer for layer in branch.modules() if isinstance(layer, torch.nn.ConvTranspose2d)]
        assert [layer.groups for layer in ups] == [1, 128, 128, 128]
        assert all(layer.stride == (2, 2) and layer.out_channels == 128 for layer in ups)
    assert module(encoder(torch.rand(2, 3, 224, 224))).u.shape == (2, 21, 7 * 2**4)


def test_the_network_is_encoder_and_decoder(encoder):
    net = PoseNet(encoder=encoder, decoder=lambda **pyramid: decoder("effpose", encoder)).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(net(image).u, net.decoder(encoder(image)).u)


def test_a_negative_depth_is_refused(encoder):
    with pytest.raises(UserError, match=r"model\.decoder\.depth.*-1"):
        decoder("pyramid", encoder, depth=-1)
