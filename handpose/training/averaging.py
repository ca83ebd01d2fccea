"""Exponential moving average of the weights. The averaged weights are validated, saved as the network, and exported.

Lightning's WeightAveraging does the work. During validation the averaged weights replace the trained ones. Checkpoints
hold the averaged weights under `state_dict`, and next to them the trained weights that are needed to resume. After
training the network keeps the averaged weights.
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights and of the batch norm statistics, updated after every step.

    Args:
        decay: largest decay of the average. After n updates the decay is min(decay, (1 + n) / (10 + n)), as in
            TensorFlow's ExponentialMovingAverage. With a constant decay the average of a short run would consist mainly
            of the random initial weights.
    """

    def __init__(self, *, decay: float) -> None:
        super().__init__(use_buffers=True, multi_avg_fn=self._update)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Create the averaged model on the device of the run.

        Lightning 2.6.6 would leave it on the CPU, because it moves the network to the GPU only after this hook.
        """
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:  # a count on the CPU can be read without waiting for the GPU
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    @torch.no_grad()
    def _update(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor) -> None:
        assert self._average_model is not None
        count = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + count) / (10 + count))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1.0 - decay)
        else:
            torch._foreach_copy_(list(averaged), list(current))  # integers, such as batch norm's number of updates
