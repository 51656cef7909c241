"""Forward passes of a model without its layers' weights, each held where it calls a decoder layer.

with held_passes(checkpoint, batches) as passes:
    for one in passes:
        output = layer(*one.args, **one.kwargs)  # one.layer names it
        one.go_on(output)  # the pass is now held at the next layer

Whatever a model does between its layers (hands an index from one to the next, keeps several residual streams,
attends to the outputs of earlier layers) is done by its own code, and once.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from coterie.hf import modules
from coterie.hf.checkpoint import Checkpoint


@contextmanager
def held_passes(checkpoint: Checkpoint, batches: Iterable[Tensor]) -> Iterator[list["Pass"]]:
    """A forward pass for each batch, held at the first decoder layer that it calls.

    What is in no layer is in memory until all passes are there. Then embedding tables, vision towers and the
    like are dropped; the few weights that the decoder has beside its layers stay until the context closes.

    Args:
        checkpoint: nothing of it is loaded yet.
        batches: ids [B, S] int64 each, without padding.

    Raises ValueError as `Checkpoint.load`, and what the model raises.
    """
    model = checkpoint.model
    layers = {name: model.get_submodule(name) for name in checkpoint.layers}
    passes: list[Pass] = []
    try:
        for name, layer in layers.items():
            layer.forward = partial(_forward, name, layer.forward)
        checkpoint.load("")
        for ids_BS in batches:
            passes.append(Pass(model, ids_BS))
            passes[-1].start()
        kept = {name: modules.get_tensor(model, name) for name in _beside_layers(checkpoint)}
        checkpoint.drop("")
        for name, tensor in kept.items():
            modules.set_tensor(model, name, tensor)
        yield passes
    finally:
        for one in passes:
            one.close()
        for layer in layers.values():
            vars(layer).pop("forward", None)
        checkpoint.drop("")


class Pass:
    """One batch's forward pass, in a thread of its own: this thread or the one that made it runs, never both.

    Args:
        model: whose layers have `held_passes`' forward.
        ids_BS: ids [B, S] int64, without padding.

    Attributes:
        layer: the name of the decoder layer at which the pass is held; None once it is over.
        args, kwargs: what that layer is called with.
        lacks: the name of the weight for which the pass ended, if it asked for one that is not in memory.
    """

    def __init__(self, model: PreTrainedModel, ids_BS: Tensor) -> None:
        self.layer: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.lacks: str | None = None
        self._calls = SimpleQueue[Any]()  # (layer, args, kwargs); what the model raised; None after its end
        self._outputs = SimpleQueue[tuple[Any] | None]()  # in a tuple, as None closes the pass
        self._thread = threading.Thread(target=self._run, args=(model, ids_BS), daemon=True)

    def start(self) -> None:
        """Runs the model until it calls a layer."""
        threads = torch.get_num_threads()
        self._thread.start()
        try:
            self._wait()
        finally:
            torch.set_num_threads(threads)

    def go_on(self, output: Any) -> None:
        """Lets the layer return this, and runs the model until it calls the next layer."""
        self.layer, self.args, self.kwargs = None, (), {}
        self._outputs.put((output,))
        self._wait()

    def close(self) -> None:
        """Ends the pass where it is."""
        if self._thread.is_alive():
            self._outputs.put(None)
            self._thread.join()

    def _wait(self) -> None:
        found = self._calls.get()
        if isinstance(found, BaseException):
            raise found
        if found is not None:
            self.layer, self.args, self.kwargs = found

    def _run(self, model: PreTrainedModel, ids_BS: Tensor) -> None:
        _here.held = self
        torch.set_num_threads(1)  # else each of these threads would keep a team of its own while it is held
        end: BaseException | None = None
        try:
            with torch.no_grad(), _InMemory(model):
                model(input_ids=ids_BS, use_cache=False)
        except _LacksError as error:
            self.lacks = str(error)
        except _ClosedError:
            return
        except BaseException as error:  # raised where the pass is waited for
            end = error
        self._calls.put(end)

    def _hand_over(self, *call: Any) -> Any:
        """In the pass's thread: the output of this call."""
        self._calls.put(call)
        answer = self._outputs.get()
        if answer is None:
            raise _ClosedError
        return answer[0]


_here = threading.local()


def _forward(name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward: in a pass it is handed over, elsewhere it is the layer's own."""
    held: Pass | None = getattr(_here, "held", None)
    return own(*args, **kwargs) if held is None else held._hand_over(name, args, kwargs)


def _beside_layers(checkpoint: Checkpoint) -> list[str]:
    """Names of the decoder's tensors but those of its layers, embedding tables, and models inside it."""
    start = checkpoint.stack.rpartition(".")[0]
    layers = checkpoint.model.get_submodule(checkpoint.stack)

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{prefix}{name}"
        for name, child in module.named_children():
            if child is not layers and not isinstance(child, PreTrainedModel | nn.Embedding):
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(checkpoint.model.get_submodule(start), f"{start}." if start else ""))


class _ClosedError(BaseException):
    """Ends a pass that no one waits for."""


class _LacksError(BaseException):
    """Ends a pass that asks for a weight which is not in memory."""


class _InMemory(TorchDispatchMode):
    """Within, nothing is computed with weights that are not in memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                named = self._model.named_parameters()
                raise _LacksError(next((name for name, tensor in named if tensor is leaf), "a weight"))
        return func(*args, **(kwargs or {}))
