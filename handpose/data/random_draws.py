"""Random numbers for the pictures of a batch, of which a process may hold only a part."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed


class BatchShare(NamedTuple):
    """The part of a step's pictures that one process has: the rank-th of num equal ones, in order."""

    rank: int = 0
    num_shares: int = 1

    @classmethod
    def for_this_process(cls) -> "BatchShare":
        """Of this process among those of torch.distributed; the whole where there are none."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()


WHOLE_BATCH = BatchShare()


class RandomDraws:
    """Draws for every picture of a step, and gives those of a share of them.

    So each picture is drawn the same however many processes share the step. generator: lives on the CPU, and is in the
    same state in all of them. count: pictures of the share; first: those of the step before it; total: all of it.
    """

    def __init__(self, generator: torch.Generator, count: int, *, first: int = 0, total: int | None = None) -> None:
        self.count = count
        self._generator = generator
        self._own = slice(first, first + count)
        self._total = count if total is None else total

    @classmethod
    def for_share(cls, generator: torch.Generator, count: int, share: BatchShare) -> "RandomDraws":
        return cls(generator, count, first=share.rank * count, total=share.num_shares * count)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1), (count, *shape)."""
        return torch.rand((self._total, *shape), generator=self._generator)[self._own]

    def symmetric(self, *shape: int) -> Tensor:
        """Uniform in [-1, 1), (count, *shape)."""
        return 2.0 * self.uniform(*shape) - 1.0

    def normal(self, *shape: int) -> Tensor:
        """(count, *shape)."""
        return torch.randn((self._total, *shape), generator=self._generator)[self._own]

    def integers(self, end: int) -> Tensor:
        """In 0 to end - 1, (count,) int64."""
        return torch.randint(end, (self._total,), generator=self._generator)[self._own]

    def common_normal(self, *shape: int) -> Tensor:
        """One draw that all pictures of the step see, (*shape,)."""
        return torch.randn(shape, generator=self._generator)

    def choose(self, probability: float) -> tuple[Tensor, "RandomDraws"]:
        """Each picture with the same probability: rows of the share, (n,) int64, and draws for these n pictures.

        They come from a generator of their own, so that what one share has no picture for it can leave out. With
        probability 0 nothing is drawn.
        """
        if not probability:
            return torch.empty(0, dtype=torch.int64), self
        is_chosen = torch.rand(self._total, generator=self._generator) < probability
        seed = int(torch.randint(2**62, (), generator=self._generator))
        rows = is_chosen[self._own].nonzero()[:, 0]
        before, total = int(is_chosen[: self._own.start].sum()), int(is_chosen.sum())
        return rows, RandomDraws(torch.Generator().manual_seed(seed), len(rows), first=before, total=total)
