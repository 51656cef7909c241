"""What became of a checkpoint whose experts were stored in few bits, on the terminal."""

from collections import Counter
from typing import TYPE_CHECKING

from coterie.report.tables import format_bytes, format_number, print_table

if TYPE_CHECKING:
    from coterie.shrink.quantize_checkpoint import Quantized


def print_quantized(quantized: "Quantized") -> None:
    """Prints the bits of each layer's experts, and one table of before and after."""
    layers = [
        [layer, format_number(sum(bits) / len(bits)), _counts(bits), "".join(map(str, bits))]
        for layer, bits in quantized.bits.items()
    ]
    print_table("Bits", ["layer", "average", "experts by bits", "each expert"], layers)
    print()
    dry = quantized.out is None
    rows = [
        ["on disk", *map(format_bytes, quantized.disk)],
        ["in memory", *map(format_bytes, quantized.memory)],
        ["routed experts", *map(format_bytes, quantized.expert_bytes)],
        ["bits per expert weight, with scales", *_stored(quantized)],
    ]
    if quantized.perplexity is not None:
        rows.append(["perplexity on held-out text", *(format_number(p, 3) for p in quantized.perplexity)])
    title = f"{format_number(quantized.average_bits())} bits per expert, by {quantized.method}"
    print_table(title, ["", "before", "computed after" if dry else "after"], rows)
    if dry:
        print("\nThis was a dry run: nothing was written, and no loss was measured.")
    else:
        print(f"\nwritten to {quantized.out}; coterie.shrink.load_packed reads it")


def _counts(bits: list[int]) -> str:
    return ", ".join(f"{count} in {width}" for width, count in sorted(Counter(bits).items()))


def _stored(quantized: "Quantized") -> list[str]:
    return [format_number(8 * size / quantized.expert_weights) for size in quantized.expert_bytes]
