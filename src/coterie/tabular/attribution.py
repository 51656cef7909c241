"""Shapley values of mixtures of linear experts: exact with the gate held, sampled without.

Letters: T rows, E experts, D features, C columns (a one-hot column is several features).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.tabular.linear_mixture import LinearMixture


class Explanation(NamedTuple):
    """Shapley values of the mixture's score.

    Attributes:
        phi: [n, C] of each column; the rows of phi sum to the score less phi0.
        phi0: [n] the score of the background.
        per_expert: [n, E, C] the part of phi that each expert contributes.
    """

    phi: NDArray[np.float64]
    phi0: NDArray[np.float64]
    per_expert: NDArray[np.float64]


def explain_with_gate_held(
    model: LinearMixture, x_TD: Tensor, background_D: Tensor, blocks: Sequence[Sequence[int]]
) -> Explanation:
    """Exact Shapley values of Σ g_i(x) s_i(z) at z = x, the gate held at x: φ_j = Σ g_i w_ij (x_j - μ_j).

    Args:
        model: the mixture.
        x_TD: rows to explain.
        background_D: μ, what an absent feature is set to.
        blocks: features of each column, whose values are summed.

    Source: Sharma et al. 2023 (FEAMOE).
    """
    gate_TE = model.router(x_TD).weights
    own_TED = linear_shapley(model.experts.weight.squeeze(1), x_TD, background_D)
    per_expert_TEC = sum_columns(gate_weighted(gate_TE, own_TED), blocks)
    phi0_T = gate_TE @ model.experts.each(background_D.unsqueeze(0)).flatten()
    return Explanation(per_expert_TEC.sum(1).numpy(), phi0_T.numpy(), per_expert_TEC.numpy())


def explain_with_gate(
    model: LinearMixture,
    x_TD: Tensor,
    background_D: Tensor,
    blocks: Sequence[Sequence[int]],
    permutations: int,
    generator: torch.Generator,
) -> Explanation:
    """Sampled Shapley values of Σ g_i(z) s_i(z), the gate following z; see `sampled_shapley`."""
    phi_TCE, phi0_E = sampled_shapley(
        lambda z_TD: model.router(z_TD).weights * model(z_TD).scores_TE,
        x_TD,
        background_D,
        blocks,
        permutations=permutations,
        generator=generator,
    )
    phi0_T = phi0_E.sum().repeat(len(x_TD))
    return Explanation(phi_TCE.sum(2).numpy(), phi0_T.numpy(), phi_TCE.transpose(1, 2).numpy())


def linear_shapley(weight_ED: Tensor, x_TD: Tensor, background_D: Tensor) -> Tensor:
    """Shapley values of each linear expert, w_j (x_j - mu_j), as [T, E, D].

    They explain the expert's score at x against its score at the background, features taken to be
    independent.

    >>> linear_shapley(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, 3.0]))
    tensor([[[4., 0.]]])
    """
    return weight_ED * (x_TD - background_D).unsqueeze(1)


def gate_weighted(gate_TE: Tensor, phi_TED: Tensor) -> Tensor:
    """What each expert contributes to the mixture's Shapley values: g_i φ_j^i, [T, E, D].

    Shapley values are linear in the model, so with the gate held at its value those of the mixture are the
    sum over experts, whatever the experts are, as long as their own Shapley values are known.

    Source: Sharma et al. 2023 (FEAMOE).
    """
    return gate_TE.unsqueeze(-1) * phi_TED


def sum_columns(phi: Tensor, blocks: Sequence[Sequence[int]]) -> Tensor:
    """[..., D] → [..., C]: sums over the features of each column, the dummies of a category say.

    >>> sum_columns(torch.tensor([1.0, 2.0, 3.0]), [[0, 2], [1]])
    tensor([4., 2.])
    """
    return torch.stack([phi[..., list(block)].sum(-1) for block in blocks], -1)


class Sampled(NamedTuple):
    """phi [T, C, ...] with the values' trailing shape, and the value of the background, phi0 [...]."""

    phi: Tensor
    phi0: Tensor


def sampled_shapley(
    value: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    background_D: Tensor,
    blocks: Sequence[Sequence[int]],
    *,
    permutations: int,
    generator: torch.Generator,
) -> Sampled:
    """Shapley values of any function by sampled orders of its columns, each order also taken backwards.

    Columns enter one after the other, from the background to x; a column's value is the mean change it
    brings. So phi sums to value(x) - value(background) exactly, whatever the number of orders.

    Args:
        value: [n, D] → [n, ...].
        x_TD: rows to explain.
        background_D: what an absent column is set to.
        blocks: features of each column, which enter together.
        permutations: number of orders; half of them, rounded up, are drawn.
        generator: of the orders.

    Source: Castro et al. 2009; pairs of opposite orders: Mitchell et al. 2022.
    """
    start = background_D.expand_as(x_TD)
    first = value(start)
    phi = first.new_zeros(len(x_TD), len(blocks), *first.shape[1:])
    drawn = -(-permutations // 2)
    for _ in range(drawn):
        order = torch.randperm(len(blocks), generator=generator).tolist()
        for each in (order, order[::-1]):
            present_TD, before = start.clone(), first
            for column in each:
                features = list(blocks[column])
                present_TD[:, features] = x_TD[:, features]
                after = value(present_TD)
                phi[:, column] += after - before
                before = after
    return Sampled(phi / (2 * drawn), first[0] if len(first) else first.new_zeros(first.shape[1:]))


def enumerated_shapley(
    value: Callable[[Tensor], Tensor], x_TD: Tensor, background_D: Tensor, blocks: Sequence[Sequence[int]]
) -> Tensor:
    """Shapley values of any function by its definition, [T, C], with 2^C evaluations per row.

    Args:
        value: [n, D] → [n].
        x_TD: rows to explain.
        background_D: what an absent column is set to.
        blocks: features of each of the C columns.

    Source: Shapley 1953.

    >>> product = lambda z: z[:, 0] * z[:, 1]
    >>> enumerated_shapley(product, torch.tensor([[2.0, 3.0]]), torch.zeros(2), [[0], [1]])
    tensor([[3., 3.]])
    """
    columns = len(blocks)
    present_SC = torch.cartesian_prod(*[torch.tensor([False, True])] * columns).view(-1, columns)
    feature_SD = torch.zeros(len(present_SC), x_TD.shape[1], dtype=torch.bool)
    for column, block in enumerate(blocks):
        feature_SD[:, list(block)] = present_SC[:, column : column + 1]
    size_S = present_SC.sum(1)
    # |S|! (C - |S| - 1)! / C!, the share of orders in which a column comes right after just the coalition S
    chance = [1 / (columns * math.comb(columns - 1, size)) for size in range(columns)]
    joined_SC = torch.tensor([0.0, *chance], dtype=x_TD.dtype)[size_S].unsqueeze(1)
    absent_SC = torch.tensor([*chance, 0.0], dtype=x_TD.dtype)[size_S].unsqueeze(1)
    weight_SC = torch.where(present_SC, joined_SC, -absent_SC)
    values_TS = torch.stack([value(torch.where(feature_SD, x_D, background_D)) for x_D in x_TD])
    return values_TS @ weight_SC
