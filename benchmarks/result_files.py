"""Files of results: JSON with the date and the machine on which they were measured."""

import contextlib
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from handpose.files import write_json
from handpose.resources import count_cores, measure_memory

_PACKAGES = ("ray", "torch", "pytorch-lightning", "optuna", "onnxruntime")


def describe_machine() -> dict[str, Any]:
    """Describe the processor, cores, memory and GPU, and the versions of Python and the main packages."""
    described = {
        "processor": _get_processor_name(),
        "cores": count_cores(),
        "memory_gb": round(measure_memory().total / 1e9),
        "python": platform.python_version(),
        "versions": _list_versions(),
    }
    return described | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def format_machine() -> str:
    """Describe the machine in a few words."""
    found = describe_machine()
    return f"{found['processor']}, {found['cores']} cores{', ' + found['gpu'] if 'gpu' in found else ''}"


def write_results(file: Path | None, content: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write results as JSON with the date and the machine. Without a file, do nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        head = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
        write_json(file, {**head, **content}, indent=indent)


def _get_processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [line for line in lines if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.processor()


def _list_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # Ray need not be installed on a machine with a GPU
            found[name] = version(name)
    return found
