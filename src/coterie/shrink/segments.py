"""An expert as its neurons, which can be told apart, put in another order and moved to another expert.

What an expert gives is the sum of what its F neurons give: down[:, i] · act(gate[i] · x) · (up[i] · x), or
without the gate down[:, i] · act(up[i] · x). A segment is all that belongs to one neuron: the row of gate,
the row of up, their biases, and the column of down.

Letters: E experts, F their hidden width, D the width they read, W the width of a segment.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.hf import ExpertTensors

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")


def to_segments(experts: ExpertTensors, parts: Sequence[Part] = PARTS) -> Tensor:
    """[E, F, W] float32: each expert as its neurons.

    Args:
        experts: gated or not, with biases or without.
        parts: which weights a segment holds, in this order; a gate is left out where there is none. A bias
            follows the row that it belongs to; the bias of down is no neuron's.

    Raises ValueError for no part that exists.

    >>> experts = ExpertTensors(up=torch.zeros(4, 3, 2), down=torch.ones(4, 2, 3), gate=torch.zeros(4, 3, 2))
    >>> to_segments(experts)[0].tolist()
    [[0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    """
    unknown = [part for part in parts if part not in PARTS]
    found = [tensor for part in parts if part in PARTS for tensor in _columns(experts, part)]
    if unknown or not found:
        raise ValueError(
            f"parts={list(parts)}; use some of {', '.join(PARTS)}, and gate not alone without one"
        )
    return torch.cat([tensor.float() for tensor in found], dim=2)


def from_segments(segments_EFW: Tensor, like: ExpertTensors) -> ExpertTensors:
    """The inverse of `to_segments` with all parts.

    Args:
        segments_EFW: [E, F, W], any E and F.
        like: has the parts, the width D and the dtype; its biases of down, [E, D], are taken over.

    >>> experts = ExpertTensors(torch.randn(2, 3, 4), torch.randn(2, 4, 3), torch.randn(2, 3, 4))
    >>> bool((from_segments(to_segments(experts), experts).down == experts.down).all())
    True
    """
    widths = [tensor.shape[2] for part in PARTS for tensor in _columns(like, part)]
    pieces = iter(torch.split(segments_EFW.to(like.up.dtype), widths, dim=2))
    found: dict[str, Tensor] = {}
    for part in PARTS:
        for name in (part, f"{part}_bias"):
            if part != "down" and getattr(like, name) is not None:
                piece = next(pieces)
                found[name] = piece.squeeze(2) if name.endswith("bias") else piece
    return ExpertTensors(**found, down=next(pieces).transpose(1, 2), down_bias=like.down_bias)


def align(experts: ExpertTensors, first: int, other: int) -> Tensor:
    """[F]: which neuron of `other` should stand in each place so that it is most like `first`.

    The best of all orders for the sum of inner products of the neurons' weights, by the Hungarian algorithm.

    >>> up = torch.randn(1, 3, 4)
    >>> two = ExpertTensors(torch.cat((up, up[:, [2, 0, 1]])), torch.zeros(2, 4, 3))
    >>> align(two, 0, 1).tolist()
    [1, 2, 0]
    """
    matrices = [experts.up, experts.down.transpose(1, 2)]
    matrices += [experts.gate] if experts.gate is not None else []
    similarity_FF = sum(m[first].float() @ m[other].float().T for m in matrices)
    assert isinstance(similarity_FF, Tensor)
    return torch.from_numpy(linear_sum_assignment(similarity_FF.cpu().numpy(), maximize=True)[1])


def reordered(experts: ExpertTensors, order_F: Tensor) -> ExpertTensors:
    """The same experts with their neurons in another order, which compute the same."""
    order_F = order_F.to(experts.up.device)
    rows = {"up": 1, "gate": 1, "down": 2, "up_bias": 1, "gate_bias": 1}
    return ExpertTensors(
        **{
            name: tensor.index_select(rows[name], order_F) if name in rows else tensor
            for name, tensor in vars(experts).items()
            if tensor is not None
        }
    )


def _columns(experts: ExpertTensors, part: Part) -> list[Tensor]:
    """What one part of the segments holds, [E, F, D] and, for a bias, [E, F, 1]."""
    if part == "down":
        return [experts.down.transpose(1, 2)]
    weight, bias = getattr(experts, part), getattr(experts, f"{part}_bias")
    return [tensor for tensor in (weight, None if bias is None else bias.unsqueeze(2)) if tensor is not None]
