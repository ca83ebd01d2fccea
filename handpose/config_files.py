"""Locations of configuration files: configs/, and configs/ in the folder of the user that `paths.extensions` names.

That folder also has the user's Python modules, so that a `_target_` can name a class that is not in this package.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"

_extensions: Path | None = None


def use_extensions(folder: Path) -> None:
    """Find modules and configuration files in a folder of the user as well, in this process from now on.

    Args:
        folder: absolute path of the folder. It replaces the folder of an earlier call.
    """
    global _extensions
    _extensions = folder
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that no module of the user hides one of a library


def extension_configs() -> Path | None:
    """Return configs/ of the user's folder; None if there is none."""
    return _extensions / "configs" if _extensions is not None and (_extensions / "configs").is_dir() else None


def config_folders() -> list[Path]:
    """Return the folders with configuration files. As in Hydra, a file in an earlier folder hides its namesakes."""
    extension = extension_configs()
    return [CONFIGS] if extension is None else [CONFIGS, extension]


def find_options(group: str) -> dict[str, Path]:
    """Find the options of a configuration group.

    Args:
        group: the group, such as `model/decoder`.

    Returns:
        Name of the option -> its file, in alphabetical order.
    """
    files = {path.stem: path for folder in reversed(config_folders()) for path in (folder / group).glob("*.yaml")}
    return dict(sorted(files.items()))
