"""Text as bytes: find, split, window, order it in batches. Tables, small images, corruptions."""

from coterie.data.batches import ShuffledBatches, whole_batches
from coterie.data.corruption import attack_tokens, corrupt_images
from coterie.data.decisions import COMPAS_FEATURES, MORTGAGE_FEATURES, compas, mortgages
from coterie.data.domain_markov import domain_markov
from coterie.data.files import Span, find_text, split_by_file, stdlib_sources
from coterie.data.images import digits, read_digits
from coterie.data.panel import daily_features, forward_return, panel_frame, robust_zscore_by_day
from coterie.data.panel_windows import PanelWindows, Split, purged_splits
from coterie.data.tables import TableEncoder, check_columns, import_pandas, read_table, table_chunks
from coterie.data.text import ByteCorpus, ByteWindows
from coterie.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, byte_tokenizer

__all__ = [
    "COMPAS_FEATURES",
    "END_OF_TEXT",
    "MORTGAGE_FEATURES",
    "VOCAB_SIZE",
    "ByteCorpus",
    "ByteWindows",
    "PanelWindows",
    "ShuffledBatches",
    "Span",
    "Split",
    "TableEncoder",
    "attack_tokens",
    "byte_tokenizer",
    "check_columns",
    "compas",
    "corrupt_images",
    "daily_features",
    "digits",
    "domain_markov",
    "find_text",
    "forward_return",
    "import_pandas",
    "mortgages",
    "panel_frame",
    "purged_splits",
    "read_digits",
    "read_table",
    "robust_zscore_by_day",
    "split_by_file",
    "stdlib_sources",
    "table_chunks",
    "whole_batches",
]
