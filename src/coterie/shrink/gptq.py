"""GPTQ: columns are rounded one after the other, and what each loses is mended by those still to come.

The Hessian is an argument, so that whatever weights the tokens (routing weights, as in MoEQuant) only changes
the tensor. Weights are [..., out, in], Hessians [..., in, in]: all experts of a bank at once.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coterie.kernels.packed import PackedWeight, check_bits, check_group_size
from coterie.shrink.quantize import Grid, check_finite, find_grid, to_groups

BLOCK = 128  # columns, between updates of all the later ones
MORE_DAMPING = (1, 10, 100)  # times the damping asked for, until the Hessian can be factored


class HessianMean:
    """The running mean H = 2/n · Σ c x xᵀ of a linear layer's inputs, in float64.

    Args:
        columns: width of an input.

    n counts tokens, not their weights.

    >>> hessian = HessianMean(2)
    >>> hessian.add(torch.tensor([[1.0, 2.0]]))
    >>> hessian.add(torch.tensor([[3.0, 0.0]]), weights_T=torch.tensor([0.5]))
    >>> hessian.tokens, hessian.mean().tolist()
    (2, [[5.5, 2.0], [2.0, 4.0]])
    """

    def __init__(self, columns: int) -> None:
        self.total, self.tokens = torch.zeros(columns, columns, dtype=torch.float64), 0

    def add(self, x_TD: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds tokens [T, D], each counted by its weight; ValueError when they are not finite."""
        check_finite(x_TD)
        x_TD = x_TD.double()
        weighted_TD = x_TD if weights_T is None else x_TD * weights_T.double().unsqueeze(1)
        self.total = self.total.to(x_TD.device) + 2 * weighted_TD.T @ x_TD
        self.tokens += len(x_TD)

    def mean(self) -> Tensor:
        """[D, D]; zeros when no token was added."""
        return self.total / max(self.tokens, 1)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    symmetric: bool = False,
    factors: Sequence[float] = (1.0,),
    norm: float = 2.0,
    damping: float = 0.01,
    act_order: bool = False,
) -> PackedWeight:
    """Rounds columns in turn, moving each one's error onto later columns through the Hessian's inverse.

    1. Dead columns (H_ii = 0: their input was always 0) get H_ii = 1 and weight 0.
    2. `damping` times the mean diagonal is added to the diagonal; ten and a hundred times that where a
       Hessian still cannot be factored.
    3. U = the upper Cholesky factor of H⁻¹. For each column: round, divide the error by U_ii, subtract its
       product with row U_i from the columns to the right; blockwise, which is the same sum.

    Args:
        weight: [..., out, in].
        hessian: [..., in, in], any positive factor; leading dimensions broadcast to the weight's.
        bits: 1, 2, 3, 4 or 8.
        group_size: as in `rtn`. A group's scale is found when its first column is reached, from the
            weights as they are then.
        symmetric: as in `rtn`.
        factors: as in `rtn`.
        norm: as in `rtn`.
        damping: share of the mean diagonal.
        act_order: columns with the largest H_ii first. Scales then come from the weights as they were, since
            the columns of a group are no longer neighbours in time.

    Returns the packed weight. A matrix whose Hessian is zero (an expert without tokens) or cannot be factored
    is rounded to nearest, with a UserWarning that names its index among the leading dimensions.

    Raises ValueError for shapes that do not fit, Hessians that are not finite, and where `rtn` does.

    Source: Frantar et al. 2022 (GPTQ), algorithm 1; static groups from its code.

    >>> x = torch.randn(512, 64) @ torch.randn(64, 64)
    >>> hessian, weight = x.T @ x, torch.randn(8, 64)
    >>> def error(q): d = q.dequantize() - weight; return float((d @ hessian * d).sum())
    >>> from coterie.shrink import rtn
    >>> error(gptq(weight, hessian, bits=3)) < 0.7 * error(rtn(weight, bits=3))
    True
    """
    columns = weight.shape[-1]
    check_bits(bits)
    check_finite(weight)
    check_finite(hessian)
    if hessian.shape[-2:] != (columns, columns) or hessian.dim() > weight.dim():
        raise ValueError(f"hessian {tuple(hessian.shape)} does not fit weight {tuple(weight.shape)}")
    group_size = check_group_size(group_size, columns)
    lead = weight.shape[:-2]
    w = weight.float().reshape(-1, *weight.shape[-2:]).clone()  # [B, out, in]
    h = hessian.double().expand(*lead, columns, columns).reshape(-1, columns, columns).clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    unseen = (diagonal == 0).all(-1)
    _warn(unseen, lead, "has a Hessian of zeros, so no token reached it")
    dead = (diagonal == 0) & ~unseen.unsqueeze(-1)
    diagonal.masked_fill_(diagonal == 0, 1.0)
    w.masked_fill_(dead.unsqueeze(1), 0.0)

    def search(groups: Tensor) -> Grid:
        return find_grid(groups, bits, symmetric=symmetric, factors=factors, norm=norm)

    if act_order:
        order = diagonal.argsort(-1, descending=True)
        h = h.take_along_dim(order.unsqueeze(1), 2).take_along_dim(order.unsqueeze(2), 1)
        grid = search(to_groups(w, group_size))
        along = order.unsqueeze(1).expand_as(w)
        upper = _inverse_factor(h, damping, lead)
        levels = _round_columns(w.gather(2, along), upper, grid, group_size, along // group_size)
        levels = torch.empty_like(levels).scatter_(2, along, levels)
    else:
        levels, grid = _round_groups(w, _inverse_factor(h, damping, lead), group_size, search)
    return PackedWeight.from_levels(
        levels.reshape(weight.shape),
        bits,
        scales=grid.scale.reshape(*weight.shape[:-1], -1),
        zeros=None if grid.zero is None else grid.zero.reshape(*weight.shape[:-1], -1),
        group_size=group_size,
    )


def _round_groups(
    w: Tensor, upper: Tensor, group_size: int, search: Callable[[Tensor], Grid]
) -> tuple[Tensor, Grid]:
    """Levels, and the grids found on the way."""
    levels, grids = torch.empty_like(w), []
    block = math.gcd(group_size, BLOCK)  # a group starts with a block: all earlier errors have reached it
    for start in range(0, w.shape[-1], block):
        if start % group_size == 0:
            grids.append(search(to_groups(w[..., start : start + group_size], group_size)))
        levels[..., start : start + block] = _round_block(w, upper, start, block, lambda c: grids[-1])
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    scale = torch.cat([grid.scale for grid in grids], -1)
    return levels, Grid(grids[0].bits, scale, torch.cat(zeros, -1) if zeros else None)


def _round_columns(w: Tensor, upper: Tensor, grid: Grid, group_size: int, groups: Tensor) -> Tensor:
    """Levels on grids known before; `groups` [B, out, in] says which one each column takes."""

    def grid_of(column: int) -> Grid:
        take = groups[..., column : column + 1]
        zero = None if grid.zero is None else grid.zero.gather(-1, take)
        return Grid(grid.bits, grid.scale.gather(-1, take), zero)

    blocks = [_round_block(w, upper, start, BLOCK, grid_of) for start in range(0, w.shape[-1], BLOCK)]
    return torch.cat(blocks, -1)


def _round_block(w: Tensor, upper: Tensor, start: int, size: int, grid_of: Callable[[int], Grid]) -> Tensor:
    """Levels of columns start … start + size - 1; `w` is changed in place, there and to the right."""
    stop = min(start + size, w.shape[-1])
    levels, errors = torch.empty_like(w[..., start:stop]), torch.empty_like(w[..., start:stop])
    for c in range(start, stop):
        grid, column = grid_of(c), w[..., c, None, None]
        levels[..., c - start] = grid.levels(column).flatten(-2)[..., 0]
        error = (column - grid.nearest(column)).flatten(-2) / upper[:, c, c, None, None]
        w[..., c:stop] -= error * upper[:, c, None, c:stop]
        errors[..., c - start] = error[..., 0]
    w[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return levels


def _inverse_factor(h: Tensor, damping: float, lead: torch.Size) -> Tensor:
    """U [B, in, in], float32, with Uᵀ U = (H + damping)⁻¹; the identity where H has no factor."""
    upper = torch.eye(h.shape[-1], device=h.device).repeat(len(h), 1, 1)
    todo = torch.arange(len(h), device=h.device)
    for more in MORE_DAMPING:
        mean = h[todo].diagonal(dim1=-2, dim2=-1).mean(-1)
        damped = h[todo] + torch.diag_embed((damping * more * mean).unsqueeze(-1).expand(-1, h.shape[-1]))
        factor, failed = torch.linalg.cholesky_ex(damped)
        inverse, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        good = (failed == 0) & (failed_again == 0)
        upper[todo[good]] = inverse[good].float()
        todo = todo[~good]
        if len(todo) == 0:
            break
    hopeless = torch.zeros(len(h), dtype=torch.bool, device=h.device).index_fill_(0, todo, True)
    _warn(
        hopeless,
        lead,
        f"has a Hessian without a Cholesky factor even with {damping * MORE_DAMPING[-1]:g} damping",
    )
    return upper


def _warn(which: Tensor, lead: torch.Size, why: str) -> None:
    for index in which.reshape(lead).nonzero().tolist():
        place = f"matrix {index[0] if len(index) == 1 else tuple(index)}" if index else "the matrix"
        warnings.warn(f"{place} {why}; it is rounded to nearest", stacklevel=3)
