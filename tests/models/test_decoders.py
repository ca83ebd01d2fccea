"""Pyramid and EffPose; tests/contracts has what every decoder keeps to."""

import functools

import hydra
import pytest
import torch

from handpose.config import compose, to_plain_values
from handpose.errors import UserError
from handpose.heatmaps import ImageAxes, compute_expected_coordinates
from handpose.models.encoder import Encoder
from handpose.models.pose_net import PoseNet


@pytest.fixture(scope="module")
def encoder():
    return Encoder(name="mobilenetv3_small_050", pretrained=False, weights=None, normalize=True, drop_path=0.0).eval()


@functools.cache
def read_defaults(name):
    return to_plain_values(compose("train", [f"model/decoder={name}"]))["model"]["decoder"]


def make_decoder(name, encoder, **values):
    made = hydra.utils.instantiate(read_defaults(name) | values)
    return made(channels=encoder.channels, reductions=encoder.reductions)


OPTIONS = {
    "effpose": [{}],
    "pyramid": [
        {},
        {"skips": "none"},
        {"conv": "dense", "width": 20},
        {"bins_per_cell": 2},
        {"head": "axes"},
        {"head": "axes", "bins_per_cell": 3, "conv": "dense", "skips": "none"},
    ],
}
KINDS = [pytest.param(name, values, id=f"{name} {values}") for name, variants in OPTIONS.items() for values in variants]


@pytest.mark.parametrize(("name", "values"), KINDS)
@pytest.mark.parametrize("depth", range(6))
def test_each_block_doubles_the_bins_along_u_and_v_in_any_layout_of_memory(name, values, depth, encoder):
    pyramid = encoder(torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last))
    logits = make_decoder(name, encoder, depth=depth, **values).eval()(pyramid)
    bins_per_cell = values.get("bins_per_cell", 1)
    assert logits.u.shape == (2, 21, 3 * 2**depth * bins_per_cell)
    assert logits.v.shape == (2, 21, 2 * 2**depth * bins_per_cell)
    assert logits.depth.shape[:2] == (2, 21)
    assert all(axis.isfinite().all() for axis in logits)


@pytest.mark.parametrize("bins_per_cell", [1, 2])
def test_the_marginals_of_the_pyramid_are_of_one_distribution(encoder, bins_per_cell):
    module = make_decoder("pyramid", encoder, bins_per_cell=bins_per_cell).eval()
    seen = {}
    module.head.heatmaps.register_forward_hook(lambda _, __, output: seen.update(cells=output))
    logits = module(encoder(torch.rand(1, 3, 64, 64)))
    heatmaps = torch.nn.PixelShuffle(bins_per_cell)(seen["cells"])
    joint = torch.softmax(heatmaps.flatten(2), dim=-1).view(heatmaps.shape)
    assert heatmaps.shape == (1, 21, 16 * bins_per_cell, 16 * bins_per_cell)
    assert torch.allclose(torch.softmax(logits.u, -1), joint.sum(2), atol=1e-5)
    assert torch.allclose(torch.softmax(logits.v, -1), joint.sum(3), atol=1e-5)


@pytest.mark.parametrize("bins_per_cell", [1, 2])
@pytest.mark.parametrize("head", ["heatmaps", "axes"])
def test_depth_is_read_where_the_logits_say_the_joints_are(encoder, head, bins_per_cell):
    module = make_decoder("pyramid", encoder, head=head, bins_per_cell=bins_per_cell).eval()
    seen = {}
    module.head.register_forward_hook(lambda _, __, output: seen.update(output=output))
    module(encoder(torch.rand(2, 3, 64, 96)))
    u, v, attention = seen["output"]
    assert attention.shape == (2, 21, 16, 24)
    assert torch.allclose(attention.sum(2), torch.softmax(u, -1).unflatten(-1, (24, -1)).sum(-1), atol=1e-5)
    assert torch.allclose(attention.sum(3), torch.softmax(v, -1).unflatten(-1, (16, -1)).sum(-1), atol=1e-5)


@pytest.mark.parametrize("values", OPTIONS["pyramid"])
def test_a_pyramid_learns_where_the_joints_of_two_pictures_are(encoder, values):
    torch.manual_seed(0)
    images, target = torch.rand(2, 3, 64, 64), 0.1 + 0.8 * torch.rand(2, 21, 3)
    module = make_decoder("pyramid", encoder, depth=2, **values)
    axes = ImageAxes(sigma=0.1, target="gaussian", read_out="soft_argmax")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    pyramid = [level.detach() for level in encoder(images)]
    for _ in range(60):
        logits = module(pyramid)
        wanted = [axes.draw_heatmaps(target[..., i], bins=axis.shape[-1]) for i, axis in enumerate(logits)]
        loss = sum(-(torch.log_softmax(axis, -1) * p).sum(-1).mean() for axis, p in zip(logits, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (compute_expected_coordinates(module(pyramid)) - target).abs().mean() < 0.06


def test_without_blocks_the_pyramid_is_a_plain_head_on_the_last_map(encoder):
    module = make_decoder("pyramid", encoder, depth=0)
    pyramid = encoder(torch.rand(2, 3, 64, 64))
    assert not list(module.stem.parameters())
    assert module.head.heatmaps.in_channels == encoder.channels[-1]
    assert torch.equal(module.eval()(pyramid).u, module([*[None] * 4, pyramid[-1]]).u)


def test_skips_change_what_the_pyramid_sees(encoder):
    assert len(make_decoder("pyramid", encoder, depth=4, skips="add").skips) == 4
    assert len(make_decoder("pyramid", encoder, depth=5, skips="add").skips) == 4  # the encoder has no map at full size
    assert len(make_decoder("pyramid", encoder, depth=4, skips="none").skips) == 0


def test_effpose_is_the_original_design(encoder):
    """Two branches, four 4 x 4 stride-2 transposed convolutions each, the first dense, the rest depthwise separable."""
    module = make_decoder("effpose", encoder)
    for branch in (module.xy_branch, module.z_branch):
        ups = [layer for layer in branch.modules() if isinstance(layer, torch.nn.ConvTranspose2d)]
        assert [layer.groups for layer in ups] == [1, 128, 128, 128]
        assert all(layer.stride == (2, 2) and layer.out_channels == 128 for layer in ups)
    assert module(encoder(torch.rand(2, 3, 224, 224))).u.shape == (2, 21, 7 * 2**4)


def test_the_network_is_encoder_and_decoder(encoder):
    net = PoseNet(encoder=encoder, decoder=lambda **pyramid: make_decoder("effpose", encoder)).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(net(image).u, net.decoder(encoder(image)).u)


def test_a_negative_depth_is_refused(encoder):
    with pytest.raises(UserError, match=r"model\.decoder\.depth.*-1"):
        make_decoder("pyramid", encoder, depth=-1)
