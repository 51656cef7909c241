"""Text as bytes: find, split, window, order it in batches. Tables, streams, small images, corruptions."""

from coterie.data.batches import ShuffledBatches, whole_batches
from coterie.data.corruption import attack_tokens, corrupt_images
from coterie.data.decisions import COMPAS_FEATURES, MORTGAGE_FEATURES, compas, mortgages
from coterie.data.domain_markov import domain_markov
from coterie.data.drift import DriftStream, led_drift, rbf_drift, sea_drift
from coterie.data.files import Span, find_text, split_by_file, stdlib_sources
from coterie.data.ids import Vocabulary
from coterie.data.images import digits, read_digits
from coterie.data.impressions import Events, histories
from coterie.data.panel import daily_features, forward_return, panel_frame, robust_zscore_by_day
from coterie.data.panel_windows import PanelWindows, Split, purged_splits
from coterie.data.progress import Shown, counted, progress_bar, progress_shown
from coterie.data.stream import read_stream, records, stream_chunks
from coterie.data.tables import TableEncoder, check_columns, import_pandas, read_table, table_chunks
from coterie.data.text import ByteCorpus, ByteWindows
from coterie.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, byte_tokenizer
from coterie.data.whole import check_writable, written_whole

__all__ = [
    "COMPAS_FEATURES",
    "END_OF_TEXT",
    "MORTGAGE_FEATURES",
    "VOCAB_SIZE",
    "ByteCorpus",
    "ByteWindows",
    "DriftStream",
    "Events",
    "PanelWindows",
    "Shown",
    "ShuffledBatches",
    "Span",
    "Split",
    "TableEncoder",
    "Vocabulary",
    "attack_tokens",
    "byte_tokenizer",
    "check_columns",
    "check_writable",
    "compas",
    "corrupt_images",
    "counted",
    "daily_features",
    "digits",
    "domain_markov",
    "find_text",
    "forward_return",
    "histories",
    "import_pandas",
    "led_drift",
    "mortgages",
    "panel_frame",
    "progress_bar",
    "progress_shown",
    "purged_splits",
    "rbf_drift",
    "read_digits",
    "read_stream",
    "read_table",
    "records",
    "robust_zscore_by_day",
    "sea_drift",
    "split_by_file",
    "stdlib_sources",
    "stream_chunks",
    "table_chunks",
    "whole_batches",
    "written_whole",
]
