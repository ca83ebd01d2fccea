"""Batch norm over all processes that share a training step, so that it normalises over the whole batch."""

from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins import LayerSync
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

_Module = TypeVar("_Module", bound=nn.Module)
_DIMS, _SHAPE = (0, 2, 3), (1, -1, 1, 1)


class SyncBatchNormPlugin(LayerSync):
    """Lightning plugin that synchronises batch norm if the strategy has several processes.

    Lightning's own TorchSyncBatchNorm (2.6.6) works on GPUs only. It also uses torch's conversion, which replaces
    timm's BatchNormAct2d by a norm without the activation, and so changes the network.

    Args:
        on_gpu: whether the processes train on GPUs.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._kind = GpuSyncBatchNorm if on_gpu else CpuSyncBatchNorm

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the batch norms of the model. The parameters remain the same objects."""
        for parent, name, child in _find_modules(model, _BatchNorm):
            setattr(parent, name, self._kind(child))
        return model

    def revert(self, model: _Module) -> _Module:
        """Put the original batch norms back."""
        for parent, name, child in _find_modules(model, _SyncBatchNormBase):
            setattr(parent, name, child.restore())
        return model


def _find_modules(model: nn.Module, kind: type) -> list[tuple[nn.Module, str, Any]]:
    """List the modules of a class, each as parent, name and module."""
    pairs = ((parent, *pair) for parent in model.modules() for pair in parent.named_children())
    return [each for each in pairs if isinstance(each[2], kind)]


class _SyncBatchNormBase(_BatchNorm):
    """A synchronised replacement of a batch norm. Every process must have the same number of values.

    It shares the parameters and statistics of the original norm, and the dropout and activation that follow in timm's.

    Args:
        norm: the batch norm to replace.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.train(norm.training)
        self.__dict__["_norm"] = norm  # not a submodule, because its parameters would then count twice

    def restore(self) -> nn.Module:
        """Return the original norm with the parameters and statistics learnt since."""
        norm: nn.Module = self.__dict__["_norm"]
        norm.__dict__["_parameters"].update(self._parameters)
        norm.__dict__["_buffers"].update(self._buffers)
        return norm.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


class GpuSyncBatchNorm(_SyncBatchNormBase, nn.SyncBatchNorm):
    """Synchronised batch norm with torch's GPU kernels."""

    process_group: Any = None


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes, with a gradient. torch.distributed.nn has one too, but it is deprecated (2.14)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Sum the gradients, because the input of each process contributes to the losses of all processes."""
        return _AllReduceSum.forward(ctx, grad)


def _all_reduce_sum(x: Tensor) -> Tensor:
    total: Tensor = _AllReduceSum.apply(x)
    return total


class CpuSyncBatchNorm(_SyncBatchNormBase, nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015) with sums, and their gradients, over all processes."""

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
