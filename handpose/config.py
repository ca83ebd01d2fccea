"""Compose a checked configuration from Hydra overrides, in the programs and in the workers of a sweep.

`compose` checks that all keys exist and that the values have the types of the constructors they are passed to. It makes
paths absolute. A mistake raises UserError with one sentence that names the key and the remedy.
"""

import difflib
import os
import pkgutil
import re
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from handpose.config_files import config_folders, extension_configs, find_options, use_extensions
from handpose.errors import UserError, explain_file_error, join_lines
from handpose.files import expand_home, write_atomically
from handpose.formats import rename_key
from handpose.schema import check_config, explain_unknown_key, list_parameters
from handpose.utf8 import is_utf8, read_utf8
from handpose.yaml_files import load_yaml

ConfigName = Literal["train", "tune"]

# ValueError: raised by Hydra 1.3 for a group that is set to null.
_HYDRA_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

PATH_KEYS = (
    "paths.data",
    "paths.output",
    "paths.packed",
    "paths.extensions",
    "paths.logs",
    "paths.checkpoints",
    "paths.predictions",
    "data.root",
    "model.checkpoint_path",
    "model.weights",
    "model.encoder.weights",
    "augment.background_folder",
)
"""Keys whose values are paths. They are made absolute, and differ between machines."""

SWEEP_GROUPS = (
    "budget",
    "sweep",
    "retrain",
    "report",
    "notify",
    "scheduler",
    "searcher",
    "ray",
    "search_space",
    "hydra",
)
"""Groups and keys that tune.py has and train.py does not, and `hydra`."""

_REQUIRED_GROUPS = (
    "data",
    "model",
    "heatmap",
    "loss",
    "augment",
    "optimizer",
    "lr_schedule",
    "test_time",
    "trainer",
    "checkpoints",
    "pictures",
    "logger",
)
"""Groups that every configuration must have."""


def compose(config_name: ConfigName, overrides: Sequence[str]) -> DictConfig:
    """Compose and check a configuration.

    It works in a script, inside @hydra.main, in a worker, and in a test.

    Args:
        config_name: the program.
        overrides: overrides as on the command line. `best=FILE` inserts the overrides of that file before the others.

    Raises:
        UserError: a mistake in the overrides or in a file that they name.
    """
    given = [quote_non_ascii(rename_key(item)) for item in overrides]
    for item in given:
        _check_is_utf8(override_key(item), item.partition("=")[2])
    path = _find_best_path(given)
    all_overrides = insert_best_overrides(given)
    use_given_extensions(all_overrides)
    try:
        return _compose_and_check(config_name, all_overrides)
    except UserError as error:
        if path is None or _can_compose(config_name, _read_best_overrides(path)):
            raise
        raise UserError(f"best={path} does not fit this version of the project: {error}") from error


def use_given_extensions(overrides: Sequence[str]) -> None:
    """Find modules and configuration files in the folder that the override `paths.extensions` names, if any.

    `compose` calls this itself.

    Raises:
        UserError: the folder does not exist.
    """
    keys = ("paths.extensions", "paths.base")
    values = {override_key(item): parse_override_value(item) for item in overrides if override_key(item) in keys}
    given = values.get("paths.extensions")
    if given in (None, ""):
        return
    folder = Path(str(values.get("paths.base") or os.getcwd())) / expand_home(str(given))
    if not folder.is_dir():
        raise UserError(
            f"paths.extensions={given}: the folder {folder} does not exist; it must hold your modules and their "
            "YAML files in configs/ (docs/extending.md)"
        )
    use_extensions(folder)


def _can_compose(config_name: ConfigName, overrides: list[str]) -> bool:
    try:
        _compose_and_check(config_name, overrides)
    except UserError:
        return False
    return True


def _compose_and_check(config_name: ConfigName, overrides: list[str]) -> DictConfig:
    for folder in config_folders():
        _check_package_directives(folder)
    try:
        config = _compose_with_hydra(config_name, overrides)
    except yaml.YAMLError as error:
        raise _make_yaml_error(error) from error
    except UnicodeDecodeError as error:  # it does not name the file
        for folder in config_folders():
            for path in folder.rglob("*.yaml"):
                read_utf8(path)
        raise UserError(join_lines(error)) from error
    except _HYDRA_ERRORS as error:
        raise UserError(_explain_compose_error(config_name, overrides, error)) from error
    _check_added_keys(config_name, config, overrides)
    try:
        _check_required_groups(config)
        _make_paths_absolute(config)
        check_config(to_plain_values(config))
    except OmegaConfBaseException as error:  # an interpolation that cannot be resolved
        raise UserError(join_lines(error)) from error
    return config


