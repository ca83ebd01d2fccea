"""The only road from Hydra overrides to a composed configuration: for scripts, workers of a sweep and tests.

A configuration that comes out of `compose` is checked: keys exist, values have the types of the constructors they are
meant for, paths are absolute. What is wrong raises UserError, in one sentence that names the key and the remedy.
"""

import difflib
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

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
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from handpose.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"

ConfigName = Literal["train", "tune"]

# ValueError: what Hydra 1.3 raises for a group that is set to null.
_HYDRA_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

_PATH_KEYS = (
    "paths.data",
    "paths.output",
    "paths.packed",
    "paths.logs",
    "paths.checkpoints",
    "paths.predictions",
    "data.root",
    "model.checkpoint_path",
    "model.encoder.weights",
)
_FRACTION = Annotated[float, Field(ge=0, le=1)]
_SHARE = Annotated[float, Field(gt=0, lt=1)]
_WEIGHT = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_COUNT = Annotated[int, Field(ge=1)]
_TYPES: dict[str, Any] = {
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "test": bool,
    "resume": bool,
    "best": str | None,
    "test_time": Literal["none", "rotations", "rotations_mirror"],
    "num_rotations": _COUNT,
    "num_threads": _COUNT | None,
    "data.root": str,
    "data.image_size": Annotated[int, Field(ge=32)] | None,
    "data.batch_size": _COUNT,
    "data.num_workers": Annotated[int, Field(ge=0)],
    "data.source.val_fraction": _SHARE,
    "data.source.num_blocks": _COUNT,
    "data.source.split_seed": Annotated[int, Field(ge=0)],
    "model.encoder.drop_path": Annotated[float, Field(ge=0, lt=1)],
    "model.decoder.depth": Annotated[int, Field(ge=0, le=8)],
    "model.decoder.width": _COUNT,
    "model.decoder.depth_bins": Annotated[int, Field(ge=2)],
    "model.decoder.depth_hidden": _COUNT,
    "heatmap.sigma": _SHARE,
    "loss.heatmap_weight": _WEIGHT,
    "loss.coordinate_weight": _WEIGHT,
    "loss.depth_weight": _WEIGHT,
    "optimizer.lr": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "optimizer.weight_decay": _WEIGHT,
    "lr_schedule.warmup": _FRACTION,
    "lr_schedule.final": _FRACTION,
    "lr_schedule.gamma": _FRACTION,
    "trainer.max_epochs": _COUNT,
    "trainer.precision": Literal["32-true", "bf16-mixed", "16-mixed"],
    "trainer.check_val_every_n_epoch": _COUNT,
    "trainer.limit_train_batches": Annotated[int | float, Field(gt=0)],
    "trainer.limit_val_batches": Annotated[int | float, Field(gt=0)],
    "checkpoints.enabled": bool,
    "checkpoints.metric": str,
    "checkpoints.mode": Literal["min", "max"],
    "checkpoints.every_n_epochs": _COUNT,
    "pictures.every_n_steps": Annotated[int, Field(ge=0)],
    "pictures.num_hands": _COUNT,
    "logger.name": Literal["tensorboard", "wandb", "none"],
    "logger.project": str,
    "logger.run_name": str | None,
}
"""Types and ranges of the keys that no constructor's signature gives; corners of search spaces are held to them too."""

_NEEDED = (
    "data",
    "model",
    "heatmap",
    "loss",
    "augment",
    "optimizer",
    "lr_schedule",
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
    overrides = _with_best(list(overrides))
    try:
        config = _composed(config_name, overrides)
    except _HYDRA_ERRORS as error:
        raise UserError(_explained(config_name, overrides, error)) from error
    try:
        _make_paths_absolute(config)
        _check(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(_one_line(error)) from error
    return config


def instantiated(config: DictConfig, key: str, **arguments: Any) -> Any:
    """What the `_target_` under a key makes; arguments come on top of the configuration's.

    Raises UserError for a value that its constructor refuses.
    """
    try:
        return hydra.utils.instantiate(OmegaConf.select(config, key), **arguments)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, (ValueError, TypeError)):
            raise UserError(f"{key}: {_one_line(cause)}") from error
        raise


def script(config_name: ConfigName, main: Callable[[DictConfig], None]) -> None:
    """Run a script's main on the composed command line.

    A user's mistake is one sentence on stderr and status 2; Ctrl-C leaves with 130. A .env file in the working folder
    or above it is read first; what the environment sets already counts before it.
    """
    with _told():
        _load_environment()
        _check_command_line(config_name, sys.argv[1:])

    @hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base="1.3")
    def entry(_: DictConfig) -> None:
        with _told():
            main(compose(config_name, task_overrides()))

    entry()


