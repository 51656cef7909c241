"""The training loop of the rankers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coterie.data import counted


def train_epochs(
    model: nn.Module,
    columns: Sequence[Tensor],
    loss: Callable[[Sequence[Tensor]], Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Adam over shuffled batches of a table that is in memory.

    A ranker's step takes about a millisecond, and so would what `coterie.train.fit` does around one.

    Args:
        model: left in evaluation mode.
        columns: tensors of N rows each.
        loss: of a batch of the columns' rows.
        epochs: passes over the rows. A last batch of one row, which has no deviation, joins the one before.
        batch_size: rows of a step.
        lr: learning rate.
        seed: of the order of rows.

    Returns: mean loss of each epoch.

    Raises ValueError for no rows, or a loss that is not finite.
    """
    rows = len(columns[0])
    if rows < 2:
        raise ValueError(f"{rows} rows to learn from; give at least 2")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    losses = []
    for _ in counted(range(epochs), "epochs"):
        order, total = torch.randperm(rows, generator=generator), torch.zeros(())
        starts = list(range(0, rows, batch_size))
        if len(starts) > 1 and rows - starts[-1] == 1:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], rows], strict=True):
            batch = order[start:end]
            value = loss([column[batch] for column in columns])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += value.detach() * (end - start)
        losses.append(total.item() / rows)
        if not torch.isfinite(total):
            raise ValueError(f"the loss became {total.item()}; use a lower learning rate than {lr:g}")
    model.eval()
    return losses
