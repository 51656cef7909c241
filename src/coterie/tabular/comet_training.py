"""How a COMET mixture for tables is trained. Not `coterie.train.fit`, each of whose steps costs about what a
step of models this small does."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coterie.data import counted
from coterie.nn import LearnedPermutation, MoE, balance, permutation_entropy

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
    adam = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    curve: list[float] = []
    best, best_state, since, searched = math.inf, None, 0, max(epochs // 10, 1)
    for epoch in counted(range(epochs), "epochs"):
        _search(permutations, epoch / searched)
        total = 0.0
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for picked in torch.split(shuffled, batch_size):
            output, routing = model(x_TD[picked])
            error = loss(output, target_T[picked])
            total += error.item() * len(picked)
            error = error + entropy * balance.path_entropy([routing])
            for permutation in permutations:
                if not bool(permutation.hard):
                    error = error + _PERMUTATION_ENTROPY * permutation_entropy(permutation.matrix())
            adam.zero_grad()
            torch.autograd.backward(error)
            adam.step()
        if not math.isfinite(total):
            raise ValueError(f"the loss became {total} in epoch {epoch + 1}; use a smaller lr than {lr}")
        curve.append(_error(model, x_TD[held], target_T[held], loss) if len(held) else total / len(rows))
        if not len(held) or epoch < searched:  # a search is not over at its best epoch
            continue
        since += 1
        if curve[-1] < best - _WORTH_IT:
            best, since = curve[-1], 0
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if since >= (patience or epochs):
            break
    _search(permutations, 1.0)
    if best_state is not None:
        model.load_state_dict(best_state)
    return curve


@torch.no_grad()
def _error(
    model: nn.Module, x_TD: Tensor, target_T: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> float:
    model.eval()
    error = loss(model(x_TD)[0], target_T).item()
    model.train()
    return error


def _search(permutations: list[LearnedPermutation], progress: float) -> None:
    for permutation in permutations:
        permutation.progress.fill_(min(progress, 1.0))
        if progress >= 1:
            permutation.harden()
