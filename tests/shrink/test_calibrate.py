import json

import pytest
import torch
from safetensors.torch import save_file

from coterie.data import byte_tokenizer
from coterie.hf import find_moe_blocks, recording
from coterie.shrink.calibrate import batches, calibrated, check_vocabulary, held_out, read_text

TENSORS = ("experts", "weights", "norms", "moved", "inputs")


def read(path, **options):
    return read_text(path, byte_tokenizer(64), **{"max_tokens": 10_000, "seq_len": 64} | options)


def test_each_document_is_cut_into_sequences_of_its_own(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [{"text": "a" * 150}, {"input": "b" * 60, "output": "c" * 10}, {"input_ids": [1] * 40}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    sequences = read(file)
    assert [len(ids) for ids in sequences] == [64, 64, 22, 64, 6, 40]
    assert sequences[3] == [98] * 60 + [99] * 4


@pytest.mark.parametrize("name", ["ids.pt", "ids.safetensors"])
def test_rows_of_token_ids_are_documents_and_need_no_tokenizer(tmp_path, name):
    ids, path = torch.arange(300).view(3, 100), tmp_path / name
    torch.save(ids, path) if name.endswith("pt") else save_file({"ids": ids}, path)
    found = read_text(path, None, max_tokens=1000, seq_len=60)
    assert list(map(len, found)) == [60, 40] * 3
    assert [i for sequence in found for i in sequence] == list(range(300))


def test_no_more_is_read_than_was_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 5000)
    assert [len(ids) for ids in read(tmp_path / "a.txt", max_tokens=320)] == [64] * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty; name a file with text in it"),
        ("a.txt", "a" * 200, "holds 200 tokens .* at least 256 tokens"),
        ("a.jsonl", "{", "line 1: no JSON"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}', "line 2 holds prompt"),
        ("a.jsonl", "[1]", "line 1 holds list"),
    ],
)
def test_text_that_is_too_short_or_damaged_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_text_needs_a_tokenizer_and_ids_of_the_model(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    with pytest.raises(ValueError, match=r"has no tokenizer .* give .jsonl with input_ids"):
        read_text(tmp_path / "a.txt", None, max_tokens=1000, seq_len=64)
    with pytest.raises(ValueError, match="token id 300, the model 257 tokens"):
        check_vocabulary("a.jsonl", [[1, 2], [300]], 257)
    with pytest.raises(ValueError, match="of another tokenizer"):
        check_vocabulary("a.jsonl", [[1, -2]], 257)


def test_batches_hold_every_sequence_once_and_need_no_padding():
    sequences = [[i] * length for i, length in enumerate([5, 3, 5, 5, 3, 5, 5, 2])]
    found = batches(sequences, batch_size=3)
    assert [tuple(ids.shape) for ids in found] == [(3, 5), (2, 5), (2, 3), (1, 2)]
    assert sorted(row for ids in found for row in ids.tolist()) == sorted(sequences)


def test_the_held_out_end_is_a_tenth():
    seen, rest = held_out([[i] for i in range(40)])
    assert (seen, rest) == ([[i] for i in range(36)], [[i] for i in range(36, 40)])


def test_batch_by_batch_and_after_an_interruption_it_records_the_same(model, tmp_path):
    blocks = find_moe_blocks(model)
    text = [torch.randint(257, (2, 10)) for _ in range(3)]
    with recording(blocks, keep_inputs=25) as wanted, torch.no_grad():
        for ids in text:
            model(ids)
    done = []

    def interrupt():
        done.append(0)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(calibrated(model, blocks, text, keep_inputs=25, folder=tmp_path, on_batch=interrupt))
    assert [f.name for f in sorted(tmp_path.iterdir())] == [f"batch-0000{i}.safetensors" for i in range(2)]
    ran = []
    hook = model.register_forward_hook(lambda *_: ran.append(0))
    pairs = list(calibrated(model, blocks, text, keep_inputs=25, folder=tmp_path))
    hook.remove()
    assert len(ran) == 1, "what was done is not done again"
    assert [block for block, _ in pairs] == blocks
    for (_, found), reference in zip(pairs, wanted, strict=True):
        for name in TENSORS:
            assert torch.equal(getattr(found, name), getattr(reference, name)), name
