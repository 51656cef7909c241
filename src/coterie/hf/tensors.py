"""The tensors of an MoE block in one orientation, whatever way they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.hf.layout import BankLayout


@dataclass
class ExpertTensors:
    """Experts as y = down · (act(gate · x) * (up · x)), or down · act(up · x) where gate is None.

    Args:
        up: [E, F, D].
        down: [E, D, F].
        gate: [E, F, D], or None.
        gate_bias: [E, F], or None, as the following.
        up_bias: [E, F].
        down_bias: [E, D].
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __getitem__(self, ids: list[int]) -> "ExpertTensors":
        """Copies of some experts, in the order of `ids`."""
        return ExpertTensors(**{k: v[ids].clone() for k, v in vars(self).items() if v is not None})


@dataclass
class RouterTensors:
    """What a router holds for each expert.

    Args:
        rows: the weights of the last linear map, [E, D'].
        bias: added to the logits, [E], or None.
        selection_bias: added to the scores for the choice of experts only, [E], or None.
        scale: multiplies the combine weight, [E], or None.
    """

    rows: Tensor
    bias: Tensor | None = None
    selection_bias: Tensor | None = None
    scale: Tensor | None = None

    def __getitem__(self, ids: list[int]) -> "RouterTensors":
        """Copies of some experts' entries, in the order of `ids`."""
        return RouterTensors(**{k: v[ids].clone() for k, v in vars(self).items() if v is not None})


def unpack(stored: Mapping[str, Tensor], bank: BankLayout) -> ExpertTensors:
    """A bank's stored tensors in the one orientation: views, which write through.

    Args:
        stored: by role: "in", "down", and "in_bias", "down_bias" where there are biases.
        bank: how they are stored.

    >>> bank = BankLayout(transposed=True, interleaved=True)
    >>> experts = unpack({"in": torch.arange(4.0).view(1, 1, 4), "down": torch.ones(1, 2, 1)}, bank)
    >>> experts.gate.flatten().tolist(), experts.up.flatten().tolist(), list(experts.down.shape)
    ([0.0, 2.0], [1.0, 3.0], [1, 1, 2])
    """
    w_in, down = stored["in"], stored["down"]
    if bank.transposed:
        w_in, down = w_in.transpose(1, 2), down.transpose(1, 2)
    gate, up = _split(w_in, bank)
    if not bank.biased:
        return ExpertTensors(up, down, gate)
    gate_bias, up_bias = _split(stored["in_bias"], bank)
    return ExpertTensors(up, down, gate, gate_bias, up_bias, stored["down_bias"])


def pack(experts: ExpertTensors, bank: BankLayout) -> dict[str, Tensor]:
    """The inverse of `unpack`: new tensors as the bank stores them, by role.

    Raises ValueError if a gate or a bias is missing that the bank has, or given where it has none.
    """
    for name, wanted in (("gate", bank.gated), ("down_bias", bank.biased), ("up_bias", bank.biased)):
        if (getattr(experts, name) is not None) != wanted:
            raise ValueError(f"the experts must come {'with' if wanted else 'without'} {name}")
    stored = {"in": _merge(experts.gate, experts.up, bank), "down": experts.down}
    if bank.transposed:
        stored = {role: w.transpose(1, 2) for role, w in stored.items()}
    if experts.up_bias is not None and experts.down_bias is not None:
        stored |= {
            "in_bias": _merge(experts.gate_bias, experts.up_bias, bank),
            "down_bias": experts.down_bias,
        }
    return {role: w.contiguous() for role, w in stored.items()}


def _split(w: Tensor, bank: BankLayout) -> tuple[Tensor | None, Tensor]:
    if not bank.gated:
        return None, w
    if bank.interleaved:
        return w[:, 0::2], w[:, 1::2]
    hidden = w.shape[1] // 2
    return w[:, :hidden], w[:, hidden:]


def _merge(gate: Tensor | None, up: Tensor, bank: BankLayout) -> Tensor:
    if gate is None:
        return up
    return torch.stack((gate, up), 2).flatten(1, 2) if bank.interleaved else torch.cat((gate, up), 1)
