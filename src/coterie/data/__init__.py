"""Text as bytes: find, split, window, order it in batches. Tables, small images, corruptions."""

from coterie.data.batches import ShuffledBatches, whole_batches
from coterie.data.corruption import attack_tokens, corrupt_images
from coterie.data.domain_markov import domain_markov
from coterie.data.files import Span, find_text, split_by_file, stdlib_sources
from coterie.data.ids import Vocabulary
from coterie.data.images import digits, read_digits
from coterie.data.impressions import Events, histories
from coterie.data.tables import TableEncoder, check_columns, import_pandas, read_table, table_chunks
from coterie.data.text import ByteCorpus, ByteWindows
from coterie.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, byte_tokenizer

__all__ = [
    "END_OF_TEXT",
    "VOCAB_SIZE",
    "ByteCorpus",
    "ByteWindows",
    "Events",
    "ShuffledBatches",
    "Span",
    "TableEncoder",
    "Vocabulary",
    "attack_tokens",
    "byte_tokenizer",
    "check_columns",
    "corrupt_images",
    "digits",
    "domain_markov",
    "find_text",
    "histories",
    "import_pandas",
    "read_digits",
    "read_table",
    "split_by_file",
    "stdlib_sources",
    "table_chunks",
    "whole_batches",
]
