"""The report of a run: tables on the terminal, and a page that opens offline."""

from coterie.report.attraction import (
    Attracted,
    Passage,
    attracted_bytes,
    attracted_tokens,
    attracted_words,
    load_by_layer,
    passage,
)
from coterie.report.comparison import Arm, compare, headline
from coterie.report.explorer import Explorer, ExplorerLayer, write_explorer
from coterie.report.page import Report, write_report
from coterie.report.shrunk import print_shrunk, write_shrunk_page
from coterie.report.tables import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_rate,
    print_table,
)

__all__ = [
    "Arm",
    "Attracted",
    "Explorer",
    "ExplorerLayer",
    "Passage",
    "Report",
    "attracted_bytes",
    "attracted_tokens",
    "attracted_words",
    "compare",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_number",
    "format_rate",
    "headline",
    "load_by_layer",
    "passage",
    "print_shrunk",
    "print_table",
    "write_explorer",
    "write_report",
    "write_shrunk_page",
]
