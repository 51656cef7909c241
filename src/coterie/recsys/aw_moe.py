"""AW-MoE: experts for feature interactions, weighted by a vote of what the user has done.

Source: Gong et al. 2023, "Attention Weighted Mixture of Experts with Contrastive Learning for Personalized
Ranking in E-commerce" (ICDE 2023, arXiv 2306.05011). The abstract fixes the blocks; widths are our reading.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn import NormalizedExperts, SequenceGate, TargetPooling, drop_elements, router_contrast

GateKind = Literal["attention", "softmax", "one expert"]


class RankerOutput(NamedTuple):
    """Logits [B], and the experts' weights [B, K]."""

    logits: Tensor
    gate: Tensor


class AWMoE(nn.Module):
    """Scores a candidate for a user by Σ_k g_k f_k(x), x the history pooled for the candidate, beside it.

    Args:
        item_features: [items, F] what is known of each item; row 0 is for an unknown one and for padding.
        embedding: width of an embedding of each item beside its features; 0 for none.
        n_experts: K.
        item_dim: D, width of an item's vector.
        expert_hidden: hidden width of each expert, which has one hidden layer.
        gate: "attention" is AW-MoE's `SequenceGate`; "softmax" a two-layer gate on x, the usual mixture; "one
            expert" none, which makes it a DIN.
        length_norm: of the `SequenceGate`.

    Returns (from forward, for history [B, M] and target [B], numbers of items, 0 for none): RankerOutput.

    Raises IndexError for a number of no item.

    >>> ranker = AWMoE(torch.randn(50, 3))
    >>> output = ranker(torch.tensor([[0, 4, 7], [0, 0, 0]]), torch.tensor([9, 9]))
    >>> output.logits.shape, output.gate.shape
    (torch.Size([2]), torch.Size([2, 4]))
    """

    item_features: Tensor

    def __init__(
        self,
        item_features: Tensor,
        *,
        embedding: int = 8,
        n_experts: int = 4,
        item_dim: int = 16,
        expert_hidden: int = 32,
        gate: GateKind = "attention",
        length_norm: bool = True,
    ) -> None:
        super().__init__()
        self.kind, self.n_experts = gate, 1 if gate == "one expert" else n_experts
        self.register_buffer("item_features", item_features.float())
        items, features = item_features.shape
        self.embedding = nn.Embedding(items, embedding)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.item = nn.Sequential(
            nn.Linear(embedding + features, item_dim), nn.ReLU(), nn.Linear(item_dim, item_dim)
        )
        self.pooling = TargetPooling(item_dim)
        width = 2 * item_dim
        self.experts = NormalizedExperts(self.n_experts, width, expert_hidden, norm=False, activation="relu")
        self.score = _Readout(self.n_experts, expert_hidden)
        if gate == "attention":
            self.gate: nn.Module = SequenceGate(item_dim, n_experts, length_norm=length_norm)
        else:
            self.gate = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, self.n_experts))

    def forward(self, history_BM: Tensor, target_B: Tensor) -> RankerOutput:
        items_BMD, target_BD = self.encode(history_BM, target_B)
        mask_BM = history_BM > 0
        x_BX = torch.cat([self.pooling(items_BMD, mask_BM, target_BD), target_BD], 1)
        if self.kind == "attention":
            gate_BK = self.gate(items_BMD, mask_BM, target_BD)
        elif self.kind == "softmax":
            gate_BK = self.gate(x_BX).softmax(-1)
        else:
            gate_BK = torch.ones(len(x_BX), 1, device=x_BX.device)
        scores_BK = self.score(self.experts(x_BX))
        return RankerOutput((gate_BK * scores_BK).sum(1), gate_BK)

    def encode(self, history_BM: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of the history's items [B, M, D] and of the target [B, D]; each item is computed once."""
        numbers = torch.cat([history_BM, target_B.unsqueeze(1)], 1)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.item_features):
            raise IndexError(
                f"items run from {int(numbers.min())} to {int(numbers.max())}; "
                f"there are {len(self.item_features)}, numbered from 0"
            )
        seen, place = torch.unique(numbers, return_inverse=True)
        vectors = self.item(torch.cat([self.embedding(seen), self.item_features[seen]], 1))[place]
        return vectors[:, :-1], vectors[:, -1]

    def gate_of(self, history_BM: Tensor, mask_BM: Tensor, target_B: Tensor) -> Tensor:
        """Weights [B, K] that a part of the history votes for. ValueError unless the gate is "attention"."""
        if self.kind != "attention":
            raise ValueError(f"a {self.kind!r} gate does not read the history; use gate='attention'")
        items_BMD, target_BD = self.encode(history_BM, target_B)
        weights: Tensor = self.gate(items_BMD, mask_BM, target_BD)
        return weights


class _Readout(nn.Module):
    """One number per expert: hidden [B, K, F] to scores [B, K]."""

    def __init__(self, n_experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.bias = nn.Parameter(torch.zeros(n_experts))

    def forward(self, hidden_BKF: Tensor) -> Tensor:
        return (hidden_BKF * self.weight).sum(-1) + self.bias


def ranking_loss(
    model: AWMoE,
    history_BM: Tensor,
    target_B: Tensor,
    label_B: Tensor,
    user_B: Tensor,
    *,
    contrastive: float = 0.0,
    mask_prob: float = 0.5,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy, plus InfoNCE between the gate of a history and of the same with behaviours left out.

    Args:
        model: with an "attention" gate, if contrastive is above 0.
        history_BM: numbers of items, 0 for none.
        target_B: the candidates' numbers.
        label_B: 0 or 1.
        user_B: numbers of users; examples of one user are no negatives of each other.
        contrastive: weight λ of InfoNCE.
        mask_prob: probability that a behaviour is left out; one always stays.
        temperature: of InfoNCE.
        generator: of what is left out.
    """
    output = model(history_BM, target_B)
    loss = F.binary_cross_entropy_with_logits(output.logits, label_B)
    if contrastive:
        some_BM = drop_elements(history_BM > 0, mask_prob, generator)
        view_BK = model.gate_of(history_BM, some_BM, target_B)
        loss = loss + contrastive * router_contrast(output.gate, view_BK, user_B, temperature=temperature)
    return loss
