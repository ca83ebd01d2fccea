"""A trained network, built from a checkpoint and the configuration in it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from handpose.config import compose, instantiate_key, quote_override
from handpose.config_files import find_options
from handpose.errors import UserError
from handpose.evaluation.ensemble import Ensemble
from handpose.evaluation.views import Views
from handpose.files import read_json
from handpose.training.build import build_training
from handpose.training.calibration import Calibration
from handpose.training.checkpoints import list_architecture_overrides, load_weights, read_checkpoint
from handpose.training.module import HandPose
from handpose.yaml_files import load_yaml


class TrainedNetwork(NamedTuple):
    """A network with the weights of a checkpoint, or several that predict together, in eval mode on the CPU.

    Attributes:
        module: the network.
        views: the views of an image whose predictions are averaged.
        image_size: side in pixels of the images that it was trained on; None if they had the size of their files.
    """

    module: HandPose | Ensemble
    views: Views
    image_size: int | None

    @property
    def is_calibrated(self) -> bool:
        """Whether the expected errors have been calibrated on validation images, of all networks."""
        members = self.module.members if isinstance(self.module, Ensemble) else [self.module]
        return all(member.calibration != Calibration() for member in members)

    def choose_input_size(self, requested: int | None) -> int:
        """Return the side of the network's input images in pixels: the requested one, or else that of the training.

        Raises:
            UserError: neither is known, or the size is too small.
        """
        size = requested or self.image_size
        if size is None:
            raise UserError(
                "the network was trained on images in their original size (data.image_size=null); give this size, for "
                "example --image-size 224"
            )
        if size < 32:
            raise UserError(f"--image-size must be at least 32, but it is {size}")
        return size


def list_checkpoints(paths: Sequence[Path]) -> list[Path]:
    """List the checkpoints that a user names: files, or a folder `retrain/combined` of a sweep.

    Args:
        paths: what the user has given.

    Raises:
        UserError: a folder is not the combined result of a retraining.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        file = path / "metrics.json"
        content = read_json(file) if file.is_file() else None
        names = content.get("checkpoints") if isinstance(content, dict) else None
        if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"--checkpoint {path} is a folder without combined networks (retrain/combined of a sweep with "
                "retrain.seeds has them); give a checkpoint, such as best-...ckpt or last.ckpt"
            )
        found += [path / name for name in names]
    return list(dict.fromkeys(found))


def read_networks(paths: Sequence[Path], *, overrides: Sequence[str] = ()) -> TrainedNetwork:
    """Build the networks of checkpoints, whose predictions are averaged. Views and input size are those of the first.

    Args:
        paths: at least one checkpoint.
        overrides: overrides of their configurations.

    Raises:
        UserError: a file is not a checkpoint of this project, or the networks cannot predict the same images.
    """
    networks = [read_network(path, overrides=overrides) for path in paths]
    first = networks[0]
    for path, network in zip(paths, networks, strict=True):
        if network.image_size != first.image_size or type(network.module.axes) is not type(first.module.axes):
            raise UserError(
                f"{path} was trained on images of {network.image_size} px with {type(network.module.axes).__name__}, "
                f"but {paths[0]} on {first.image_size} px with {type(first.module.axes).__name__}: they cannot predict "
                "together"
            )
    if len(networks) == 1:
        return first
    return first._replace(module=Ensemble([network.module for network in networks]).eval())  # type: ignore[misc]


def read_network(path: Path, *, overrides: Sequence[str] = ()) -> TrainedNetwork:
    """Build the network of a checkpoint.

    Args:
        path: the checkpoint.
        overrides: overrides of its configuration.

    Raises:
        UserError: the file is not a checkpoint of this project.
    """
    checkpoint = read_checkpoint(path, key="--checkpoint")
    config = compose("train", [*list_network_overrides(checkpoint["config"]), *overrides])
    module, _ = build_training(config, pretrained=False, quiet=True)
    views = instantiate_key(config, "test_time")
    views.check_axes(module.axes)
    load_weights(module, checkpoint, path)
    return TrainedNetwork(module.eval(), views, checkpoint["config"]["data"]["image_size"])


def list_network_overrides(config: Mapping[str, Any]) -> list[str]:
    """List the overrides that give a checkpoint's network, read-out and test-time views.

    Args:
        config: the configuration in the checkpoint.
    """
    overrides = list_architecture_overrides(config) | {
        f"heatmap.{key}": value for key, value in _iterate_values(config["heatmap"])
    }
    overrides["augment.rotation_deg"] = config["augment"].get("rotation_deg", 0.0)  # not every augmentation has it
    return [quote_override(key, value) for key, value in overrides.items()]


def list_data_overrides(config: Mapping[str, Any]) -> list[str]:
    """List the overrides that give the data set a checkpoint was trained on.

    Args:
        config: the configuration in the checkpoint.
    """
    data = config["data"]
    source = {
        f"data.source.{key}": value for key, value in _iterate_values(data["source"]) if key not in _NOT_DATA_KEYS
    }
    overrides = {"data": _find_data_choice(data["source"]["_target_"])} | source
    overrides |= {f"data.{key}": data[key] for key in ("root", "image_size", "batch_size")}
    # Checkpoints of earlier versions have no folds.
    overrides |= {f"folds.{key}": value for key, value in config.get("folds", {}).items()}
    return [quote_override(key, value) for key, value in overrides.items()]


_NOT_DATA_KEYS = ("root", "image_size", "num_workers")  # the first two also belong to `data`


def _iterate_values(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in node.items() if not key.startswith("_"))


def _find_data_choice(target: str) -> str:
    """Find the option of the group `data` whose source has this `_target_`."""
    for name, path in find_options("data").items():
        if load_yaml(path)["source"]["_target_"] == target:
            return name
    raise UserError(
        f"the checkpoint was trained on data of {target}, which is not in configs/data; give data=..., or "
        "paths.extensions=FOLDER if it is in your own folder"
    )
