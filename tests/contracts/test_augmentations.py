"""What every augmentation in configs/augment keeps to."""

import pytest
import torch

from handpose.data.random_draws import BatchShare
from handpose.data.sample import HandBatch
from tests.data.test_augment import SIZE, hand_batch

SEED = 3


@pytest.fixture
def batch():
    return hand_batch()


def generator():
    return torch.Generator().manual_seed(SEED)


def part(batch, rank, num):
    rows = slice(rank * len(batch.image) // num, (rank + 1) * len(batch.image) // num)
    return HandBatch(*(field[rows] for field in batch))


def test_a_view_has_pictures_between_0_and_1_and_finite_labels(augmentation, batch):
    view = augmentation.make()(batch, generator())
    assert view.image.shape == (len(batch.image), 3, *SIZE)
    assert view.image.dtype == torch.float32
    assert view.image.isfinite().all()
    assert view.image.min() >= 0.0
    assert view.image.max() <= 1.0
    assert (view.intrinsics.shape, view.xyz_m.shape) == (batch.intrinsics.shape, batch.xyz_m.shape)
    assert view.intrinsics.isfinite().all()
    assert view.xyz_m.isfinite().all()


def test_the_same_generator_draws_the_same_view(augmentation, batch):
    first, again = (augmentation.make()(batch, generator()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("num", [2, 4])
def test_processes_that_share_a_batch_see_the_views_of_the_whole(augmentation, batch, num):
    made = augmentation.make()
    whole = made(batch, generator())
    shares = [made(part(batch, rank, num), generator(), BatchShare(rank, num)) for rank in range(num)]
    for field, of_whole in enumerate(whole):
        assert torch.allclose(torch.cat([view[field] for view in shares]), of_whole, atol=1e-6)


def test_the_batch_is_left_as_it_was(augmentation, batch):
    before = [field.clone() for field in batch]
    augmentation.make()(batch, generator())
    assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))


def test_the_hand_keeps_its_shape(augmentation, batch):
    """A camera that turns moves the joints rigidly; a mirror, too, keeps their distances."""
    view = augmentation.make()(batch, generator())
    assert torch.allclose(torch.cdist(view.xyz_m, view.xyz_m), torch.cdist(batch.xyz_m, batch.xyz_m), atol=1e-4)


def test_an_augmentation_with_another_camera_says_so(augmentation, batch):
    made = augmentation.make()
    focal_px = made(batch, generator()).intrinsics[:, [0, 1], [0, 1]]
    assert made.camera_options or torch.allclose(focal_px, batch.intrinsics[:, [0, 1], [0, 1]], rtol=1e-4)
