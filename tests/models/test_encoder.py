import pytest
import timm
import torch
from safetensors.torch import save_file

from handpose.errors import UserError
from handpose.models.encoder import Encoder

NAME = "mobilenetv3_small_050"


def make_encoder(name=NAME, *, pretrained=False, weights=None, normalize=True, drop_path=0.0):
    return Encoder(name=name, pretrained=pretrained, weights=weights, normalize=normalize, drop_path=drop_path)


def test_channels_and_reductions_are_those_of_the_maps():
    module = make_encoder().eval()
    maps = module(torch.rand(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == module.channels
    assert [64 // x.shape[2] for x in maps] == module.reductions


def test_pictures_are_normalised_as_the_weights_expect():
    module = make_encoder().eval()
    config = timm.get_pretrained_cfg(NAME)
    grey = torch.tensor(config.mean).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    plain = timm.create_model(NAME, features_only=True, pretrained=False).eval()
    plain.load_state_dict(module.pyramid.state_dict())
    assert torch.allclose(module(grey)[-1], plain(torch.zeros(1, 3, 64, 64))[-1], atol=1e-5)


@pytest.mark.parametrize("size", [72, 100])
def test_the_maps_of_a_picture_of_any_size_tile_it(size):
    """Sides that are no multiple of 32 are enlarged, so that a cell is the same fraction of the picture in each map."""
    module = make_encoder().eval()
    image = torch.rand(1, 3, size, size)
    enlarged = 32 * -(-size // 32)
    maps = module(image)
    assert [x.shape[-1] * reduction for x, reduction in zip(maps, module.reductions, strict=True)] == [enlarged] * 5
    resized = torch.nn.functional.interpolate(image, size=enlarged, mode="bilinear", align_corners=False)
    assert all(torch.equal(a, b) for a, b in zip(maps, module(resized), strict=True))


def test_the_original_does_not_normalise():
    module = make_encoder(normalize=False).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.allclose(module(image)[-1], module.pyramid(image)[-1])


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_come_from_a_file(tmp_path, ending):
    source = timm.create_model(NAME, pretrained=False)
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    module = make_encoder(weights=str(path))
    assert torch.equal(module.pyramid.conv_stem.weight, source.conv_stem.weight)


class Malice:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file ran code')",))


def test_a_file_of_weights_runs_no_code(tmp_path):
    torch.save({"conv_stem.weight": Malice()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth does not fit"):
        make_encoder(weights=str(tmp_path / "weights.pth"))


def test_a_missing_file_of_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.pth"):
        make_encoder(weights=str(tmp_path / "nowhere.pth"))


def test_the_nearest_model_is_named_for_a_wrong_name():
    with pytest.raises(UserError, match="efficientnet_b4"):
        make_encoder("eficientnet_b4")


def test_weights_that_cannot_be_fetched_are_a_sentence(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    with pytest.raises(UserError, match=r"cannot be fetched \(no route.*model\.encoder\.weights=FILE"):
        make_encoder(pretrained=True)


def test_a_model_without_stochastic_depth_is_refused_for_that_alone():
    make_encoder("repghostnet_050")
    with pytest.raises(UserError, match=r"model\.encoder\.drop_path=0\.1: repghostnet_050 .*drop_path=0\.0"):
        make_encoder("repghostnet_050", drop_path=0.1)


def test_a_tag_of_weights_that_a_timm_model_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(UserError, match=r"has no weights with the tag 'foo'; it has mobilenetv3_small_100.lamb_in1k"):
        Encoder(name="mobilenetv3_small_100.foo", pretrained=False, weights=None, normalize=True, drop_path=0.0)
