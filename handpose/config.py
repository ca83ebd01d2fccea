"""The only road from Hydra overrides to a composed configuration: for scripts, workers of a sweep and tests.

A configuration that comes out of `compose` is checked: keys exist, values have the types of the constructors they are
meant for, paths are absolute. What is wrong raises UserError, in one sentence that names the key and the remedy.
"""

import argparse
import difflib
import io
import itertools
import os
import pkgutil
import re
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import hydra
import yaml
from dotenv import find_dotenv, load_dotenv
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from handpose.config_files import config_folders, extension_configs, find_options, use_extensions
from handpose.errors import UserError, explain_file_error, is_about_files
from handpose.files import expand_home, write_atomically
from handpose.formats import rename_key
from handpose.schema import check_config, explain_unknown_key, list_parameters
from handpose.utf8 import is_utf8, read_utf8, use_utf8
from handpose.yaml_files import load_yaml

ConfigName = Literal["train", "tune"]

# ValueError: what Hydra 1.3 raises for a group that is set to null.
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
"""Keys whose values are locations. They are made absolute, and differ between machines."""

SWEEP_GROUPS = ("sweep", "retrain", "report", "scheduler", "searcher", "ray", "search_space", "hydra")
"""Groups and keys of tune.py that train.py does not have, and `hydra`."""

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
"""Groups without which there is no run."""


def compose(config_name: ConfigName, overrides: Sequence[str]) -> DictConfig:
    """Compose and check a configuration; works in a script, inside @hydra.main, in a worker and in a test.

    overrides: as on the command line. `best=FILE` puts that file's overrides before the others.
    Raises UserError for what a user can mend.
    """
    given = [_quote_non_ascii(rename_key(item)) for item in overrides]
    for item in given:
        _check_is_utf8(override_key(item), item.partition("=")[2])
    path = _find_best_path(given)
    every = _insert_best_overrides(given)
    use_given_extensions(every)
    try:
        return _compose_and_check(config_name, every)
    except UserError as error:
        if path is None or _can_compose(config_name, _read_best_overrides(path)):
            raise
        raise UserError(f"best={path} does not fit this version of the project: {error}") from error


def use_given_extensions(overrides: Sequence[str]) -> None:
    """Find modules and configuration files in the folder that `paths.extensions` among the overrides names, if any.

    `compose` does this by itself. Raises UserError where there is no such folder.
    """
    values = {
        override_key(item): parse_override_value(item) for item in overrides if override_key(item) in _EXTENSION_KEYS
    }
    given = values.get("paths.extensions")
    if given in (None, ""):
        return
    folder = Path(str(values.get("paths.base") or os.getcwd())) / expand_home(str(given))
    if not folder.is_dir():
        raise UserError(
            f"paths.extensions={given}: the folder {folder} does not exist; it must hold your modules and their "
            f"YAML files in "
            "configs/ (docs/extending.md)"
        )
    use_extensions(folder)


_EXTENSION_KEYS = ("paths.extensions", "paths.base")


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
    except UnicodeDecodeError as error:  # which does not name the file
        for folder in config_folders():
            for path in folder.rglob("*.yaml"):
                read_utf8(path)
        raise UserError(_join_lines(error)) from error
    except _HYDRA_ERRORS as error:
        raise UserError(_explain_compose_error(config_name, overrides, error)) from error
    _check_added_keys(config_name, config, overrides)
    try:
        _check_required_groups(config)
        _make_paths_absolute(config)
        check_config(to_plain_values(config))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(_join_lines(error)) from error
    return config


