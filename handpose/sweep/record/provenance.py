"""The provenance of a result: package versions, git revision, command line and data."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from handpose.config import PATH_KEYS, compose, quote_override, to_plain_values
from handpose.formats import ADDED_KEYS
from handpose.metrics.validation import get_direction
from handpose.search.space import flatten_config
from handpose.yaml_files import load_yaml

_REPOSITORY = Path(__file__).resolve().parents[3]
_PACKAGES = ("torch", "timm", "pytorch-lightning", "torchmetrics", "ray", "optuna", "hydra-core", "numpy")


def collect_provenance(*, data: str | None) -> dict[str, Any]:
    """Collect the provenance to be saved with a result.

    Args:
        data: fingerprint of the data set; None if it is unknown.

    Returns:
        A dictionary that can be written as YAML.
    """
    return {
        "data_fingerprint": data,
        "git": read_git_state(),
        "versions": collect_versions(),
        "command_line": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": os.getcwd(),
    }


def collect_versions() -> dict[str, str]:
    """Collect the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_git_state() -> dict[str, Any]:
    """Read the project's git revision and whether there are uncommitted changes; both are None outside a repository."""
    revision = _run_git("rev-parse", "HEAD")
    changes = _run_git("status", "--porcelain")
    return {"revision": revision, "dirty": None if revision is None or changes is None else bool(changes)}


PROCESS_MB = "process_mb"
"""Key of sweep.yaml: main memory of a worker in MB, measured by the preflight. It is not part of the provenance."""

_LOCATION_PREFIXES = ("budget.", "paths.", "data.source.root", "best", *PATH_KEYS)


_ADDED_KEYS_OF_TRAINING = {key: value for key, value in ADDED_KEYS.items() if not key.startswith("sweep.")}


def select_configuration(config: DictConfig) -> dict[str, Any]:
    """Select everything that a training depends on: the composed configuration without locations.

    Returns:
        Dotted key -> value.
    """
    return {
        key: value
        for key, value in flatten_config(to_plain_values(config)).items()
        if not key.startswith(_LOCATION_PREFIXES)
    }


def fill_in_modes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each mode that is null by the direction of its metric.

    Earlier versions always wrote a mode. This makes their files comparable with those of this version.

    Args:
        values: dotted key -> value.

    Returns:
        A copy of `values` with the modes filled in.
    """
    modes = {f"{group}.mode": get_direction(values.get(f"{group}.metric", "")) for group in ("sweep", "checkpoints")}
    return {**values, **{key: mode for key, mode in modes.items() if values.get(key) is None}}


def describe_differences(best: Path, *, data: str | None) -> Iterator[str]:
    """Describe what has changed since a best.yaml was written. What the file does not contain is not compared.

    Args:
        best: the best.yaml.
        data: fingerprint of the current data set; None if it is unknown.

    Yields:
        One sentence for each difference.

    Raises:
        UserError: the configuration of the file cannot be composed.
    """
    then = load_yaml(best)
    if "configuration" in then:
        now = select_configuration(compose("train", [quote_override("best", str(best))]))
        before = fill_in_modes({**_ADDED_KEYS_OF_TRAINING, **then["configuration"]})
        yield from _describe_changes(before, fill_in_modes(now), "{name} is {now}, and was {then}: configs/ differ")
    yield from _describe_changes(then.get("versions", {}), collect_versions(), "{name} is {now}, and was {then}")
    yield from _describe_revision_changes(then.get("git") or {}, read_git_state())
    if data is not None and then.get("data_fingerprint") not in (None, data):
        yield f"the data have the fingerprint {data}, and had {then['data_fingerprint']}: other data or splits"


def _describe_changes(then: Mapping[str, Any], now: Mapping[str, Any], sentence: str) -> Iterator[str]:
    """Yield a sentence for each name whose value has changed. A missing name has the value null."""
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            before, after = ("null" if each.get(name) is None else each[name] for each in (then, now))
            yield sentence.format(name=name, now=after, then=before)


def _describe_revision_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if then.get("revision") != now["revision"] and then.get("revision") is not None:
        yield f"the project's revision is {now['revision'] or 'unknown'}, and was {then['revision']}"
    if then.get("dirty"):
        yield "the project had changes that were not committed"
    if now["dirty"]:
        yield "the project has changes here that are not committed"


def _run_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
