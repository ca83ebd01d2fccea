"""A cache that makes composing a configuration about ten times faster in the tests."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import hydra
import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override

from handpose import config_files
from handpose.config_files import CONFIGS

SHIPPED = {"pkg://hydra.conf", f"file://{CONFIGS}", "structured://"}
"""Where Hydra looks when there is no folder of a user."""


def cache_composition(patch: pytest.MonkeyPatch) -> None:
    """Keep what Hydra composes from the configurations of this repository.

    A configuration is unresolved, and so the same for equal overrides. For other overrides that choose the same
    options, what Hydra reads and merges is kept, and the overrides are applied to a copy of it.
    """
    patch.setattr(hydra, "compose", _keep_configs(hydra.compose))
    patch.setattr(config_loader_impl, "create_defaults_list", _keep_lists(config_loader_impl.create_defaults_list))
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _keep_merged(merge))


def _keep_configs(compose: Any) -> Any:
    kept: dict[Any, Any] = {}

    def compose_once(name: str, overrides: Sequence[str], return_hydra_config: bool = False) -> Any:
        if config_files.config_folders() != [CONFIGS]:
            return compose(name, overrides, return_hydra_config)
        key = (name, *overrides, return_hydra_config)
        if key not in kept:
            kept[key] = compose(name, list(overrides), return_hydra_config)
        return copy.deepcopy(kept[key])

    return compose_once


def _keep_lists(create_defaults_list: Any) -> Any:
    kept: dict[Any, Any] = {}

    def create_once(repo: IConfigRepository, config_name: str, overrides_list: list[Override], **how: Any) -> Any:
        if not _is_shipped(repo):
            return create_defaults_list(repo=repo, config_name=config_name, overrides_list=overrides_list, **how)
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        choices = [override for override in overrides_list if not any(override is value for value in values)]
        key = (config_name, *(choice.input_line for choice in choices), *how.items())
        if key not in kept:
            kept[key] = create_defaults_list(repo=repo, config_name=config_name, overrides_list=choices, **how)
        return dataclasses.replace(kept[key], config_overrides=values)

    return create_once


def _keep_merged(merge: Any) -> Any:
    kept: dict[str, Any] = {}

    def merge_once(loader: ConfigLoaderImpl, defaults: Sequence[ResultDefault], repo: IConfigRepository) -> Any:
        if not _is_shipped(repo):
            return merge(loader, defaults, repo)
        key = repr(defaults)
        if key not in kept:
            kept[key] = merge(loader, defaults, repo)
        return copy.deepcopy(kept[key])

    return merge_once


def _is_shipped(repo: IConfigRepository) -> bool:
    return {source.full_path() for source in repo.get_sources()} <= SHIPPED