def instantiate_key(config: DictConfig, key: str, **arguments: Any) -> Any:
    """What the `_target_` under a key makes; arguments come on top of the configuration's.

    Raises UserError for a value that its constructor refuses.
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
            raise UserError(f"{key}: {_join_lines(cause)}") from error
        raise


def run_script(config_name: ConfigName, main: Callable[[DictConfig], None]) -> None:
    """Run a script's main on the composed command line.

    A user's mistake is one sentence on stderr and status 2; Ctrl-C leaves with 130. A .env file in the working folder
    or above it is read first; what the environment sets already counts before it.
    """
    use_utf8()
    with exit_on_user_error():
        load_dotenv_file()
        flags, overrides = _split_command_line()
        overrides = [_quote_non_ascii(_rename_with_warning(item)) for item in overrides]
        use_given_extensions(overrides)
        if not {"-h", "--help", "--hydra-help", "--version"} & set(flags):
            for run in _expand_multirun(overrides) if {"-m", "--multirun"} & set(flags) else [overrides]:
                compose(config_name, run)  # before Hydra does, whose own messages are many lines
        if {"-c", "--cfg", "-i", "--info"} & {flag.partition("=")[0] for flag in flags}:
            overrides = _insert_best_overrides(overrides)  # Hydra prints the configuration and never reaches main
        sys.argv[1:] = [*flags, *overrides, *search_path_override()]  # Hydra takes no flag between two overrides

    @hydra.main(config_path=str(config_folders()[0]), config_name=config_name, version_base="1.3")
    def entry(_: DictConfig) -> None:
        with exit_on_user_error():
            main(compose(config_name, _list_given_overrides()))

    entry()


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of `python -m module`, whose help shows the description as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _rename_with_warning(override: str) -> str:
    """Replace the former name of a key, which earlier versions used, by its name now."""
    renamed = rename_key(override)
    if renamed != override:
        old, new = override_key(override), override_key(renamed)
        print(f"warning: {old} has been renamed to {new}; use the new name", file=sys.stderr)
    return renamed


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a user's mistake, what is wrong with a user's files, and Ctrl-C or SIGTERM into a sentence and a status."""
    hook = threading.excepthook
    threading.excepthook = partial(_handle_thread_error, hook)
    try:
        with interrupt_on_sigterm():
            yield
    except UserError as error:
        _exit(f"error: {_join_lines(error)}", 2)
    except OSError as error:
        if not is_about_files(error):
            raise
        _exit(f"error: {_join_lines(explain_file_error(error))}", 2)
    except KeyboardInterrupt as error:
        _exit(str(error) or "interrupted", 130)
    finally:
        threading.excepthook = hook


def _handle_thread_error(hook: Callable[[threading.ExceptHookArgs], Any], arguments: threading.ExceptHookArgs) -> None:
    """Print no traceback of what the thread has handed over to the main thread, as TensorBoard's writer does."""
    if getattr(arguments.thread, "exception", None) is not arguments.exc_value:
        hook(arguments)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM act as Ctrl-C within the block, unless it is handled already.

    Lightning takes note of SIGTERM and goes on to the end of the batch, which may never come.
    """
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_keyboard_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


def load_dotenv_file() -> None:
    """Read a .env file of the working folder or above it; what the environment sets already counts before it."""
    path = find_dotenv(usecwd=True)
    _unset_empty_variables()
    try:
        if path:
            load_dotenv(stream=io.StringIO(read_utf8(Path(path))))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_join_lines(error)}); it must hold lines like MP_DATA=DIR") from error
    _unset_empty_variables()


def _unset_empty_variables() -> None:
    """A folder that is set to nothing is not set: written into the working folder itself, results would litter it."""
    for name in ("MP_DATA", "DIR_SCRATCH"):
        if os.environ.get(name) == "":
            del os.environ[name]


def _split_command_line() -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, as in `--cfg job`, and the overrides."""
    arguments = sys.argv[1:]
    if not any(item.startswith("-") for item in arguments):
        return [], arguments
    overrides = [item for item in arguments if "=" in item and not item.startswith("-")]
    return [item for item in arguments if item not in overrides], overrides


