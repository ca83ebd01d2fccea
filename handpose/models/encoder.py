"""The encoder: any timm model with a feature pyramid (Wightman, PyTorch Image Models).

A decoder only needs to know `channels` and `reductions` of the pyramid.
"""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.errors import UserError
from handpose.models.weights import find_weights_file, map_tensors_by_order


class Encoder(nn.Module):
    """A timm model as a feature pyramid, including the normalisation that its weights expect.

    A model that accepts images of one size only, such as most vision transformers, is built for `image_size`.

    Args:
        name: name of a timm model that supports features_only=True.
        pretrained: whether to download the weights from the hub.
        weights: file to read the weights from, for machines without internet (.safetensors, or a .pth that contains
            tensors only); package:NAME reads them from an installed Python package.
        normalize: whether to normalise images with the mean and standard deviation that timm states for the model; the
            original design did not.
        drop_path: stochastic depth: probability that a training step skips a residual branch, in the last block.
        image_size: side of the images in pixels; None: timm's default for the model.

    Attributes:
        channels: channels of the feature maps, from the finest to the coarsest.
        reductions: strides of the feature maps in pixels, in the same order.
        note: what the user should know about the source of the weights; empty if nothing.

    Raises:
        UserError: there is no such model, it has no feature pyramid, it does not accept images of this size, or its
            weights cannot be loaded.
    """

    training_options = ("pretrained", "weights", "drop_path")
    mean: Tensor
    std: Tensor

    @staticmethod
    def depends_on_image_size(options: Mapping[str, Any]) -> bool:
        """Return whether the shapes of the weights depend on the size of the images.

        Args:
            options: arguments of the constructor.
        """
        return has_fixed_size(options["name"])

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool,
        weights: str | None,
        normalize: bool,
        drop_path: float,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_name(name)
        source = _make_weight_options(weights, name) if weights is not None else None
        self.note = _LOADED_BY_ORDER.format(weights, name) if source is not None and "state_dict" in source else ""
        self.name = name
        self.layout = layout = _find_layout(name, image_size)
        self.channels, self.reductions = list(layout.channels), list(layout.reductions)
        options: dict[str, Any] = {} if layout.img_size is None else {"img_size": layout.img_size}
        if drop_path > 0.0:
            options["drop_path_rate"] = drop_path
        self.pyramid = _create(name, pretrained=pretrained, weights=weights, source=source, options=options)
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        identity = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = (config.mean, config.std) if normalize and config is not None else identity
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute the feature pyramid.

        If the sides of an image are not multiples of the coarsest reduction, the image is enlarged to the next
        multiples. Then the cells of every feature map cover the image exactly, and a relative position is the same in
        all of them. For a model that accepts one size only, every image is resized to that size.

        Args:
            image: (B, 3, H, W) in [0, 1].

        Returns:
            Feature map i is (B, channels[i], H / reductions[i], W / reductions[i]) of the resized image.
        """
        coarsest, fixed = self.reductions[-1], self.layout.fixed_size
        size = [fixed or math.ceil(side / coarsest) * coarsest for side in image.shape[-2:]]
        if size != list(image.shape[-2:]):
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        maps = self.pyramid((image - self.mean) / self.std)
        return [_to_channels_first(self.pyramid, maps[i]) for i in self.layout.levels]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm's model excludes from weight decay."""
        excluded = {_flatten_name(name) for name in _list_no_decay_names(self.name)}
        return {f"pyramid.{name}" for name, _ in self.pyramid.named_parameters() if _flatten_name(name) in excluded}


