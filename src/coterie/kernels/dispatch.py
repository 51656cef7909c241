"""Which rows go to which expert, in the order the grouped kernels want them.

Letters: T tokens, E experts, K slots per token, N = T·K slots in all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Dispatch:
    """All N = T·K slots sorted by expert, stable, so that a group keeps its tokens in order.

    order_N: slot indices (token · K + slot), int64; unused slots come last, after every group.
    ends_E: where each expert's group ends in that order, int32 (cumulative counts).
    slots: K.

    >>> d = sort_by_expert(torch.tensor([[1, 0], [1, -1]]), num_experts=3)
    >>> d.order_N.tolist(), d.ends_E.tolist(), d.tokens_N.tolist()
    ([1, 0, 2, 3], [1, 3, 3], [0, 0, 1, 1])
    """

    order_N: Tensor
    ends_E: Tensor
    slots: int

    @property
    def tokens_N(self) -> Tensor:
        """The token of each row in expert order, int64."""
        return self.order_N // self.slots

    @property
    def inverse_N(self) -> Tensor:
        """Where each slot went: the inverse permutation of `order_N`."""
        positions_N = torch.arange(len(self.order_N), device=self.order_N.device)
        return torch.empty_like(self.order_N).scatter_(0, self.order_N, positions_N)


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> Dispatch:
    """Sorts slots by expert. `experts_TK` is int64, -1 for an unused slot. No host synchronisation."""
    experts_N = experts_TK.reshape(-1)
    keys_N = experts_N.where(experts_N >= 0, num_experts)
    order_N = torch.sort(keys_N, stable=True).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=keys_N.device)
    counts.scatter_add_(0, keys_N, torch.ones_like(keys_N, dtype=torch.int32))
    ends_E = counts[:num_experts].cumsum(0, dtype=torch.int32)
    return Dispatch(order_N, ends_E, experts_TK.shape[1])
