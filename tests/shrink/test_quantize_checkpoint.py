"""coterie quantize: what it writes, what it foretells, what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import grouped, mixtral, tiny
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from coterie.hf import bytes_on_disk, find_moe_blocks, load, outline, stream_layers
from coterie.shrink import perplexity, rounding, save_packed
from coterie.shrink import quantize_checkpoint as quantizing
from coterie.shrink.calibrate import batches, held_out, read_text
from coterie.shrink.quantize_block import CLIPPING, SEARCH, quantize_block
from coterie.shrink.quantize_checkpoint import quantize_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # tiny text: some experts see no token


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Fewer scales are searched."""
    for search in (SEARCH, CLIPPING):
        monkeypatch.setitem(search, "factors", [1.0, 0.95])


def test_what_is_written_reads_back_and_is_what_was_measured(coterie, checkpoint, texts, tmp_path):
    out = tmp_path / "small"
    arguments = ["--bits", 2.25, "--calib", texts[0], "--out", out, "--group-size", 32, "--json"]
    status, printed, err = coterie("quantize", checkpoint, *arguments, "--report")
    assert status == 0, err
    done = json.loads(printed)
    page = (out / "report.html").read_text()
    assert "2.25 bits per expert, by mc-sharp" in page
    for bits in done["bits"].values():
        assert "".join(map(str, bits)) in page
    assert done["average_bits"] == 2.25
    assert {b for widths in done["bits"].values() for b in widths} == {1, 2, 3}
    assert done["disk"] == [bytes_on_disk(checkpoint), bytes_on_disk(out)]
    assert done["disk"][1] < done["disk"][0]
    for line in ("model.layers.1.mlp: experts by bits: ", "model.layers.1.mlp: rounded", f"writing {out}"):
        assert line in err
    assert all(speed > 0 for speed in done["speed"])
    model = load(out)
    assert type(model) is type(load(checkpoint))
    banks = [layer.mlp.experts.packed for layer in model.model.layers]
    assert [bank.bits for bank in banks] == list(done["bits"].values())
    assert sum(bank.nbytes for bank in banks) == done["expert_bytes"][1]
    _, rest = held_out(read_text(texts[0], AutoTokenizer.from_pretrained(out), max_tokens=65536, seq_len=64))
    assert perplexity(model, batches(rest)) == pytest.approx(done["perplexity"][1])
    assert perplexity(load(checkpoint), batches(rest)) == pytest.approx(done["perplexity"][0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prose.txt", "small", "sums.jsonl"]


def test_a_dry_run_foretells_bits_and_bytes_and_writes_nothing(coterie, checkpoint, texts, tmp_path):
    arguments = ["quantize", checkpoint, "--bits", 2, "--calib", texts[0]]
    status, printed, _ = coterie(*arguments, "--json", "--dry-run")
    assert status == 0
    foretold = json.loads(printed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prose.txt", "sums.jsonl"]
    done = json.loads(coterie(*arguments, "--json", "--out", tmp_path / "out")[1])
    for number in ("bits", "expert_bytes", "memory", "stored_bits"):
        assert foretold[number] == done[number]
    assert foretold["disk"][1] == pytest.approx(done["disk"][1], rel=0.05)
    assert (foretold["perplexity"], foretold["speed"], foretold["out"]) == (None, None, None)
    _, printed, _ = coterie(*arguments, "--dry-run")
    assert "2.00 bits per expert, by mc-sharp" in printed
    assert "computed after" in printed
    assert "nothing was written" in printed


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "moequant"])
def test_eight_bits_for_all_change_little(checkpoint, texts, tmp_path, method):
    options = {"bits": 8, "calib": [texts[0]], "method": method, "progress": False}
    done = quantize_checkpoint(checkpoint, tmp_path / "out", **options)
    before, after = done.perplexity
    assert after == pytest.approx(before, rel=0.05)
    assert {b for widths in done.bits.values() for b in widths} == {8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 3.5], "bit budget 3.5 per expert is infeasible: model.layers.0.mlp has 8 experts"),
        (["--bits", 1], "use 1.375 … 3"),
        (["--bits", 2.5, "--method", "rtn"], "rtn gives all experts the same bits=2.5; use one of 1, 2, 3"),
        (
            ["--bits", 2, "--method", "magic"],
            "no method 'magic'; use one of mc-sharp, moequant, gptq, awq, rtn",
        ),
        (["--bits", 1, "--method", "awq"], "awq gives all experts the same bits=1; use one of 2, 3, 4, 8"),
        (
            ["--bits", 1, "--method", "moequant"],
            "moequant gives all experts the same bits=1; use one of 2, 3",
        ),
        (["--bits", 2, "--router-bits", 1], "router_bits=1; use one of 2, 3, 4, 8, 16, which leaves it as"),
        (["--bits", 2, "--scope", "block"], "no scope 'block'; use layer or model"),
        (
            ["--bits", 1.1, "--scope", "model"],
            "infeasible: the model has 16 experts with 1, 2, 3 bits; use 1.188",
        ),
        (
            ["--bits", 2, "--method", "rtn", "--scope", "model"],
            "rtn gives all experts the same bits; only mc-sharp has a scope",
        ),
        (["--bits", 2, "--method", "rtn", "--affinity"], "rtn looks at no token, so none can be weighted"),
        (["--bits", 2, "--chat"], "the checkpoint has no chat template"),
        (["--bits", 2, "--group-size", 33], "group_size=33; use a multiple of 32"),
    ],
)
def test_bad_wishes_are_refused_in_one_line_before_weights_are_read(
    coterie, checkpoint, texts, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(quantizing, "load", None)
    arguments = ["--calib", texts[0], "--out", tmp_path / "out", *options]
    status, printed, err = coterie("quantize", checkpoint, *arguments)
    assert (status, printed) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_refused(coterie, checkpoint, texts, tmp_path):
    dense, taken = tmp_path / "dense", tmp_path / "taken"
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(dense)
    taken.mkdir()
    (taken / "file").write_text("")
    for folder, out, calib, message in [
        (dense, tmp_path / "out", texts[0], "LlamaForCausalLM has no MoE block"),
        (checkpoint, taken, texts[0], "taken exists already"),
        (checkpoint, tmp_path / "out", tmp_path / "none.txt", "none.txt does not exist"),
    ]:
        status, _, err = coterie("quantize", folder, "--bits", 2, "--calib", calib, "--out", out)
        assert status == 2
        assert message in err


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("options", [["--scope", "model"], ["--router-bits", 8]])
def test_an_interrupted_run_goes_on_after_the_last_block_it_did(
    coterie, checkpoint, texts, tmp_path, monkeypatch, stream, options
):
    arguments = ["--bits", 2, "--calib", texts[0], "--group-size", 32, *stream, *options]
    coterie("quantize", checkpoint, *arguments, "--out", tmp_path / "straight")
    rounded = []

    def interrupting(block, *args, **options):
        rounded.append(block.name)
        if len(rounded) == 2:
            raise KeyboardInterrupt
        return quantize_block(block, *args, **options)

    monkeypatch.setattr(rounding, "quantize_block", interrupting)
    out = tmp_path / "out"
    status, _, err = coterie("quantize", checkpoint, *arguments, "--out", out)
    assert status == 130
    assert "the same command goes on with what is left" in err
    assert not out.exists()
    monkeypatch.setattr(rounding, "expert_statistics", None)  # all was measured
    passes = []

    def counted(*args):
        passes.append(args)
        yield from stream_layers(*args)

    monkeypatch.setattr(quantizing, "stream_layers", counted)
    status, printed, err = coterie("quantize", checkpoint, *arguments, "--out", out)
    assert status == 0, err
    assert len(passes) == len(stream)  # the one that rounds
    assert ("tokens/s" in printed, "perplexity" in printed) == (not stream, not stream)
    assert rounded == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.mlp"]
    same_tensors(out, tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "prose.txt", "straight", "sums.jsonl"]


def test_what_was_kept_for_other_settings_is_not_used(coterie, checkpoint, texts, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    arguments = ["--method", "moequant", "--calib", texts[0], "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(quantizing, "_write", interrupt)
        assert coterie("quantize", checkpoint, *arguments, "--bits", 4)[0] == 130
    assert coterie("quantize", checkpoint, *arguments, "--bits", 3, "--json")[0] == 0
    assert {b for layer in load(tmp_path / "out").model.layers for b in layer.mlp.experts.packed.bits} == {3}


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", 2.25, "--router-bits", 4],
        ["--bits", 1.75, "--scope", "model"],
        ["--bits", 3, "--method", "moequant"],
        ["--bits", 4, "--method", "awq", "--router-bits", 8],
    ],
)
def test_layer_by_layer_it_writes_the_same(coterie, checkpoint, texts, tmp_path, monkeypatch, options):
    arguments = ["quantize", checkpoint, *options, "--calib", texts[0], "--group-size", 32, "--json"]
    whole = json.loads(coterie(*arguments, "--out", tmp_path / "whole")[1])
    monkeypatch.setattr(quantizing, "load", None)
    foretold = json.loads(coterie(*arguments, "--stream", "--dry-run")[1])
    status, printed, err = coterie(*arguments, "--stream", "--out", tmp_path / "streamed")
    assert status == 0, err
    same_tensors(tmp_path / "streamed", tmp_path / "whole")
    done = json.loads(printed)
    assert (done["perplexity"], done["speed"]) == (None, None)
    assert done["disk"][1] == bytes_on_disk(tmp_path / "streamed")
    for number in ("bits", "layer_bits", "expert_bytes", "memory", "overall_bits", "router_bits"):
        assert foretold[number] == done[number] == whole[number]


@pytest.mark.parametrize("make", [grouped, mixtral])
def test_other_families_layer_by_layer(make, tmp_path):
    make().save_pretrained(tmp_path / "model")
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (40, 16), generator=draw).tolist()
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    options = {"bits": 3, "calib": [tmp_path / "ids.jsonl"], "method": "moequant", "progress": False}
    for name, stream in (("whole", False), ("streamed", True)):
        quantize_checkpoint(tmp_path / "model", tmp_path / name, stream=stream, **options)
    same_tensors(tmp_path / "streamed", tmp_path / "whole")


