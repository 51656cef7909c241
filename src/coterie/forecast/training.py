"""Training of a forecaster's few layers: a lean loop, since `coterie.train.fit` seeds the whole process."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.data import counted
from coterie.forecast.network import SMETimes
from coterie.nn import balance

# rows → windows [B, L], what follows each step by P [B, L], prompts [B, N, D] or None
Samples = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


@dataclass
class Trained:
    """How training went: mean squared errors by epoch, and the epoch (from 0) whose weights were kept."""

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best: int = 0


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
) -> Trained:
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

    Raises ValueError where the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    steps, done, trained, kept = epochs * math.ceil(count / batch_size), 0, Trained(), model.trained()
    for epoch in counted(range(epochs), "epochs"):
        model.train()
        total = 0.0
        for rows in torch.split(torch.randperm(count, generator=generator), batch_size):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * done / steps)) / 2
            x_BL, target_BL, prompts_BND = samples(rows)
            y_BL, routing = model(x_BL, prompts_BND)
            error = F.mse_loss(y_BL, target_BL)
            loss = error
            if balance_coef and routing.num_experts > 1:
                loss = loss - balance_coef * balance.importance_entropy(routing)
            if not math.isfinite(loss.item()):
                raise ValueError(f"epoch {epoch}: the loss is {loss.item()}; use a smaller lr than {lr:g}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, done = total + error.item() * len(rows), done + 1
        trained.loss.append(total / count)
        model.eval()
        if validate is None:
            trained.best = epoch
            continue
        trained.validation.append(validate())
        if trained.validation[-1] <= min(trained.validation):
            trained.best, kept = epoch, {name: t.clone() for name, t in model.trained().items()}
        elif epoch - trained.best >= patience:
            break
    if validate is not None:
        model.load_state_dict(kept, strict=False)
    return trained
