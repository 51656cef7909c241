"""A byte-level tokenizer in Hugging Face's format: token id = byte value, 256 = end of text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = 256
VOCAB_SIZE = 257


def byte_tokenizer(max_len: int) -> "PreTrainedTokenizerFast":
    """The tokenizer saved beside a byte-level checkpoint.

    Args:
        max_len: longest sequence of the model, in tokens.

    >>> tokenizer = byte_tokenizer(512)
    >>> tokenizer("hé")["input_ids"], tokenizer.decode([104, 195, 169])
    ([104, 195, 169], 'hé')
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary["<|endoftext|>"] = END_OF_TEXT
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next from U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    characters, stand_in = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(stand_in))
            stand_in += 1
    return characters
