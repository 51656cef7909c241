"""The network of MIGA: an encoder of windows, a router on what it finds, experts that talk within groups."""

from torch import Tensor, nn

from coterie.finance.train import Scores
from coterie.nn import GroupAttentionExperts, LinearScore, MLPExperts, MoE, Router, TopK


class MIGA(nn.Module):
    """A shared encoder, a top-k router on what it finds, and experts in groups that give the score.

    Args:
        encoder: windows [N, L, F] → [N, width].
        width: of its result.
        n_groups: G groups of experts.
        experts_per_group: M; E = G · M.
        top_k: experts per instrument and day; softmax after selection.
        expert_dim: hidden width of an expert.
        group_attention: whether active experts of a group read each other's hidden vectors.
        auxiliary: a linear head on the encoder beside the experts, for a loss of its own.

    Returns (from forward, for x [N, L, F]): `Scores`.

    Raises ValueError for a top_k outside 1 … E.

    Source: Yu et al. 2024 (MIGA); initialisation is that of the other expert banks.

    >>> import torch
    >>> from coterie.finance.backbones import ConvEncoder
    >>> scores = MIGA(ConvEncoder(6, 24), 24)(torch.randn(50, 5, 6))
    >>> scores.score.shape, scores.routing.experts.shape
    (torch.Size([50]), torch.Size([50, 2]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        *,
        n_groups: int = 2,
        experts_per_group: int = 4,
        top_k: int = 2,
        expert_dim: int = 16,
        group_attention: bool = True,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        num_experts = n_groups * experts_per_group
        experts: GroupAttentionExperts | MLPExperts
        if group_attention:
            experts = GroupAttentionExperts(num_experts, width, expert_dim, num_groups=n_groups, dim_out=1)
        else:
            experts = MLPExperts(num_experts, width, expert_dim, dim_out=1, activation="relu")
        self.encoder = encoder
        self.moe = MoE(Router(LinearScore(width, num_experts), TopK(top_k)), experts)
        self.auxiliary = nn.Linear(width, 1) if auxiliary else None

    def forward(self, x_NLF: Tensor) -> Scores:
        z_ND = self.encoder(x_NLF)
        y_N1, routing = self.moe(z_ND)
        auxiliary_N = None if self.auxiliary is None else self.auxiliary(z_ND).squeeze(1)
        return Scores(y_N1.squeeze(1), routing, auxiliary_N)


class OneResponse(nn.Module):
    """One response for all instruments: an encoder and a head, as a baseline for `MIGA`.

    Args:
        encoder: windows [N, L, F] → [N, width].
        head: [N, width] → [N, 1].

    Returns (from forward, for x [N, L, F]): `Scores` without a routing.

    >>> import torch
    >>> linear = OneResponse(nn.Flatten(), nn.Linear(5 * 6, 1))
    >>> linear(torch.randn(50, 5, 6)).score.shape
    torch.Size([50])
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x_NLF: Tensor) -> Scores:
        y_N1: Tensor = self.head(self.encoder(x_NLF))
        return Scores(y_N1.squeeze(1))
