"""Training in epochs, of models whose step takes about a millisecond, as what `fit` does around one would."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from coterie.data import counted


@dataclass
class EpochHistory:
    """How a training in epochs went.

    Args:
        loss: mean loss of the training rows, by epoch.
        validation: validation error, by epoch; empty without a validation.
        best: the epoch, from 0, whose weights were kept.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best: int = 0


def train_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Tensor]],
    loss: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    epochs: int,
    schedule: LRScheduler | None = None,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
) -> EpochHistory:
    """Trains in place, in one process, and leaves the weights of the best epoch and evaluation mode.

    No random generator is seeded: the order of rows is the caller's, and dropout draws from torch's own.
    Inside `coterie.data.progress_shown`, a bar counts the epochs.

    Args:
        model: in training mode during steps, in evaluation mode when it is validated.
        optimizer: of those of its parameters that are to learn.
        batches: epoch, from 0 → the rows [B] of each of its steps; called when the epoch begins.
        loss: rows [B] → what is minimised, and what `EpochHistory.loss` shows of it: a mean over these rows,
            which is averaged over all rows in its own precision.
        epochs: at most.
        schedule: of the learning rate, moved on after every step.
        validate: error by which the best epoch is chosen; infinite for an epoch that should not be. None, or
            no epoch with a finite error, keeps the last.
        patience: epochs without a better error after the best, after which training ends; None for no end.
        min_delta: an error counts as better if it is smaller by more than this.

    Returns: losses and validation errors of the epochs that were run.

    Raises ValueError for epochs or patience below 1, and for a loss that is NaN or infinite, before it
    reaches the weights.

    >>> x_ND, model = torch.linspace(-1, 1, 20).unsqueeze(1), nn.Linear(1, 1)
    >>> def loss(rows):
    ...     error = (model(x_ND[rows]) - 3 * x_ND[rows]).square().mean()
    ...     return error, error.detach()
    >>> adam = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> history = train_epochs(model, adam, lambda epoch: torch.randperm(20).split(5), loss, epochs=30)
    >>> len(history.loss), history.loss[-1] < history.loss[0]
    (30, True)
    """
    if epochs < 1 or (patience is not None and patience < 1):
        raise ValueError(f"epochs={epochs}, patience={patience}; should be at least 1")
    history, least, kept = EpochHistory(), math.inf, None
    lr = optimizer.param_groups[0]["lr"]
    for epoch in counted(range(epochs), "epochs"):
        model.train()
        total: Tensor | float = 0.0
        seen = 0
        for rows in batches(epoch):
            minimised, shown = loss(rows)
            if not math.isfinite(value := minimised.item()):
                raise ValueError(f"epoch {epoch + 1}: the loss became {value}; use a smaller lr than {lr:g}")
            optimizer.zero_grad()
            torch.autograd.backward(minimised)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total, seen = total + shown.detach() * len(rows), seen + len(rows)
        history.loss.append(float(total) / seen)
        model.eval()
        if validate is None:
            continue
        history.validation.append(validate())
        if history.validation[-1] < least - min_delta:
            history.best, least, kept = epoch, history.validation[-1], _learnt(model)
        elif kept is not None and patience is not None and epoch - history.best >= patience:
            break
    if kept is None:
        history.best = len(history.loss) - 1
    else:
        model.load_state_dict(kept, strict=False)  # without what is frozen
    return history


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what training may change: buffers, and parameters that are not frozen."""
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in frozen}
