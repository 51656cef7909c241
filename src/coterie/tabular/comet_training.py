"""How a COMET mixture for tables is trained."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coterie.nn import LearnedPermutation, MoE, balance, permutation_entropy
from coterie.train import train_epochs

_PERMUTATION_ENTROPY = 1e-4  # ζ of the paper
_WORTH_IT = 1e-4  # an epoch that improves by less does not count as better


def train(
    model: MoE,
    x_TD: Tensor,
    target_T: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    entropy: float,
    patience: int | None,
    seed: int,
) -> list[float]:
    """AdamW over shuffled epochs, in place.

    Args:
        model: of tree routers, with or without permutations that are searched over a tenth of the epochs.
        x_TD: features.
        target_T: what `loss` compares outputs with.
        loss: (outputs, targets) → mean loss.
        entropy: weight of the paths' entropy.
        patience: epochs without a better loss on a held-out tenth, after which training stops and the best
            weights come back; None, and with fewer than 100 rows, for all epochs on all rows.
        seed: of the split and of the order.

    Returns: the loss after each epoch that was run: held-out where rows are held out, else of training.

    Raises ValueError when the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x_TD), generator=generator)
    held = order[: len(x_TD) // 10] if patience is not None and len(x_TD) >= 100 else order[:0]
    rows = order[len(held) :]
    permutations = [m for m in model.modules() if isinstance(m, LearnedPermutation)]
    searched, errors = max(epochs // 10, 1), list[float]()

    def batches(epoch: int) -> tuple[Tensor, ...]:
        _search(permutations, epoch / searched)
        return torch.split(rows[torch.randperm(len(rows), generator=generator)], batch_size)

    def step_loss(picked: Tensor) -> tuple[Tensor, Tensor]:
        output, routing = model(x_TD[picked])
        error = loss(output, target_T[picked])
        total = error + entropy * balance.path_entropy([routing])
        for permutation in permutations:
            if not bool(permutation.hard):
                total = total + _PERMUTATION_ENTROPY * permutation_entropy(permutation.matrix())
        return total, error.double()

    @torch.no_grad()
    def held_out_error() -> float:
        errors.append(loss(model(x_TD[held])[0], target_T[held]).item())
        return errors[-1] if len(errors) > searched else math.inf  # a search is not over at its best epoch

    history = train_epochs(
        model,
        torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True),
        batches,
        step_loss,
        epochs=epochs,
        validate=held_out_error if len(held) else None,
        patience=patience,
        min_delta=_WORTH_IT,
    )
    _search(permutations, 1.0)
    return errors or history.loss


def _search(permutations: list[LearnedPermutation], progress: float) -> None:
    for permutation in permutations:
        permutation.progress.fill_(min(progress, 1.0))
        if progress >= 1:
            permutation.harden()
