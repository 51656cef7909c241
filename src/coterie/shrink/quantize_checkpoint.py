"""A checkpoint on disk with its experts in few bits: from checks to the new folder.

quantize_checkpoint(folder, out, method="mc-sharp", bits=2.0, calib=["text.txt"])
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from coterie.hf import MoEBlock, find_moe_blocks, load, outline
from coterie.hf.save import check_output
from coterie.kernels.packed import BITS, check_group_size
from coterie.shrink.calibrate import batches, check_vocabulary, held_out, read_text
from coterie.shrink.checkpoint import read_tokenizer
from coterie.shrink.mc_sharp import allocate_bits, bit_budget, expert_statistics
from coterie.shrink.measure import bytes_on_disk, perplexity
from coterie.shrink.packed_blocks import check_packable, pack_block, packed_nbytes
from coterie.shrink.packed_checkpoint import save_packed
from coterie.shrink.progress import Show, showing
from coterie.shrink.quantize_block import quantize_block
from coterie.shrink.routed import block_inputs

MC_SHARP = "mc-sharp"
QUANTIZERS = (MC_SHARP, "gptq", "rtn")
"""mc-sharp chooses 1, 2 or 3 bits for each expert and rounds with GPTQ; the others give all the same."""


@dataclass
class Quantized:
    """What became of a checkpoint.

    Args:
        source: its folder.
        out: the new folder; None in a dry run, in which sizes after are computed, not measured.
        method: one of QUANTIZERS.
        bits: block name → bits of each expert.
        expert_weights: numbers in the matrices of all routed experts.
        expert_bytes: bytes of routed experts (before, after), scales and padding included.
        memory: bytes of all parameters and buffers (before, after).
        disk: bytes of the safetensors files (before, after).
        perplexity: on the held-out end of the calibration text (before, after); None in a dry run.
        calibration_tokens: read.
        heldout_tokens: tested on.
    """

    source: str
    out: str | None
    method: str
    bits: dict[str, list[int]]
    expert_weights: int
    expert_bytes: tuple[int, int]
    memory: tuple[int, int]
    disk: tuple[int, int]
    perplexity: tuple[float, float] | None
    calibration_tokens: int
    heldout_tokens: int

    def average_bits(self) -> float:
        """Bits per expert, as they were budgeted: no scales, no padding."""
        every = [b for widths in self.bits.values() for b in widths]
        return sum(every) / len(every)

    def stored_bits(self) -> float:
        """Bits per expert weight, as they are stored."""
        return 8 * self.expert_bytes[1] / self.expert_weights

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, as JSON holds them."""
        return {**asdict(self), "average_bits": self.average_bits(), "stored_bits": self.stored_bits()}


