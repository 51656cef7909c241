"""Calibration of a checkpoint larger than memory: all tokens through one decoder layer at a time.

for block, record in stream_records(folder, batches):
    print(block.name, record.sum_by_expert(record.weights))
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.hf.blocks import MoEBlock
from coterie.hf.checkpoint import Checkpoint
from coterie.hf.held import Pass, held_passes
from coterie.hf.record import BlockRecord, recording


def stream_records(
    source: Path | str | Checkpoint, batches: Iterable[Tensor], *, keep_inputs: int = 0
) -> Iterator[tuple[MoEBlock, BlockRecord]]:
    """What each MoE block did with some text, block by block, with one decoder layer's weights in memory.

    The model's own forward pass runs once for each batch, and is held at every layer until all others are
    there: what it does between its layers, and hands from one to another, is what it always does.

    Args:
        source: folder with config.json and safetensors, or a `Checkpoint` of it.
        batches: ids [B, S] int64 each, without padding.
        keep_inputs: as in `recording`.

    Yields each block and its record, in order of depth. The block's layer is loaded until the next block is
    asked for; an edit of it changes neither what the layers above see nor how they compute.

    Memory: the embeddings, then two layers' weights at most; per batch two hidden states [B, S, D], and what
    else the model keeps between its layers. A thread per batch, of which one runs.

    Raises ValueError if there are no batches, as `Checkpoint` does, or if the model does not call each layer
    once, in order of depth, or needs weights between them that are neither small nor the decoder's own.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    with _passes(checkpoint, batches) as passes:
        for number, name in enumerate(checkpoint.layers):
            blocks = [block for block in checkpoint.blocks if checkpoint.layer_of(block) == name]
            with checkpoint.loaded(name) as layer:
                with recording(blocks, keep_inputs=keep_inputs) as records:
                    _go_on(checkpoint, number, layer, passes)
                yield from zip(blocks, records, strict=True)


def stream_layers(
    source: Path | str | Checkpoint, batches: Iterable[Tensor]
) -> Iterator[tuple[MoEBlock, list[Callable[[], Any]]]]:
    """Each MoE block on its way through some text, with one decoder layer's weights in memory.

    Where `stream_records` shows each layer an unedited model below it, here the layers above see what a layer
    computes as it is when the next block is asked for. Whoever asks may by then have put another module
    in the place of the block's experts; it is taken out again before the layer is dropped.

    Args:
        source: folder with config.json and safetensors, or a `Checkpoint` of it.
        batches: ids [B, S] int64 each, without padding.

    Yields each block, in order of depth, and for each batch a function that runs the block's layer on it.

    Raises ValueError as `stream_records`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    with _passes(checkpoint, batches) as passes:
        for number, name in enumerate(checkpoint.layers):
            blocks = [block for block in checkpoint.blocks if checkpoint.layer_of(block) == name]
            with checkpoint.loaded(name) as layer:
                for block in blocks:
                    yield block, [partial(_compute, layer, one) for one in passes]
                _go_on(checkpoint, number, layer, passes)
                for block in blocks:
                    experts = block.layout.experts["down"].rpartition(".")[0]
                    checkpoint.model.set_submodule(experts, block.bank)


@contextmanager
def _passes(checkpoint: Checkpoint, batches: Iterable[Tensor]) -> Iterator[list[Pass]]:
    """The batches' passes, held at the first layer."""
    with held_passes(checkpoint, batches) as passes:
        if not passes:
            raise ValueError("there are no batches to run; give at least one")
        _check_held(checkpoint, 0, passes)
        yield passes


def _compute(layer: nn.Module, one: Pass) -> Any:
    return layer(*one.args, **one.kwargs)


@torch.no_grad()
def _go_on(checkpoint: Checkpoint, number: int, layer: nn.Module, passes: list[Pass]) -> None:
    """Every batch through one layer, and on to the next."""
    for one in passes:
        one.go_on(_compute(layer, one))
    _check_held(checkpoint, number + 1, passes)


def _check_held(checkpoint: Checkpoint, number: int, passes: list[Pass]) -> None:
    """Whether the passes are held at the layer of that number, or over after the last one."""
    due = [*checkpoint.layers, None][number]
    for one in passes:
        if one.layer == due:  # after the last layer a pass ends for lack of the output head
            continue
        if one.layer in checkpoint.layers[:number]:
            problem = f"calls {one.layer} more than once"
        elif one.layer is not None:
            problem = f"calls {one.layer} where {due} is next"
        elif one.lacks is not None:
            problem = f"needs {one.lacks}, which is in none of its layers, before it calls {due}"
        else:
            problem = f"does not call its layer {due}"
        raise ValueError(
            f"{checkpoint.folder}: {type(checkpoint.model).__name__} {problem}, so it cannot be streamed; "
            "load the whole model instead"
        )
