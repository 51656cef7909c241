"""Expert weights in the native kernel's own order, kept from call to call.

with prepacked() as copies:
    model.generate(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from coterie.kernels import native_library
from coterie.kernels.native_library import DTYPES, Bank, empty, library, release_memory

_SAMPLES = 4  # rows of each expert whose first number is compared at every call


class Prepacked:
    """The packed copies that a `prepacked()` block keeps."""

    def __init__(self) -> None:
        self._banks: dict[tuple[Any, ...], _Bank] = {}

    @property
    def nbytes(self) -> int:
        """What the copies take."""
        return sum(bank.copy.nbytes for bank in self._banks.values() if bank.copy is not None)

    def clear(self) -> None:
        """Drops the copies and gives their memory back to the system; further calls make new ones."""
        self._banks.clear()
        release_memory()

    def find(self, w: Tensor, matrices: int, interleaved: bool = False) -> Tensor | None:
        """The copy of a bank; None at its first sight, after a change, and where it would be larger than it.

        Args:
            w: [E, matrices · rows, columns], float32 or bfloat16.
            matrices: of each expert: 2 for gate and up.
            interleaved: their rows take turns.
        """
        if (
            w.is_inference() or 1 not in w.stride()[1:]
        ):  # torch does not count its changes; the kernel reads a copy
            return None
        key = (
            w.data_ptr(),
            w.shape,
            w.stride(),
            w.dtype,
            matrices,
            interleaved,
            native_library.instruction_limit,
        )
        bank = self._banks.get(key)
        if bank is None or not bank.sees(w):
            self._banks = {k: b for k, b in self._banks.items() if not b.memory.expired()}  # type: ignore[no-untyped-call]
            # packed when it comes again: what autocast or an optimizer makes anew at each call never is
            self._banks[key] = _Bank(_weak(w), w._version, _sample(w).clone())
            return None
        if bank.copy is None and not bank.refused:
            bank.copy = _pack(w, matrices, interleaved)
            bank.refused = bank.copy is None
        return bank.copy


@dataclass
class _Bank:
    memory: StorageWeakRef  # keeps the storage's identity, not its memory
    version: int
    sample: Tensor
    copy: Tensor | None = None
    refused: bool = False

    def sees(self, w: Tensor) -> bool:
        """Whether w is the bank that was seen, unchanged."""
        same = self.memory.cdata == w.untyped_storage()._cdata and self.version == w._version
        return same and torch.equal(self.sample, _sample(w))


def _weak(w: Tensor) -> StorageWeakRef:
    return StorageWeakRef(w.untyped_storage())  # type: ignore[no-untyped-call]


def _sample(w: Tensor) -> Tensor:
    return w.detach()[:, :: max(1, w.shape[1] // _SAMPLES), 0]


def _pack(w: Tensor, matrices: int, interleaved: bool) -> Tensor | None:
    """The copy, or None where it would take more than the bank: odd widths, bfloat16 without its products."""
    experts, rows, columns = w.shape
    sizes = (experts, matrices, rows // matrices, columns, DTYPES[w.dtype])
    floats: int = library().coterie_prepacked_floats(*sizes)
    if not _fits(floats, w):
        return None
    copy = empty((floats,), torch.float32)
    bank, threads = Bank(w.data_ptr(), *w.stride()), torch.get_num_threads()
    library().coterie_prepack(bank, *sizes, interleaved, threads, copy.data_ptr())
    return copy


def _fits(floats: int, w: Tensor) -> bool:
    return 4 * floats <= w.nbytes


_active: Prepacked | None = None


def active() -> Prepacked | None:
    """The copies of the `prepacked()` block that the process is in."""
    return _active


@contextmanager
def prepacked(copies: Prepacked | None = None) -> Iterator[Prepacked]:
    """Inside, the native kernel keeps a packed copy of each bank of experts that it meets without gradients.

    It otherwise packs weights anew at every call, which is up to a third of the time where an expert has few
    tokens. Results are the same bits. Copies take no more memory than the banks themselves, and are dropped
    at the end of the outermost block; those of a `Prepacked` that was given stay, for the next block. The
    block is the process's, for all of its threads.

    A bank is packed when it comes for the second time, and once more after a change: by an optimizer, under
    `torch.no_grad`, by `load_state_dict`, or with a new `.data`. Torch does not count what is written in
    place through `.data`. Some numbers of every expert are compared at each call for its sake: the change of
    a whole expert is noticed, that of single numbers may not be; call `clear` after it.

    Not packed are parameters made under `torch.inference_mode`, which have no count of changes, and what
    would grow by it: widths that are no multiple of the vectors (32 with AVX-512), and bfloat16 on a
    processor without bfloat16 products.

    >>> from coterie.nn import Routing, SwiGLUExperts
    >>> bank, routing = SwiGLUExperts(num_experts=8, dim=64, hidden=32), Routing.dense(torch.rand(5, 8))
    >>> x = torch.randn(5, 64)
    >>> with torch.no_grad(), prepacked() as copies:
    ...     first, second = bank(x, routing), bank(x, routing)
    ...     copies.nbytes <= sum(p.nbytes for p in bank.parameters()), torch.equal(first, second)
    (True, True)
    """
    global _active
    outer = _active
    _active = used = copies or outer or Prepacked()
    try:
        yield used
    finally:
        _active = outer
        if copies is None and outer is None:
            used.clear()
