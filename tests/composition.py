"""A cache that makes composing a configuration about ten times faster in the tests."""

import dataclasses
import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import omegaconf.base
import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult

from handpose import config_files


def cache_composition(patch: pytest.MonkeyPatch) -> None:
    """Cache what Hydra composes from the current configuration folders. Folders that a test adds are not cached.

    Hydra returns unresolved configurations, so equal overrides always give equal configurations. Overrides that select
    the same options of the groups share the merged files; Hydra applies the remaining overrides to a copy.

    Args:
        patch: undoes the cache.
    """
    folders = config_files.config_folders()
    sources = {"pkg://hydra.conf", "structured://", *(f"file://{folder}" for folder in folders)}
    create_list = _keep_lists(config_loader_impl.create_defaults_list, sources)
    merge = _keep_merged(ConfigLoaderImpl._compose_config_from_defaults_list, sources)
    patch.setattr(hydra, "compose", _keep_configs(hydra.compose, folders))
    patch.setattr(config_loader_impl, "create_defaults_list", create_list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge)
    patch.setattr(FileConfigSource, "load_config", _keep_files(FileConfigSource.load_config, sources))
    patch.setattr(omegaconf.base, "parse", functools.cache(omegaconf.base.parse))  # of interpolations


def _keep_configs(compose: Any, folders: list[Path]) -> Any:
    kept: dict[Any, bytes] = {}  # copy.deepcopy takes six times as long as pickle.loads

    def compose_once(name: str, overrides: Sequence[str], return_hydra_config: bool = False) -> Any:
        if config_files.config_folders() != folders:
            return compose(name, overrides, return_hydra_config)
        key = (name, *overrides, return_hydra_config)
        if key not in kept:
            kept[key] = pickle.dumps(compose(name, list(overrides), return_hydra_config))
        return pickle.loads(kept[key])

    return compose_once


def _keep_lists(create_defaults_list: Any, sources: set[str]) -> Any:
    kept: dict[Any, Any] = {}

    def create_once(repo: IConfigRepository, config_name: str, overrides_list: list[Override], **how: Any) -> Any:
        if not _reads_only(repo, sources):
            return create_defaults_list(repo=repo, config_name=config_name, overrides_list=overrides_list, **how)
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        choices = [override for override in overrides_list if not any(override is value for value in values)]
        key = (config_name, *(choice.input_line for choice in choices), *how.items())
        if key not in kept:
            kept[key] = create_defaults_list(repo=repo, config_name=config_name, overrides_list=choices, **how)
        return dataclasses.replace(kept[key], config_overrides=values)

    return create_once


def _keep_merged(merge: Any, sources: set[str]) -> Any:
    kept: dict[str, bytes] = {}

    def merge_once(loader: ConfigLoaderImpl, defaults: Sequence[ResultDefault], repo: IConfigRepository) -> Any:
        if not _reads_only(repo, sources):
            return merge(loader, defaults, repo)
        key = repr(defaults)
        if key not in kept:
            kept[key] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(kept[key])

    return merge_once


def _keep_files(load_config: Any, sources: set[str]) -> Any:
    kept: dict[tuple[str, str], bytes] = {}

    def load_once(source: FileConfigSource, config_path: str) -> ConfigResult:
        if source.full_path() not in sources:
            return load_config(source, config_path)
        key = (source.full_path(), config_path)
        if key not in kept:
            kept[key] = pickle.dumps(load_config(source, config_path))
        return pickle.loads(kept[key])

    return load_once


def _reads_only(repo: IConfigRepository, sources: set[str]) -> bool:
    return {source.full_path() for source in repo.get_sources()} <= sources