def has_fixed_size(name: str) -> bool:
    """Return whether a timm model is built for images of one size, on which the shapes of its weights may depend."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.fixed_input_size)


class _PyramidLayout(NamedTuple):
    """Layout of the feature pyramid of a timm model.

    Attributes:
        levels: indices of the feature maps that are used.
        channels: their channels.
        reductions: their strides in pixels.
        fixed_size: side in pixels of the only images that the model accepts; None: any size.
        img_size: timm's `img_size` argument for the model; None: timm's default.
    """

    levels: tuple[int, ...]
    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    fixed_size: int | None
    img_size: int | None


@functools.cache
def _find_layout(name: str, image_size: int | None) -> _PyramidLayout:
    """Find out how a model must be created for images of a given size, by running it on shapes only.

    Raises:
        UserError: the model has no feature pyramid, or none for this size.
    """
    config = timm.get_pretrained_cfg(name)
    own_size = 224 if config is None else config.input_size[-1]  # timm's default
    asked = image_size or own_size
    try:
        coarsest = _create_on_meta(name).feature_info.reduction()[-1]
        tiling = math.ceil(asked / coarsest) * coarsest
        if not has_fixed_size(name):
            return _try_layout(name, tiling, fixed_size=None, img_size=None)
        if asked == own_size and (layout := _try_layout_or_none(name, own_size)) is not None:
            return layout
        return _try_layout(name, tiling, fixed_size=tiling, img_size=tiling)
    except Exception as error:  # timm and torch raise exceptions of many types
        if asked != own_size:
            _find_layout(name, own_size)  # raises an error with the reason if the model accepts no size at all
            raise UserError(
                f"model.encoder.name={name} does not take pictures of {asked} px; give data.image_size={own_size}"
            ) from error
        raise UserError(f"model.encoder.name={name} cannot serve as an encoder: {_explain_error(error)}") from error


def _try_layout_or_none(name: str, size: int) -> _PyramidLayout | None:
    try:
        return _try_layout(name, size, fixed_size=size, img_size=None)
    except Exception:  # the caller tries a multiple of the coarsest reduction next
        return None


def _try_layout(name: str, size: int, *, fixed_size: int | None, img_size: int | None) -> _PyramidLayout:
    """Run a model on the shape of an image.

    Raises:
        ValueError: the cells of its last feature map do not cover the image.
    """
    maps, info = _compute_shapes(name, size, img_size=img_size)
    channels, reductions = info.channels(), info.reduction()
    cells = [tuple(shape[1:]) for shape in maps]
    levels = tuple(i for i in range(len(maps)) if _covers_image(cells[i], reductions[i], size))
    if not levels or levels[-1] != len(maps) - 1 or any(maps[i][0] != channels[i] for i in levels):
        got = " x ".join(map(str, cells[-1]))
        raise ValueError(
            f"its last feature map has {got} cells, which do not cover a picture of {size} px at a stride of "
            f"{reductions[-1]}"
        )
    return _PyramidLayout(
        levels=levels,
        channels=tuple(channels[i] for i in levels),
        reductions=tuple(reductions[i] for i in levels),
        fixed_size=fixed_size,
        img_size=img_size,
    )


def _covers_image(cells: Sequence[int], reduction: int, size: int) -> bool:
    """Whether this number of cells covers an image to within half a cell."""
    return all(abs(count * reduction - size) < reduction / 2 for count in cells)


def _compute_shapes(name: str, size: int, *, img_size: int | None) -> tuple[list[tuple[int, ...]], Any]:
    """Return the channels, rows and columns of each feature map for an image of this size, and timm's feature_info."""
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    pyramid = _create_on_meta(name, **options).eval()
    try:
        maps = pyramid(torch.zeros(1, 3, size, size, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        # The shapes depend on values, which tensors on the meta device do not have.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            pyramid = timm.create_model(name, features_only=True, pretrained=False, **options).eval()
            maps = pyramid(torch.zeros(1, 3, size, size))
    return [tuple(_to_channels_first(pyramid, each).shape[1:]) for each in maps], pyramid.feature_info


@functools.lru_cache(maxsize=1)  # _find_layout often needs the same model twice in a row
def _create_on_meta(name: str, *, features_only: bool = True, **options: Any) -> Any:
    """Create a timm model without values and without changing the state of the random number generator."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return timm.create_model(name, features_only=features_only, pretrained=False, **options)


def _to_channels_first(pyramid: nn.Module, features: Tensor) -> Tensor:
    is_last = str(getattr(getattr(pyramid, "output_fmt", None), "value", "NCHW")) == "NHWC"
    return features.permute(0, 3, 1, 2) if is_last else features


@functools.cache
def _list_no_decay_names(name: str) -> frozenset[str]:
    model = _create_on_meta(name, features_only=False)
    return frozenset(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())


def _flatten_name(name: str) -> str:
    """Return a parameter name that is the same in timm's models and feature extractors, which rename some modules."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")


_LOADED_BY_ORDER = "{} has other tensor names than {}: since the shapes agree, the tensors are matched by their order"


def _make_weight_options(weights: str, name: str) -> dict[str, Any]:
    """Return where timm must take the weights from: `file` or `state_dict`."""
    file = find_weights_file(weights)
    try:
        tensors = map_tensors_by_order(file, name)
    except Exception as error:  # torch, safetensors and timm raise exceptions of many types
        raise UserError(f"model.encoder.weights={weights} does not fit {name}: {_explain_error(error)}") from error
    return {"file": str(file)} if tensors is None else {"state_dict": tensors}


def _create(
    name: str, *, pretrained: bool, weights: str | None, source: dict[str, Any] | None, options: dict[str, Any]
) -> nn.Module:
    try:
        pyramid = timm.create_model(
            name,
            features_only=True,
            pretrained=pretrained or source is not None,
            pretrained_cfg_overlay=source,
            **options,
        )
    except Exception as error:  # timm, the hub's client and torch raise exceptions of many types
        if isinstance(error, TypeError) and "drop_path_rate" in options and "drop_path_rate" in str(error):
            raise UserError(
                f"model.encoder.drop_path={options['drop_path_rate']:g}: {name} has no residual branches to drop; give "
                "model.encoder.drop_path=0.0"
            ) from error
        if weights is not None:
            raise UserError(f"model.encoder.weights={weights} does not fit {name}: {_explain_error(error)}") from error
        if pretrained:
            raise UserError(
                f"the pretrained weights of {name} cannot be fetched ({_explain_error(error)}); give "
                "model.encoder.weights=FILE or model.encoder.pretrained=false"
            ) from error
        raise UserError(f"model.encoder.name={name} cannot serve as an encoder: {_explain_error(error)}") from error
    for module in pyramid.modules():  # timm would keep a second copy of all tensors
        if isinstance(config := getattr(module, "pretrained_cfg", None), dict):
            config.pop("state_dict", None)
    return pyramid


def _explain_error(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_name(name: str) -> None:
    architecture, dot, tag = name.partition(".")
    if timm.is_model(name):
        tags = timm.models.get_arch_pretrained_cfgs(architecture)
        if dot and name not in tags:
            known = f"it has {' and '.join(tags)}" if tags else "it has none"
            raise UserError(f"model.encoder.name={name}: {architecture} has no weights with the tag '{tag}'; {known}")
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists all models"
    raise UserError(f"model.encoder.name={name} is not a timm model{hint}")
