"""`coterie inspect`: what it says is what the model did, and the command refuses what it cannot look into."""

import json
import shutil
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.cli import main
from coterie.data import byte_tokenizer
from coterie.hf import find_moe_blocks, load, recording
from coterie.inspect import inspect, write_page

EXPERTS, K = 8, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder and two texts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        initializer_range=0.3,
    )
    root = tmp_path_factory.mktemp("inspect")
    Qwen3MoeForCausalLM(config).save_pretrained(root / "model")
    byte_tokenizer(512).save_pretrained(root / "model")
    (root / "letters.txt").write_text("abcdefgh <i> " * 30)
    (root / "digits.txt").write_text("0123456789\n" * 30)
    return root


@pytest.fixture(scope="module")
def texts(files):
    return [files / "letters.txt", files / "digits.txt"]


@pytest.fixture(scope="module")
def found(files, texts):
    return inspect(files / "model", texts, tokens=256, length=64)


@pytest.fixture(scope="module")
def records(files, texts):
    """One per text and block, of the whole model in memory."""
    model = load(files / "model")
    each = []
    for text in texts:
        ids_BS = torch.tensor(list(text.read_bytes()[:256])).view(-1, 64)
        with recording(find_moe_blocks(model)) as records, torch.no_grad():
            model(ids_BS)
        each.append(records)
    return each


def test_load_weights_and_output_norms_are_those_of_the_whole_model(found, records):
    for number, layer in enumerate(found.layers):
        both = [text[number] for text in records]
        for load_E, record in zip(layer.load, both, strict=True):
            counts_E = record.experts.flatten().bincount(minlength=EXPERTS)
            torch.testing.assert_close(torch.tensor(load_E), counts_E * EXPERTS / (256.0 * K))
        experts = torch.cat([record.experts for record in both])
        for what, values in (("weights", layer.weights), ("norms", layer.norms)):
            recorded = torch.cat([getattr(record, what) for record in both])
            for expert, value in enumerate(values):
                mean = recorded[experts == expert].mean()
                assert (
                    value == pytest.approx(float(mean), rel=1e-4) if value else not (experts == expert).any()
                )


def test_partners_are_the_experts_that_share_most_tokens(found, records):
    experts = torch.cat([text[0].experts for text in records])
    for expert, partners in enumerate(found.layers[0].partners):
        rows = experts[(experts == expert).any(1)]
        shares = [
            float((rows == other).any(1).float().mean()) if len(rows) else 0 for other in range(EXPERTS)
        ]
        shares[expert] = 0
        best = sorted(shares, reverse=True)[: len(partners)]
        assert [share for _, share in partners] == pytest.approx(best)
        assert all(share == pytest.approx(shares[other]) for other, share in partners)


def test_a_text_has_all_its_experts_in_common_with_itself_and_the_table_is_symmetric(found):
    assert found.texts == ["letters", "digits"]
    assert found.overlap[0][0] == found.overlap[1][1] == 1
    assert found.overlap[0][1] == found.overlap[1][0]
    assert 0 <= found.overlap[0][1] < 1, "letters and digits are not served by the same experts"


def test_the_passage_shows_each_token_with_its_experts(found, records):
    texts, experts = found.passage.texts, found.passage.experts
    assert "".join(texts[:13]) == "abcdefgh <i> "
    assert len(texts) == 2 * 256 + 1
    assert texts[256] == "\n\n"
    assert experts[1][256] == []
    for number in (0, 255):
        assert sorted(experts[1][number]) == sorted(records[0][1].experts[number].tolist())
        assert sorted(experts[1][257 + number]) == sorted(records[1][1].experts[number].tolist())
    assert all(weights == sorted(weights, reverse=True) for weights in found.passage.weights[0])


def test_an_expert_attracts_a_token_that_it_was_given_more_often_than_others(found, records):
    text = b"abcdefgh <i> " * 20
    best = [(tokens[0], expert) for expert, tokens in enumerate(found.layers[0].tokens) if tokens]
    assert best
    for token, expert in best:
        if token.text in "abcdefghi":
            given = records[0][0].experts[[i for i in range(256) if text[i] == ord(token.text)]]
            assert int((given == expert).sum()) == token.count


def test_the_page_needs_nothing_else_and_escapes_the_text(found, tmp_path):
    write_page(tmp_path / "page.html", found, command="coterie inspect")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<i>" not in page
    assert "&lt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('data-panel="attraction"') == 2


def test_a_page_that_cannot_be_written_is_one_line(found, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ValueError, match="cannot write the page: "):
        write_page(tmp_path / "page.html", found)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns its exit status and what it printed."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["coterie", "inspect", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return command


def test_the_command_prints_tables_or_json_and_writes_the_page(run, files, texts, tmp_path):
    options = ("--text", texts[0], "--text", texts[1], "--tokens", 256)
    code, shown, errors = run(files / "model", *options, "--json", "--html", tmp_path / "page.html")
    assert code == 0, errors
    content = json.loads(shown)
    assert content["tokens"] == [256, 256]
    assert content["blocks"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    code, shown, errors = run(files / "model", *options)
    assert code == 0, errors
    assert "busiest load" in shown
    assert "letters" in shown


def test_no_sequence_is_longer_than_the_model_has_positions(files, texts, found, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert inspect(tmp_path / "model", texts, tokens=256, length=512).layers == found.layers


def test_bad_input_is_one_line_and_exit_status_2(run, files, texts, tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "short.txt").write_text("Hello")
    load(files / "model").save_pretrained(tmp_path / "mute")
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.json").write_text('{"model_type": "alien"}')
    (tmp_path / "alien" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for arguments, message in (
        ((tmp_path / "dense", "--text", texts[0]), "LlamaForCausalLM has no MoE block"),
        ((tmp_path / "mute", "--text", texts[0]), "has no tokenizer"),
        ((files / "model", "--text", tmp_path / "short.txt"), "give at least 32"),
        ((files / "model",), "there is no text"),
        ((tmp_path / "nowhere", "--text", texts[0]), "nowhere does not exist"),
        ((tmp_path / "nowhere", "--text", texts[0], "--html", tmp_path), "is a folder; name a file"),
        ((tmp_path / "nowhere", "--html", tmp_path / "short.txt" / "page.html"), "short.txt is a file"),
        ((tmp_path / "alien", "--text", texts[0]), "model type `alien`"),
    ):
        code, shown, errors = run(*arguments)
        assert (code, shown) == (2, ""), errors
        assert message in errors
        assert errors.strip().count("\n") == 0, errors


def test_conversations_are_read_when_asked_for(files, tmp_path, monkeypatch, capsys):
    text = tmp_path / "chat.jsonl"
    text.write_text(json.dumps({"messages": [{"role": "user", "content": "abcdefgh " * 9}]}))
    arguments = ["coterie", "inspect", str(files / "model"), "--text", str(text), "--chat"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "no chat template" in capsys.readouterr().err
