"""The encoder: any timm model that gives a feature pyramid (Wightman, PyTorch Image Models).

`channels` and `reductions` of the pyramid are the whole contract between encoder and decoder.
"""

import difflib
import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.errors import UserError


class Encoder(nn.Module):
    """A timm model as a feature pyramid, with the normalisation its weights expect.

    name: of the timm model. pretrained: fetch its weights from the hub. weights: a file with them instead, for machines
    without internet (.safetensors, or a .pth holding tensors only). normalize: subtract the mean and divide by the
    deviation that timm states for the model; the original design did not.

    channels, reductions: of the maps that `forward` gives, finest first.
    Raises UserError when there is no such model, it has no pyramid, or its weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, name: str, pretrained: bool, weights: str | None, normalize: bool, drop_path: float) -> None:
        super().__init__()
        self.pyramid = _create(name, pretrained=pretrained, weights=weights, drop_path=drop_path)
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


def _create(name: str, *, pretrained: bool, weights: str | None, drop_path: float) -> nn.Module:
    _check_name(name)
    overlay = None
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"model.encoder.weights: there is no file {weights}")
        overlay = {"file": weights}
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0.0 else {}
    try:
        return timm.create_model(
            name,
            features_only=True,
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=overlay,
            **options,
        )
    except Exception as error:  # timm, the hub's client and torch each raise their own; the cause is told in all cases
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if weights is not None:
            raise UserError(f"model.encoder.weights={weights} does not fit {name}: {reason}") from error
        if pretrained:
            raise UserError(
                f"the pretrained weights of {name} cannot be fetched ({reason}); give model.encoder.weights=FILE or "
                "model.encoder.pretrained=false"
            ) from error
        raise UserError(f"model.encoder.name={name} cannot serve as an encoder: {reason}") from error


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
    raise UserError(f"model.encoder.name={name} is no timm model{hint}")