def _compose_with_hydra(config_name: ConfigName, overrides: list[str]) -> DictConfig:
    overrides = [*overrides, *search_path_override()]
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, overrides)
    with hydra.initialize_config_dir(str(config_folders()[0]), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def search_path_override() -> list[str]:
    """Return the override that lets Hydra find options in the user's folder; an empty list if there is no folder."""
    folder = extension_configs()
    return [] if folder is None else [quote_override("hydra.searchpath", [f"file://{folder}"])]


def _find_best_path(overrides: list[str]) -> str | None:
    given = [item for item in overrides if override_key(item) == "best"]
    path = parse_override_value(given[-1]) if given else None
    return None if path in (None, "") else str(path)


def insert_best_overrides(overrides: list[str]) -> list[str]:
    """Insert the overrides of the file in best=FILE, if it is given, before the others.

    An override of the file that selects an option of a group is left out if the others select one too.

    Raises:
        UserError: the file cannot be read.
    """
    path = _find_best_path(overrides)
    if path is None:
        return overrides
    groups = {override_key(item) for item in overrides if is_group(override_key(item))}
    return [item for item in _read_best_overrides(path) if override_key(item) not in groups] + overrides


def _read_best_overrides(path: str) -> list[str]:
    """Read the overrides in a sweep's best.yaml."""
    try:
        overrides = load_yaml(expand_home(path))["overrides"]
        if not isinstance(overrides, list):
            raise TypeError("overrides must be a list")
    except FileNotFoundError as error:
        hint = "a finished sweep writes sweeps/NAME/best.yaml"
        raise UserError(f"best={path}: there is no such file; {hint}") from error
    except OSError as error:
        raise UserError(f"best={explain_file_error(error, path, verb='read')}") from error
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"best={path} is not the best.yaml of a sweep: it has no list `overrides`") from error
    return [str(item) for item in overrides]


@cache  # this opens every file, and a process composes many configurations
def _check_package_directives(configs: Path) -> None:
    """Refuse a byte-order mark before `# @package`, because Hydra would overlook the line and ignore the values."""
    for path in configs.rglob("*.yaml"):
        with path.open("rb") as file:
            if re.match(rb"\xef\xbb\xbf\s*#\s*@", file.read(32)):
                raise UserError(
                    f"{path} begins with a byte-order mark, which hides its # @package from Hydra; save the file in "
                    "UTF-8 without one"
                )


