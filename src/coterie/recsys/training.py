"""Training of the rankers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coterie.train import train_epochs


def train_on_rows(
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
    sizes = [min(batch_size, rows - start) for start in range(0, rows, batch_size)]
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [batch_size + 1]
    generator = torch.Generator().manual_seed(seed)

    def batch_loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        value = loss([column[batch] for column in columns])
        return value, value

    return train_epochs(
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        lambda epoch: torch.split(torch.randperm(rows, generator=generator), sizes),
        batch_loss,
        epochs=epochs,
    ).loss
