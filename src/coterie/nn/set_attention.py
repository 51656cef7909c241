"""A set of elements read in the light of a reference: a gate that lets them vote, and a pooling of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SequenceGate(nn.Module):
    """Gate weights by the vote of a sequence: g = Σ_j a_j · v_j, signed and not normalised.

    Each element j gives every expert a vote v_j, and counts as much as its relevance to the reference,
    a_j in (0, 1). There is no softmax, neither over elements, which would erase how many there are, nor over
    experts, which would erase sign and scale.

    Args:
        dim: D, width of elements and of the reference.
        num_experts: K.
        hidden: hidden widths of what computes votes and relevance.
        length_norm: divide by √(number of elements), so that long and short sequences have one scale.

    Returns (from forward, for elements [B, M, D], mask [B, M], reference [B, D]): weights [B, K]; a learnt
    default where a sequence is empty. Padding counts exactly 0.

    Raises ValueError for shapes that do not fit each other.

    Source: Gong et al. 2023 (AW-MoE), gate unit and activation unit.

    >>> gate = SequenceGate(8, num_experts=4)
    >>> mask = torch.tensor([[True, True, False], [False, False, False]])
    >>> weights = gate(torch.randn(2, 3, 8), mask, torch.randn(2, 8))
    >>> weights.shape, bool((weights[1] == gate.default).all())
    (torch.Size([2, 4]), True)
    """

    def __init__(
        self, dim: int, num_experts: int, hidden: tuple[int, int] = (32, 16), *, length_norm: bool = True
    ) -> None:
        super().__init__()
        self.vote, self.relevance = PairMLP(dim, hidden[0], num_experts), PairMLP(dim, hidden[1], 1)
        # weights are unbounded: votes start small, with a default that uses every expert alike
        nn.init.normal_(self.vote.last.weight, std=0.1)
        self.default = nn.Parameter(torch.full((num_experts,), num_experts**-0.5))
        self.length_norm = length_norm

    def forward(self, elements_BMD: Tensor, mask_BM: Tensor, reference_BD: Tensor) -> Tensor:
        check_set(elements_BMD, mask_BM, reference_BD)
        active_BM1 = self.relevance(elements_BMD, reference_BD).sigmoid() * mask_BM.unsqueeze(-1)
        weights_BK = (active_BM1 * self.vote(elements_BMD, reference_BD)).sum(1)
        count_B1 = mask_BM.sum(1, keepdim=True)
        if self.length_norm:
            weights_BK = weights_BK / count_B1.clamp(min=1).sqrt()
        return torch.where(count_B1 > 0, weights_BK, self.default)


class TargetPooling(nn.Module):
    """Σ_j sigmoid(a_j) h_j: elements by their relevance to a reference, not normalised, so that many count.

    Args:
        dim: D, width of elements and of the reference.
        hidden: hidden width of what computes the relevance.

    Returns (from forward, for elements [B, M, D], mask [B, M], reference [B, D]): [B, D].

    Source: Zhou et al. 2018 (DIN), section 4.3.

    >>> pooling, mask = TargetPooling(8), torch.tensor([[True, False]])
    >>> x = torch.randn(1, 2, 8)
    >>> torch.equal(pooling(x, mask, x[:, 0]), pooling(x * mask[..., None], mask, x[:, 0]))
    True
    """

    def __init__(self, dim: int, hidden: int = 16) -> None:
        super().__init__()
        self.relevance = PairMLP(dim, hidden, 1)

    def forward(self, elements_BMD: Tensor, mask_BM: Tensor, reference_BD: Tensor) -> Tensor:
        check_set(elements_BMD, mask_BM, reference_BD)
        active_BM1 = self.relevance(elements_BMD, reference_BD).sigmoid() * mask_BM.unsqueeze(-1)
        pooled_BD: Tensor = (active_BM1 * elements_BMD).sum(1)
        return pooled_BD


class PairMLP(nn.Module):
    """An MLP of [h; z; h - z; h · z] for every element h and the one reference z.

    The first layer of that is a sum of three: of h, of z, which is computed once, and of h · z.
    """

    def __init__(self, dim: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.element = nn.Linear(dim, hidden)
        self.reference = nn.Linear(dim, hidden, bias=False)
        self.product = nn.Linear(dim, hidden, bias=False)
        self.last = nn.Linear(hidden, dim_out)

    def forward(self, elements_BMD: Tensor, reference_BD: Tensor) -> Tensor:
        product_BMD = elements_BMD * reference_BD.unsqueeze(1)
        z_BMF = self.element(elements_BMD) + self.product(product_BMD)
        y: Tensor = self.last(F.relu(z_BMF + self.reference(reference_BD).unsqueeze(1)))
        return y


def check_set(elements_BMD: Tensor, mask_BM: Tensor, reference_BD: Tensor) -> None:
    batch, elements, dim = elements_BMD.shape
    if mask_BM.shape != (batch, elements) or reference_BD.shape != (batch, dim):
        raise ValueError(
            f"elements {tuple(elements_BMD.shape)} with mask {tuple(mask_BM.shape)} and reference "
            f"{tuple(reference_BD.shape)}; should be [B, M, D], [B, M] and [B, D]"
        )
