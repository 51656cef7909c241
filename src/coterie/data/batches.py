"""In which order items are seen: a pure function of the seed and the step; whole batches as items."""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class ShuffledBatches:
    """An endless `batch_sampler` for `torch.utils.data.DataLoader`; each epoch is a fresh permutation.

    The batch of a step depends on seed and step alone, so a run that starts at step s goes on exactly as one
    that came there from step 0, and the processes of a distributed run together see what one would see.
    Items that do not fill a last batch are left out of their epoch.

    Args:
        num_items: length of the dataset.
        batch_size: items per step, over all processes and micro-batches.
        seed: of the permutations.
        start_step: first step to yield.
        rank: this process's index.
        world: how many processes there are.
        accumulate: micro-batches per step.

    Yields: `accumulate` lists per step, each of batch_size / (world · accumulate) indices.

    Raises:
        ValueError: the batch cannot be shared evenly, or there are fewer items than one batch.

    >>> batches = ShuffledBatches(num_items=8, batch_size=4, seed=0)
    >>> [indices] = batches.at(0)
    >>> sorted(indices + batches.at(1)[0])
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        *,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size < 1 or accumulate < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size={batch_size}, accumulate={accumulate}, rank={rank} of {world}; "
                "the first two should be at least 1 and 0 ≤ rank < world"
            )
        if batch_size % (world * accumulate):
            raise ValueError(
                f"batch_size={batch_size} cannot be shared by {world} processes × {accumulate} micro-batches;"
                f" use a multiple of {world * accumulate}"
            )
        if num_items < batch_size:
            raise ValueError(f"{num_items} items do not fill one batch of {batch_size}; use a smaller batch")
        self.num_items, self.batch_size, self.seed, self.start_step = num_items, batch_size, seed, start_step
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every item (but a ragged end) was seen once."""
        return self.num_items // self.batch_size

    def at(self, step: int) -> list[list[int]]:
        """This process's micro-batches of `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        batch = self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        # micro-batch before rank: n processes share out each micro-batch that one process would see
        parts = batch.reshape(self.accumulate, self.world, -1)[:, self.rank]
        return cast("list[list[int]]", parts.tolist())

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield from self.at(step)
            step += 1

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
            self._epoch = epoch
        return self._order


def whole_batches(columns: Sequence[Tensor], *, steps: int, batch_size: int, seed: int) -> TensorDataset:
    """A dataset of `steps` items, each a whole batch of rows: shuffled epochs, one after the other.

    For tables: collating single rows would take longer than training on them. Train on it with
    `fit(..., steps=steps, batch_size=1)`; a column [N, ...] then arrives as [1, batch_size, ...].

    Args:
        columns: tensors with N rows each.
        steps: batches.
        batch_size: rows of one; may be larger than N.
        seed: of the permutations.

    >>> [whole] = whole_batches([torch.arange(6)], steps=2, batch_size=3, seed=0).tensors
    >>> whole.shape, sorted(whole.flatten().tolist())
    (torch.Size([2, 3]), [0, 1, 2, 3, 4, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(columns[0]))
    order = torch.cat([torch.randperm(len(columns[0]), generator=generator) for _ in range(epochs)])
    rows = order[: steps * batch_size].view(steps, batch_size)
    return TensorDataset(*(column[rows] for column in columns))