def _check_added_keys(config_name: ConfigName, config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse `+key=value` if nothing reads the key. Keys of a `_target_` are checked against its signature later."""
    added = [item for item in map(_parse_override, overrides) if item.is_add() and not is_group(item.key_or_group)]
    if not added:
        return
    known = _list_known_keys(config_name, [_parse_override(item) for item in overrides if is_group(override_key(item))])
    for item in added:
        if item.key_or_group not in known and not _has_target(config, item.key_or_group):
            raise UserError(explain_unknown_key(item.key_or_group, known))


def _has_target(config: DictConfig, key: str) -> bool:
    parents = [key.rsplit(".", i)[0] for i in range(1, key.count(".") + 1)]
    return any("_target_" in (OmegaConf.select(config, parent) or {}) for parent in parents)


def _check_required_groups(config: DictConfig) -> None:
    for group in _REQUIRED_GROUPS:
        if config.get(group) is None:
            raise UserError(f"there is no {group}; give {group}=one of {', '.join(find_options(group))}")


def _make_paths_absolute(config: DictConfig) -> None:
    base = Path(OmegaConf.select(config, "paths.base") or os.getcwd())
    for key in PATH_KEYS:
        value = OmegaConf.select(config, key)
        if value is not None and not str(value).startswith("package:"):  # allowed for model.encoder.weights
            path = str(base / expand_home(str(value)))
            _check_is_utf8(key, path)
            OmegaConf.update(config, key, path)


def _check_is_utf8(key: str, value: str) -> None:
    if not is_utf8(value):
        raise UserError(
            f"{key}={os.fsencode(value).decode('utf-8', 'backslashreplace')} is not UTF-8, but names of files must "
            "be; rename the file or folder (convmv renames whole trees)"
        )


# --- parts of a configuration -----------------------------------------------------------------------------------------


def instantiate_key(config: DictConfig, key: str, **arguments: Any) -> Any:
    """Instantiate the `_target_` under a key of the configuration.

    Args:
        config: the configuration.
        key: the dotted key.
        arguments: further arguments. They take precedence over those of the configuration.

    Raises:
        UserError: the constructor refuses a value.
    """
    try:
        return hydra.utils.instantiate(OmegaConf.select(config, key), **arguments)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, (UserError, OSError)):
            raise cause from error
        if isinstance(cause, (ValueError, TypeError)):
            raise UserError(f"{key}: {join_lines(cause)}") from error
        raise


def to_plain_values(config: DictConfig) -> dict[str, Any]:
    """Convert the configuration to plain dictionaries, lists and scalars, with interpolations resolved."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=False))


def save_config(config: DictConfig, path: Path) -> None:
    """Write the configuration to a YAML file."""
    with write_atomically(path) as part:
        part.write_text(yaml.safe_dump(to_plain_values(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def list_location_overrides(config: DictConfig) -> list[str]:
    """List overrides with which a process in another folder and environment composes the same paths."""
    keys = ("paths.data", "paths.output", "paths.packed", "paths.extensions")
    values = {key: OmegaConf.select(config, key) for key in keys}
    path_overrides = [quote_override(key, value) for key, value in values.items() if value is not None]
    return [quote_override("paths.base", os.getcwd()), *path_overrides]


def find_choice(group: str, target: str) -> str:
    """Return the option of a group with this `_target_`, such as `pyramid` of model/decoder, or else the target."""
    return _read_targets(group).get(target, target)


def find_target(group: str, target: str | None) -> Any:
    """Return the class or function of a `_target_` if a file of the group names it; otherwise None.

    Other targets are not imported. This is for files that may come from someone else, such as checkpoints and sweeps:
    they can only select from the options that exist here.
    """
    return None if target is None or target not in _read_targets(group) else pkgutil.resolve_name(target)


def _read_targets(group: str) -> dict[str, str]:
    """Return the `_target_` of each option of a group -> the option."""
    return {load_yaml(path).get("_target_"): name for name, path in find_options(group).items()}


def is_group(key: str) -> bool:
    """Whether a configuration group of this name exists."""
    return any((folder / key).is_dir() for folder in config_folders())


def dotted_keys(values: object, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested dictionaries, both inner and outer ones."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(value, f"{prefix}{key}.")


# --- overrides --------------------------------------------------------------------------------------------------------


def override_key(override: str) -> str:
    """Return the key of an override, without a prefix such as `+`."""
    return override.partition("=")[0].lstrip("+~")


def quote_override(key: str, value: object) -> str:
    """Format `key=value` in Hydra's grammar, so that Hydra reads the same value back.

    Args:
        key: the key.
        value: a scalar, or a list or dictionary of such values.
    """
    return f"{key}={_quote_value(value)}"


def _quote_value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_quote_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quote_value(str(name))}:{_quote_value(item)}" for name, item in value.items()) + "}"
    text = str(value)
    if not _needs_quotes(text):
        return text
    # In quotes, a backslash is literal, except before a quotation mark and at the end.
    doubled = re.sub(r"\\+(?='|\Z)", lambda run: 2 * run[0], text)
    return "'" + doubled.replace("'", "\\'") + "'"


def _needs_quotes(text: str) -> bool:
    """Whether Hydra would parse the unquoted text as something else than this string."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return True
    return not (isinstance(parsed, str) and parsed == text)


def quote_non_ascii(override: str) -> str:
    """Quote a value such as /home/jürgen/hands, because Hydra's grammar allows non-ASCII letters only in quotes."""
    key, equals, value = override.partition("=")
    if value.isascii() or set(value) & set("'\"[]{}"):
        return override
    return f"{key}{equals}{_quote_value(value)}"


def parse_override_value(override: str) -> object:
    """Parse the value of an override as Hydra does. Return the text if it is not a single value for Hydra."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        parsed = None
    if parsed is None or parsed.is_sweep_override():
        return override.partition("=")[2].strip("'\"")
    return parsed.value()


def parse_assignments(items: Sequence[str]) -> dict[str, Any]:
    """Parse items such as `optimizer.lr=3e-3` as the command line does.

    Returns:
        Key -> value. A prefix such as `+` is a part of the key.

    Raises:
        UserError: an item is not key=value with a single value, or a key comes twice.
    """
    values: dict[str, Any] = {}
    for item in items:
        parsed, key = _parse_override(item), item.partition("=")[0]
        if parsed.is_delete() or key in values:
            raise UserError(f"{item!r} is not possible here; write key=value, each key once")
        values[key] = parsed.value()
    return values


def _parse_override(override: str) -> Override:
    """Parse an override.

    Raises:
        UserError: it is not an override, or has several values.
    """
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        key, equals, value = override.partition("=")
        quoted = (
            "; with special characters a value needs quotes for Hydra and for the shell: "
            f"{_format_for_shell(key, value)}"
        )
        raise UserError(
            f"cannot read {override!r} on the command line; write key=value{quoted if equals else ''}"
        ) from error
    if parsed.is_sweep_override():
        raise UserError(f"{override} is a search range; it belongs in a file under search_spaces/")
    return parsed


def _format_for_shell(key: str, text: str) -> str:
    """Format an override with a text value as it is typed into a shell."""
    override = quote_override(key, text)
    return shlex.quote(override) if re.search(r'["$`\\!]', override) else f'"{override}"'


# --- error messages of one sentence -----------------------------------------------------------------------------------


def _make_yaml_error(error: yaml.YAMLError) -> UserError:
    """Make the error for a configuration file that Hydra could not read."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return UserError(join_lines(error))
    try:
        load_yaml(Path(mark.name))
    except UserError as twice:
        return twice
    except (OSError, yaml.YAMLError):
        pass
    return UserError(f"{mark.name} is not valid YAML: {join_lines(error)}")


def _explain_compose_error(config_name: ConfigName, overrides: list[str], error: Exception) -> str:
    """Explain why a configuration could not be composed: the first mistake in an override, or else Hydra's message."""
    try:
        parsed = [_parse_override(item) for item in overrides]
    except UserError as unreadable:
        return str(unreadable)
    groups = [item for item in parsed if is_group(item.key_or_group) and not item.is_delete()]
    wrong = [sentence for item in groups if (sentence := _find_wrong_choice(item))]
    if wrong:
        return wrong[0]
    known = _list_known_keys(config_name, groups)
    for item in parsed:
        key = item.key_or_group
        if not is_group(key) and not item.is_add() and key not in known:
            if others := _find_choices_with_key(key):
                return f"there is no configuration key {key} with this choice; it is a key of {' and '.join(others)}"
            return explain_unknown_key(key, known) + _suggest_adding(config_name, groups, key)
    return join_lines(error.__cause__ or error)


def _find_choices_with_key(key: str) -> list[str]:
    """Return the choices, such as `searcher=tpe`, whose file has a value for a key."""
    parts = key.split(".")
    found = []
    for number in range(1, len(parts)):
        group, rest = "/".join(parts[:number]), ".".join(parts[number:])
        if is_group(group):
            files = find_options(group).items()
            found += [f"{group}={name}" for name, file in files if rest in dotted_keys(load_yaml(file))]
    return found


def _find_wrong_choice(item: Override) -> str | None:
    group, choice = item.key_or_group, item.value()
    choices = list(find_options(group))
    if str(choice) in choices or (choice is None and group not in _REQUIRED_GROUPS):
        return None
    near = difflib.get_close_matches(str(choice), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(choices)}"
    if "." in str(choice):  # the name of a class, which a checkpoint or a sweep has in place of a file
        hint = f"if it is in your own folder, give paths.extensions=FOLDER; {hint}"
    return f"{group}={'null' if choice is None else choice}: no such choice; {hint}"


def _suggest_adding(config_name: ConfigName, groups: Sequence[Override], key: str) -> str:
    """Return a hint if the key is a constructor argument of its parent that has no value in the configuration."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(_compose_groups(config_name, groups), parent) if parent else None
    if node is None or "_target_" not in node or name not in list_parameters(node["_target_"]):
        return ""
    return f"; to add a key that has no value yet, write +{key}=..."


def _list_known_keys(config_name: ConfigName, groups: Sequence[Override]) -> set[str]:
    return set(dotted_keys(OmegaConf.to_container(_compose_groups(config_name, groups), resolve=False)))


def _compose_groups(config_name: ConfigName, groups: Sequence[Override]) -> DictConfig:
    """Compose the configuration with only these options."""
    try:
        return _compose_with_hydra(config_name, [item.input_line for item in groups if item.input_line is not None])
    except _HYDRA_ERRORS:
        return _compose_with_hydra(config_name, [])
