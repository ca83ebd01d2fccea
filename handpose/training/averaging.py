"""The moving average of the weights, which is what is validated, saved as the network, and exported.

Lightning's WeightAveraging does the work: the average takes the network's place during validation, lies under
`state_dict` in checkpoints, with the weights that are trained beside it to go on from, and stays when training ends.
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class AveragedWeights(WeightAveraging):
    """Exponential moving average of weights and of batch norm's statistics, updated after every step.

    decay: of an old average, at most. After n updates it is min(decay, (1 + n) / (10 + n)), as TensorFlow's
    ExponentialMovingAverage has it: else the average of a short run would be its random beginning.
    """

    def __init__(self, *, decay: float) -> None:
        super().__init__(use_buffers=True, multi_avg_fn=self._update)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning 2.6.6 would leave the average on the CPU: the network reaches its GPU only after this."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:  # counted here, where asking for the count does not wait for a GPU
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    @torch.no_grad()
    def _update(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor) -> None:
        assert self._average_model is not None
        count = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + count) / (10 + count))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1.0 - decay)
        else:
            torch._foreach_copy_(list(averaged), list(current))  # counts, as of batch norm's updates