def test_one_budget_for_the_model_gives_layers_what_their_experts_need(coterie, checkpoint, texts, tmp_path):
    louder = load(checkpoint)
    with torch.no_grad():  # errors of the second layer's experts are ten times as large
        louder.model.layers[1].mlp.experts.down_proj *= 10
    louder.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    arguments = ["quantize", tmp_path / "model", "--calib", texts[0], "--bits", 1.75]
    layer = json.loads(coterie(*arguments, "--dry-run", "--json")[1])
    model = json.loads(coterie(*arguments, "--dry-run", "--json", "--scope", "model")[1])
    assert (layer["scope"], model["scope"]) == ("layer", "model")
    first, second = "model.layers.0.mlp", "model.layers.1.mlp"
    assert layer["layer_bits"] == {first: 1.75, second: 1.75}
    assert model["layer_bits"][first] < 1.75 < model["layer_bits"][second]
    assert model["average_bits"] == 1.75
    assert model["bits"][second] != layer["bits"][second]
    status, printed, err = coterie(*arguments, "--scope", "model", "--out", tmp_path / "out", "--report")
    assert status == 0, err
    assert "1.75 bits per expert, by mc-sharp over the whole model" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    for name, average in model["layer_bits"].items():
        for text in (printed, page):
            assert f"{average:.2f}" in text
            assert "".join(map(str, model["bits"][name])) in text
    banks = [block.mlp.experts.packed for block in load(tmp_path / "out").model.layers]
    assert [bank.bits for bank in banks] == list(model["bits"].values())


