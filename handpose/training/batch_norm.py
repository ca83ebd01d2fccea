"""Batch norm over all processes that share a training step, so that it sees the whole batch as one process does."""

from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins import LayerSync
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

_Module = TypeVar("_Module", bound=nn.Module)
_DIMS, _SHAPE = (0, 2, 3), (1, -1, 1, 1)


class SyncBatchNormPlugin(LayerSync):
    """Lightning's plugin for it, which acts where a strategy has several processes.

    on_gpu: whether they train on GPUs. Lightning's own, TorchSyncBatchNorm (2.6.6), uses torch's conversion, which
    replaces timm's BatchNormAct2d by a norm without the activation: another network. It is for GPUs only, too.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._kind = GpuSyncBatchNorm if on_gpu else CpuSyncBatchNorm

    def apply(self, model: nn.Module) -> nn.Module:
        """Exchange the norms within the model; the parameters remain the same objects."""
        for parent, name, child in _find_modules(model, _BatchNorm):
            setattr(parent, name, self._kind(child))
        return model

    def revert(self, model: _Module) -> _Module:
        """Put back what was there."""
        for parent, name, child in _find_modules(model, _SyncBatchNormBase):
            setattr(parent, name, child.restore())
        return model


def _find_modules(model: nn.Module, kind: type) -> list[tuple[nn.Module, str, Any]]:
    """Parent, name and module of all modules of a kind."""
    pairs = ((parent, *pair) for parent in model.modules() for pair in parent.named_children())
    return [each for each in pairs if isinstance(each[2], kind)]


class _SyncBatchNormBase(_BatchNorm):
    """Stands for a norm: has its parameters and statistics, and what follows it in timm's, dropout and activation.

    Every process has equally many values. norm: that it stands for.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.train(norm.training)
        self.__dict__["_norm"] = norm  # no submodule, whose parameters would count twice

    def restore(self) -> nn.Module:
        """The norm that it stands for, with what has been learnt."""
        norm: nn.Module = self.__dict__["_norm"]
        norm.__dict__["_parameters"].update(self._parameters)
        norm.__dict__["_buffers"].update(self._buffers)
        return norm.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


class GpuSyncBatchNorm(_SyncBatchNormBase, nn.SyncBatchNorm):
    """With torch's kernels."""

    process_group: Any = None


class _AllReduceSum(torch.autograd.Function):
    """Over processes, with a gradient. torch has one in distributed.nn, which is deprecated (2.14)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Each process has a part in every other one's loss."""
        return _AllReduceSum.forward(ctx, grad)


def _all_reduce_sum(x: Tensor) -> Tensor:
    total: Tensor = _AllReduceSum.apply(x)
    return total


class CpuSyncBatchNorm(_SyncBatchNormBase, nn.BatchNorm2d):
    """Ioffe and Szegedy 2015, with the sums over processes, whose gradients are summed too."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and distributed.is_initialized()):
            return super().forward(x)
        count = distributed.get_world_size() * x.numel() // x.shape[1]
        mean = _all_reduce_sum(x.sum(_DIMS)) / count
        centered = x - mean.view(_SHAPE)
        variance = _all_reduce_sum(centered.square().sum(_DIMS)) / count
        self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        normed = centered * torch.rsqrt(variance + self.eps).view(_SHAPE)
        if self.weight is not None:
            normed = normed * self.weight.view(_SHAPE) + self.bias.view(_SHAPE)
        result: Tensor = self.act(self.drop(normed))
        return result

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased_variance, share)
