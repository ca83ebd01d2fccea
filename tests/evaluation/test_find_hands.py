"""Joints found in photographs come back into the photographs' own cameras exactly."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from handpose.evaluation.find_hands import find_hands
from handpose.evaluation.photographs import Camera, Photograph
from handpose.evaluation.trained_network import TrainedNetwork
from handpose.evaluation.views import Views
from handpose.geometry import project
from tests.builders import as_prediction, make_hands

SIDE = 48
ONE_PASS = Views(num_rotations=1, rotation_deg=0.0, mirror=False, scales=[1.0], crop=None)
SIZES = [(300, 200), (90, 160), (48, 48)]
MOVED = torch.tensor([[0.05, 0.02, 0.0], [-0.03, 0.06, 0.1], [0.0, 0.0, 0.05]])[:, None]


class KnowsTheTruth(nn.Module):
    """Gives the joints that it knows, in the frame of the camera it is shown a picture of."""

    device = torch.device("cpu")

    def __init__(self, truth_m):
        super().__init__()
        self.truth_m, self.shown = truth_m, []

    def predict(self, view, scale_m):
        """The truth in the frame of the camera: the photograph's own first, then one that looks at the hand."""
        self.shown.append(view)
        rotations = [compute_rotation_to(xyz_m) if len(self.shown) > 1 else torch.eye(3) for xyz_m in self.truth_m]
        turned = [xyz_m.float() @ turn.T for xyz_m, turn in zip(self.truth_m, rotations, strict=True)]
        return as_prediction(torch.stack(turned), 0.004)


def compute_rotation_to(xyz_m):
    """The rotation without roll that takes the middle of the joints' box of rays to the optical axis."""
    rays = xyz_m / xyz_m[:, 2:]
    middle = (rays.amin(0) + rays.amax(0)) / 2
    ray, axis = (middle / middle.norm()).numpy(), np.array([0.0, 0.0, 1.0])
    cross, cosine = np.cross(ray, axis), float(ray @ axis)
    skew = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    return torch.from_numpy(np.eye(3) + skew + skew @ skew / (1 + cosine)).float()


def make_photographs(truth_m, tmp_path):
    """Dark pictures with a bright square over joint 9, and cameras in whose middle the hands are not."""
    made = []
    for (width, height), xyz_m in zip(SIZES, truth_m, strict=True):
        focal = 1.3 * max(width, height)
        camera = np.array([[focal, 0, 0.55 * width], [0, focal, 0.45 * height], [0, 0, 1.0]])
        u, v = project(xyz_m, torch.from_numpy(camera))[9].round().int().tolist()
        pixels = np.full((height, width, 3), 20, np.uint8)
        reach = max(width, height) // 40 + 1
        pixels[max(v - reach, 0) : v + reach + 1, max(u - reach, 0) : u + reach + 1] = 255
        made.append(Photograph(tmp_path / "x.png", Image.fromarray(pixels), Camera(camera, "given")))
    return made


@pytest.mark.parametrize(("fill", "passes"), [(None, 1), (0.6, 2)])
def test_joints_come_back_into_the_photographs_camera(tmp_path, fill, passes):
    truth_m = torch.from_numpy(make_hands(3)) + MOVED
    photographs = make_photographs(truth_m, tmp_path)
    module = KnowsTheTruth(truth_m)
    network = TrainedNetwork(module, ONE_PASS, SIDE)
    found_m, error_m = find_hands(network, photographs, side=SIDE, scale_m=0.03, fill=fill, mirror=False)
    assert error_m == pytest.approx(0.004)
    assert len(module.shown) == passes
    assert np.abs(found_m - truth_m.numpy()).max() < 1e-6  # float32 in the network
    for view in module.shown:
        assert view.image.shape == (3, 3, SIDE, SIDE)


