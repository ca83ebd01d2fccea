"""Parametrizes the contract tests with every option of a configuration group and the variants that its class states."""

import functools
import pkgutil
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pytest

from handpose.config import compose, instantiate_key, quote_override, to_plain_values
from handpose.config_files import CONFIGS, extension_configs

GROUPS = {
    "scheduler": "scheduler",
    "encoder": "model/encoder",
    "decoder": "model/decoder",
    "loss": "loss",
    "data_set": "data",
    "augmentation": "augment",
    "metric": "metrics",
}
"""Argument of a contract test -> configuration group whose options it is run with."""


class Option(NamedTuple):
    """An option of a configuration group, with some values that are not the default ones."""

    group: str
    name: str
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return self.group.replace("/", ".")

    @property
    def overrides(self) -> list[str]:
        changes = [quote_override(f"{self.key}.{name}", value) for name, value in self.values]
        return [f"{self.group}={self.name}", *changes]

    def compose(self, *more: str) -> Any:
        return compose("tune", [*self.overrides, *more])

    def make(self, *more: str, **arguments: Any) -> Any:
        """What the option makes, with further arguments."""
        return instantiate_key(self.compose(*more), self.key, **arguments)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.values)])


SLOW = {("scheduler", "freeze_thaw"), ("data", "dexycb")}
"""Options that take many seconds, which have tests of their own, too."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, group in GROUPS.items():
        if argument in metafunc.fixturenames:
            slow = {option: pytest.mark.slow for option in list_options(group) if (group, option.name) in SLOW}
            options = [pytest.param(option, marks=slow.get(option, ())) for option in list_options(group)]
            metafunc.parametrize(argument, options, ids=str)


@functools.cache
def list_options(group: str) -> list[Option]:
    return [option for name in list_names(group) for option in list_variants(group, name)]


def list_names(group: str) -> list[str]:
    """The options in the user's folder if pytest is given one, otherwise those in configs/."""
    return sorted(path.stem for path in ((extension_configs() or CONFIGS) / group).glob("*.yaml"))


def list_variants(group: str, name: str) -> Iterator[Option]:
    """The default values, each other value of a Literal or bool argument, and what `contract_variants` lists."""
    yield Option(group, name)
    if group in ("data", "metrics"):
        return
    values = to_plain_values(Option(group, name).compose())
    for part in group.split("/"):
        values = values[part]
    target = pkgutil.resolve_name(values["_target_"])
    hints = typing.get_type_hints(target.__init__ if isinstance(target, type) else target)
    for argument, hint in hints.items():
        if argument in values:
            others = [value for value in _list_choices(hint) if value != values[argument]]
            yield from (Option(group, name, ((argument, value),)) for value in others)
    yield from (Option(group, name, tuple(variant.items())) for variant in getattr(target, "contract_variants", ()))


def _list_choices(hint: Any) -> list[Any]:
    if hint is bool:
        return [False, True]
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [value for part in typing.get_args(hint) for value in _list_choices(part)]
    return []
