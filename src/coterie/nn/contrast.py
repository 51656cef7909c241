"""Two views of an example should be routed alike, and unlike other examples."""

import torch
from torch import Tensor
from torch.nn import functional as F


def router_contrast(
    weights_BK: Tensor, view_BK: Tensor, groups_B: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """InfoNCE between the gate weights of examples and of another view of each; the rest are negatives.

    Args:
        weights_BK: gate weights [B, K].
        view_BK: those of the other view, in the same order.
        groups_B: whose example each is; two of one group are no negatives of each other. None for all apart.
        temperature: divides the cosine.

    Returns: a scalar, in nats; ln(B) where all are routed alike.

    Raises ValueError for shapes that differ or a temperature that is not positive.

    Source: van den Oord et al. 2018 (InfoNCE); Gong et al. 2023 (AW-MoE), contrastive learning on the gate.

    >>> weights = torch.eye(4)
    >>> router_contrast(weights, weights, temperature=0.1).item() < 0.01
    True
    >>> router_contrast(weights, weights, torch.zeros(4)).item()  # one group: no negatives
    0.0
    """
    if weights_BK.shape != view_BK.shape or (groups_B is not None and len(groups_B) != len(weights_BK)):
        raise ValueError(
            f"weights {tuple(weights_BK.shape)}, view {tuple(view_BK.shape)}"
            + ("" if groups_B is None else f", groups {tuple(groups_B.shape)}")
            + "; should be [B, K], [B, K] and [B]"
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature:g}; should be above 0")
    cosine_BB = F.normalize(weights_BK, dim=1, eps=1e-8) @ F.normalize(view_BK, dim=1, eps=1e-8).T
    logits_BB = cosine_BB / temperature
    if groups_B is not None:
        same_BB = groups_B.unsqueeze(0) == groups_B.unsqueeze(1)
        same_BB.fill_diagonal_(False)
        logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
    return F.cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))


def drop_elements(mask_BM: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """The mask with each element dropped with probability p, but never the last one of a sequence.

    Args:
        mask_BM: bool, True for elements.
        p: 0 ≤ p < 1.
        generator: of the draws.

    Raises ValueError for p outside of that.

    >>> drop_elements(torch.tensor([[True, False], [False, False]]), 0.99).tolist()
    [[True, False], [False, False]]
    """
    if not 0 <= p < 1:
        raise ValueError(f"p={p:g}; should be 0 ≤ p < 1")
    # the element with the largest draw stays, whatever the others do
    draw_BM = torch.rand(mask_BM.shape, generator=generator, device=mask_BM.device).masked_fill(~mask_BM, -1)
    return mask_BM & ((draw_BM >= p) | (draw_BM == draw_BM.max(1, keepdim=True).values))
