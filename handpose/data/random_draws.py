"""Random numbers for the images of a step, of which a process may have only a part."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed


class BatchShare(NamedTuple):
    """Part of the images of a step that one process has. All parts have the same size.

    Attributes:
        rank: index of the part, counted from 0.
        num_shares: number of parts.
    """

    rank: int = 0
    num_shares: int = 1

    @classmethod
    def for_this_process(cls) -> "BatchShare":
        """Return the part of this process according to torch.distributed; the whole step if it is not in use."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()


WHOLE_BATCH = BatchShare()


class RandomDraws:
    """Random numbers for every image of a step, of which it returns those of one part.

    So an image gets the same numbers however many processes share the step.

    Args:
        generator: a generator on the CPU. It has the same state in all processes.
        count: number of images in the part.
        first: number of images of the step before the part.
        total: number of images of the step; None: count.
    """

    def __init__(self, generator: torch.Generator, count: int, *, first: int = 0, total: int | None = None) -> None:
        self.count = count
        self._generator = generator
        self._own = slice(first, first + count)
        self._total = count if total is None else total

    @classmethod
    def for_share(cls, generator: torch.Generator, count: int, share: BatchShare) -> "RandomDraws":
        """Return the draws for the given part of a step, which has `count` images."""
        return cls(generator, count, first=share.rank * count, total=share.num_shares * count)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniformly in [0, 1): (count, *shape)."""
        return torch.rand((self._total, *shape), generator=self._generator)[self._own]

    def symmetric(self, *shape: int) -> Tensor:
        """Draw uniformly in [-1, 1): (count, *shape)."""
        return 2.0 * self.uniform(*shape) - 1.0

    def normal(self, *shape: int) -> Tensor:
        """Draw from the standard normal distribution: (count, *shape)."""
        return torch.randn((self._total, *shape), generator=self._generator)[self._own]

    def integers(self, end: int) -> Tensor:
        """Draw integers from 0 to end - 1: (count,) int64."""
        return torch.randint(end, (self._total,), generator=self._generator)[self._own]

    def common_normal(self, *shape: int) -> Tensor:
        """Draw normal numbers that all images of the step share: (*shape,)."""
        return torch.randn(shape, generator=self._generator)

    def choose(self, probability: float) -> tuple[Tensor, "RandomDraws"]:
        """Choose each image with the same probability.

        The draws for the chosen images come from a generator of their own. So a process without a chosen image can skip
        them. If the probability is 0, nothing is drawn.

        Returns:
            Positions of the chosen images in this part, (n,) int64, and random draws for these n images.
        """
        if not probability:
            return torch.empty(0, dtype=torch.int64), self
        is_chosen = torch.rand(self._total, generator=self._generator) < probability
        seed = int(torch.randint(2**62, (), generator=self._generator))
        rows = is_chosen[self._own].nonzero()[:, 0]
        before, total = int(is_chosen[: self._own.start].sum()), int(is_chosen.sum())
        return rows, RandomDraws(torch.Generator().manual_seed(seed), len(rows), first=before, total=total)
