"""Every kind of calibration text becomes ids of the checkpoint's tokenizer; what cannot is named."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from coterie.data import byte_tokenizer
from coterie.hf import calibration_ids, load_tokenizer

END = 256
TEXT = "The quick brown fox jumps over the lazy dog. " * 3


def ids(path, tokenizer=None, tokens=1000, length=16, vocab_size=300):
    return calibration_ids(
        path, tokenizer or byte_tokenizer(512), tokens=tokens, length=length, vocab_size=vocab_size
    )


def test_a_text_file_is_cut_into_sequences_without_its_remainder(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    ids_BS = ids(tmp_path / "a.txt")
    assert ids_BS.shape == (len(TEXT) // 16, 16)
    assert bytes(ids_BS.flatten().tolist()).decode() == TEXT[: ids_BS.numel()]
    assert ids(tmp_path / "a.txt", tokens=40).shape == (2, 16)
    assert ids(tmp_path / "a.txt", length=10_000).shape == (1, len(TEXT) + 1), "one short sequence"


def test_the_documents_of_a_folder_follow_one_another(tmp_path):
    (tmp_path / "b.md").write_text("B" * 20)
    (tmp_path / "a.jsonl").write_text('{"text": "AAA"}\n\n{"text": "' + "C" * 10 + '", "id": 3}\n')
    wanted = [*b"AAA", END, *b"C" * 10, END, *b"B" * 20, END]
    assert ids(tmp_path, length=36).flatten().tolist() == wanted


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_ids_are_taken_as_they_are_and_need_no_tokenizer(tmp_path, suffix):
    wanted = torch.arange(64, dtype=torch.int32).view(2, 32)
    path = tmp_path / f"ids{suffix}"
    torch.save(wanted, path) if suffix == ".pt" else save_file({"ids": wanted}, path)
    found = calibration_ids(path, None, tokens=48, length=16, vocab_size=64)
    assert torch.equal(found, torch.arange(48).view(3, 16))
    assert found.dtype == torch.int64


def test_a_saved_dataset_is_read_by_the_datasets_library(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path, r"install it: pip install 'coterie\[datasets\]'")

    class Split(list):
        column_names = ("text", "label")

    library = types.SimpleNamespace(load_from_disk=lambda folder: {"train": Split([{"text": TEXT}])})
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert bytes(ids(tmp_path).flatten().tolist()).decode() == TEXT[: len(TEXT) // 16 * 16]
    Split.column_names = ("content",)
    refused(tmp_path, 'has the columns content, but no "text"')


def test_what_cannot_be_used_is_named(tmp_path):
    refused(tmp_path / "nowhere.txt", "does not exist")
    refused(tmp_path / "nowhere.pt", "does not exist")
    empty, short, lines = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "a.jsonl"
    empty.write_text("")
    refused(empty, "is empty")
    short.write_text("Hello")
    refused(short, "holds 6 tokens; give at least 32")
    lines.write_text('{"text": "fine"}\n{"content": "not"}\n')
    refused(lines, 'line 2 holds content; give "text"')
    lines.write_text('{"text": "fine"}\n{"text": \n')
    refused(lines, "line 2: no JSON: Expecting value")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("not a tensor")
        refused(tmp_path / name, "cannot be read")
    torch.save(torch.randn(64), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "should hold one tensor of token ids")
    torch.save(torch.arange(64) + 280, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"holds ids from 280 to 343; the model's vocabulary has 0 … 299")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there, " * 3}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def chatting(template=TEMPLATE):
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_go_through_the_chat_template_when_asked_for(tmp_path):
    path, lines = tmp_path / "a.jsonl", [{"messages": CHAT}, {"text": "plain"}, {"messages": CHAT[:1]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = {"tokens": 1000, "length": 1000, "vocab_size": 300}
    found = calibration_ids(path, chatting(), chat=True, **options).flatten().tolist()
    first = b"<user>Hi\n<assistant>" + b"Hello there, " * 3 + b"\n"
    assert found == [*first, END, *b"plain", END, *b"<user>Hi\n", END]
    with pytest.raises(ValueError, match=r"line 1 holds messages; give .* ask for it \(--chat\)"):
        calibration_ids(path, chatting(), **options)


def test_conversations_that_cannot_be_rendered_are_named(tmp_path):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    path = tmp_path / "a.jsonl"
    for line, tokenizer, message in [
        ({"messages": CHAT}, byte_tokenizer(512), "no chat template to read conversations with"),
        ({"messages": "Hi"}, chatting(), 'line 1: "messages" should be a list of objects'),
        ({"messages": []}, chatting(), 'line 1: "messages" should be a list of objects'),
        (
            {"messages": CHAT[1:]},
            chatting(strict),
            "line 1: the chat template cannot render this: user first",
        ),
    ]:
        path.write_text(json.dumps(line))
        with pytest.raises(ValueError, match=message) as caught:
            calibration_ids(path, tokenizer, tokens=100, length=16, vocab_size=300, chat=True)
        assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_and_one_with_a_damaged_one_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ValueError, match=r"has no tokenizer; add .* or give token ids"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        ids(path)
    assert "\n" not in str(caught.value)
