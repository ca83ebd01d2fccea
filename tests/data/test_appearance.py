import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from handpose.data import appearance
from handpose.data.appearance import Patches
from handpose.data.random_draws import RandomDraws
from handpose.errors import UserError


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_draws(count):
    return RandomDraws(make_generator(), count)


def make_pictures(count=4, size=48):
    return torch.rand(count, 3, size, size, generator=make_generator(9))


def test_a_blur_is_scipys_gaussian_of_some_width():
    image = make_pictures(1)
    blurred = image.clone()
    appearance.blur(blurred, torch.tensor([0]), make_draws(1))
    errors = [
        np.abs(
            ndimage.gaussian_filter(image[0].numpy(), (0, sigma, sigma), mode="nearest", radius=2) - blurred[0].numpy()
        )
        for sigma in np.linspace(0.003, 0.012, 400) * 48
    ]
    assert min(error.max() for error in errors) < 2e-3
    assert (image - blurred).abs().max() > 0.02


def test_only_the_chosen_pictures_are_blurred():
    image = make_pictures()
    before = image.clone()
    appearance.blur(image, torch.tensor([1, 3]), make_draws(2))
    changed = (image != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, True]


def test_noise_has_at_most_its_deviation_and_is_another_in_each_picture():
    image = torch.full((64, 3, 48, 48), 0.5)
    appearance.add_noise(image, 10.0, make_draws(64))
    deviations = 255 * (image - 0.5).std(dim=(1, 2, 3))
    assert deviations.max() < 10.5
    assert deviations.max() > 8.0
    assert deviations.min() < 2.0
    assert not torch.equal(image[0] > 0.5, image[1] > 0.5)


def test_patches_lie_on_joints_and_keep_to_their_size():
    uv = torch.stack(
        [torch.rand(200, 21, generator=make_generator(1)) * 30 + 10, torch.rand(200, 21) * 20 + 20], dim=-1
    )
    patches = Patches.draw(uv, (64, 64), (0.2, 0.6), make_draws(200))
    hand = (uv.amax(1) - uv.amin(1)).amax(-1, keepdim=True)
    share = 2 * patches.half / hand
    assert (share >= 0.2 - 1e-6).all()
    assert (share <= 0.6 + 1e-6).all()
    assert ((uv - patches.center[:, None]).norm(dim=-1).amin(dim=1) < 1e-6).all()


def test_a_patch_covers_the_area_of_its_shape():
    """An ellipse pi a b, a rectangle 4 a b, whatever its angle."""
    angle = torch.linspace(0, 3, 8)
    center, half = torch.full((8, 2), 32.0), torch.tensor([[12.0, 7.0]]).expand(8, 2)
    is_ellipse = torch.arange(8) < 4
    cover = Patches(center, half, angle, is_ellipse, torch.zeros(8, 3, 64, 64)).cover((64, 64))
    area = cover.sum(dim=(1, 2, 3))
    assert torch.allclose(area[:4], torch.tensor(np.pi * 84.0), rtol=0.06)
    assert torch.allclose(area[4:], torch.tensor(4 * 84.0), rtol=0.06)


def test_a_joint_without_an_image_gives_no_patch_that_is_no_number():
    uv = torch.full((3, 21, 2), torch.nan)
    uv[1] = torch.inf
    uv[2, :10] = 5.0
    image = make_pictures(3)
    appearance.draw_patches(Patches.draw(uv, (48, 48), (0.2, 0.6), make_draws(3)), image, torch.arange(3))
    assert image.isfinite().all()


def test_drawn_backgrounds_are_smooth_colours_and_no_two_alike():
    drawn = appearance.draw_backgrounds((48, 48), make_draws(16), torch.device("cpu"))
    assert drawn.shape == (16, 3, 48, 48)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    steps = (drawn[..., 1:] - drawn[..., :-1]).abs().mean(dim=(1, 2, 3))
    assert steps.max() < 0.1
    assert len({round(float(mean), 4) for mean in drawn.mean(dim=(1, 2, 3))}) == 16


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (300, 200), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("L", (40, 60), 255).save(tmp_path / "inner/grey.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_backgrounds_are_parts_of_the_pictures_of_a_folder(folder):
    device = torch.device("cpu")
    seen = appearance.crop_backgrounds(str(folder), (32, 32), make_draws(40), device)
    colors = {tuple(color) for color in seen.mean(dim=(2, 3)).round(decimals=2).tolist()}
    assert colors == {(1.0, 0.0, 0.0), (1.0, 1.0, 1.0)}
    assert appearance.read_backgrounds(str(folder)).shape == (2, 3, 256, 256)


def test_a_part_of_a_picture_is_as_it_is_or_mirrored(tmp_path):
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    seen = appearance.crop_backgrounds(str(tmp_path), (32, 32), make_draws(30), torch.device("cpu"))
    slopes = (seen[:, 0, 16, 1:] - seen[:, 0, 16, :-1]).mean(dim=-1) * 255 / 8  # 1 for the whole picture
    assert slopes.abs().max() <= 1.01
    assert slopes.abs().min() >= 0.39
    assert 5 < int((slopes < 0).sum()) < 25


def test_a_folder_without_pictures_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"augment\.background_folder=.* has no pictures .*or null for drawn"):
        appearance.read_backgrounds(str(tmp_path))


def test_a_broken_picture_is_named(folder):
    (folder / "half.png").write_bytes((folder / "red.png").read_bytes()[:20])
    with pytest.raises(UserError, match=r"half\.png cannot be read as a picture; remove it"):
        appearance.read_backgrounds(f"{folder}/.")
