"""Averaging at test time: what turns with the hand comes back exactly, what turns with the picture averages out."""

import math

import pytest
import torch
from torch import nn

from handpose.data.sample import HandBatch
from handpose.evaluation.predict import Predictor
from handpose.geometry import project
from tests.builders import cameras, hands

SIZE = 32
NUM_HANDS = 4


@pytest.fixture
def batch() -> HandBatch:
    generator = torch.Generator().manual_seed(0)
    return HandBatch(
        image=torch.randint(0, 256, (NUM_HANDS, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        intrinsics=torch.from_numpy(cameras(NUM_HANDS, SIZE)).float(),
        xyz_m=torch.from_numpy(hands(NUM_HANDS)).float(),
        scale_m=torch.full((NUM_HANDS,), torch.nan),
        position=torch.tensor([7, 3, 5, 1]),
    )


class ReadsTheTruth(nn.Module):
    """Knows the joints of every view, whatever it shows, and adds an error of its own: equivariant without it."""

    def __init__(self, error_m=(0.0, 0.0, 0.0)):
        super().__init__()
        self.error_m = torch.tensor(error_m)
        self.views = []

    def predict_xyz_m(self, view, scale_m):
        self.views.append(view)
        return view.xyz_m + self.error_m


def predicted(module, batch, test_time, num_rotations):
    position, xyz_m = Predictor(module, test_time=test_time, num_rotations=num_rotations).predict_step(batch, 0)
    assert torch.equal(position, batch.position)
    return xyz_m


@pytest.mark.parametrize(
    ("test_time", "num_rotations", "passes"),
    [("none", 8, 1), ("rotations", 1, 1), ("rotations", 5, 5), ("rotations_mirror", 1, 2), ("rotations_mirror", 3, 6)],
)
def test_an_equivariant_network_predicts_the_same_in_the_mean_over_all_views(batch, test_time, num_rotations, passes):
    module = ReadsTheTruth()
    assert torch.allclose(predicted(module, batch, test_time, num_rotations), batch.xyz_m, atol=1e-6)
    assert len(module.views) == passes


def test_the_views_turn_evenly_over_the_full_circle(batch):
    centre = (SIZE - 1) / 2
    straight = batch.intrinsics.clone()
    straight[:, :2, 2] = centre
    module = ReadsTheTruth()
    predicted(module, batch._replace(intrinsics=straight), "rotations", 6)
    from_centre = torch.stack([project(view.xyz_m, view.intrinsics) - centre for view in module.views])
    turned = torch.view_as_complex(from_centre) / torch.view_as_complex(from_centre[:1])
    expected = torch.polar(torch.ones(6), 2 * math.pi * torch.arange(6) / 6)
    assert torch.allclose(turned, expected[:, None, None].expand_as(turned), atol=1e-3)


def test_every_view_shows_the_picture_turned(batch):
    """The pixel under a joint is the same in all views, up to the warp's blur: the joint turned with the picture."""
    smooth = torch.linspace(0, 255, SIZE).expand(NUM_HANDS, 3, SIZE, SIZE).to(torch.uint8)
    module = ReadsTheTruth()
    predicted(module, batch._replace(image=smooth), "rotations_mirror", 4)
    seen = [value_under(view, joint=9) for view in module.views]
    assert all(torch.allclose(value, seen[0], atol=0.05) for value in seen)


def value_under(view, *, joint):
    uv = project(view.xyz_m, view.intrinsics)[:, joint]
    grid = ((2 * uv + 1) / SIZE - 1).view(-1, 1, 1, 2)
    return nn.functional.grid_sample(view.image, grid, align_corners=False).flatten(1)


def test_an_error_that_stays_with_the_picture_averages_out(batch):
    straight = batch.intrinsics.clone()
    straight[:, :2, 2] = (SIZE - 1) / 2  # the views turn about the optical axis
    batch = batch._replace(intrinsics=straight)
    sideways = ReadsTheTruth((0.01, -0.02, 0.0))
    assert torch.allclose(predicted(sideways, batch, "rotations", 4), batch.xyz_m, atol=1e-6)
    to_one_side = ReadsTheTruth((0.01, 0.0, 0.0))
    assert torch.allclose(predicted(to_one_side, batch, "rotations_mirror", 1), batch.xyz_m, atol=1e-6)
    away = ReadsTheTruth((0.0, 0.0, 0.01))
    assert torch.allclose(predicted(away, batch, "rotations", 4) - batch.xyz_m, away.error_m, atol=1e-6)
