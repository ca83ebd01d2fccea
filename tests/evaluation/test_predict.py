import numpy as np
import pytest
import torch
from torch import nn

from handpose.data.sample import HandBatch
from handpose.evaluation.predict import PredictionModule, compute_errors
from handpose.evaluation.trained_network import read_network
from handpose.evaluation.views import Views
from tests.builders import as_prediction, make_cameras, make_hands

SIZE = 32


class ReadsTheTruth(nn.Module):
    def predict(self, view, scale_m):
        assert view.image.dtype == torch.float32
        assert view.image.max() <= 1
        return as_prediction(view.xyz_m, 0.002)


def test_a_prediction_stands_beside_its_place_in_the_split():
    fields = {
        "image": torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8),
        "intrinsics": torch.from_numpy(make_cameras(4, SIZE)).float(),
        "xyz_m": torch.from_numpy(make_hands(4)).float(),
        "scale_m": torch.full((4,), torch.nan),
        "position": torch.tensor([7, 3, 5, 1]),
        "mask": torch.empty(4, 0, SIZE, SIZE, dtype=torch.uint8),
        "has_depth": torch.ones(4, dtype=torch.bool),
    }
    batch = HandBatch(*(fields[name] for name in HandBatch._fields))
    views = Views(num_rotations=3, rotation_deg=90.0, mirror=True, scales=[1.0], crop=None)
    position, xyz_m, error_m = PredictionModule(ReadsTheTruth(), views=views).predict_step(batch, 0)
    assert torch.equal(position, batch.position)
    assert torch.allclose(xyz_m, batch.xyz_m, atol=1e-6)
    assert torch.allclose(error_m, torch.tensor(0.002), atol=1e-5)  # all views agree


def test_errors_are_in_their_units():
    target = make_hands(5)
    moved = target + np.array([0.0, 0.0, 0.01])
    errors = compute_errors(moved, target, make_cameras(5))
    assert errors["pa_mpjpe_mm"] == pytest.approx(0, abs=1e-6)
    assert errors["rr_mpjpe_mm"] == pytest.approx(0, abs=1e-6)
    assert errors["pck_auc"] == pytest.approx(1, abs=0.006)  # rounding leaves an error above 0
    assert 0 < errors["keypoint_error_px"] < 1


def test_a_network_of_one_size_is_read_with_the_size_that_it_was_trained_on(write_checkpoint):
    network = read_network(write_checkpoint("model.encoder.name=test_vit"))
    assert network.module.net.encoder.layout.fixed_size == 64
    assert all(axis.isfinite().all() for axis in network.module.net(torch.rand(1, 3, 96, 96)))
