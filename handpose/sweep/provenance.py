"""Where a result comes from: versions, revision, command line, data."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "timm", "pytorch-lightning", "torchmetrics", "ray", "optuna", "hydra-core", "numpy")


def provenance(*, data: str | None) -> dict[str, Any]:
    """What to write beside a result. data: fingerprint of the data set, where it is known."""
    return {
        "data_fingerprint": data,
        "git": git_state(),
        "versions": versions(),
        "command_line": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": os.getcwd(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Revision of this project, and whether its files were changed since; both None outside a repository."""
    revision = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return {"revision": revision, "dirty": None if revision is None or changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values. Atomic: a reader finds the whole file or none."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(part, path)
