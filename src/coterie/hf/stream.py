"""Calibration of a checkpoint larger than memory: all tokens through one decoder layer at a time.

for block, record in stream_records(folder, batches):
    print(block.name, record.sum_by_expert(record.weights))
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coterie.hf.blocks import MoEBlock
from coterie.hf.checkpoint import Checkpoint
from coterie.hf.record import BlockRecord, recording


def stream_records(
    source: Path | str | Checkpoint, batches: Iterable[Tensor], *, keep_inputs: int = 0
) -> Iterator[tuple[MoEBlock, BlockRecord]]:
    """What each MoE block did with some text, block by block, with one decoder layer's weights in memory.

    Args:
        source: folder with config.json and safetensors, or a `Checkpoint` of it.
        batches: ids [B, S] int64 each, without padding.
        keep_inputs: as in `recording`.

    Yields each block and its record, in order of depth. The block's layer is loaded until the next block is
    asked for; an edit of it changes neither what the layers above see nor how they compute.

    Memory: the embeddings, then two layers' weights at most, and two hidden states [B, S, D] per batch.

    Raises ValueError if there are no batches, as `Checkpoint` does, or if the decoder is no plain stack: what
    a layer is called with depends on the layers below, or it returns more than its hidden states.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    calls = _catch(checkpoint, batches)
    for number, name in enumerate(checkpoint.layers):
        blocks = [block for block in checkpoint.blocks if checkpoint.layer_of(block) == name]
        with checkpoint.loaded(name) as layer:
            with recording(blocks, keep_inputs=keep_inputs) as records, torch.no_grad():
                for call in calls:
                    call.hidden = _run(name, layer, call, number)
            yield from zip(blocks, records, strict=True)


def stream_layers(
    source: Path | str | Checkpoint, batches: Iterable[Tensor]
) -> Iterator[tuple[MoEBlock, list[Callable[[], Tensor]]]]:
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
    calls = _catch(checkpoint, batches)
    for number, name in enumerate(checkpoint.layers):
        with checkpoint.loaded(name) as layer:
            blocks = [block for block in checkpoint.blocks if checkpoint.layer_of(block) == name]
            for block in blocks:
                yield block, [partial(_run, name, layer, call, number) for call in calls]
            with torch.no_grad():
                for call in calls:
                    call.hidden = _run(name, layer, call, number)
            for block in blocks:
                checkpoint.model.set_submodule(block.layout.experts["down"].rpartition(".")[0], block.bank)


@dataclass
class _Call:
    """One batch on its way: the hidden states, and what else each layer is called with."""

    hidden: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _AllCaughtError(Exception):
    """Ends a forward pass once the last layer has been called."""


def _catch(checkpoint: Checkpoint, batches: Iterable[Tensor]) -> list[_Call]:
    """Runs what comes before the layers, once for all batches, with stubs in the layers' places."""
    checkpoint.load("")
    calls = []
    for ids_BS in batches:
        calls.append(_call_stubs(checkpoint, ids_BS, lambda hidden: hidden))
        if len(calls) == 1:
            _check_plain(checkpoint, calls[0], _call_stubs(checkpoint, ids_BS, torch.zeros_like))
    checkpoint.drop("")
    if not calls:
        raise ValueError("there are no batches to run; give at least one")
    width = checkpoint.model.config.get_text_config().hidden_size
    if calls[0].hidden.shape[2:] != (width,):
        raise ValueError(
            f"{checkpoint.folder}: {type(checkpoint.model).__name__} carries several residual streams per "
            f"token ({list(calls[0].hidden.shape[2:])}, its width is {width}); its blocks cannot be recorded"
        )
    return calls


def _call_stubs(checkpoint: Checkpoint, ids_BS: Tensor, output: Callable[[Tensor], Tensor]) -> _Call:
    """A forward pass in which every layer only notes its arguments and returns `output(its input)`."""
    layers = [checkpoint.model.get_submodule(name) for name in checkpoint.layers]
    calls: list[_Call] = []
    passed: list[Tensor] = []

    def stub(number: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if number == 0 and not calls:
                calls.append(_Call(hidden))
            elif not passed or hidden is not passed[-1] or number != len(calls[0].others):
                raise ValueError(
                    f"{checkpoint.folder}: {type(checkpoint.model).__name__} does not pass the output of one "
                    "layer to the next as it is, so it cannot be streamed; load the whole model instead"
                )
            calls[0].others.append((args[1:], kwargs))
            if number == len(layers) - 1:
                raise _AllCaughtError
            passed[:] = [output(hidden)]
            return passed[0]

        return forward

    try:
        for number, layer in enumerate(layers):
            layer.forward = stub(number)
        with torch.no_grad():
            checkpoint.model(input_ids=ids_BS, use_cache=False)
    except _AllCaughtError:
        return calls[0]
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    raise ValueError(f"{type(checkpoint.model).__name__} does not call its layer {checkpoint.layers[-1]}")


def _check_plain(checkpoint: Checkpoint, call: _Call, other: _Call) -> None:
    """Whether the layers' other arguments are the same when all layers return something else."""
    for name, some, others in zip(checkpoint.layers, call.others, other.others, strict=True):
        for a, b in zip(tree_leaves(some), tree_leaves(others), strict=True):
            if isinstance(a, Tensor) and not torch.equal(a, b):
                raise ValueError(
                    f"{checkpoint.folder}: {name} is called with more than the hidden states of the layer "
                    "below, so it cannot be streamed; load the whole model instead"
                )


def _run(name: str, layer: nn.Module, call: _Call, number: int) -> Tensor:
    args, kwargs = call.others[number]
    output = layer(call.hidden, *args, **kwargs)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{name} returns a {type(output).__name__} instead of hidden states, so it cannot be streamed; "
            "load the whole model instead"
        )
    return output
