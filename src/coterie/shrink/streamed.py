"""Pruning and merging of a checkpoint larger than memory: recorded, edited and written layer by layer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from coterie.hf import BlockRecord, Checkpoint, MoEBlock, rewriting, stream_records
from coterie.hf.save import Format

# (block, its records by domain, its number) → what each expert that is left is made of, as old ids
Edit = Callable[[MoEBlock, Sequence[BlockRecord], int], list[list[int]]]


def edit_streamed(
    folder: Path,
    out: Path | None,
    edit: Edit,
    domains: Sequence[Sequence[Tensor]],
    *,
    keep_inputs: int,
    format: Format,
    on_block: Callable[[MoEBlock], None] = lambda block: None,
) -> dict[str, list[list[int]]]:
    """Edits every MoE block with the weights of one decoder layer in memory, or one per domain.

    What a block's records say is what it does in the unedited model.

    Args:
        folder: the checkpoint.
        out: a new folder, which appears whole or not at all; None writes nothing.
        edit: makes one block smaller.
        domains: batches of ids [B, S] of each.
        keep_inputs: as in `recording`.
        format: of the new checkpoint.
        on_block: called after each block.

    Returns: block name → what `edit` returned.
    """
    checkpoints = [Checkpoint(folder) for _ in domains]
    sources = [
        stream_records(checkpoint, batches, keep_inputs=keep_inputs)
        for checkpoint, batches in zip(checkpoints, domains, strict=True)
    ]
    experts = {}
    with ExitStack() as stack:
        writer = None
        if out is not None:
            writer = stack.enter_context(rewriting(checkpoints[0], out, format=format))
        for number, pairs in enumerate(zip(*sources, strict=True)):
            block = pairs[0][0]
            experts[block.name] = edit(block, [record for _, record in pairs], number)
            if writer is not None:
                writer.write(block)
            on_block(block)
    return experts
