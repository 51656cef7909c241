"""SMETimes' network: patches of a series through a frozen language model and a mixture of linear experts."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from coterie.forecast.backbone import Backbone
from coterie.forecast.prompts import CacheMismatchError
from coterie.nn import Dense, LinearExperts, LinearScore, MoE, Router, Routing, TopK

_SMALLEST = 1e-3  # of a window's deviation, in those of the training rows: a constant window must not explode


class SMETimes(nn.Module):
    """Predicts, after every patch of a series, the next one.

    1. Each window is normalised by its own mean and deviation.
    2. Each patch of P steps becomes one token: E(patch), mixed with the vector of its prompt by a learned
       share α: α E(patch) + (1 - α) prompt.
    3. The frozen language model reads the tokens.
    4. A gate mixes linear experts on each of its last hidden states.
    5. A linear decoder turns token n into patch n + 1, and the window's mean and deviation come back.

    Args:
        backbone: the language model, width D; its weights never change.
        seq_len: L, steps of a window, a multiple of P.
        token_len: P, steps of a patch.
        num_experts: K; 1 makes the mixture a plain linear layer.
        gate_top_k: experts per token; None for all.
        encoder: "linear", or "mlp" with one hidden layer.
        hidden: its width.
        dropout: inside the "mlp" encoder.

    Returns (from forward, for windows x [B, L] and prompts [B, L/P, D] or None): y [B, L], where step t is
    the prediction of step t + P, and the Routing of the B · L/P tokens.

    Raises ValueError: L is not a multiple of P, K < 1, or windows of another length; CacheMismatchError for
    prompts of another width or number.

    Source: Fan et al. 2025 (SMETimes), section 3.

    >>> from coterie.forecast.backbone import tiny_backbone
    >>> model = SMETimes(tiny_backbone(steps=1), seq_len=96, token_len=24)
    >>> y_BL, routing = model(torch.randn(3, 96))
    >>> y_BL.shape, routing.weights.shape
    (torch.Size([3, 96]), torch.Size([12, 4]))
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seq_len: int,
        token_len: int,
        num_experts: int = 4,
        gate_top_k: int | None = None,
        encoder: Literal["linear", "mlp"] = "mlp",
        hidden: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if token_len < 1 or seq_len < 1:
            raise ValueError(f"seq_len={seq_len}, token_len={token_len}; should be at least 1")
        if seq_len % token_len:
            raise ValueError(
                f"seq_len={seq_len} is not a multiple of token_len={token_len}; with that token_len use "
                f"{-(-seq_len // token_len) * token_len} or another multiple"
            )
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}; should be at least 1")
        if encoder not in ("linear", "mlp"):
            raise ValueError(f'encoder={encoder!r}; use "linear" or "mlp"')
        self.backbone, self.seq_len, self.token_len = backbone, seq_len, token_len
        dim = backbone.dim
        self.encoder: nn.Module = nn.Linear(token_len, dim)
        if encoder == "mlp":
            layers = [nn.Linear(token_len, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, dim)]
            self.encoder = nn.Sequential(*layers)
        self.fusion = nn.Parameter(torch.zeros(()))
        select = Dense() if gate_top_k is None else TopK(gate_top_k)
        router = Router(LinearScore(dim, num_experts, bias=True), select)
        self.moe = MoE(router, LinearExperts(num_experts, dim))
        self.decoder = nn.Linear(dim, token_len)

    @property
    def prompt_share(self) -> float:
        """1 - α: how much of a token is its prompt."""
        return 1 - self.fusion.sigmoid().item()

    def trained(self) -> dict[str, Tensor]:
        """What training changes, by name: everything but the backbone."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("backbone.")}

    def forward(self, x_BL: Tensor, prompts_BND: Tensor | None = None) -> tuple[Tensor, Routing]:
        if x_BL.dim() != 2 or x_BL.shape[1] != self.seq_len:
            raise ValueError(f"windows have shape {tuple(x_BL.shape)}; should be [B, {self.seq_len}]")
        mean_B1 = x_BL.mean(1, keepdim=True)
        deviation_B1 = (x_BL.var(1, keepdim=True, correction=0) + 1e-5).sqrt().clamp(min=_SMALLEST)
        patches_BNP = ((x_BL - mean_B1) / deviation_B1).view(len(x_BL), -1, self.token_len)
        tokens_BND = self.encoder(patches_BNP)
        if prompts_BND is not None:
            if prompts_BND.shape != tokens_BND.shape:
                raise CacheMismatchError(
                    f"prompts have shape {tuple(prompts_BND.shape)}; for backbone {self.backbone.name!r} and "
                    f"these windows it should be {tuple(tokens_BND.shape)}"
                )
            share = self.fusion.sigmoid()
            tokens_BND = share * tokens_BND + (1 - share) * prompts_BND
        mixed_BND, routing = self.moe(self.backbone(tokens_BND))
        y_BL: Tensor = self.decoder(mixed_BND).flatten(1) * deviation_B1 + mean_B1
        return y_BL, routing


@torch.no_grad()
def roll(
    model: SMETimes,
    x_BL: Tensor,
    horizon: int,
    *,
    prompts_BND: Tensor | None = None,
    prompt_of: Callable[[Tensor, int], Tensor] | None = None,
    oracle_BH: Tensor | None = None,
) -> Tensor:
    """Forecasts as many patches as the horizon needs, each from what was predicted before it.

    Args:
        model: in evaluation mode.
        x_BL: windows.
        horizon: H steps, any number; what the last patch has beyond it is cut off.
        prompts_BND: of the windows' own patches, for a model trained with prompts.
        prompt_of: (patch [B, P], its first step counted from the window's) → prompt [B, D]; writes the
            prompts of predicted patches.
        oracle_BH: the true future, from which prompts are written instead: a leak, for diagnosis only.

    Returns [B, H].
    """
    size, predicted = model.token_len, []
    for step in range(math.ceil(horizon / size)):
        patch_BP = model(x_BL, prompts_BND)[0][:, -size:]
        predicted.append(patch_BP)
        x_BL = torch.cat([x_BL[:, size:], patch_BP], 1)
        begun = step * size
        if prompts_BND is None or prompt_of is None or begun + size >= horizon:
            continue
        seen_BP = patch_BP if oracle_BH is None else oracle_BH[:, begun : begun + size]
        prompt_BD = prompt_of(seen_BP, model.seq_len + begun)
        prompts_BND = torch.cat([prompts_BND[:, 1:], prompt_BD.unsqueeze(1)], 1)
    return torch.cat(predicted, 1)[:, :horizon]