def test_experts_of_unlike_sizes_share_no_budget():
    blocks = find_moe_blocks(mixtral())
    wide = find_moe_blocks(tiny())
    options = {"method": "mc-sharp", "bits": 2, "group_size": 32}
    rounding.BlockRounding(**options, scope="model").check(blocks)
    rounding.BlockRounding(**options).check([*blocks, *wide])
    with pytest.raises(ValueError, match=r"experts of model.layers.0.mlp are \[24, 32\], of .* \[16, 32\]"):
        rounding.BlockRounding(**options, scope="model").check([*blocks, *wide])


def test_experts_inside_the_decoder_layer_itself_are_refused_before_work():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"global_head_dim": 16, "num_experts": 4, "top_k_experts": 2, "enable_moe_block": True}
    config = Gemma4TextConfig(**sizes, vocab_size_per_layer_input=64, hidden_size_per_layer_input=0)
    blocks = find_moe_blocks(Gemma4ForCausalLM(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0 holds its experts and attention alike"):
        rounding.BlockRounding("gptq", 4, 32).check(blocks)


def test_other_text_to_test_on_leaves_all_of_the_calibration_text_to_calibrate_on(
    coterie, checkpoint, texts, tmp_path
):
    arguments = ["--bits", 3, "--method", "rtn", "--calib", texts[0], "--json", "--out", tmp_path / "out"]
    done = json.loads(coterie("quantize", checkpoint, *arguments, "--test", texts[1])[1])
    seen, tested = (
        read_text(text, AutoTokenizer.from_pretrained(checkpoint), max_tokens=65536, seq_len=64)
        for text in texts
    )
    assert done["calibration_tokens"] == sum(map(len, seen))
    assert done["heldout_tokens"] == sum(map(len, tested))
    expected = [perplexity(model, batches(tested)) for model in (load(checkpoint), load(tmp_path / "out"))]
    assert done["perplexity"] == pytest.approx(expected)


def test_affinity_with_gptq_is_moequant_but_for_its_routers(checkpoint, texts, tmp_path):
    options = {"bits": 3, "calib": texts[:1], "progress": False}
    quantize_checkpoint(checkpoint, tmp_path / "a", method="gptq", affinity=True, **options)
    quantize_checkpoint(checkpoint, tmp_path / "b", method="moequant", router_bits=16, **options)
    quantize_checkpoint(checkpoint, tmp_path / "c", method="gptq", **options)
    same_tensors(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_tensors(tmp_path / "a", tmp_path / "c")


def same_tensors(folder, other):
    first, second = (load(f).state_dict() for f in (folder, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory, _checkpoint):
    folder = tmp_path_factory.mktemp("small")
    text = folder / "text.txt"
    text.write_text("A router sends each token to a few experts. " * 20)
    options = {"bits": 2, "calib": [text], "method": "rtn", "progress": False}
    quantize_checkpoint(_checkpoint, folder / "model", **options)
    return folder / "model"


def test_a_packed_folder_loads_without_the_room_that_packed_it(small):
    code = f"""
import sys, torch
from coterie.hf import load
print(load({str(small)!r})(torch.arange(9)[None]).logits.sum().item(), "coterie.shrink" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = load(small)(torch.arange(9)[None]).logits.sum().item()
    assert done.stdout.split() == [str(expected), "False"]


def test_packed_experts_cannot_be_edited_and_others_not_saved_as_packed(checkpoint, small):
    with pytest.raises(ValueError, match="are packed, and cannot be edited"):
        outline(small)
    model = load(checkpoint)
    with pytest.raises(ValueError, match="no block of Qwen3MoeForCausalLM is packed"):
        save_packed(model, find_moe_blocks(model), small.parent / "other")


def test_packed_weights_keep_their_dtypes_in_a_model_of_another(small):
    model = load(small, dtype=torch.bfloat16)
    bank = model.model.layers[0].mlp.experts.packed
    assert bank.scales.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert bool(model(torch.arange(8).view(1, 8)).logits.isfinite().all())


def test_damage_is_named(small, tmp_path):
    def damaged(name, file, content):
        folder = tmp_path / name
        folder.mkdir()
        for part in small.iterdir():
            (folder / part.name).write_bytes(part.read_bytes())
        (folder / file).write_text(content)
        return folder

    with pytest.raises(ValueError, match=r"coterie-packed\.json is damaged"):
        load(damaged("a", "coterie-packed.json", "{"))
    with pytest.raises(ValueError, match="version 2; this coterie reads version 1"):
        load(damaged("b", "coterie-packed.json", '{"version": 2}'))
    folder = damaged("c", "note", "")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.packed.codes"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors, such as .*packed\.codes"):
        load(folder)
