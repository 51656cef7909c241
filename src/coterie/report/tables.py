"""Tables on the terminal, and the one way each kind of number is written, here and on the page."""

import sys
from collections.abc import Sequence
from typing import TextIO

MISSING = "–"


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, file: TextIO | None = None
) -> None:
    """Prints a table: ruled and coloured on a terminal, plain aligned text anywhere else.

    Args:
        title: the line above the table.
        columns: C headings; the first column is aligned left, the others right.
        rows: cells as text, C in each row; see the `format_…` functions below for numbers.
        file: where to print; standard output by default.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.

    >>> print_table("On held-out text", ["", "dense", "MoE"], [["bits per byte", "1.874", "1.8"]])
    On held-out text
                   dense  MoE
    bits per byte  1.874  1.8
    """
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} cells under {len(columns)} columns")
    file = sys.stdout if file is None else file
    if file.isatty():
        _print_ruled(title, columns, rows, file)
    else:
        _print_plain(title, columns, rows, file)


def format_count(count: float | None) -> str:
    """A number of parameters or tokens, to three digits.

    >>> format_count(1_430_000), format_count(512), format_count(999_999)
    ('1.43 M', '512', '1.00 M')
    """
    return MISSING if count is None else _scaled(count, 1000, ("", "k", "M", "B", "T"))


def format_bytes(size: float | None) -> str:
    """A size in bytes, in binary units.

    >>> format_bytes(312 * 2**20), format_bytes(None)
    ('312 MiB', '–')
    """
    return MISSING if size is None else _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_rate(rate: float | None) -> str:
    """Tokens per second, in full, thousands apart.

    >>> format_rate(8430.4)
    '8 430'
    """
    return MISSING if rate is None else f"{rate:,.0f}".replace(",", " ")


def format_number(value: float | None, digits: int = 2) -> str:
    """A measured value with a fixed number of decimals: bits per byte (3), ratios and nats (2).

    >>> format_number(1.8126, 3), format_number(None)
    ('1.813', '–')
    """
    return MISSING if value is None else f"{value:.{digits}f}"


def format_duration(seconds: float | None) -> str:
    """A wall time in seconds, in the two largest units that matter.

    >>> format_duration(4.26), format_duration(252), format_duration(3720)
    ('4.3 s', '4 min 12 s', '1 h 2 min')
    """
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    steps = 0
    while steps < len(units) - 1 and float(f"{value:.3g}") >= base:
        value, steps = value / base, steps + 1
    digits = f"{value:.0f}" if steps == 0 or value >= 999.5 else f"{value:#.3g}".rstrip(".")
    return f"{digits} {units[steps]}".rstrip()


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], file: TextIO) -> None:
    from rich.cells import cell_len

    lines = [columns, *rows]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    print(title, file=file)
    for line in lines:
        pads = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [
            cell + pad if i == 0 else pad + cell for i, (cell, pad) in enumerate(zip(line, pads, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=file)


def _print_ruled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], file: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: a label such as "[b]" is a label, not markup.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(
            Text(column),
            justify="left" if i == 0 else "right",
            style="dim" if i == 0 else "",
            overflow="fold",  # not cut, where the terminal is narrow
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=file)
    console.print(Text(title, style="bold"))
    console.print(table)
