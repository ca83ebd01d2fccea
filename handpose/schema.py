"""The types and ranges of configuration values, checked before anything is built from them.

The signature of a constructor is the schema of the arguments for its `_target_`. A table has the types of the other
keys.
"""

import difflib
import functools
import inspect
import json
import math
import pkgutil
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from handpose.errors import UserError

Values = Mapping[str, Any]
T = TypeVar("T")

_FRACTION = Annotated[float, Field(ge=0, le=1)]
_OPEN_FRACTION = Annotated[float, Field(gt=0, lt=1)]
_WEIGHT = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_COUNT = Annotated[int, Field(ge=1)]
_TYPES: dict[str, Any] = {
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "test": bool,
    "resume": bool,
    "best": str | None,
    "train_on_val": bool,
    "folds.num": _COUNT,
    "folds.index": Annotated[int, Field(ge=0)],
    "retrain.use_val": bool,
    "retrain.seeds": _COUNT,
    "retrain.predict": Literal["ensemble", "best", "first"],
    "report.scientific": str | None,
    "notify.events": list[Literal["finished", "failed", "interrupted", "new_best", "quarantined"]],
    "notify.gap_s": Annotated[float, Field(ge=0)],
    "test_time.num_rotations": _COUNT,
    "test_time.rotation_deg": Annotated[float, Field(ge=0, le=180)],
    "test_time.crop": Annotated[float, Field(gt=0, le=1)] | None,
    "encoder_lr_factor": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "ema_decay": Annotated[float, Field(ge=0, lt=1)],
    "num_threads": _COUNT | None,
    "data.root": str,
    "data.image_size": Annotated[int, Field(ge=32)] | None,
    "data.batch_size": _COUNT,
    "data.num_workers": Annotated[int, Field(ge=0)],
    "data.source.val_fraction": _OPEN_FRACTION,
    "data.source.num_blocks": _COUNT,
    "data.source.split_seed": Annotated[int, Field(ge=0)],
    "model.weights": str | None,
    "model.compile": Literal["default", "reduce-overhead", "max-autotune"] | None,
    "model.encoder.drop_path": Annotated[float, Field(ge=0, lt=1)],
    "model.decoder.depth": Annotated[int, Field(ge=0, le=8)],
    "model.decoder.width": _COUNT,
    "model.decoder.bins_per_cell": Annotated[int, Field(ge=1, le=8)],
    "model.decoder.depth_bins": Annotated[int, Field(ge=2)],
    "model.decoder.depth_hidden": _COUNT,
    "heatmap.sigma": _OPEN_FRACTION,
    "loss.heatmap_weight": _WEIGHT,
    "loss.coordinate_weight": _WEIGHT,
    "loss.depth_weight": _WEIGHT,
    "loss.bone_length_weight": _WEIGHT,
    "loss.bone_direction_weight": _WEIGHT,
    "optimizer.lr": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "optimizer.weight_decay": _WEIGHT,
    "lr_schedule.warmup": _FRACTION,
    "lr_schedule.flat": _FRACTION,
    "lr_schedule.final": _FRACTION,
    "lr_schedule.gamma": _FRACTION,
    "augment.rotation_deg": Annotated[float, Field(ge=0, le=180)],
    "augment.perspective_deg": Annotated[float, Field(ge=0, le=45)],
    "augment.scale": Annotated[float, Field(ge=0, lt=1)],
    "trainer.max_epochs": _COUNT,
    "trainer.precision": Literal["32-true", "bf16-mixed", "16-mixed", "64-true"],
    "trainer.check_val_every_n_epoch": _COUNT,
    "trainer.limit_train_batches": Annotated[int | float, Field(gt=0)],
    "trainer.limit_val_batches": Annotated[int | float, Field(gt=0)],
    "trainer.limit_test_batches": Annotated[int | float, Field(ge=0)] | None,
    "trainer.limit_predict_batches": Annotated[int | float, Field(ge=0)] | None,
    "trainer.fast_dev_run": Annotated[int, Field(ge=0)] | bool,
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.gradient_clip_val": Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
    "trainer.log_every_n_steps": Annotated[int, Field(ge=0)],
    "trainer.strategy": Literal["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"],
    "checkpoints.enabled": bool,
    "checkpoints.metric": str,
    "checkpoints.mode": Literal["min", "max"] | None,
    "checkpoints.every_n_epochs": _COUNT,
    "pictures.every_n_steps": Annotated[int, Field(ge=0)],
    "pictures.num_hands": _COUNT,
    "pictures.trial_hands": Annotated[int, Field(ge=0)],
    "logger.name": Literal["tensorboard", "wandb", "none"],
    "logger.project": str,
    "logger.run_name": str | None,
}
"""Types and ranges of the keys that no constructor's signature gives. The bounds of search spaces are checked too."""


