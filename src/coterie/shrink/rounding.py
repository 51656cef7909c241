"""What `quantize_checkpoint` does with one block, and what of it was done before an interruption."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coterie.data import written_whole
from coterie.hf import MoEBlock
from coterie.kernels.packed import BITS, check_group_size
from coterie.nn import QuantizedExperts
from coterie.shrink.mc_sharp import (
    ExpertStatistics,
    allocate_bits,
    allocate_model_bits,
    bit_budget,
    expert_statistics,
)
from coterie.shrink.packed_blocks import check_packable, packed_bank, packed_nbytes
from coterie.shrink.packed_checkpoint import load_bank, save_bank
from coterie.shrink.quantize_block import Rounding, quantize_block, quantize_router

MC_SHARP, MOEQUANT = "mc-sharp", "moequant"
ROUNDINGS: dict[str, Rounding] = {
    MC_SHARP: "gptq",
    MOEQUANT: "gptq",
    "gptq": "gptq",
    "awq": "awq",
    "rtn": "rtn",
}
"""Method → how experts are rounded. mc-sharp chooses 1, 2 or 3 bits for each expert, the others give all the
same; moequant counts each calibration token by its combine weight, and rounds routers first."""

LAYER, MODEL = "layer", "model"  # what mc-sharp's budget of bits is shared by
UNROUNDED = 16  # bits of a router that stays as it is, whatever type it has
ROUTER_BITS = (*BITS[1:], UNROUNDED)


@dataclass
class BlockRounding:
    """Bits, rounded router and packed experts of one block after the other.

    Args:
        method: of ROUNDINGS.
        bits: per expert, on average at most for mc-sharp.
        group_size: as in `rtn`.
        affinity: count tokens by their combine weights, whatever the method.
        scope: "layer" or "model": what an average of mc-sharp's is over.
        router_bits: of each router's rows, 16 to leave them; None for what the method does.
        folder: keeps what is done, so that an interrupted run goes on after it; None keeps nothing.
    """

    method: str
    bits: float
    group_size: int
    affinity: bool = False
    scope: str = LAYER
    router_bits: int | None = None
    folder: Path | None = None

    @property
    def chooses(self) -> bool:
        """Whether experts get different bits, for which their inputs are needed."""
        return self.method == MC_SHARP

    @property
    def router_width(self) -> int:
        """Bits of each router's rows: MoEQuant rounds them as it does experts, all else leaves them."""
        if self.router_bits is not None:
            return self.router_bits
        return int(self.bits) if self.method == MOEQUANT else UNROUNDED

    def check(self, blocks: list[MoEBlock]) -> None:
        """Raises ValueError if these blocks cannot be rounded so; no weight is read."""
        if self.method not in ROUNDINGS:
            raise ValueError(f"no method {self.method!r}; use one of {', '.join(ROUNDINGS)}")
        rounding = ROUNDINGS[self.method]
        # signs cannot be scaled, and make no router
        widths = BITS[1:] if rounding == "awq" or self.method == MOEQUANT else BITS
        if not self.chooses and self.bits not in widths:
            some = ", ".join(map(str, widths))
            raise ValueError(
                f"{self.method} gives all experts the same bits={self.bits:g}; use one of {some}"
            )
        if self.affinity and rounding == "rtn":
            raise ValueError("rtn looks at no token, so none can be weighted; leave the affinity out")
        if self.router_width not in ROUTER_BITS:
            some = ", ".join(map(str, ROUTER_BITS))
            raise ValueError(f"router_bits={self.router_width}; use one of {some}, which leaves it as it is")
        self._check_scope(blocks)
        for block in blocks:
            check_packable(block)
            if isinstance(block.layer, nn.ModuleList):  # Gemma 4
                raise ValueError(
                    f"{block.name} holds its experts and attention alike; they cannot be run apart, to round "
                    "them on what they read"
                )
            if self.chooses and self.scope == LAYER:
                bit_budget(block.num_experts, self.bits, where=block.name)
            for matrix in (block.experts.up, block.experts.down):
                check_group_size(self.group_size, matrix.shape[2])

    def statistics(self, number: int, block: MoEBlock, inputs: Callable[[], Tensor]) -> ExpertStatistics:
        """What the choice of bits knows of a block's experts.

        Args:
            number: of the block.
            block: of the model as it was.
            inputs: gives what it reads [T, D]; not called if that is not needed.
        """
        file = self._statistics_file(number)
        if file is not None and file.exists():
            return _read_statistics(file)
        found = expert_statistics(block, inputs(), group_size=self.group_size)
        if file is not None:
            _write_statistics(found, file)
        return found

    def kept_statistics(self, count: int) -> list[ExpertStatistics]:
        """Those of the first blocks, `count` at most, that an interrupted run kept; no pass gave them."""
        files = (self._statistics_file(number) for number in range(count))
        kept = itertools.takewhile(lambda file: file is not None and file.exists(), files)
        return [_read_statistics(file) for file in kept if file is not None]

    def plan(self, blocks: Sequence[MoEBlock], statistics: Sequence[ExpertStatistics]) -> list[list[int]]:
        """Bits of each expert of each block.

        Args:
            blocks: in order of depth.
            statistics: of each, where the method chooses; else none are needed.
        """
        if not self.chooses:
            return [[int(self.bits)] * block.num_experts for block in blocks]
        if self.scope == MODEL:
            return allocate_model_bits(statistics, self.bits)
        return [allocate_bits(one, self.bits) for one in statistics]

    @torch.no_grad()
    def bank(
        self, number: int, block: MoEBlock, widths: list[int], inputs: Callable[[], Tensor]
    ) -> QuantizedExperts:
        """The block's experts, rounded; its router, if it is rounded, is so before, in place.

        Args:
            number: of the block.
            block: of a model whose earlier blocks are rounded.
            widths: bits of each expert.
            inputs: see `statistics`.
        """
        file = None if self.folder is None else self.folder / f"bank-{number:05}.safetensors"
        rows_file = None if file is None else file.with_name(f"router-{number:05}.safetensors")
        rounds_router = self.router_width != UNROUNDED
        if file is not None and rows_file is not None and file.exists():
            if rounds_router:
                block.router.rows.copy_(load_file(rows_file)["rows"])
            return load_bank(file)
        inputs_TD, rounding = inputs(), ROUNDINGS[self.method]
        if rounds_router:
            rows = quantize_router(block, inputs_TD, self.router_width, rounding, group_size=self.group_size)
            block.router.rows.copy_(rows.dequantize())
            if rows_file is not None:
                with written_whole(rows_file) as draft:
                    save_file({"rows": block.router.rows.clone()}, draft)
        w_in, w_out = quantize_block(
            block,
            inputs_TD,
            widths,
            rounding,
            affinity=self.affinity or self.method == MOEQUANT,
            group_size=self.group_size,
        )
        bank = packed_bank(block, w_in, w_out)
        if file is not None:
            save_bank(bank, file)
        return bank

    def nbytes(self, block: MoEBlock, widths: list[int]) -> int:
        """Bytes that the block's experts will take."""
        return packed_nbytes(block, widths, self.group_size, scaled=ROUNDINGS[self.method] == "awq")

    def _statistics_file(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"statistics-{number:05}.json"

    def _check_scope(self, blocks: list[MoEBlock]) -> None:
        if self.scope not in (LAYER, MODEL):
            raise ValueError(f"no scope {self.scope!r}; use {LAYER} or {MODEL}")
        if self.scope == LAYER:
            return
        if not self.chooses:
            raise ValueError(f"{self.method} gives all experts the same bits; only {MC_SHARP} has a scope")
        bit_budget(sum(block.num_experts for block in blocks), self.bits, where="the model")
        first, *others = [(block.name, tuple(block.experts.up.shape[1:])) for block in blocks]
        for name, shape in others:
            if shape != first[1]:
                raise ValueError(
                    f"experts of {name} are {list(shape)}, of {first[0]} {list(first[1])}: a bit takes "
                    f"other bytes there, so they cannot share a budget; use scope {LAYER}"
                )


def _write_statistics(statistics: ExpertStatistics, file: Path) -> None:
    content = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(statistics).items()}
    with written_whole(file) as draft:
        draft.write_text(json.dumps(content))


def _read_statistics(file: Path) -> ExpertStatistics:
    content = json.loads(file.read_text())
    tensors = {
        name: torch.tensor(content.pop(name), dtype=torch.float64)
        for name in ("frequency", "weight", "error")
    }
    return ExpertStatistics(
        **tensors, name=content["name"], bits=tuple(content["bits"]), tokens=content["tokens"]
    )
