"""What `coterie quantize` and `coterie calib` say on the terminal."""

from collections import Counter
from typing import TYPE_CHECKING

from coterie.report.tables import format_bytes, format_count, format_number, format_rate, print_table

if TYPE_CHECKING:
    from coterie.shrink.quantize_checkpoint import Quantized
    from coterie.shrink.self_calibration import Written


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
    if quantized.speed is not None:
        rows.append(["tokens/s", *map(format_rate, quantized.speed)])
    title = f"{format_number(quantized.average_bits())} bits per expert, by {quantized.method}"
    print_table(title, ["", "before", "computed after" if dry else "after"], rows)
    if dry:
        print("\nThis was a dry run: nothing was written, and no loss was measured.")
    else:
        print(f"\nwritten to {quantized.out}; coterie.shrink.load_packed reads it")


def print_written(written: "Written") -> None:
    """Prints what a model wrote, in a table."""
    rows = [
        ["sentences", str(written.sentences)],
        ["tokens", format_count(written.tokens)],
        ["negative log-likelihood, nats per token", format_number(written.nll, 3)],
        ["sigma, 0 if experts are used alike", format_number(written.sigma, 4)],
        ["experts that no token reached", f"{written.unused} of {written.experts}"],
    ]
    print_table(f"Written by the model, {written.method}", ["", ""], rows)
    print(f"\nwritten to {written.out}; --calib reads it")


def _counts(bits: list[int]) -> str:
    return ", ".join(f"{count} in {width}" for width, count in sorted(Counter(bits).items()))


def _stored(quantized: "Quantized") -> list[str]:
    return [format_number(8 * size / quantized.expert_weights) for size in quantized.expert_bytes]
