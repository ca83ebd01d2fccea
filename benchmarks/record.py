"""How figures are kept: as JSON, with the day and the machine that they were measured on."""

import contextlib
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from handpose.resources import count_cores, main_memory
from handpose.whole_file import write_json

_PACKAGES = ("ray", "torch", "pytorch-lightning", "optuna")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU, and the versions of what does the work."""
    described = {
        "processor": _processor(),
        "cores": count_cores(),
        "memory_gb": round(main_memory().total / 1e9),
        "python": platform.python_version(),
        "versions": _versions(),
    }
    return described | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def machine_line() -> str:
    """The machine in a few words."""
    found = machine()
    return f"{found['processor']}, {found['cores']} cores{', ' + found['gpu'] if 'gpu' in found else ''}"


def write_results(file: Path | None, content: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write figures as JSON, with the day and the machine; nothing without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        head = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
        write_json(file, {**head, **content}, indent=indent)


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [line for line in lines if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a machine with a GPU may be lent without Ray
            found[name] = version(name)
    return found
