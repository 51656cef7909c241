"""Which expert gets how many bits: statistics of its use, what rounding it costs, and an integer program.

statistics = expert_statistics(block, inputs_TD)
bits = allocate_bits(statistics, average=2.0)
pack_block(model, block, *quantize_block(block, inputs_TD, bits))

Letters: T tokens, K slots per token, E experts, J bit widths, D width, F hidden width.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.hf import MoEBlock
from coterie.shrink.knapsack import cheapest_choices
from coterie.shrink.packed_blocks import expert_matrices, expert_output
from coterie.shrink.quantize import rtn
from coterie.shrink.routed import routed_tokens

BITS = (1, 2, 3)


@dataclass
class ExpertStatistics:
    """What a mixed-precision allocation knows of one block's experts.

    Args:
        name: of the block.
        frequency: [E] share of the tokens that were sent to an expert; sums to K.
        weight: [E] mean over all tokens of the router's softmax for it, counted where it was chosen, before
            any renormalisation.
        error: [E, J] Frobenius norm of what the block's output changes by when only this expert is rounded.
        bits: the J widths of `error`.
        tokens: T.
    """

    name: str
    frequency: Tensor
    weight: Tensor
    error: Tensor
    bits: tuple[int, ...] = BITS
    tokens: int = 0


@torch.no_grad()
def expert_statistics(
    block: MoEBlock, inputs_TD: Tensor, *, bits: Sequence[int] = BITS, group_size: int = 128
) -> ExpertStatistics:
    """Runs a block on what it read, and each of its experts again in every width.

    An expert's output reaches the block's through its own tokens alone, times their weights; so the change of
    the block's output is measured on those tokens, and no other expert runs. The rounding of the probe is to
    nearest, from the original weights each time.

    Args:
        block: whose experts are to be stored in fewer bits; it is left as it is.
        inputs_TD: what it read of calibration text (`block_inputs`).
        bits: widths to try.
        group_size: as in `rtn`.

    Raises ValueError, naming the block, if there are no inputs or they are not finite, or if its router is no
    linear map of them.

    Source: Huang et al. 2024 (MC, arXiv 2410.06270), section 3.2, and its code: frequency, weight and error.
    """
    routed, tokens = routed_tokens(block, inputs_TD), len(inputs_TD)
    scores_TK = router_softmax(block, inputs_TD).gather(1, routed.experts_TK.clamp(min=0))
    error_EJ = torch.zeros(block.num_experts, len(bits), dtype=torch.float64)
    for e in range(block.num_experts):
        x_nD, weights_n = routed.of(e)
        w_in, w_out = expert_matrices(block, e)
        exact_nD = expert_output(block, e, x_nD, w_in, w_out)
        for j, width in enumerate(bits):
            rounded = [rtn(w, width, group_size=group_size).dequantize() for w in (w_in, w_out)]
            change_nD = expert_output(block, e, x_nD, *rounded) - exact_nD
            error_EJ[e, j] = (change_nD * weights_n.unsqueeze(1)).double().norm()
    return ExpertStatistics(
        block.name,
        frequency=routed.sums(torch.ones_like(scores_TK)) / tokens,
        weight=routed.sums(scores_TK) / tokens,
        error=error_EJ,
        bits=tuple(bits),
        tokens=tokens,
    )


def allocate_bits(
    statistics: ExpertStatistics,
    average: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
) -> list[int]:
    """Bits of each expert of a block: the least Σ frequency^α · weight^β · error^γ within the budget.

    At least one expert gets each width but the smallest, as the paper has it. Frequencies and weights are
    divided by their sums; that changes no choice. An expert that no token reached costs nothing at any width,
    so it gets the smallest, with a UserWarning.

    Args:
        statistics: of the block.
        average: bits per expert at most, over the block; ⌊E · average⌋ are spent.
        alpha: exponent of the frequency.
        beta: exponent of the weight.
        gamma: exponent of the error. The authors' code raises the error to α; with γ = α = 1 both agree.

    Raises ValueError when the budget is below what the smallest widths take, or above the largest.

    Source: Huang et al. 2024 (MC), equation 4; exponents from its code's defaults.

    >>> statistics = ExpertStatistics("mlp", frequency=torch.tensor([0.5, 1.0, 0.4, 0.1]),
    ...     weight=torch.tensor([0.3, 0.5, 0.1, 0.1]), error=torch.tensor([[8.0, 4, 1]] * 4))
    >>> allocate_bits(statistics, average=2.0)
    [2, 3, 2, 1]
    """
    budget = bit_budget(len(statistics.frequency), average, statistics.bits, where=statistics.name)
    _warn_of_unused(statistics)
    return _cheapest_bits(_costs(statistics, alpha, beta, gamma), statistics.bits, budget)


def allocate_model_bits(
    statistics: Sequence[ExpertStatistics],
    average: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
) -> list[list[int]]:
    """Bits of each expert of each block, by one program over all of them: a block may get more than another.

    What `allocate_bits` minimises, summed over the blocks, within one budget; so the sum is never above what
    it is block by block. Frequencies and weights are divided by their sums over each block, as there, while
    errors count as they are: a block whose output moves more in absolute terms gets more bits. At least one
    expert of the model gets each width but the smallest.

    Args:
        statistics: of every block, with the same widths.
        average: bits per expert at most, over the model.
        alpha: as in `allocate_bits`, like the following.
        beta: exponent of the weight.
        gamma: exponent of the error.

    Returns the bits of each block's experts, in the order of `statistics`.

    Raises ValueError when the budget cannot be met, or blocks were measured in different widths.

    Source: as of `allocate_bits`; the authors solve it block by block.

    >>> error = torch.tensor([[9.0, 4, 1]] * 2)
    >>> calm = ExpertStatistics("calm", torch.ones(2), torch.ones(2), error)
    >>> wild = ExpertStatistics("wild", torch.ones(2), torch.ones(2), 10 * error)
    >>> allocate_model_bits([calm, wild], average=2.25)
    [[1, 2], [3, 3]]
    """
    if not statistics:
        raise ValueError("there are no statistics; give those of each block")
    bits, sizes = statistics[0].bits, [len(one.frequency) for one in statistics]
    for one in statistics:
        if one.bits != bits:
            raise ValueError(
                f"{one.name} was measured in {one.bits} bits, {statistics[0].name} in {bits}; "
                "one program takes the same widths for all"
            )
        _warn_of_unused(one)
    budget = bit_budget(sum(sizes), average, bits, where="the model")
    chosen = iter(
        _cheapest_bits(torch.cat([_costs(s, alpha, beta, gamma) for s in statistics]), bits, budget)
    )
    return [list(itertools.islice(chosen, size)) for size in sizes]


def bit_budget(experts: int, average: float, bits: Sequence[int] = BITS, *, where: str = "a block") -> int:
    """⌊experts · average⌋; ValueError outside what the widths and one expert of each larger width allow.

    >>> bit_budget(8, 2.05)
    16
    """
    rising = sorted(bits)
    low = experts * rising[0] + sum(b - rising[0] for b in rising[1:])
    # 2.4 · 5 is 12, whatever floating point makes of it
    budget = math.floor(experts * average + 1e-9) if math.isfinite(average) else -1
    if experts < len(rising) - 1 or not low <= budget <= experts * rising[-1]:
        raise ValueError(
            f"bit budget {average:g} per expert is infeasible: {where} has {experts} experts with "
            f"{', '.join(map(str, bits))} bits; use {math.ceil(1000 * low / experts) / 1000:g} … {rising[-1]}"
        )
    return budget


def _costs(statistics: ExpertStatistics, alpha: float, beta: float, gamma: float) -> Tensor:
    """[E, J] float64 of what each width of each expert adds to the sum that is minimised."""
    frequency_E, weight_E = statistics.frequency.double(), statistics.weight.double()
    frequency_E, weight_E = frequency_E / frequency_E.sum(), weight_E / weight_E.sum()
    cost_E = frequency_E**alpha * weight_E**beta
    return cost_E.unsqueeze(1) * statistics.error.double() ** gamma


def _cheapest_bits(costs_EJ: Tensor, bits: Sequence[int], budget: int) -> list[int]:
    chosen = cheapest_choices(costs_EJ.numpy(), bits, budget, at_least_one=range(1, len(bits)))
    return [bits[j] for j in chosen]


def _warn_of_unused(statistics: ExpertStatistics) -> None:
    unused = [e for e, f in enumerate(statistics.frequency.tolist()) if f == 0]
    if unused:
        warnings.warn(
            f"{statistics.name}: no calibration token reached experts {unused}; "
            f"they get {min(statistics.bits)} bit, more text would tell more",
            stacklevel=3,
        )


def router_softmax(block: MoEBlock, inputs_TD: Tensor) -> Tensor:
    """[T, E] float32 softmax of the router's logits over all experts, before any choice.

    Raises ValueError for a router that is no linear map of the block's input.
    """
    router = block.router
    if router.rows.shape[1] != inputs_TD.shape[1]:
        raise ValueError(
            f"{block.name}: its router has rows of {router.rows.shape[1]} for inputs of "
            f"{inputs_TD.shape[1]}; expert statistics need a linear router"
        )
    bias = None if router.bias is None else router.bias.float().cpu()
    return F.linear(inputs_TD.float(), router.rows.float().cpu(), bias).softmax(-1)
