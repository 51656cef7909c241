"""What `coterie quantize` and `coterie calib` say: on the terminal, and of quantize as a page."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.report.paper import PaperPage, Table, write_paper_page
from coterie.report.tables import format_bytes, format_count, format_number, format_rate, print_table

if TYPE_CHECKING:
    from coterie.shrink.quantize_checkpoint import Quantized
    from coterie.shrink.self_calibration import Written


_BITS = ["layer", "average", "experts by bits", "each expert"]


def print_quantized(quantized: "Quantized") -> None:
    """Prints the bits of each layer's experts, and one table of before and after."""
    print_table("Bits", _BITS, _bits(quantized))
    print()
    dry = quantized.out is None
    print_table(_title(quantized), ["", "before", "computed after" if dry else "after"], _rows(quantized))
    if dry:
        print("\nThis was a dry run: nothing was written, and no loss was measured.")
    else:
        print(f"\nwritten to {quantized.out}; coterie.hf.load reads it")


def write_quantized_page(path: str | os.PathLike[str], quantized: "Quantized") -> Path:
    """Writes the same as one self-contained HTML file; returns its path."""
    page = PaperPage(
        title=f"{Path(quantized.source).name}, in fewer bits",
        kicker=f"coterie, {quantized.method}",
        headline=_title(quantized),
        lead=["The loss is that on the text it was measured on. Test it on what it will be used for."],
        claims=[],
        tables=[
            Table("Before and after", ["", "before", "after"], _rows(quantized)),
            Table("Bits of the experts", _BITS, _bits(quantized)),
        ],
        measured_note=f"Perplexity is on {quantized.heldout_tokens} tokens that were not calibrated on; "
        "speed is of forward passes on this machine, the two models by turns."
        if quantized.perplexity is not None
        else "Streamed, one layer at a time: perplexity and speed were not measured.",
        provenance={
            "checkpoint": quantized.source,
            "calibration": f"{quantized.calibration_tokens} tokens",
        },
    )
    return write_paper_page(path, page)


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


def _overall(quantized: "Quantized") -> list[str]:
    return [format_number(8 * size / quantized.weights) for size in quantized.memory]


def _title(quantized: "Quantized") -> str:
    over = " over the whole model" if quantized.scope == "model" else ""
    return f"{format_number(quantized.average_bits())} bits per expert, by {quantized.method}{over}"


def _rows(quantized: "Quantized") -> list[list[str]]:
    rows = [
        ["on disk", *map(format_bytes, quantized.disk)],
        ["in memory", *map(format_bytes, quantized.memory)],
        ["routed experts", *map(format_bytes, quantized.expert_bytes)],
        ["bits per expert weight, with scales", *_stored(quantized)],
        ["bits per weight of the whole model", *_overall(quantized)],
    ]
    if quantized.router_bits < 16:
        rows.append(["bits of the routers, in bytes as before", "unrounded", str(quantized.router_bits)])
    if quantized.perplexity is not None:
        rows.append(["perplexity on held-out text", *(format_number(p, 3) for p in quantized.perplexity)])
    if quantized.speed is not None:
        rows.append(["tokens/s", *map(format_rate, quantized.speed)])
    return rows


def _bits(quantized: "Quantized") -> list[list[str]]:
    return [
        [
            layer,
            format_number(average),
            _counts(quantized.bits[layer]),
            "".join(map(str, quantized.bits[layer])),
        ]
        for layer, average in quantized.layer_bits().items()
    ]
