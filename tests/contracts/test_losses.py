"""What every loss in configs/loss keeps to: finite terms and gradients, also for hands outside the picture."""

import pytest
import torch

from handpose.heatmaps import AxisLogits
from tests.test_losses import make_hands_and_axes, make_logits


def uniform_logits():
    return AxisLogits(*(torch.zeros(8, 21, 24, requires_grad=True) for _ in range(3)))


@pytest.mark.parametrize("kind", ["image", "camera"])
@pytest.mark.parametrize("shift_m", [(0.12, 0.0, 0.0), (0.0, -0.15, 0.0), (5.0, 5.0, 5.0), (0.0, 0.0, -0.6)])
def test_hands_partly_or_wholly_outside_the_picture_give_finite_losses_and_gradients(loss, kind, shift_m):
    axes, truth = make_hands_and_axes(kind, shift_m=shift_m)  # the last has its joints in the camera's plane
    logits = uniform_logits()
    terms = loss.make()(logits, truth, axes)
    sum(terms.values()).backward()
    assert all(term.shape == () and 0.0 <= float(term.detach()) < 1e6 for term in terms.values())
    assert all(axis.grad.isfinite().all() and axis.grad.abs().max() < 1e6 for axis in logits)


def test_a_coordinate_outside_the_picture_has_no_gradient_and_the_others_have_theirs(loss):
    axes, truth = make_hands_and_axes("image", shift_m=(0.12, 0.0, 0.0))
    outside = truth.coordinates[..., 0] > 1.0
    assert 0.1 < outside.float().mean() < 0.9
    logits = uniform_logits()
    sum(loss.make()(logits, truth, axes).values()).backward()
    assert logits.u.grad[outside].abs().max() == 0.0
    assert (logits.u.grad[~outside].abs().amax(-1) > 0.0).all()


def test_the_truth_has_a_smaller_loss_than_a_guess(loss):
    axes, truth = make_hands_and_axes("image")
    terms = [loss.make()(logits, truth, axes) for logits in (make_logits(truth.coordinates), uniform_logits())]
    best, guess = (float(sum(each.values()).detach()) for each in terms)
    assert best < 0.2 * guess
