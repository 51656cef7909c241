"""Training of a forecaster's few layers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from coterie.forecast.network import SMETimes
from coterie.nn import balance
from coterie.train import EpochHistory, train_epochs

# rows → windows [B, L], what follows each step by P [B, L], prompts [B, N, D] or None
Samples = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


def train(
    model: SMETimes,
    samples: Samples,
    count: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    balance_coef: float,
    generator: torch.Generator,
    validate: Callable[[], float] | None = None,
    patience: int = 3,
) -> EpochHistory:
    """Trains a model in place with Adam and a cosine schedule, on the squared error of every position.

    Args:
        model: all but its backbone is trained.
        samples: gives the windows of some rows.
        count: how many rows there are.
        epochs: at most.
        batch_size: rows per step.
        lr: at the start.
        balance_coef: weight of the entropy of the experts' mean use, which is subtracted from the loss.
        generator: of the batches' order.
        validate: the error by which the best epoch is chosen; None keeps the last.
        patience: epochs without a better error after which training ends.

    Returns: mean squared errors by epoch.

    Raises ValueError where the loss is not finite.
    """
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * math.ceil(count / batch_size)

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        x_BL, target_BL, prompts_BND = samples(rows)
        y_BL, routing = model(x_BL, prompts_BND)
        error = F.mse_loss(y_BL, target_BL)
        if not balance_coef or routing.num_experts == 1:
            return error, error.double()
        return error - balance_coef * balance.importance_entropy(routing), error.double()

    return train_epochs(
        model,
        adam,
        lambda epoch: torch.split(torch.randperm(count, generator=generator), batch_size),
        loss,
        epochs=epochs,
        schedule=LambdaLR(adam, lambda step: (1 + math.cos(math.pi * step / steps)) / 2),
        validate=validate,
        patience=patience,
    )
