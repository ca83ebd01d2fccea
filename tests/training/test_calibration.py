"""Expected errors from the widths of heatmaps: recovered where they are known, and in the right unit."""

import numpy as np
import pytest
import torch

from handpose.evaluation.predict import CalibrationSample, calibrate
from handpose.geometry import project
from handpose.heatmaps import AxisLogits, CameraAxes, ImageAxes, compute_variances, draw_gaussian_heatmaps
from handpose.skeleton import ROOT
from handpose.training.calibration import Calibration, fit_calibration
from tests.builders import make_cameras, make_hands

BINS = 64


def make_image_axes():
    axes = ImageAxes(sigma=0.04, target="gaussian", read_out="soft_argmax")
    axes.fit(torch.from_numpy(make_hands(20)).float())
    return axes


def test_the_variance_of_a_gaussian_is_its_sigma_squared():
    heatmaps = draw_gaussian_heatmaps(torch.full((2, 21), 0.5, dtype=torch.float64), bins=BINS, sigma=0.05)
    found = compute_variances(AxisLogits(*(3 * [heatmaps.log()])))
    assert found.shape == (2, 21, 3)
    assert found.numpy() == pytest.approx(0.05**2, rel=1e-6)


def test_two_places_that_are_equally_likely_have_half_their_distance_squared():
    logits = torch.full((1, 1, BINS), -torch.inf)
    logits[..., 10] = logits[..., 42] = 0.0
    assert compute_variances(AxisLogits(logits, logits, logits)).numpy() == pytest.approx((16 / BINS) ** 2)


@pytest.mark.parametrize("kind", ["image", "camera"])
def test_a_small_step_along_an_axis_has_the_metres_that_decoding_gives(kind):
    if kind == "image":
        axes = make_image_axes().double()
    else:
        ranges = {"x_mm": [-200, 200], "y_mm": [-150, 150], "z_mm": [300, 1100]}
        axes = CameraAxes(sigma=0.04, target="gaussian", read_out="soft_argmax", **ranges).double()
    xyz_m, intrinsics = torch.from_numpy(make_hands(3)), torch.from_numpy(make_cameras(3, 64))
    scale_m, size = torch.full((3,), 0.03, dtype=torch.float64), (64, 64)
    coordinates = axes.encode(xyz_m, intrinsics, size)
    before = axes.decode(coordinates, intrinsics, size, scale_m)
    unit = axes.to_metres(torch.ones_like(coordinates), before, intrinsics, size, scale_m)
    for axis in range(3):
        step = torch.zeros_like(coordinates)
        step[:, 4, axis] = 1e-6  # of one joint, so that the depth of the root, which all give together, hardly changes
        moved = axes.decode(coordinates + step, intrinsics, size, scale_m) - before
        relative = moved[:, 4] - moved[:, ROOT]
        along = relative[:, axis] if axis < 2 else torch.linalg.vector_norm(relative, dim=-1)
        assert (along / 1e-6).numpy() == pytest.approx(unit[:, 4, axis].numpy(), rel=0.15)


def test_factors_and_the_narrowest_variance_are_recovered():
    rng = np.random.default_rng(0)
    narrowest, factors = np.array([1e-3, 2e-3, 5e-4]), np.array([0.5, 1.0, 2.0])
    excess = rng.gamma(2.0, 1e-3, (400, 21, 3))
    excess[rng.random(excess.shape) < 0.05] = 0.0
    errors = np.abs(rng.laplace(0.0, 1.0, excess.shape)) * factors * np.sqrt(excess)
    errors[rng.random(errors.shape) < 0.02] = np.nan  # outside the image
    found = fit_calibration(narrowest + excess, errors)
    assert found.narrowest == pytest.approx(narrowest, rel=0.05)
    assert found.factors == pytest.approx(factors, rel=0.05)


def test_the_mean_expected_error_is_that_of_the_sample():
    rng = np.random.default_rng(1)
    variances, metres = rng.gamma(2.0, 1e-3, (50, 21, 3)), rng.uniform(0.1, 0.4, (50, 21, 3))
    distance_m = rng.gamma(2.0, 0.005, (50, 21))
    sample = CalibrationSample(variances, rng.gamma(2.0, 0.01, (50, 21, 3)), metres, distance_m)
    expected = calibrate(sample).compute_errors(torch.from_numpy(variances)).numpy() * metres
    others = [joint for joint in range(21) if joint != ROOT]
    assert np.linalg.norm(expected, axis=-1)[:, others].mean() == pytest.approx(distance_m[:, others].mean())


def test_no_joint_is_certain_and_a_checkpoint_holds_plain_values():
    calibration = Calibration((1e-3, 1e-3, 1e-3), (1.0, 2.0, 3.0))
    assert (calibration.compute_errors(torch.full((1, 3), 1e-4)) > 0).all()
    assert Calibration.from_plain(calibration.to_plain()) == calibration


def test_the_module_predicts_its_joints_and_errors_in_metres(write_checkpoint):
    from handpose.data.augment import View
    from handpose.evaluation.trained_network import read_network

    module = read_network(write_checkpoint()).module
    view = View(torch.rand(2, 3, 64, 64), torch.from_numpy(make_cameras(2, 64)).float(), torch.zeros(2, 21, 3))
    scale_m = torch.full((2,), 0.03)
    with torch.no_grad():
        found = module.predict(view, scale_m)
        assert torch.equal(found.xyz_m, module.predict_xyz_m(view, scale_m))
        deviation = compute_variances(module(view)).sqrt()
        lengths = module.axes.to_metres(deviation, found.xyz_m, view.intrinsics, view.size, scale_m)
        assert torch.allclose(found.error_m, lengths.norm(dim=-1))
        module.calibration = module.calibration.scale(2.0)
        assert torch.allclose(module.predict(view, scale_m).error_m, 2 * found.error_m)
    assert project(found.xyz_m, view.intrinsics).shape == (2, 21, 2)


def test_images_that_do_not_suffice_leave_the_network_uncalibrated():
    variances = np.full((3, 21, 3), 1e-3)
    errors = np.full((3, 21, 3), 0.01)
    errors[..., 2] = np.nan  # no joint inside the image along an axis
    assert fit_calibration(variances, errors) == Calibration()
    sample = CalibrationSample(variances, errors, np.ones((3, 21, 3)), np.ones((3, 21)))
    assert calibrate(sample) == Calibration()
