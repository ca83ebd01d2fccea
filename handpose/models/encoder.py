"""The encoder: any timm model that gives a feature pyramid (Wightman, PyTorch Image Models).

`channels` and `reductions` of the pyramid are the whole contract between encoder and decoder.
"""

import difflib
import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.errors import UserError
from handpose.models.weights import tensors_in_order, weights_file


class Encoder(nn.Module):
    """A timm model as a feature pyramid, with the normalisation its weights expect.

    name: of the timm model. pretrained: fetch its weights from the hub. weights: a file with them instead, for machines
    without internet (.safetensors, or a .pth holding tensors only), or `package:NAME` for an installed Python package
    that carries one. normalize: subtract the mean and divide by the deviation that timm states for the model; the
    original design did not.

    channels, reductions: of the maps that `forward` gives, finest first. note: what a user should know of where the
    weights came from; empty for nothing.
    Raises UserError when there is no such model, it has no pyramid, or its weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, name: str, pretrained: bool, weights: str | None, normalize: bool, drop_path: float) -> None:
        super().__init__()
        _check_name(name)
        source = _source(weights, name) if weights is not None else None
        self.note = _BY_ORDER.format(weights, name) if source is not None and "state_dict" in source else ""
        self.pyramid = _create(name, pretrained=pretrained, weights=weights, source=source, drop_path=drop_path)
        info: Any = self.pyramid.feature_info
        self.channels: list[int] = info.channels()
        self.reductions: list[int] = info.reduction()
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        identity = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = (config.mean, config.std) if normalize and config is not None else identity
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W) in [0, 1]. Returns the pyramid; map i is (B, channels[i], H / reductions[i], ...).

        A picture whose sides are no multiples of the coarsest reduction is enlarged to the next ones: then the cells of
        every map tile the picture, and a place is the same fraction of each.
        """
        coarsest = self.reductions[-1]
        size = [math.ceil(side / coarsest) * coarsest for side in image.shape[-2:]]
        if size != list(image.shape[-2:]):
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        return self.pyramid((image - self.mean) / self.std)


_BY_ORDER = "{} has other names than {}: its tensors, whose shapes agree, are taken in their order"


def _source(weights: str, name: str) -> dict[str, Any]:
    """Where timm is to take the weights from: `file`, or `state_dict`."""
    file = weights_file(weights)
    try:
        tensors = tensors_in_order(file, name)
    except Exception as error:  # torch, safetensors and timm each raise their own
        raise UserError(f"model.encoder.weights={weights} does not fit {name}: {_reason(error)}") from error
    return {"file": str(file)} if tensors is None else {"state_dict": tensors}


def _create(
    name: str, *, pretrained: bool, weights: str | None, source: dict[str, Any] | None, drop_path: float
) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0.0 else {}
    try:
        pyramid = timm.create_model(
            name,
            features_only=True,
            pretrained=pretrained or source is not None,
            pretrained_cfg_overlay=source,
            **options,
        )
    except Exception as error:  # timm, the hub's client and torch each raise their own; the cause is told in all cases
        if weights is not None:
            raise UserError(f"model.encoder.weights={weights} does not fit {name}: {_reason(error)}") from error
        if pretrained:
            raise UserError(
                f"the pretrained weights of {name} cannot be fetched ({_reason(error)}); give "
                "model.encoder.weights=FILE or model.encoder.pretrained=false"
            ) from error
        raise UserError(f"model.encoder.name={name} cannot serve as an encoder: {_reason(error)}") from error
    for module in pyramid.modules():  # timm keeps what it was made from: the same tensors once more
        if isinstance(config := getattr(module, "pretrained_cfg", None), dict):
            config.pop("state_dict", None)
    return pyramid


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
    raise UserError(f"model.encoder.name={name} is no timm model{hint}")
