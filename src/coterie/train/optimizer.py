"""AdamW, with weight decay only where it belongs."""

from typing import Any

import torch
from torch import nn

_FUSED = ("cpu", "cuda", "mps", "xpu")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    device: torch.device | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a model, in the groups of `weight_decay_groups`.

    Args:
        device: where the model will train; the fused implementation is used where there is one.

    Raises:
        ValueError: no parameter is trainable.
    """
    groups = [g for g in weight_decay_groups(model, weight_decay) if g["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter; unfreeze some before training")
    kind = "cpu" if device is None else device.type
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=kind in _FUSED)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two optimizer groups: matrices decay; the rest does not.

    The rest is whatever has fewer than two dimensions, is called a bias (an expert bank's are [E, F]), or
    belongs to a norm or an embedding, an output matrix tied to one included.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    >>> groups = weight_decay_groups(model, 0.1)
    >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    [(0.1, [(2, 4)]), (0.0, [(10, 4), (2,), (2,), (2,)])]
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, *_NORMS))
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.dim() < 2 or name.endswith("bias") or id(parameter) in exempt
            (kept if spare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
