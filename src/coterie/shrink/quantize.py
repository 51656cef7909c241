"""Quantisers that look at one group of columns at a time: round to nearest, sign, and AWQ's channel scales.

Weights are [..., out, in] with any leading dimensions: one matrix, or the experts of a bank at once.
G groups of group_size columns each; the last may be shorter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.kernels.packed import PackedWeight, check_bits, check_group_size, level_range

SMALLEST_SCALE = 1e-8  # of a group that is all zeros


def rtn(
    weight: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    symmetric: bool = False,
    factors: Sequence[float] = (1.0,),
    norm: float = 2.0,
) -> PackedWeight:
    """Round to nearest: each weight to the closest level of its group. One bit is the sign.

    Asymmetric groups span min … max (0 included, so that 0 stays exact) with a whole zero point;
    symmetric ones have max |w| at level 2^(b-1) - 1. One bit stores sign(w), +1 for 0, times the group's
    mean |w|.

    Args:
        weight: [..., out, in].
        bits: 1, 2, 3, 4 or 8.
        group_size: columns that share a scale, a multiple of 32; -1 for a whole row.
        symmetric: no zero points. One bit never has them.
        factors: each group takes the one by which shrinking or stretching its range errs least. MC searches
            100 in 0.9 … 1.1, MoEQuant 11 in 0.5 … 1.
        norm: the error is the sum of |error|^norm over the group (MC: 2.4).

    Returns the packed weight; its scales were rounded to bfloat16 before the levels were chosen.

    Raises ValueError for another width or group size, and for weights that are not finite.

    Source: GPTQ (Frantar et al. 2022), section 2; the sign from MC (Huang et al. 2024), appendix.

    >>> weight = rtn(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), bits=2)
    >>> weight.dequantize().tolist()
    [[-1.0, 0.0, 0.0, 2.0]]
    >>> rtn(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), bits=1).dequantize().tolist()
    [[-0.875, 0.875, 0.875, 0.875]]
    """
    check_bits(bits)
    check_finite(weight)
    weight = weight.float()
    group_size = check_group_size(group_size, weight.shape[-1])
    groups = to_groups(weight, group_size)
    grid = find_grid(groups, bits, symmetric=symmetric, factors=factors, norm=norm)
    levels = grid.levels(groups).flatten(-2)[..., : weight.shape[-1]]
    return PackedWeight.from_levels(levels, bits, scales=grid.scale, zeros=grid.zero, group_size=group_size)


def awq(
    weight: Tensor,
    magnitude: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    symmetric: bool = False,
    factors: Sequence[float] = (1.0,),
    steps: int = 20,
) -> PackedWeight:
    """Activation-aware scaling: columns with large inputs are stretched before rounding, the inputs shrunk.

    Column i is multiplied by s_i = magnitude_i^a, normalised by the root of max · min; of a = 0, 1/steps, …,
    (steps - 1)/steps the one with the least output error tr(ΔW H ΔWᵀ) is kept.

    Args:
        weight: [L…, M…, out, in]: the matrices M… share an input, and so their scales (gate and up).
        magnitude: [L…, in] mean |x| of the input channels.
        hessian: [L…, in, in] of the inputs, weighted or not (`HessianMean`).
        bits: 2, 3, 4 or 8.
        group_size: as in `rtn`.
        symmetric: as in `rtn`.
        factors: as in `rtn`; the clipping of each group, searched for every a.
        steps: candidates for a.

    Returns the packed weight, with 1/s as its `input_scale`.

    Raises ValueError for shapes that do not fit, and where `rtn` does.

    Source: Lin et al. 2023 (AWQ), section 3.2 and its code's search; the affinity-weighted error is
    MoEQuant's (2025), section 3.3.

    >>> x = torch.randn(256, 64) * torch.logspace(-1, 1, 64)
    >>> hessian, weight = x.T @ x / 128, torch.randn(8, 64)
    >>> def error(q): d = q.dequantize() - weight; return float((d @ hessian * d).sum())
    >>> error(awq(weight, x.abs().mean(0), hessian, bits=3)) < error(rtn(weight, bits=3))
    True
    """
    lead, columns = magnitude.shape[:-1], weight.shape[-1]
    if (weight.shape[: len(lead)], weight.shape[-1]) != (lead, magnitude.shape[-1]):
        raise ValueError(f"magnitude {tuple(magnitude.shape)} does not fit weight {tuple(weight.shape)}")
    if hessian.shape != (*lead, columns, columns):
        raise ValueError(f"hessian {tuple(hessian.shape)}; use {(*lead, columns, columns)}")
    if bits == 1:
        raise ValueError("bits=1 keeps signs only, which scaling does not change; use rtn")
    check_finite(magnitude)
    check_finite(hessian)
    weight, between = weight.float(), weight.dim() - len(lead) - 2
    shared = (*lead, *[1] * between)  # broadcasts over the matrices that share an input
    hessian = hessian.float().view(*shared, columns, columns)
    best, best_error = torch.ones(*lead, columns), torch.full(lead, torch.inf)
    best, best_error = best.to(weight.device), best_error.to(weight.device)

    def quantized(scale: Tensor) -> PackedWeight:
        stretched = weight * scale.view(*shared, 1, columns)
        return rtn(stretched, bits, group_size=group_size, symmetric=symmetric, factors=factors)

    for step in range(steps):
        scale = magnitude.float().clamp(min=1e-4) ** (step / steps)
        scale = scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
        change = quantized(scale).dequantize() / scale.view(*shared, 1, columns) - weight
        error = (change @ hessian * change).flatten(len(lead)).sum(-1)
        better = error < best_error
        best = torch.where(better.unsqueeze(-1), scale, best)
        best_error = torch.where(better, error, best_error)
    packed = quantized(best)
    packed.input_scale = (1 / best).view(*shared, columns).expand(*weight.shape[:-2], columns).contiguous()
    return packed


@dataclass(eq=False)
class Grid:
    """Where the levels of each group lie: scale [..., G], zero [..., G] or None, for groups [..., G, g]."""

    bits: int
    scale: Tensor
    zero: Tensor | None

    def levels(self, groups: Tensor) -> Tensor:
        """The closest level of each weight, as floats."""
        if self.bits == 1:
            return torch.where(groups >= 0, 1.0, -1.0)
        levels = (groups / self.scale.unsqueeze(-1)).round()
        return (levels if self.zero is None else levels + self.zero.unsqueeze(-1)).clamp(
            *level_range(self.bits)
        )

    def nearest(self, groups: Tensor) -> Tensor:
        """Each weight as its closest level stands for it."""
        levels = self.levels(groups)
        return (levels if self.zero is None else levels - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)


def find_grid(
    groups: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    factors: Sequence[float] = (1.0,),
    norm: float = 2.0,
) -> Grid:
    """The grid of each group [..., G, g], float32; see `rtn`. NaN marks columns that are padding."""
    if bits == 1:
        return Grid(1, _storable(groups.abs().nanmean(-1)), None)
    missing = groups.isnan()
    low, high = level_range(bits)
    groups = groups.masked_fill(missing, 0.0)
    bottom, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best, best_error = None, torch.full_like(top, torch.inf)
    for factor in factors:
        if symmetric:
            grid = Grid(bits, _storable(torch.maximum(-bottom, top) * (factor / high)), None)
        else:
            scale = _storable((top - bottom) * (factor / (high - low)))
            grid = Grid(bits, scale, (low - factor * bottom / scale).round().clamp(low, high))
        if len(factors) == 1:
            return grid
        error = (grid.nearest(groups) - groups).abs().pow(norm).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = grid if best is None else _choose(better, grid, best)
    if best is None:
        raise ValueError("factors is empty; (1.0,) searches nothing")
    return best


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[..., in] → [..., G, group_size], NaN past the last column."""
    padded = F.pad(weight, (0, -weight.shape[-1] % group_size), value=torch.nan)
    return padded.view(*weight.shape[:-1], -1, group_size)


def check_finite(t: Tensor) -> None:
    """ValueError when anything in `t` is NaN or infinite."""
    bad = int((~t.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {t.numel()} values are not finite; nothing sensible can be made of them")


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST_SCALE).bfloat16().float()


def _choose(first: Tensor, a: Grid, b: Grid) -> Grid:
    zero = None if a.zero is None or b.zero is None else torch.where(first, a.zero, b.zero)
    return Grid(a.bits, torch.where(first, a.scale, b.scale), zero)
