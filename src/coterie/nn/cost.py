"""What an expert costs: parameters by expert, whatever the bank is made of."""

import torch
from torch import Tensor, nn

from coterie.nn.experts import ConcatExperts, ModuleExperts
from coterie.nn.zero_cost import ZeroCostExperts


def parameters_per_expert(bank: nn.Module) -> Tensor:
    """int64 [E]: how many parameters a token passes through in each expert of the bank.

    A bank of equal experts shares its parameters out evenly; banks of different ones are counted one by one.

    >>> from coterie.nn import SwiGLUExperts
    >>> bank = ConcatExperts(SwiGLUExperts(2, 8, 16), ZeroCostExperts(8, zero=1, copy=1, constant=1))
    >>> parameters_per_expert(bank).tolist()
    [384, 384, 24, 0, 0]
    """
    if isinstance(bank, ConcatExperts):
        return torch.cat([parameters_per_expert(each) for each in bank.banks])
    if isinstance(bank, ModuleExperts):
        return torch.tensor([_count(expert) for expert in bank.experts])
    if isinstance(bank, ZeroCostExperts):
        each = _count(bank) // max(bank.constant, 1)
        return torch.tensor([each if kind == "constant" else 0 for kind in bank.kinds])
    experts = int(bank.num_experts)  # type: ignore[arg-type]
    return torch.full((experts,), _count(bank) // experts)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