@contextmanager
def _told() -> Iterator[None]:
    """Turn a user's mistake, and Ctrl-C, into a sentence and a status."""
    try:
        yield
    except UserError as error:
        _leave(f"error: {_one_line(error)}", 2)
    except KeyboardInterrupt as error:
        _leave(str(error) or "interrupted", 130)


def _leave(sentence: str, status: int) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(status)


def _load_environment() -> None:
    path = find_dotenv(usecwd=True)
    try:
        load_dotenv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}); it must hold lines like MP_DATA=DIR") from error


def _check_command_line(config_name: ConfigName, arguments: Sequence[str]) -> None:
    """Compose before Hydra does, whose own messages are many lines; of a multirun (-m) the first run."""
    flags = [item for item in arguments if item.startswith("-")]
    overrides = [item for item in arguments if "=" in item and item not in flags] if flags else arguments
    if not {"-h", "--help", "--hydra-help", "--version"} & set(flags):
        compose(config_name, [_first_run(item) for item in overrides] if flags else overrides)


def _first_run(override: str) -> str:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return override  # composing it tells what is wrong
    if not parsed.is_discrete_sweep():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


def task_overrides() -> list[str]:
    """The overrides of the running script's command line, as Hydra took them."""
    return list(HydraConfig.get().overrides.task)


def location_overrides(config: DictConfig) -> list[str]:
    """Overrides that let another process, in another folder and environment, compose the same paths."""
    keys = ("paths.data", "paths.output", "paths.packed")
    return [quote_override("paths.base", os.getcwd())] + [
        quote_override(key, OmegaConf.select(config, key)) for key in keys
    ]


def quote_override(key: str, value: object) -> str:
    """One override in Hydra's grammar for a scalar or a list of scalars: `key=value`, read back as the same value."""
    return f"{key}={_quoted(value)}"


