"""The only road from Hydra overrides to a composed configuration: for scripts, workers of a sweep and tests.

A configuration that comes out of `compose` is checked: keys exist, values have the types of the constructors they are
meant for, paths are absolute. What is wrong raises UserError, in one sentence that names the key and the remedy.
"""

import difflib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import hydra
import yaml
from dotenv import find_dotenv, load_dotenv
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from handpose.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"

ConfigName = Literal["train", "tune"]

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
_SCALARS: dict[str, Any] = {
    "seed": int,
    "test": bool,
    "resume": bool,
    "best": str | None,
    "test_time": Literal["none", "rotations", "rotations_mirror"],
    "num_rotations": int,
    "num_threads": int | None,
    "data.root": str,
    "data.image_size": int | None,
    "data.batch_size": int,
    "data.num_workers": int,
    "checkpoints.enabled": bool,
    "checkpoints.metric": str,
    "checkpoints.mode": Literal["min", "max"],
    "checkpoints.every_n_epochs": int,
    "pictures.every_n_steps": int,
    "pictures.num_hands": int,
    "logger.name": Literal["tensorboard", "wandb", "none"],
    "logger.project": str,
    "logger.run_name": str | None,
}
"""Types of the keys that no constructor's signature gives."""

_AT_LEAST = {
    "seed": 0,
    "num_rotations": 1,
    "num_threads": 1,
    "data.image_size": 32,
    "data.batch_size": 1,
    "data.num_workers": 0,
    "checkpoints.every_n_epochs": 1,
    "pictures.every_n_steps": 0,
    "pictures.num_hands": 1,
    "trainer.max_epochs": 1,
    "trainer.check_val_every_n_epoch": 1,
    "model.decoder.depth": 0,
    "model.decoder.width": 1,
    "model.decoder.depth_bins": 2,
}


def compose(config_name: ConfigName, overrides: Sequence[str]) -> DictConfig:
    """Compose and check a configuration; works in a script, inside @hydra.main, in a worker and in a test.

    overrides: as on the command line. `best=FILE` puts that file's overrides before the others.
    Raises UserError for what a user can mend.
    """
    overrides = _with_best(list(overrides))
    try:
        config = _composed(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explained(config_name, overrides, error)) from error
    _make_paths_absolute(config)
    _check(config)
    return config


def script(config_name: ConfigName, main: Callable[[DictConfig], None]) -> None:
    """Run a script's main on the composed command line.

    A user's mistake is one sentence on stderr and status 2; Ctrl-C leaves with 130. A .env file in the working folder
    or above it is read first; what the environment sets already counts before it.
    """
    load_dotenv(find_dotenv(usecwd=True))
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if not flags:  # --help, --cfg and --multirun are Hydra's own business
        with _told():
            compose(config_name, sys.argv[1:])

    @hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base="1.3")
    def entry(_: DictConfig) -> None:
        with _told():
            main(compose(config_name, list(HydraConfig.get().overrides.task)))

    entry()


