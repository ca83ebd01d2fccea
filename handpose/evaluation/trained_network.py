"""A trained network from its checkpoint alone, and the configuration that it was trained with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from handpose.config import compose, instantiate_key, quote_override
from handpose.config_files import find_options
from handpose.errors import UserError
from handpose.evaluation.views import Views
from handpose.training.build import build_training
from handpose.training.checkpoints import list_architecture_overrides, load_weights, read_checkpoint
from handpose.training.module import HandPose
from handpose.yaml_files import load_yaml


class TrainedNetwork(NamedTuple):
    """A network with a checkpoint's weights, in eval mode on the CPU.

    views: those of a picture that a prediction is the mean of. image_size: side in pixels of the pictures it was
    trained on; None where they had the size of their files.
    """

    module: HandPose
    views: Views
    image_size: int | None

    def choose_input_size(self, requested: int | None) -> int:
        """Side in pixels of the pictures to show it; raises UserError where neither it nor `requested` says."""
        size = requested or self.image_size
        if size is None:
            raise UserError(
                "the network was trained on images in their original size (data.image_size=null); give this size, for "
                "example --image-size 224"
            )
        if size < 32:
            raise UserError(f"--image-size must be at least 32, but it is {size}")
        return size


def read_network(path: Path, *, overrides: Sequence[str] = ()) -> TrainedNetwork:
    """Build the network that a checkpoint holds; overrides: of its configuration, on top.

    Raises UserError when the file is no checkpoint of ours.
    """
    checkpoint = read_checkpoint(path, key="--checkpoint")
    config = compose("train", [*list_network_overrides(checkpoint["config"]), *overrides])
    module, _ = build_training(config, pretrained=False, quiet=True)
    views = instantiate_key(config, "test_time")
    views.check_axes(module.axes)
    load_weights(module, checkpoint, path)
    return TrainedNetwork(module.eval(), views, checkpoint["config"]["data"]["image_size"])


def list_network_overrides(config: Mapping[str, Any]) -> list[str]:
    """Of a checkpoint's configuration the overrides that give its network, its read-out and its views at test time."""
    every = list_architecture_overrides(config) | {
        f"heatmap.{key}": value for key, value in _iterate_values(config["heatmap"])
    }
    every["augment.rotation_deg"] = config["augment"].get("rotation_deg", 0.0)  # not every augmentation has it
    return [quote_override(key, value) for key, value in every.items()]


def list_data_overrides(config: Mapping[str, Any]) -> list[str]:
    """Of a checkpoint's configuration the overrides that give the data set it was trained on."""
    data = config["data"]
    source = {
        f"data.source.{key}": value for key, value in _iterate_values(data["source"]) if key not in _NOT_DATA_KEYS
    }
    every = {"data": _find_data_choice(data["source"]["_target_"])} | source
    every |= {f"data.{key}": data[key] for key in ("root", "image_size", "batch_size")}
    return [quote_override(key, value) for key, value in every.items()]


_NOT_DATA_KEYS = ("root", "image_size", "num_workers")  # the first two are those of data


def _iterate_values(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in node.items() if not key.startswith("_"))


def _find_data_choice(target: str) -> str:
    """The choice of the group `data` whose source is made by a target."""
    for name, path in find_options("data").items():
        if load_yaml(path)["source"]["_target_"] == target:
            return name
    raise UserError(
        f"the checkpoint was trained on data of {target}, which is not in configs/data; give data=..., or "
        "paths.extensions=FOLDER if it is in your own folder"
    )
