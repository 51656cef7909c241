"""The smallest language model with every part that training touches, and data for it."""

from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn import LinearScore, MoE, Router, Routing, SwiGLUExperts, TopK
from coterie.train import History, fit


class TinyMoE(nn.Module):
    """Embedding, dropout (so that random numbers matter), one MoE layer with a selection bias, output."""

    def __init__(self, dim: int = 8, experts: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, dim)
        self.dropout = nn.Dropout(dropout)
        router = Router(LinearScore(dim, experts), TopK(2, bias=torch.zeros(experts)))
        self.moe = MoE(router, SwiGLUExperts(experts, dim, 8))
        self.norm = nn.RMSNorm(dim)
        self.out = nn.Linear(dim, 257)

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, list[Routing]]:
        x_BSD = self.dropout(self.embed(ids_BS))
        y_BSD, routing = self.moe(x_BSD)
        logits_BSV: Tensor = self.out(self.norm(x_BSD + y_BSD))
        return logits_BSV, [routing]


def tiny_data(items: int = 24, seq_len: int = 8, seed: int = 0) -> Any:
    """Windows [items, seq_len + 1] of a skewed distribution over a few bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, (items, seq_len + 1), generator=generator) ** 2


def tiny_run(model: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, History]:
    """A quiet run of `fit`; the same arguments give the same run."""
    torch.manual_seed(0)
    model = TinyMoE() if model is None else model
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 4, "progress": False, "lr": 1e-2}
    return model, fit(model, tiny_data(), **{**defaults, **settings})


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold bit-identical tensors."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