class _told:  # noqa: N801 - reads as a word in a with statement
    """Turns a user's mistake, and Ctrl-C, into a sentence and a status."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError):
            _leave(f"error: {error}", 2)
        if isinstance(error, KeyboardInterrupt):
            _leave(f"interrupted{'' if not str(error) else f': {error}'}", 130)


def _leave(sentence: str, status: int) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(status)


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
    text = str(value).replace("\\", "\\\\").replace("'", "\\'") if _needs_quotes(str(value)) else str(value)
    return f"'{text}'" if _needs_quotes(str(value)) else text


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
    path = next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("best=")), "null")
    path = path.strip("'\"")
    if path in ("null", ""):
        return overrides
    if not Path(path).is_file():
        raise UserError(f"best={path}: there is no such file; a finished sweep leaves one at sweeps/NAME/best.yaml")
    try:
        content = yaml.safe_load(Path(path).read_text())
        best = [str(item) for item in content["overrides"]]
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"best={path} is not the best.yaml of a sweep: it has no list `overrides`") from error
    groups = {_key(item) for item in overrides if _is_group(_key(item))}
    return [item for item in best if _key(item) not in groups] + overrides


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _is_group(key: str) -> bool:
    return (CONFIGS / key).is_dir()


# What is wrong, in one sentence.


def _explained(config_name: ConfigName, overrides: list[str], error: Exception) -> str:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for item in overrides:
        try:
            parsed.append(parser.parse_override(item))
        except HydraException:
            return (
                f"cannot read {item!r} on the command line; write key=value, and quote values with special characters"
            )
    sweeps = [item for item in parsed if item.is_sweep_override()]
    if sweeps:
        return f"{sweeps[0].input_line} is a search range; it belongs in a file under search_spaces/"
    for item in parsed:
        if _is_group(item.key_or_group) and not item.is_delete():
            wrong = _wrong_choice(item)
            if wrong:
                return wrong
    known = _known_keys(config_name, parsed)
    for item in parsed:
        if not _is_group(item.key_or_group) and not item.is_add() and item.key_or_group not in known:
            return unknown_key(item.key_or_group, known)
    return " ".join(str(error.__cause__ or error).split())


def unknown_key(key: str, known: set[str]) -> str:
    """The sentence for a key that is not there, with the nearest that are."""
    # The right last word comes first, as optimizer.lr for lr.
    near = sorted(name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2])[:2]
    near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `--cfg job` prints all keys"
    return f"there is no configuration key {key}{hint}"


def _wrong_choice(item: Override) -> str | None:
    choice = item.value()
    choices = sorted(path.stem for path in (CONFIGS / item.key_or_group).glob("*.yaml"))
    if choice is None or not choices or str(choice) in choices:
        return None
    near = difflib.get_close_matches(str(choice), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else "there is"
    return f"{item.key_or_group}={choice}: no such choice; {hint} {'' if near else ', '.join(choices)}".rstrip()


def _known_keys(config_name: ConfigName, parsed: Sequence[Override]) -> set[str]:
    groups = [item.input_line for item in parsed if _is_group(item.key_or_group) and item.input_line is not None]
    try:
        config = _composed(config_name, groups)
    except (HydraException, OmegaConfBaseException):
        config = _composed(config_name, [])
    values = OmegaConf.to_container(config, resolve=False)
    leaves = set(leaf_keys(values))
    inner = {key.rsplit(".", i)[0] for key in leaves for i in range(1, key.count(".") + 1)}
    return leaves | inner


def _make_paths_absolute(config: DictConfig) -> None:
    base = Path(OmegaConf.select(config, "paths.base") or os.getcwd())
    for key in _PATH_KEYS:
        value = OmegaConf.select(config, key)
        if value is not None:
            OmegaConf.update(config, key, str(base / Path(str(value)).expanduser()))


def _check(config: DictConfig) -> None:
    try:
        values = plain(config)
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error
    for key, kind in _SCALARS.items():
        node = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        if node is not None and key.rpartition(".")[2] in node:
            _check_type(key, OmegaConf.select(config, key), kind)
    for key, low in _AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if value is not None and value < low:
            raise UserError(f"{key} must be at least {low}, but it is {value}")
    _check_targets(values, prefix="")


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
        # Strict, because "3" or 2.0 for a number of blocks is a mistake; JSON mode, because YAML has lists and no
        # tuples.
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # not a type that a value of YAML could have
        return
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        reasons = [item["msg"] for item in error.errors() if not _may_be_made(item)]
        if not reasons:
            return
        reason = reasons[0]
        raise UserError(f"{key}={value}: {reason[0].lower()}{reason[1:]}") from error


def _may_be_made(item: Any) -> bool:
    """Whether the refusal is of a type that YAML cannot hold, as a Tensor, and not of a list or a scalar."""
    return item["type"] == "is_instance_of" and item["ctx"]["class"] != "Sequence"