def check_config(values: Values) -> None:
    """Check a whole configuration, as plain values, against the table and the constructors.

    Raises:
        UserError: a value is not allowed.
    """
    for name, unsupported in _RESTRICTED_ARGUMENTS.items():
        for value in _select_values(values["trainer"], name):
            unsupported.check_value(f"trainer.{name}", value)
    for key, kind in _TYPES.items():
        for value in _select_values(values, key):
            _check_type(key, value, kind)
    _check_targets(values, prefix="")
    _check_epochs(values)


def _select_values(values: Values, key: str) -> Iterator[Any]:
    """Yield the value under a dotted key, if it exists."""
    node: Any = values
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return
        node = node[name]
    yield node


def is_allowed(key: str, value: float) -> bool:
    """Whether the table allows a number for a key. Keys that the table does not have allow any."""
    try:
        _check_type(key, value, _TYPES.get(key, Any))
    except UserError:
        return False
    return True


class RestrictedArgument(NamedTuple):
    """An argument for which only a few values are allowed.

    Attributes:
        allowed: the allowed values.
        remedy: what to do instead, for the error message.
    """

    allowed: Sequence[Any]
    remedy: str

    def check_value(self, key: str, value: Any, *, where: str = "") -> None:
        """Raise UserError if a value is not allowed. 1 and 1.0 differ, as in Lightning."""
        if not any(type(value) is type(allowed) and value == allowed for allowed in self.allowed):
            raise UserError(f"{key}={_format_yaml_value(value)} is not supported{where}: {self.remedy}")


_NO_EARLY_END_REMEDY = (
    "a training runs to trainer.max_epochs unless trainer.max_steps or trainer.max_time ends it before"
)
_RESTRICTED_ARGUMENTS = {
    "logger": RestrictedArgument([None], "choose logger=tensorboard, logger=wandb or logger=none"),
    "callbacks": RestrictedArgument([None, []], "the project has its own callbacks, which the other keys configure"),
    "plugins": RestrictedArgument([None, []], "the project has its own plugins"),
    "default_root_dir": RestrictedArgument([None], "set paths.output, or paths.logs for this run alone"),
    "enable_checkpointing": RestrictedArgument([None], "give checkpoints.enabled=true or checkpoints.enabled=false"),
    "enable_model_summary": RestrictedArgument([None, False], "no summary is printed; leave the key out"),
    "model_registry": RestrictedArgument([None], "checkpoints are kept in paths.checkpoints"),
    "num_sanity_val_steps": RestrictedArgument(
        [None, 0], "everything is checked before training; +trainer.fast_dev_run=true tries one batch of each stage"
    ),
    "use_distributed_sampler": RestrictedArgument([False], "the data loaders already divide the batches among devices"),
    "sync_batchnorm": RestrictedArgument([False], "devices always share the statistics of batch norm"),
    "barebones": RestrictedArgument(
        [False],
        "give logger=none checkpoints.enabled=false trainer.enable_progress_bar=false for the bare speed",
    ),
    "overfit_batches": RestrictedArgument(
        [0, 0.0], "give trainer.limit_train_batches=N, although each epoch then draws other pictures"
    ),
    "val_check_interval": RestrictedArgument(
        [None, 1.0],
        "validation runs at the end of an epoch; give trainer.check_val_every_n_epoch, or shorter epochs by "
        "trainer.limit_train_batches",
    ),
    "min_epochs": RestrictedArgument([None], _NO_EARLY_END_REMEDY),
    "min_steps": RestrictedArgument([None], _NO_EARLY_END_REMEDY),
}
"""Arguments of Lightning's Trainer that this project sets itself or that do not work with it."""


def _format_yaml_value(value: Any) -> str:
    return json.dumps(value).strip('"')


def _check_epochs(values: Values) -> None:
    trainer, saving = values["trainer"], values["checkpoints"]
    max_steps = trainer.get("max_steps", -1)
    if max_steps < 1 and max_steps != -1:
        raise UserError(f"trainer.max_steps must be at least 1, or -1 for no limit, but it is {max_steps}")
    if trainer.get("fast_dev_run"):  # one epoch, after which everything is run
        return
    val_interval, epochs = trainer["check_val_every_n_epoch"], trainer["max_epochs"]
    if val_interval > epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch={val_interval} would validate nothing within trainer.max_epochs={epochs}"
        )
    if saving["enabled"] and math.lcm(val_interval, saving["every_n_epochs"]) > epochs:
        raise UserError(
            f"checkpoints.every_n_epochs={saving['every_n_epochs']} would save nothing within "
            f"trainer.max_epochs={epochs}; make it smaller, or give checkpoints.enabled=false"
        )