def _expand_multirun(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a multirun: one value each of `seed=0,1`."""
    return [list(run) for run in itertools.product(*(_expand_override(item) for item in overrides))]


def _expand_override(override: str) -> list[str]:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return [override]  # composing it tells what is wrong
    if not parsed.is_discrete_sweep():
        return [override]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def list_task_overrides() -> list[str]:
    """The overrides of the running script's command line, those of best=FILE in its place."""
    overrides = _insert_best_overrides(_list_given_overrides())
    return [item for item in overrides if override_key(item) != "best"]


def list_given_keys() -> list[str]:
    """The keys that the running script's command line sets by name, those of best=FILE left out."""
    return [override_key(item) for item in _list_given_overrides() if not item.startswith("~")]


def _list_given_overrides() -> list[str]:
    """The running script's overrides, variables of the environment put in, which another machine may not have.

    But not in those of the searcher: the URL of its database may hold a password, and overrides are written down.
    """
    resolved = HydraConfig.get().overrides.task
    written = typing.cast(list[str], OmegaConf.to_container(resolved, resolve=False))
    return [item if override_key(item).startswith("searcher.") else resolved[i] for i, item in enumerate(written)]


def list_location_overrides(config: DictConfig) -> list[str]:
    """Overrides that let another process, in another folder and environment, compose the same paths."""
    keys = ("paths.data", "paths.output", "paths.packed", "paths.extensions")
    values = {key: OmegaConf.select(config, key) for key in keys}
    places = [quote_override(key, value) for key, value in values.items() if value is not None]
    return [quote_override("paths.base", os.getcwd()), *places]


def quote_override(key: str, value: object) -> str:
    """One override in Hydra's grammar for a scalar or a list of scalars: `key=value`, read back as the same value."""
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
    text = str(value)
    if not _needs_quotes(text):
        return text
    # In quotes a backslash stands for itself, except before a quotation mark and at the end.
    doubled = re.sub(r"\\+(?='|\Z)", lambda run: 2 * run[0], text)
    return "'" + doubled.replace("'", "\\'") + "'"


def parse_override_value(override: str) -> object:
    """The value that an override gives, as Hydra reads it; the text itself where Hydra reads no single value."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        parsed = None
    if parsed is None or parsed.is_sweep_override():
        return override.partition("=")[2].strip("'\"")
    return parsed.value()


def _quote_non_ascii(override: str) -> str:
    """Quote a value such as /home/jürgen/hands: Hydra's grammar takes letters beyond ASCII in quotes only."""
    key, equals, value = override.partition("=")
    if value.isascii() or set(value) & set("'\"[]{}"):
        return override
    return f"{key}{equals}{_quote_value(value)}"


def _needs_quotes(text: str) -> bool:
    """Whether the grammar would read the bare word as something else than this string."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return True
    return not (isinstance(parsed, str) and parsed == text)


def to_plain_values(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, interpolations resolved."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=False))


def save_config(config: DictConfig, path: Path) -> None:
    """Write the configuration as YAML."""
    with write_atomically(path) as part:
        part.write_text(yaml.safe_dump(to_plain_values(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def find_choice(group: str, target: str) -> str:
    """The choice of a group that makes a target, as pyramid of model/decoder; the target itself where there is none."""
    targets = {load_yaml(path).get("_target_"): name for name, path in find_options(group).items()}
    return targets.get(target, target)


def find_target(group: str, target: str | None) -> Any:
    """The class or function of a target that a file of the group names; None for any other, which is not imported.

    For files that may come from someone else, as checkpoints and sweeps: they choose among what is here.
    """
    known = {load_yaml(path).get("_target_") for path in find_options(group).values()}
    return None if target is None or target not in known else pkgutil.resolve_name(target)


def _compose_with_hydra(config_name: ConfigName, overrides: list[str]) -> DictConfig:
    overrides = [*overrides, *search_path_override()]
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, overrides)
    with hydra.initialize_config_dir(str(config_folders()[0]), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def search_path_override() -> list[str]:
    """The override that lets Hydra find the options in the user's folder as well; none where there is no folder."""
    folder = extension_configs()
    return [] if folder is None else [quote_override("hydra.searchpath", [f"file://{folder}"])]


def _find_best_path(overrides: list[str]) -> str | None:
    given = [item for item in overrides if override_key(item) == "best"]
    path = parse_override_value(given[-1]) if given else None
    return None if path in (None, "") else str(path)


def _insert_best_overrides(overrides: list[str]) -> list[str]:
    path = _find_best_path(overrides)
    if path is None:
        return overrides
    groups = {override_key(item) for item in overrides if is_group(override_key(item))}
    return [item for item in _read_best_overrides(path) if override_key(item) not in groups] + overrides


def _read_best_overrides(path: str) -> list[str]:
    """The overrides of a sweep's best.yaml."""
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


def override_key(override: str) -> str:
    """Return the key of an override, without a prefix such as `+`."""
    return override.partition("=")[0].lstrip("+~")


def is_group(key: str) -> bool:
    """Whether there is a configuration group of this name."""
    return any((folder / key).is_dir() for folder in config_folders())


# What is wrong, in one sentence.


def _join_lines(error: object) -> str:
    return " ".join(str(error).split())


def _make_yaml_error(error: yaml.YAMLError) -> UserError:
    """Why Hydra could not read a file of the configuration."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return UserError(_join_lines(error))
    try:
        load_yaml(Path(mark.name))
    except UserError as twice:
        return twice
    except (OSError, yaml.YAMLError):
        pass
    return UserError(f"{mark.name} is not valid YAML: {_join_lines(error)}")


def _explain_compose_error(config_name: ConfigName, overrides: list[str], error: Exception) -> str:
    """Why a configuration could not be composed: the first of what may be wrong with an override, or Hydra's words."""
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
            return explain_unknown_key(key, known) + _suggest_adding(config_name, groups, key)
    return _join_lines(error.__cause__ or error)


def _parse_override(override: str) -> Override:
    """Raises UserError for what is no override, or one of many values."""
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
    """An override with a text as its value, as one types it into a shell."""
    override = quote_override(key, text)
    return shlex.quote(override) if re.search(r'["$`\\!]', override) else f'"{override}"'


def _check_added_keys(config_name: ConfigName, config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse `+key=value` where nothing reads the key; what has a `_target_` is held against its signature later."""
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


def _suggest_adding(config_name: ConfigName, groups: Sequence[Override], key: str) -> str:
    """A hint where the key is an argument of what its parent makes, and has no value in the configuration yet."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(_compose_groups(config_name, groups), parent) if parent else None
    if node is None or "_target_" not in node or name not in list_parameters(node["_target_"]):
        return ""
    return f"; to add a key that has no value yet, write +{key}=..."


def _list_choices(group: str) -> list[str]:
    return list(find_options(group))


def _find_wrong_choice(item: Override) -> str | None:
    group, choice = item.key_or_group, item.value()
    choices = _list_choices(group)
    if str(choice) in choices or (choice is None and group not in _REQUIRED_GROUPS):
        return None
    near = difflib.get_close_matches(str(choice), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(choices)}"
    if "." in str(choice):  # the name of a class, which a checkpoint or a sweep has in place of a file
        hint = f"if it is in your own folder, give paths.extensions=FOLDER; {hint}"
    return f"{group}={'null' if choice is None else choice}: no such choice; {hint}"


def _list_known_keys(config_name: ConfigName, groups: Sequence[Override]) -> set[str]:
    return set(dotted_keys(OmegaConf.to_container(_compose_groups(config_name, groups), resolve=False)))


def dotted_keys(values: object, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested dictionaries, those of inner ones too."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(value, f"{prefix}{key}.")


def _compose_groups(config_name: ConfigName, groups: Sequence[Override]) -> DictConfig:
    """The configuration with these choices and nothing else."""
    try:
        return _compose_with_hydra(config_name, [item.input_line for item in groups if item.input_line is not None])
    except _HYDRA_ERRORS:
        return _compose_with_hydra(config_name, [])


@cache  # a process composes many configurations, and this opens every file
def _check_package_directives(configs: Path) -> None:
    """Refuse a byte-order mark before `# @package`, which Hydra then overlooks: the values would have no effect."""
    for path in configs.rglob("*.yaml"):
        with path.open("rb") as file:
            if re.match(rb"\xef\xbb\xbf\s*#\s*@", file.read(32)):
                raise UserError(
                    f"{path} begins with a byte-order mark, which hides its # @package from Hydra; save the file in "
                    "UTF-8 without one"
                )


def _make_paths_absolute(config: DictConfig) -> None:
    base = Path(OmegaConf.select(config, "paths.base") or os.getcwd())
    for key in PATH_KEYS:
        value = OmegaConf.select(config, key)
        if value is not None and not str(value).startswith("package:"):  # which model.encoder.weights may name
            path = str(base / expand_home(str(value)))
            _check_is_utf8(key, path)
            OmegaConf.update(config, key, path)


def _check_is_utf8(key: str, value: str) -> None:
    if not is_utf8(value):
        raise UserError(
            f"{key}={os.fsencode(value).decode('utf-8', 'backslashreplace')} is not UTF-8, but names of files must "
            "be; rename the file or folder (convmv renames whole trees)"
        )


def _check_required_groups(config: DictConfig) -> None:
    for group in _REQUIRED_GROUPS:
        if config.get(group) is None:
            raise UserError(f"there is no {group}; give {group}=one of {', '.join(_list_choices(group))}")
