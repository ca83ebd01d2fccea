"""Several data sets as one: training draws from all of them by weight, and one of them is validated and tested.

Each part is a data set of configs/data with its own options. An epoch has as many images as all parts together, and a
part has the share of it that its weight gives, whatever its size. So a small part is seen several times in an epoch,
and only some images of a large one.
"""

import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import yaml
from pydantic import Field

from handpose.config_files import find_options
from handpose.data.sample import ALWAYS_TRAINED, Annotations, Splits, join_annotations
from handpose.errors import UserError, join_lines
from handpose.schema import bind_arguments, check_component
from handpose.skeleton import NUM_JOINTS
from handpose.yaml_files import load_yaml

T = TypeVar("T")

_DATA_FOLDER = "${paths.data}/"
_EXAMPLE = "for example data.source.parts='{freihand: {weight: 1}, ho3d: {weight: 2}}'"


class _Part(NamedTuple):
    """A data set of a mix.

    Attributes:
        name: name of the part.
        source: its reader.
        weight: its share of the training images, relative to the other parts.
    """

    name: str
    source: Any
    weight: float


class Mix:
    """Several data sets as one.

    Args:
        root: folder that the folders of the parts are in, always data.root.
        parts: name -> options of the part. `weight` is its share of the training images relative to the other parts,
            1 by default; 0: none. `root` is its folder within data.root. `reader` is the data set in configs/data,
            by default the name of the part. All others are options of its reader, as data.source.OPTION there.
        eval_part: name of the part whose validation and test splits are used; None: the first part. With folds, only
            its images are divided, and those of the other parts are always trained on.
        image_size: side in pixels that the images of all parts are resized to, always data.image_size.
        cache_folder: folder in which readers keep labels as arrays; None: they are not kept.

    Raises:
        UserError: there is no such data set, part or option, or a value is not allowed.
    """

    name: ClassVar[str] = "mix"

    def __init__(
        self,
        root: str,
        *,
        parts: Mapping[str, Any] | None,
        eval_part: str | None,
        image_size: Annotated[int, Field(ge=32)] | None,
        cache_folder: str | None = None,
    ) -> None:
        if not parts:
            raise UserError(f"data.source.parts names no data set; {_EXAMPLE}")
        folder = Path(root).expanduser().absolute()
        available = {"image_size": image_size, "cache_folder": cache_folder}
        self._parts = [_make_part(name, options, folder, available) for name, options in parts.items()]
        self._eval_part = eval_part or self._parts[0].name
        names = [part.name for part in self._parts]
        if self._eval_part not in names:
            raise UserError(f"data.source.eval_part={eval_part} is not one of data.source.parts: {', '.join(names)}")
        if not sum(part.weight for part in self._parts) > 0:
            raise UserError("all weights in data.source.parts are 0; give at least one part a weight above 0")

    def splits(self) -> Splits:
        """Read all parts.

        Raises:
            UserError: the reader of a part raises it.
        """
        trains: list[Annotations] = []
        notes: list[str] = []
        first_pose = 0
        for part in self._parts:
            read = _name_part(part.name, part.source.splits)
            notes += read.notes
            if not part.weight and part.name != self._eval_part:
                continue
            train, val, test = (
                replace(each, pose=each.pose + first_pose) for each in (read.train, read.val, read.test)
            )
            first_pose = 1 + max(int(each.pose.max()) for each in (train, val, test) if len(each))
            weight, is_divided = part.weight / len(train), part.name == self._eval_part
            if part.weight:
                trains.append(_weigh(train, weight, is_divided=is_divided))
            if is_divided:
                evaluation = _weigh(val, weight, is_divided=True), test
        return Splits(reduce(join_annotations, _fill_labels(trains)), *evaluation, notes=tuple(notes))


def _weigh(annotations: Annotations, weight: float, *, is_divided: bool) -> Annotations:
    """Give each image a weight, and a group: only the validated part is divided into folds.

    Masks are dropped, because each part has its own folder of them.
    """
    num = len(annotations)
    group = annotations.pose if annotations.group is None else annotations.group
    group = group if is_divided else np.full(num, ALWAYS_TRAINED)
    return replace(annotations, weight=np.full(num, weight), masks=None, group=group)


def _fill_labels(parts: Sequence[Annotations]) -> list[Annotations]:
    """Fill in NaN for joints and rays that a part does not have, if only some parts are labelled in 2-D alone."""
    if all(part.rays is None for part in parts) or all(part.xyz_m is None for part in parts):
        return list(parts)
    nothing = [np.full((len(part), NUM_JOINTS, 3), np.nan) for part in parts]
    return [
        replace(
            part,
            xyz_m=empty if part.xyz_m is None else part.xyz_m,
            rays=empty if part.rays is None else part.rays,
            scale_m=None,
        )
        for part, empty in zip(parts, nothing, strict=True)
    ]


def _make_part(name: str, options: Any, folder: Path, available: Mapping[str, Any]) -> _Part:
    """Make the reader of a part from its options and the defaults of its data set."""
    prefix = f"data.source.parts.{name}."
    if not isinstance(options, Mapping):
        raise UserError(f"{prefix[:-1]}={options} must be options such as {{weight: 1}}; {_EXAMPLE}")
    options = dict(options)
    weight, reader = options.pop("weight", 1.0), options.pop("reader", name)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise UserError(f"{prefix}weight={weight} must be a number that is at least 0")
    file = find_options("data").get(str(reader))
    if file is None or reader == "mix":
        near = difflib.get_close_matches(str(reader), find_options("data"), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{prefix}reader={reader}: there is no such data set to mix in configs/data{hint}")
    defaults = _read_defaults(file)
    values = {**defaults["source"], **options}
    values["root"] = str(folder / str(options.get("root", _find_default_folder(defaults))))
    if values.get("image_size") == "${data.image_size}":
        values["image_size"] = available["image_size"]
    open_keys = [key for key, value in values.items() if "${" in str(value)]
    if open_keys:
        raise UserError(f"{prefix}{open_keys[0]} must be given, because {file} takes it from elsewhere")
    check_component(values, prefix=prefix, same_as="data.source.")
    target = pkgutil.resolve_name(values.pop("_target_"))
    # Parts take the cache folder if their reader knows it; the size of images is an option like others.
    make = bind_arguments(target, cache_folder=available["cache_folder"])
    return _Part(name, _name_part(name, lambda: make(**values)), float(weight))


def _read_defaults(file: Path) -> dict[str, Any]:
    try:
        content = load_yaml(file)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {join_lines(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("source"), dict):
        raise UserError(f"{file} must have the reader of a data set as source")
    return content


def _find_default_folder(defaults: Mapping[str, Any]) -> str:
    """Return the folder of a data set within the folder of all data sets."""
    return f"{defaults.get('root')}/".removeprefix(_DATA_FOLDER)


def _name_part(name: str, call: Callable[[], T]) -> T:
    """Call a function. Its errors name the keys of the part instead of those of the data set alone."""
    try:
        return call()
    except UserError as error:
        part = f"data.source.parts.{name}."
        raise UserError(str(error).replace("data.source.", part).replace("data.root=", f"{part}root=")) from error
