"""Experts in few bits behind the same router: `QuantizedExperts`.

Letters as in `coterie.nn`: T tokens, E experts, D model width, F hidden width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from coterie.kernels import ClampedSwiGLU, PackedBank, PackedWeight, low_bit_mlp
from coterie.kernels.activations import check_activation
from coterie.nn.experts import check_routing
from coterie.nn.routing import Routing

TENSORS = {"codes": torch.int32, "scales": torch.bfloat16, "zeros": torch.int8, "input_scale": torch.float32}


class QuantizedExperts(nn.Module):
    """A bank of packed experts, for inference; each expert has bits of its own.

    `coterie.shrink.quantize_bank` makes one of `SwiGLUExperts` or `MLPExperts`, whose place it takes. All
    experts' tensors lie in four flat buffers (codes, scales, zeros, input_scale), which keep their dtypes
    whatever the module is cast to.

    Args:
        w_in: for each expert its packed [2, F, D] (gate, up), or [1, F, D] without a gate.
        w_out: for each expert its packed [D_out, F].
        b_in: bias [E, 2F] or [E, F]; None for none.
        b_out: bias [E, D_out]; None for none.
        activation: a name in `coterie.kernels.ACTIVATIONS`, or a `ClampedSwiGLU`.

    Returns (from forward, for x [T, D]): [T, D_out].

    Raises ValueError when the experts' shapes do not fit each other.

    >>> from coterie.nn import SwiGLUExperts
    >>> from coterie.shrink import quantize_bank
    >>> small = quantize_bank(SwiGLUExperts(num_experts=4, dim=32, hidden=64), bits=[1, 2, 3, 4])
    >>> small(torch.randn(5, 32), Routing.dense(torch.rand(5, 4))).shape, small.bits
    (torch.Size([5, 32]), [1, 2, 3, 4])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    input_scale: Tensor

    def __init__(
        self,
        w_in: Sequence[PackedWeight],
        w_out: Sequence[PackedWeight],
        *,
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
        activation: str | ClampedSwiGLU = "silu",
    ) -> None:
        super().__init__()
        bank = PackedBank(w_in, w_out)
        check_activation(activation, bank.gated)
        self.num_experts, self.dim, self.hidden, self.activation = (
            len(bank),
            bank.dim,
            bank.hidden,
            activation,
        )
        weights = [w for pair in zip(w_in, w_out, strict=True) for w in pair]
        self._matrices: list[dict[str, Any]] = [
            {**w.metadata(), "shapes": {name: list(t.shape) for name, t in w.tensors().items()}}
            for w in weights
        ]
        for name, dtype in TENSORS.items():
            found = [w.tensors()[name].flatten() for w in weights if name in w.tensors()]
            self.register_buffer(name, torch.cat(found) if found else torch.empty(0, dtype=dtype))
        self.b_in = None if b_in is None else nn.Parameter(b_in.detach().clone(), requires_grad=False)
        self.b_out = None if b_out is None else nn.Parameter(b_out.detach().clone(), requires_grad=False)
        self._bank: tuple[list[int], PackedBank] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernel reads addresses, which tracing lacks
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        return low_bit_mlp(
            x_TD,
            routing.weights,
            routing.dispatch,
            self.packed(),
            self.b_in,
            self.b_out,
            activation=self.activation,
        )

    @property
    def bits(self) -> list[int]:
        """Bits of each expert's first matrices."""
        return [int(m["bits"]) for m in self._matrices[::2]]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, biases too."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def packed(self) -> PackedBank:
        """The experts' packed matrices, as views of the buffers."""
        buffers = {name: getattr(self, name) for name in TENSORS}
        places = [t.data_ptr() for t in buffers.values()]
        if self._bank is None or self._bank[0] != places:  # moved to another device, or replaced
            self._bank = (places, PackedBank(*_views(buffers, self._matrices)))
        return self._bank[1]

    def layout(self) -> dict[str, Any]:
        """What the state dict's tensors do not say, as JSON can hold it; `from_layout` takes it."""
        biases = {"b_in": self.b_in, "b_out": self.b_out}
        shapes = {name: None if b is None else list(b.shape) for name, b in biases.items()}
        named = isinstance(self.activation, str)
        activation = self.activation if named else asdict(self.activation)  # type: ignore[arg-type]
        return {"matrices": self._matrices, "activation": activation, **shapes}

    @classmethod
    def from_layout(cls, layout: dict[str, Any]) -> "QuantizedExperts":
        """A bank of zeros, ready for `load_state_dict`.

        >>> from coterie.nn import MLPExperts
        >>> from coterie.shrink import quantize_bank
        >>> small = quantize_bank(MLPExperts(2, 32, 48), bits=3, group_size=32)
        >>> again = QuantizedExperts.from_layout(small.layout())
        >>> again.load_state_dict(small.state_dict())
        <All keys matched successfully>
        """
        matrices = layout["matrices"]
        sizes = {name: sum(math.prod(m["shapes"].get(name, [0])) for m in matrices) for name in TENSORS}
        buffers = {name: torch.zeros(size, dtype=TENSORS[name]) for name, size in sizes.items()}
        b_in, b_out = (layout[name] and torch.zeros(layout[name]) for name in ("b_in", "b_out"))
        w_in, w_out = _views(buffers, matrices)
        activation = layout["activation"]
        if not isinstance(activation, str):
            activation = ClampedSwiGLU(**activation)
        return cls(w_in, w_out, b_in=b_in, b_out=b_out, activation=activation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedExperts":
        scales, input_scale = self.scales, self.input_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # moves; a cast would change what the codes mean
        self.scales, self.input_scale = scales.to(self.codes.device), input_scale.to(self.codes.device)
        return self


def _views(
    buffers: dict[str, Tensor], matrices: list[dict[str, Any]]
) -> tuple[list[PackedWeight], list[PackedWeight]]:
    """Each expert's first and last packed weights, cut from the buffers in order."""
    starts, weights = dict.fromkeys(buffers, 0), []
    for matrix in matrices:
        tensors = {}
        for name, shape in matrix["shapes"].items():
            size = math.prod(shape)
            tensors[name] = buffers[name].narrow(0, starts[name], size).view(shape)
            starts[name] += size
        weights.append(PackedWeight.from_tensors(tensors, {k: v for k, v in matrix.items() if k != "shapes"}))
    return weights[::2], weights[1::2]
