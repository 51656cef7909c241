"""What a decoder keeps of earlier positions, so that each new token costs one position."""

import torch
from torch import Tensor


class Cache:
    """Keys and values of every layer, and how many positions they hold."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.length = 0


class LayerCache:
    """Keys and values of one layer so far, [B, Hkv, S, C], and what its router keeps of earlier positions."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.routing: dict[str, Tensor] = {}

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v
