"""Clusters of vectors by their direction."""

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 4096  # points that are compared with all centres at a time


def spherical_kmeans(
    points_NW: Tensor, weights_N: Tensor, first_C: Tensor, *, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """Weighted spherical k-means: a point belongs to the centre with the largest cosine.

    A centre has the direction of the weighted mean of its points' directions, so that a long point counts no
    more than a short one, and as its length the weighted mean of their lengths. One without points, or whose
    points weigh nothing, stays as it is.

    Args:
        points_NW: N points.
        weights_N: ≥ 0.
        first_C: numbers of the points that are the first centres.
        iterations: at most; it ends early when no point changes its centre.

    Returns: centres [C, W], and the centre that each point belongs to, [N] int64.

    Source: Dhillon and Modha 2001, with weights as in DERN (arXiv 2509.10377).

    >>> points = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> centres, owner = spherical_kmeans(points, torch.tensor([1.0, 3.0, 1.0]), torch.tensor([0, 2]))
    >>> centres.tolist(), owner.tolist()
    ([[2.5, 0.0], [0.0, 2.0]], [0, 0, 1])
    """
    points_NW, weights_N = points_NW.float(), weights_N.to(points_NW.device, torch.float32)
    unit_NW, length_N = F.normalize(points_NW, dim=1), points_NW.norm(dim=1)
    centres_CW = unit_NW[first_C]
    owner_N = _nearest(unit_NW, centres_CW)
    for _ in range(iterations):
        sums_CW = _sums(unit_NW * weights_N.unsqueeze(1), owner_N, len(first_C))
        full_C1 = sums_CW.norm(dim=1, keepdim=True) > 0
        centres_CW = torch.where(full_C1, F.normalize(sums_CW, dim=1, eps=1e-30), centres_CW)
        before_N, owner_N = owner_N, _nearest(unit_NW, centres_CW)
        if torch.equal(before_N, owner_N):
            break
    total_C = _sums(weights_N, owner_N, len(first_C))
    mean_C = _sums(weights_N * length_N, owner_N, len(first_C)) / total_C.clamp(min=1e-30)
    length_C = torch.where(total_C > 0, mean_C, length_N[first_C])
    return centres_CW * length_C.unsqueeze(1), owner_N


def _nearest(unit_NW: Tensor, centres_CW: Tensor) -> Tensor:
    return torch.cat([(part @ centres_CW.T).argmax(dim=1) for part in torch.split(unit_NW, _CHUNK)])


def _sums(values_N: Tensor, owner_N: Tensor, count: int) -> Tensor:
    return values_N.new_zeros(count, *values_N.shape[1:]).index_add_(0, owner_N, values_N)