def _check_targets(values: Any, *, prefix: str) -> None:
    """Check the arguments of every `_target_` in the configuration against its signature."""
    if isinstance(values, Mapping) and isinstance(values.get("_target_"), str):
        _check_arguments(values, prefix=prefix)
    inner = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        _check_targets(value, prefix=f"{prefix}{key}.")


def check_component(values: Values, *, prefix: str, same_as: str) -> None:
    """Check a `_target_` and its arguments that another component of the configuration puts together itself.

    Args:
        values: the `_target_` and its arguments.
        prefix: dotted prefix of the arguments for error messages.
        same_as: dotted prefix under which the table has the types of the same arguments.

    Raises:
        UserError: a value is not allowed, or there is no such argument.
    """
    for name, value in values.items():
        if (kind := _TYPES.get(f"{same_as}{name}")) is not None:
            _check_type(f"{prefix}{name}", value, kind)
    _check_arguments(values, prefix=prefix)


_NOT_ARGUMENTS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def _check_arguments(values: Values, *, prefix: str) -> None:
    try:
        target = pkgutil.resolve_name(values["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{prefix}_target_: there is no {values['_target_']}") from error
    known, hints = inspect.signature(target).parameters, _get_type_hints(target)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in (name for name in values if name not in _NOT_ARGUMENTS):
        if name not in known and not takes_all:
            raise UserError(explain_unknown_key(f"{prefix}{name}", {f"{prefix}{parameter}" for parameter in known}))
        if name in hints and not isinstance(values[name], Mapping):
            _check_type(f"{prefix}{name}", values[name], hints[name])


@functools.cache
def _get_type_hints(target: Any) -> dict[str, Any]:
    try:
        function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # annotations of a library that only its type checker can resolve
        return {}


@functools.cache
def _make_adapter(kind: Any) -> TypeAdapter[Any] | None:
    """Make a validator for values of a type; None if YAML cannot express any value of it."""
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:
        return None


def _check_type(key: str, value: Any, kind: Any) -> None:
    adapter = _make_adapter(kind)
    if adapter is None:
        return
    try:
        # Strict, because "3" or 2.0 for a number of blocks is a mistake. JSON, because it has no tuples, like YAML.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        refusals = [item for item in error.errors() if not _is_unsupported_type(item)]
        if refusals:
            raise UserError(_explain_type_error(key, value, refusals[0])) from error


def _is_unsupported_type(item: Any) -> bool:
    """Whether the error is about a type that YAML cannot express, such as a Tensor, not about a list or a scalar."""
    return item["type"] == "is_instance_of" and item["ctx"]["class"] != "Sequence"


_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


def _explain_type_error(key: str, value: Any, item: Any) -> str:
    if item["type"] in _BOUNDS:
        return f"{key} must be {_BOUNDS[item['type']].format(**item['ctx'])}, but it is {value}"
    reason = item["msg"]
    return f"{key}={value}: {reason[0].lower()}{reason[1:]}"


def list_parameters(target: str) -> set[str]:
    """Return the names of the arguments of a `_target_`."""
    return set(inspect.signature(pkgutil.resolve_name(target)).parameters)


def bind_arguments(make: Callable[..., T], **available: Any) -> Callable[..., T]:
    """Bind those of the available arguments that the signature of a class or function has."""
    known = inspect.signature(make).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return partial(make, **{name: value for name, value in available.items() if takes_all or name in known})


def find_nearest_keys(key: str, known: Collection[str]) -> list[str]:
    """Return up to two of the keys: those with the same last part, such as optimizer.lr for lr, or similar ones."""
    near = sorted(name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2])[:2]
    return near or difflib.get_close_matches(key, known, n=2, cutoff=0.5)


def explain_unknown_key(key: str, known: set[str]) -> str:
    """Explain that a key does not exist, and suggest the nearest keys."""
    near = find_nearest_keys(key, {name for name in known if not name.rpartition(".")[2].startswith("_")})
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `--cfg job` prints all keys"
    return f"there is no configuration key {key}{hint}"


def type_of(key: str, target: str | None) -> Any:
    """Find the type that the values of a key have.

    Args:
        key: a key of the configuration.
        target: the `_target_` that takes the key as an argument; None if there is none.

    Returns:
        The type, with its range if it has one; `Any` if it is not known.
    """
    hints = {} if target is None else _get_type_hints(pkgutil.resolve_name(target))
    return _TYPES.get(key, hints.get(key.rpartition(".")[2], Any))