@pytest.mark.parametrize("fill", [None, 0.6])
def test_what_is_shown_is_what_the_cameras_see(tmp_path, fill):
    """The bright square over a joint is where the intrinsics of the view project that joint."""
    truth_m = torch.from_numpy(make_hands(3)) + MOVED
    photographs = make_photographs(truth_m, tmp_path)
    module = KnowsTheTruth(truth_m)
    find_hands(TrainedNetwork(module, ONE_PASS, SIDE), photographs, side=SIDE, scale_m=0.03, fill=fill, mirror=False)
    view = module.shown[-1]
    for image, camera, xyz_m in zip(view.image, view.intrinsics, truth_m, strict=True):
        rotation = compute_rotation_to(xyz_m) if fill else torch.eye(3)
        expected = project(xyz_m.float() @ rotation.T, camera)[9]
        v, u = torch.nonzero(image[0] > 0.6).float().mean(0)
        assert torch.allclose(torch.stack([u, v]), expected, atol=1.0)


def test_a_known_size_reaches_the_network(tmp_path):
    truth_m = torch.from_numpy(make_hands(3))
    module = KnowsTheTruth(truth_m)
    scales = []
    module.predict = lambda view, scale_m: scales.append(scale_m) or as_prediction(truth_m.float())
    photographs = make_photographs(truth_m, tmp_path)
    network = TrainedNetwork(module, ONE_PASS, SIDE)
    find_hands(network, photographs, side=SIDE, scale_m=0.03, fill=None, mirror=False)
    assert scales[0].tolist() == pytest.approx([0.03] * 3)


class FollowsTheSquare(nn.Module):
    """Puts one and the same hand, whose sides differ, behind the bright square that it is shown."""

    device = torch.device("cpu")

    def predict(self, view, scale_m):
        rays = []
        for image, camera in zip(view.image, view.intrinsics, strict=True):
            v, u = torch.nonzero(image[0] > 0.6).float().mean(0)
            rays.append(torch.linalg.inv(camera) @ torch.stack([u, v, torch.ones(())]))
        hand = torch.from_numpy(make_hands(1)[0]).float()
        return as_prediction(0.5 * torch.stack(rays)[:, None] + hand - hand[9])


@pytest.mark.parametrize("fill", [None, 0.6])
def test_a_left_hand_is_found_in_the_mirror_as_the_right_hand_that_it_shows(tmp_path, fill):
    photographs = make_photographs(torch.from_numpy(make_hands(3)) + MOVED, tmp_path)
    in_mirror = []
    for item in photographs:
        camera = item.camera.intrinsics.copy()
        camera[0, 2] = item.picture.width - 1 - camera[0, 2]
        flipped = item.picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        in_mirror.append(Photograph(item.path, flipped, Camera(camera, "given")))
    network = TrainedNetwork(FollowsTheSquare(), ONE_PASS, SIDE)
    given = {"side": SIDE, "scale_m": 0.03, "fill": fill}
    straight_m = find_hands(network, photographs, **given, mirror=False).xyz_m
    found_m = find_hands(network, in_mirror, **given, mirror=True).xyz_m
    assert np.abs(found_m * [-1, 1, 1] - straight_m).max() < 2e-3  # a pixel more or less of the square
    as_right_m = find_hands(network, in_mirror, **given, mirror=False).xyz_m
    assert np.abs(as_right_m * [-1, 1, 1] - straight_m).max() > 0.02


def test_joints_of_the_frame_before_replace_the_first_pass(tmp_path):
    truth_m = torch.from_numpy(make_hands(3)) + MOVED
    photographs, network = make_photographs(truth_m, tmp_path), KnowsTheTruth(truth_m)
    network.shown.append(None)  # so that it knows that it is shown crops
    pairs = zip(truth_m, photographs, strict=True)
    near = np.stack([project(xyz_m, torch.from_numpy(each.camera.intrinsics)).numpy() for xyz_m, each in pairs])
    settings = {"side": SIDE, "scale_m": 0.03, "fill": 0.6, "mirror": False}
    found = find_hands(TrainedNetwork(network, ONE_PASS, SIDE), photographs, near=near, **settings)
    assert found.xyz_m == pytest.approx(truth_m.numpy(), abs=1e-5)
    assert len(network.shown) == 2
