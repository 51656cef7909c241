"""Text as bytes: find it, split it, read it in windows, order it in batches. Small images. Corruptions."""

from coterie.data.batches import ShuffledBatches
from coterie.data.corruption import attack_tokens, corrupt_images
from coterie.data.domain_markov import domain_markov
from coterie.data.files import Span, find_text, split_by_file, stdlib_sources
from coterie.data.images import digits, read_digits
from coterie.data.text import ByteCorpus, ByteWindows
from coterie.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, byte_tokenizer

__all__ = [
    "END_OF_TEXT",
    "VOCAB_SIZE",
    "ByteCorpus",
    "ByteWindows",
    "ShuffledBatches",
    "Span",
    "attack_tokens",
    "byte_tokenizer",
    "corrupt_images",
    "digits",
    "domain_markov",
    "find_text",
    "read_digits",
    "split_by_file",
    "stdlib_sources",
]
