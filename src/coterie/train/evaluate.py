"""The loss on data not trained on."""

import math
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import Dataset, default_collate

from coterie.train.losses import LossFn
from coterie.train.totals import Sums


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset[Any], loss: LossFn, batch_size: int, batches: int | None = None
) -> dict[str, float]:
    """Means of a loss over data, in evaluation mode, shared out among the processes of a distributed run.

    Args:
        model: where its parameters are, its batches go; it comes back in the mode it had.
        data: map-style, with a length; its items are collated as a DataLoader does.
        loss: called once per batch.
        batch_size: items per batch, over all processes.
        batches: only the first this many; None for all of the data, a last smaller batch included.

    Returns: "loss", "cross_entropy" (nats per token), "bits_per_token", "tokens", the loss function's
    metrics, and "imbalance" (busiest expert over mean, worst layer) if the model has experts.

    Raises:
        ValueError: the data are empty, or batch_size or batches below 1.

    >>> from coterie.train import LossOutput
    >>> def square(model, x):
    ...     value = model(x).square().mean()
    ...     return LossOutput(value, value.detach(), tokens=len(x))
    >>> evaluate(nn.Identity(), [torch.tensor(1.0), torch.tensor(2.0)], square, batch_size=8)["loss"]
    2.5
    """
    from accelerate.utils import send_to_device

    items = len(data)  # type: ignore[arg-type]
    if items == 0 or batch_size < 1 or (batches is not None and batches < 1):
        raise ValueError(
            f"{items} items, batch_size={batch_size}, batches={batches}; an evaluation needs one of each"
        )
    rank, world = _place()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = math.ceil(items / batch_size) if batches is None else min(batches, math.ceil(items / batch_size))
    share = math.ceil(batch_size / world)
    sums, training = Sums(), model.training
    model.eval()
    try:
        for batch in range(count):
            end = min((batch + 1) * batch_size, items)
            start = batch * batch_size + rank * share
            mine = range(start, min(start + share, end))
            # a process left without items still calls the loss, which may wait for the others in a
            # collective, and then does not count it
            picked = [data[i] for i in mine or range(1)]
            sums.add(loss(model, send_to_device(default_collate(picked), device)), weight=1 if mine else 0)
        totals = sums.totals()
    finally:
        model.train(training)
    result = {
        "loss": totals.loss,
        "cross_entropy": totals.cross_entropy,
        "bits_per_token": totals.cross_entropy / math.log(2),
        "tokens": float(totals.tokens),
        **totals.metrics,
    }
    return result if totals.imbalance is None else {**result, "imbalance": totals.imbalance}


def _place() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