def quantize_checkpoint(
    folder: Path | str,
    out: Path | str | None,
    *,
    bits: float,
    calib: Sequence[Path | str],
    method: str = MC_SHARP,
    group_size: int = 128,
    dry_run: bool = False,
    max_tokens: int = 65536,
    seq_len: int = 512,
    progress: bool | None = None,
) -> Quantized:
    """Stores the routed experts in few bits; all else stays as it is.

    mc-sharp takes statistics of all blocks first, from the model as it was, and chooses bits; then blocks
    are rounded in order of depth, each on what the rounded ones before it give.

    Args:
        folder: a checkpoint of a mixture of experts, with its tokenizer.
        out: a new folder, for `load_packed`; None only in a dry run.
        bits: per expert, on average over each block for mc-sharp, at most; for the others 1, 2, 3, 4 or 8.
        calib: text or .jsonl files; see `read_text`. The last tenth of each is held out.
        method: one of QUANTIZERS.
        group_size: columns that share a scale, a multiple of 32; or -1.
        dry_run: choose the bits, and write nothing.
        max_tokens: to calibrate on, of each file at most.
        seq_len: tokens of a sequence at most.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.

    Raises:
        ValueError: before the model runs: no mixture of experts, experts that cannot be packed, a bit budget
            that cannot be met, an output folder that is taken, calibration text that is missing, too short
            or of another tokenizer, an unknown method.
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    folder, out = Path(folder), None if out is None else Path(out)
    config = _check(folder, out, method, bits, group_size, dry_run)
    tokenizer = read_tokenizer(folder)
    seen, heldout = _read(calib, tokenizer, config, max_tokens, seq_len)
    model = load(folder, dtype="auto")
    blocks = find_moe_blocks(model)
    with showing(len(blocks) * ((method == MC_SHARP) + (not dry_run)), progress) as show:
        if method == MC_SHARP:
            plan = [_choose(model, block, seen, bits, group_size, show) for block in blocks]
        else:
            plan = [[int(bits)] * block.num_experts for block in blocks]
        whole, disk = _nbytes(model), bytes_on_disk(folder)
        was = sum(t.nbytes for block in blocks for t in vars(block.experts).values() if t is not None)
        will = sum(packed_nbytes(b, widths, group_size) for b, widths in zip(blocks, plan, strict=True))
        result = Quantized(
            source=str(folder),
            out=None,
            method=method,
            bits={block.name: widths for block, widths in zip(blocks, plan, strict=True)},
            expert_weights=sum(_weights(block) for block in blocks),
            expert_bytes=(was, will),
            memory=(whole, whole - was + will),
            disk=(disk, disk - was + will),
            perplexity=None,
            calibration_tokens=sum(ids.numel() for ids in seen),
            heldout_tokens=sum(ids.numel() for ids in heldout),
        )
        if dry_run or out is None:
            return result
        show.say("measuring the checkpoint on held-out text")
        before = perplexity(model, heldout)
        for block, widths in zip(blocks, plan, strict=True):
            inputs_TD = block_inputs(model, block, seen)
            rounding: Any = "rtn" if method == "rtn" else "gptq"
            packed = quantize_block(block, inputs_TD, widths, rounding, group_size=group_size)
            pack_block(model, block, *packed)
            show.step(f"{block.name}: rounded")
        show.say("measuring the new one")
        result.perplexity = (before, perplexity(model, heldout))
        result.memory = (whole, _nbytes(model))
        show.say(f"writing {out}")
        _write(model, blocks, tokenizer, out)
    result.out, result.disk = str(out), (disk, bytes_on_disk(out))
    return result


def _choose(
    model: PreTrainedModel, block: MoEBlock, seen: list[Tensor], bits: float, group_size: int, show: Show
) -> list[int]:
    statistics = expert_statistics(block, block_inputs(model, block, seen), group_size=group_size)
    widths = allocate_bits(statistics, bits)
    counts = ", ".join(f"{widths.count(b)} in {b}" for b in sorted(set(widths)))
    show.step(f"{block.name}: experts by bits: {counts}")
    return widths


def _check(folder: Path, out: Path | None, method: str, bits: float, group_size: int, dry_run: bool) -> Any:
    """The configuration of a checkpoint that can be quantised as asked for; no weight is read."""
    if method not in QUANTIZERS:
        raise ValueError(f"no method {method!r}; use one of {', '.join(QUANTIZERS)}")
    if out is None and not dry_run:
        raise ValueError("no output folder was given; give one, or make it a dry run")
    if out is not None:
        check_output(out, str(folder))
    if method != MC_SHARP and bits not in BITS:
        some = ", ".join(map(str, BITS))
        raise ValueError(f"{method} gives all experts the same bits={bits:g}; use one of {some}")
    model = outline(folder)
    for block in find_moe_blocks(model):
        check_packable(block)
        if method == MC_SHARP:
            bit_budget(block.num_experts, bits, where=block.name)
        for matrix in (block.experts.up, block.experts.down):
            check_group_size(group_size, matrix.shape[2])
    return model.config.get_text_config()


def _read(
    calib: Sequence[Path | str], tokenizer: Any, config: Any, max_tokens: int, seq_len: int
) -> tuple[list[Tensor], list[Tensor]]:
    if not calib:
        raise ValueError("no calibration text was given; give a text or .jsonl file")
    seen, rest = [], []
    for path in calib:
        seq_len = min(seq_len, config.max_position_embeddings)
        sequences = read_text(path, tokenizer, max_tokens=max_tokens, seq_len=seq_len)
        check_vocabulary(path, sequences, config.vocab_size)
        calibrate, heldout = held_out(sequences)
        seen += batches(calibrate)
        rest += batches(heldout)
    return seen, rest


def _write(model: PreTrainedModel, blocks: list[MoEBlock], tokenizer: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        draft = Path(temporary) / out.name
        save_packed(model, blocks, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        os.replace(draft, out)


def _nbytes(model: PreTrainedModel) -> int:
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def _weights(block: MoEBlock) -> int:
    matrices = (block.experts.gate, block.experts.up, block.experts.down)
    return sum(m.numel() for m in matrices if m is not None)
