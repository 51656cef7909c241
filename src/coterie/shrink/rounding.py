"""What `quantize_checkpoint` does with one block, and what of it was done before an interruption."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coterie.data import written_whole
from coterie.hf import MoEBlock
from coterie.kernels.packed import BITS, check_group_size
from coterie.shrink.experts import QuantizedExperts
from coterie.shrink.mc_sharp import allocate_bits, bit_budget, expert_statistics
from coterie.shrink.packed_blocks import check_packable, packed_bank, packed_nbytes
from coterie.shrink.packed_checkpoint import load_bank, save_bank
from coterie.shrink.quantize_block import Rounding, quantize_block

MC_SHARP, MOEQUANT = "mc-sharp", "moequant"
ROUNDINGS: dict[str, Rounding] = {
    MC_SHARP: "gptq",
    MOEQUANT: "gptq",
    "gptq": "gptq",
    "awq": "awq",
    "rtn": "rtn",
}
"""Method → how experts are rounded. mc-sharp chooses 1, 2 or 3 bits for each expert, the others give all the
same; moequant counts each calibration token by its combine weight."""


@dataclass
class BlockRounding:
    """Bits and packed experts of one block after the other.

    Args:
        method: of ROUNDINGS.
        bits: per expert, on average at most for mc-sharp.
        group_size: as in `rtn`.
        affinity: count tokens by their combine weights, whatever the method.
        folder: keeps what is done, so that an interrupted run goes on after it; None keeps nothing.
    """

    method: str
    bits: float
    group_size: int
    affinity: bool = False
    folder: Path | None = None

    @property
    def chooses(self) -> bool:
        """Whether experts get different bits, for which their inputs are needed."""
        return self.method == MC_SHARP

    def check(self, blocks: list[MoEBlock]) -> None:
        """Raises ValueError if these blocks cannot be rounded so; no weight is read."""
        if self.method not in ROUNDINGS:
            raise ValueError(f"no method {self.method!r}; use one of {', '.join(ROUNDINGS)}")
        rounding = ROUNDINGS[self.method]
        widths = BITS[1:] if rounding == "awq" else BITS
        if not self.chooses and self.bits not in widths:
            some = ", ".join(map(str, widths))
            raise ValueError(
                f"{self.method} gives all experts the same bits={self.bits:g}; use one of {some}"
            )
        if self.affinity and rounding == "rtn":
            raise ValueError("rtn looks at no token, so none can be weighted; leave the affinity out")
        for block in blocks:
            check_packable(block)
            if self.chooses:
                bit_budget(block.num_experts, self.bits, where=block.name)
            for matrix in (block.experts.up, block.experts.down):
                check_group_size(self.group_size, matrix.shape[2])

    def widths(self, number: int, block: MoEBlock, inputs: Callable[[], Tensor]) -> list[int]:
        """Bits of each expert.

        Args:
            number: of the block.
            block: of the model as it was.
            inputs: gives what it reads [T, D]; not called if that is not needed.
        """
        if not self.chooses:
            return [int(self.bits)] * block.num_experts
        file = None if self.folder is None else self.folder / f"bits-{number:05}.json"
        if file is not None and file.exists():
            found: list[int] = json.loads(file.read_text())
            return found
        statistics = expert_statistics(block, inputs(), group_size=self.group_size)
        widths = allocate_bits(statistics, self.bits)
        if file is not None:
            with written_whole(file) as draft:
                draft.write_text(json.dumps(widths))
        return widths

    def bank(
        self, number: int, block: MoEBlock, widths: list[int], inputs: Callable[[], Tensor]
    ) -> QuantizedExperts:
        """The block's experts, rounded.

        Args:
            number: of the block.
            block: of a model whose earlier blocks are rounded.
            widths: bits of each expert.
            inputs: see `widths`.
        """
        file = None if self.folder is None else self.folder / f"bank-{number:05}.safetensors"
        if file is not None and file.exists():
            return load_bank(file)
        w_in, w_out = quantize_block(
            block,
            inputs(),
            widths,
            ROUNDINGS[self.method],
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