def _quoted(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_quoted(item) for item in value) + "]"
    text = str(value)
    if not _needs_quotes(text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _needs_quotes(text: str) -> bool:
    """Whether the grammar would read the bare word as something else than this string."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return True
    return not (isinstance(parsed, str) and parsed == text)


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, interpolations resolved."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=False))


def save(config: DictConfig, path: Path) -> None:
    """Write the configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def leaf_keys(values: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all leaves of nested dictionaries."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaf_keys(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix(".")


def _composed(config_name: ConfigName, overrides: list[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, overrides)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def _with_best(overrides: list[str]) -> list[str]:
    given = [item for item in overrides if _key(item) == "best"]
    path = given[-1].partition("=")[2].strip("'\"") if given else "null"
    if path in ("null", ""):
        return overrides
    groups = {_key(item) for item in overrides if _is_group(_key(item))}
    return [item for item in _best(path) if _key(item) not in groups] + overrides


def _best(path: str) -> list[str]:
    """The overrides of a sweep's best.yaml."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"best={path}: there is no such file; a finished sweep leaves one at sweeps/NAME/best.yaml")
    try:
        overrides = yaml.safe_load(Path(path).expanduser().read_text())["overrides"]
        if not isinstance(overrides, list):
            raise TypeError("overrides must be a list")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"best={path} is not the best.yaml of a sweep: it has no list `overrides`") from error
    return [str(item) for item in overrides]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _is_group(key: str) -> bool:
    return (CONFIGS / key).is_dir()


# What is wrong, in one sentence.


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _explained(config_name: ConfigName, overrides: list[str], error: Exception) -> str:
    """Why a configuration could not be composed: the first of what may be wrong with an override, or Hydra's words."""
    try:
        parsed = [_parsed(item) for item in overrides]
    except UserError as unreadable:
        return str(unreadable)
    groups = [item for item in parsed if _is_group(item.key_or_group) and not item.is_delete()]
    wrong = [sentence for item in groups if (sentence := _wrong_choice(item))]
    if wrong:
        return wrong[0]
    known = _known_keys(config_name, groups)
    for item in parsed:
        if not _is_group(item.key_or_group) and not item.is_add() and item.key_or_group not in known:
            return unknown_key(item.key_or_group, known)
    return _one_line(error.__cause__ or error)


def _parsed(override: str) -> Override:
    """Raises UserError for what is no override, or one of many values."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(
            f"cannot read {override!r} on the command line; write key=value, and quote values with special characters"
        ) from error
    if parsed.is_sweep_override():
        raise UserError(f"{override} is a search range; it belongs in a file under search_spaces/")
    return parsed


def unknown_key(key: str, known: set[str]) -> str:
    """The sentence for a key that is not there, with the nearest that are."""
    # The right last word comes first, as optimizer.lr for lr.
    near = sorted(name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2])[:2]
    near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `--cfg job` prints all keys"
    return f"there is no configuration key {key}{hint}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _wrong_choice(item: Override) -> str | None:
    group, choice = item.key_or_group, item.value()
    choices = _choices(group)
    if str(choice) in choices or (choice is None and group not in _NEEDED):
        return None
    near = difflib.get_close_matches(str(choice), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(choices)}"
    return f"{group}={'null' if choice is None else choice}: no such choice; {hint}"


def _known_keys(config_name: ConfigName, groups: Sequence[Override]) -> set[str]:
    try:
        config = _composed(config_name, [item.input_line for item in groups if item.input_line is not None])
    except _HYDRA_ERRORS:
        config = _composed(config_name, [])
    leaves = set(leaf_keys(OmegaConf.to_container(config, resolve=False)))
    inner = {key.rsplit(".", i)[0] for key in leaves for i in range(1, key.count(".") + 1)}
    return leaves | inner


def _make_paths_absolute(config: DictConfig) -> None:
    base = Path(OmegaConf.select(config, "paths.base") or os.getcwd())
    for key in _PATH_KEYS:
        value = OmegaConf.select(config, key)
        if value is not None:
            OmegaConf.update(config, key, str(base / Path(str(value)).expanduser()))


def _check(config: DictConfig) -> None:
    values = plain(config)
    for group in _NEEDED:
        if values.get(group) is None:
            raise UserError(f"there is no {group}; give {group}=one of {', '.join(_choices(group))}")
    for key, kind in _TYPES.items():
        node = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        if node is not None and key.rpartition(".")[2] in node:
            _check_type(key, OmegaConf.select(config, key), kind)
    _check_targets(values, prefix="")
    _check_epochs(config)


def _check_epochs(config: DictConfig) -> None:
    every, epochs = config.trainer.check_val_every_n_epoch, config.trainer.max_epochs
    if every > epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch={every} would validate nothing within trainer.max_epochs={epochs}"
        )
    if config.checkpoints.enabled and math.lcm(every, config.checkpoints.every_n_epochs) > epochs:
        raise UserError(
            f"checkpoints.every_n_epochs={config.checkpoints.every_n_epochs} would save nothing within "
            f"trainer.max_epochs={epochs}; make it smaller, or give checkpoints.enabled=false"
        )


def _check_targets(values: Any, *, prefix: str) -> None:
    """Hold every `_target_` in the configuration against the signature of what it names."""
    if isinstance(values, list):
        for i, item in enumerate(values):
            _check_targets(item, prefix=f"{prefix}{i}.")
    if not isinstance(values, dict):
        return
    if isinstance(values.get("_target_"), str):
        _check_arguments(values, prefix=prefix)
    for key, value in values.items():
        _check_targets(value, prefix=f"{prefix}{key}.")


_NOT_ARGUMENTS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_ELSEWHERE = {"model.checkpoint_path"}


def _check_arguments(values: dict[str, Any], *, prefix: str) -> None:
    try:
        target = hydra.utils.get_object(values["_target_"])
    except Exception as error:
        raise UserError(f"{prefix}_target_: there is no {values['_target_']}") from error
    callable_ = target.__init__ if inspect.isclass(target) else target
    parameters = inspect.signature(callable_).parameters
    try:
        hints = typing.get_type_hints(callable_)
    except Exception:  # annotations of a library that only its type checker can resolve
        hints = {}
    for name, value in values.items():
        if name in _NOT_ARGUMENTS or f"{prefix}{name}" in _ELSEWHERE:
            continue
        if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise UserError(unknown_key(f"{prefix}{name}", {f"{prefix}{known}" for known in parameters}))
        if name in hints and not isinstance(value, dict):
            _check_type(f"{prefix}{name}", value, hints[name])


def _check_type(key: str, value: Any, kind: Any) -> None:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # not a type that a value of YAML could have
        return
    try:
        adapter.validate_python(value, strict=True)  # strict, because "3" or 2.0 for a number of blocks is a mistake
    except ValidationError as error:
        refusals = [item for item in error.errors() if not _may_be_made(item)]
        if refusals:
            raise UserError(_refusal(key, value, refusals[0])) from error


def _may_be_made(item: Any) -> bool:
    """Whether the refusal is of a type that YAML cannot hold, as a Tensor, and not of a list or a scalar."""
    return item["type"] == "is_instance_of" and item["ctx"]["class"] != "Sequence"


_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


def _refusal(key: str, value: Any, item: Any) -> str:
    if item["type"] in _BOUNDS:
        return f"{key} must be {_BOUNDS[item['type']].format(**item['ctx'])}, but it is {value}"
    reason = item["msg"]
    return f"{key}={value}: {reason[0].lower()}{reason[1:]}"
