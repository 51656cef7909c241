"""Text to calibrate a checkpoint on, as ids of its own tokenizer."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coterie.data import find_text

# One of these holds a tokenizer's vocabulary; without it transformers may make an empty one in silence.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

MIN_TOKENS = 32  # what fewer tokens say about experts is chance


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder.

    Raises ValueError if there is none that transformers can read.
    """
    advice = "add the tokenizer's files, or give token ids in a .pt or .safetensors file"
    if not any((Path(folder) / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder} has no tokenizer; {advice}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} has a tokenizer that cannot be read ({reason}); {advice}") from None
    return tokenizer


def read_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it has none."""
    known = any((Path(folder) / name).is_file() for name in VOCABULARIES)
    return load_tokenizer(folder) if known else None


def holds_ids(path: Path | str) -> bool:
    """Whether a calibration file holds ids instead of text."""
    return Path(path).suffix in (".pt", ".safetensors")


def calibration_ids(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    length: int,
    vocab_size: int,
    chat: bool = False,
) -> Tensor:
    """Sequences to run a model on.

    Args:
        path: a text file, .jsonl (see `documents`), a folder of such files, a folder that the `datasets`
            library saved with a "text" column, or token ids of any shape as .pt or .safetensors.
        tokenizer: of the model; not needed for ids.
        tokens: at most so many, from the start; documents follow one another, an end-of-text token between.
        length: of a sequence, in tokens.
        vocab_size: of the model.
        chat: read "messages", too, through the tokenizer's chat template.

    Returns: ids [B, S] int64, S = `length`, or one shorter sequence of a text that is shorter. A remainder is
    left out.

    Raises ValueError if there is nothing to read, less than MIN_TOKENS, an id is not in the vocabulary, or
    there is no chat template.
    """
    path = Path(path)
    if holds_ids(path):
        ids_N = _read_ids(path).flatten()[:tokens]
    elif tokenizer is None:
        raise ValueError(f"{path} is text, for which a tokenizer is needed")
    else:
        chats = chat_tokenizer(tokenizer) if chat else None
        ids_N = _tokenize(documents(path, characters=16 * tokens, chat=chats), tokenizer, tokens)
    if len(ids_N) < MIN_TOKENS:
        raise ValueError(f"{path} holds {len(ids_N)} tokens; give at least {MIN_TOKENS}, better thousands")
    if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocab_size:
        raise ValueError(
            f"{path} holds ids from {int(ids_N.min())} to {int(ids_N.max())}; "
            f"the model's vocabulary has 0 … {vocab_size - 1}"
        )
    length = min(length, len(ids_N))
    return ids_N[: len(ids_N) // length * length].view(-1, length)


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, if it can render conversations; ValueError if it cannot."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"the checkpoint has no {'tokenizer' if tokenizer is None else 'chat template'} to read "
            'conversations with; give "text" or "input_ids", or add its chat_template.jinja'
        )
    return tokenizer


def documents(
    path: Path, *, characters: int, chat: PreTrainedTokenizerBase | None = None
) -> Iterator[str | list[int]]:
    """The texts in a file or folder, in order, or their ids where a line of a .jsonl file holds those.

    Of token ids as .pt or .safetensors each row is a document. A line of a .jsonl file is an object with
    "text", with "input" and "output" (a question, the model's own answer), or with "input_ids"; given `chat`,
    also with "messages", a list of {"role", "content"}, which become ids through its chat template. Of a
    plain text file the first `characters` are read.

    Raises ValueError if there is none, or a line of a .jsonl file holds none of these.
    """
    if holds_ids(path):
        ids = _read_ids(path)
        yield from ids.reshape(-1, ids.shape[-1] if ids.dim() else 1).tolist()
        return
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        yield from _dataset(path)
        return
    for file in find_text([path]):
        if file.suffix == ".jsonl":
            yield from _json_lines(file, chat)
        else:
            with file.open(encoding="utf-8", errors="replace") as opened:
                yield opened.read(characters)


def _json_lines(file: Path, chat: PreTrainedTokenizerBase | None) -> Iterator[str | list[int]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: no JSON: {error.msg}") from None
            yield _document(f"{file}, line {number}", entry, chat)


def _document(where: str, entry: Any, chat: PreTrainedTokenizerBase | None) -> str | list[int]:
    if isinstance(entry, dict):
        if chat is not None and "messages" in entry:
            return _conversation(where, entry["messages"], chat)
        ids = entry.get("input_ids")
        if isinstance(ids, list) and all(type(i) is int for i in ids):
            return ids
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        if isinstance(entry.get("input"), str) and isinstance(entry.get("output"), str):
            return str(entry["input"]) + str(entry["output"])
    found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
    known = '"text", "input" and "output", or a list "input_ids"'
    if isinstance(entry, dict) and "messages" in entry:
        known += "; to read messages through the tokenizer's chat template, ask for it (--chat)"
    raise ValueError(f"{where} holds {found}; give {known}")


def _conversation(where: str, messages: Any, chat: PreTrainedTokenizerBase) -> list[int]:
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise ValueError(f'{where}: "messages" should be a list of objects with "role" and "content"')
    try:
        # the template brings its own beginning of text
        ids: Any = chat.apply_chat_template(messages, tokenize=True, return_dict=False)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the chat template cannot render this: {error}") from None
    return list(ids)


def _dataset(folder: Path) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{folder} is a dataset of the `datasets` library; install it: pip install 'coterie[datasets]'"
        ) from None
    loaded: Any = datasets.load_from_disk(str(folder))
    for split in loaded.values() if isinstance(loaded, dict) else [loaded]:
        if "text" not in split.column_names:
            raise ValueError(f'{folder} has the columns {", ".join(split.column_names)}, but no "text"')
        for entry in split:
            yield entry["text"]


def _tokenize(texts: Iterator[str | list[int]], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    ids: list[int] = []
    for text in texts:
        if isinstance(text, str):
            text = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += text
        if len(ids) >= tokens:
            break
        if tokenizer.eos_token_id is not None and text:
            ids.append(int(tokenizer.eos_token_id))
    return torch.tensor(ids[:tokens], dtype=torch.int64)


def _read_ids(path: Path) -> Tensor:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a file of token ids")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError):
        raise ValueError(f"{path} cannot be read; it should hold one tensor of token ids") from None
    if isinstance(loaded, dict) and len(loaded) == 1:
        [loaded] = loaded.values()
    if not isinstance(loaded, Tensor) or loaded.is_floating_point() or loaded.is_complex():
        raise ValueError(f"{path} should hold one tensor of token ids, integers")
    return loaded.long()


def within_positions(config: Any, seq_len: int) -> int:
    """A length of sequences, or the number of positions that a text model's configuration has, if less.

    >>> from types import SimpleNamespace
    >>> within_positions(SimpleNamespace(max_position_embeddings=128), 512)
    128
    """
    return min(seq_len, getattr(config, "max_position_embeddings", None) or seq_len)
