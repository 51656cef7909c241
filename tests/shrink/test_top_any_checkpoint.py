"""coterie top-any: what it writes, what reads it back, what it refuses, and how it goes on."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import grouped, mixtral, tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from coterie.hf import (
    Checkpoint,
    PrefixMask,
    bytes_on_disk,
    find_moe_blocks,
    load,
    masks_of,
    outline,
    place_masks,
    save,
    unmasked,
)
from coterie.hf.top_any import MASKS
from coterie.shrink import pack_block, save_packed, top_any, train_top_any
from coterie.shrink import top_any_checkpoint as job
from coterie.shrink.quantize_block import quantize_block
from coterie.shrink.quantize_checkpoint import quantize_checkpoint
from coterie.shrink.top_any_checkpoint import top_any_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # tiny text: some experts see no token

IDS = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))
QUICK = {"steps": 20, "lr": 0.05, "sparsity": 2.0, "seq_len": 32, "progress": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("A router sends each token to a few experts, and not all of them are needed. " * 15)
    return file


@pytest.fixture(scope="module")
def plain(tmp_path_factory, _checkpoint, text):
    """(what `top_any_checkpoint` found, the folder that it wrote)."""
    out = tmp_path_factory.mktemp("plain") / "masked"
    return top_any_checkpoint(_checkpoint, out, calib=[text], **QUICK), out


@pytest.fixture(scope="module")
def packed(tmp_path_factory, _checkpoint, text):
    """(what it found, its folder, the folder of the packed checkpoint)."""
    folder = tmp_path_factory.mktemp("packed")
    quantize_checkpoint(
        _checkpoint, folder / "small", bits=3, calib=[text], method="rtn", group_size=32, progress=False
    )
    done = top_any_checkpoint(folder / "small", folder / "masked", calib=[text], **QUICK)
    return done, folder / "masked", folder / "small"


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def random_masks(model, k=2):
    """Masks that keep one expert of some tokens and both of others."""
    torch.manual_seed(3)
    names = [f"{block.name}.experts" for block in find_moe_blocks(model)]
    masks = {name: PrefixMask(find_moe_blocks(model)[0].experts.up.shape[-1], k) for name in names}
    for mask in masks.values():
        torch.nn.init.normal_(mask.score.weight)
        torch.nn.init.zeros_(mask.score.bias)
        mask.score.weight.data[:, k:] = 0  # the token alone decides
    return masks


def under_top_any(model, masks, renormalize=True):
    banks = [model.get_submodule(name) for name in masks]
    with top_any(banks, list(masks.values()), renormalize=renormalize) as kept:
        found = logits(model)
    assert all(0.5 < one.ratio < 1 for one in kept)
    return found


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "coterie"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_loaded_model_gives_the_logits_of_the_one_in_memory_bit_for_bit(
    checkpoint, tmp_path, implementation, renormalize
):
    model = load(checkpoint, experts_implementation=implementation)
    before, masks = logits(model), random_masks(model)
    expected = under_top_any(model, masks, renormalize)
    place_masks(model, masks, renormalize=renormalize)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, before)
    save(model, tmp_path / "masked", format="coterie")
    again = load(tmp_path / "masked", experts_implementation=implementation)
    assert torch.equal(logits(again), expected)
    assert type(again) is type(model)
    with unmasked(again):
        assert torch.equal(logits(again), before)
    assert torch.equal(logits(copy.deepcopy(again)), expected)


def test_a_packed_one_too(checkpoint, tmp_path, model):
    blocks = find_moe_blocks(model)
    masks = random_masks(model)
    for block in blocks:
        inputs_TD = torch.randn(50, 32)
        pack_block(model, block, *quantize_block(block, inputs_TD, [3] * 8, "rtn", group_size=32))
    expected = under_top_any(model, masks)
    place_masks(model, masks, renormalize=True)
    assert torch.equal(logits(model), expected)
    save_packed(model, blocks, tmp_path / "masked")
    again = load(tmp_path / "masked")
    assert torch.equal(logits(again), expected)
    assert masks_of(again).keys() == masks.keys()


@pytest.mark.parametrize("make", [mixtral, grouped])
def test_other_families(make, tmp_path):
    model, ids = make(), IDS % 64
    place_masks(model, random_masks(model), renormalize=True)
    save(model, tmp_path / "masked", format="coterie")
    assert torch.equal(logits(load(tmp_path / "masked"), ids), logits(model, ids))


def test_every_step_of_generation_is_masked(checkpoint, plain):
    model = load(plain[1])
    written = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    ids = IDS[:1]
    for _ in range(6):  # without a cache
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), 1)
    assert written.tolist() == ids.tolist()


def test_the_masks_stay_in_32_bits_in_a_model_of_16(plain):
    model = load(plain[1], dtype=torch.bfloat16)
    assert {p.dtype for mask in masks_of(model).values() for p in mask.parameters()} == {torch.float32}
    assert bool(logits(model).isfinite().all())


def test_the_command_writes_a_copy_and_masks_and_compares_them(coterie, checkpoint, texts, tmp_path):
    out = tmp_path / "masked"
    arguments = ["--calib", texts[0], "--steps", 20, "--lr", 0.05, "--sparsity", 2, "--seq-len", 32]
    status, printed, err = coterie("top-any", checkpoint, *arguments, "--out", out, "--report", "--json")
    assert status == 0, err
    done = json.loads(printed)
    for file in checkpoint.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    beside = {file.name for file in out.iterdir()} - {file.name for file in checkpoint.iterdir()}
    assert beside == {MASKS, "coterie.json", "report.html"}
    assert done["before"]["disk"] == bytes_on_disk(checkpoint)
    assert done["after"]["disk"] == bytes_on_disk(out)
    assert done["experts"][0] == 2
    assert 1 <= done["experts"][1] < 2
    assert done["experts"][1] == pytest.approx(2 * sum(done["kept"].values()) / 2)
    gone = sum(2 * (1 - share) * 3 * 32 * 24 for share in done["kept"].values())
    extra = sum(p.numel() for mask in masks_of(load(out)).values() for p in mask.parameters())
    assert done["after"]["sizes"]["total"] == done["before"]["sizes"]["total"] + extra
    assert done["after"]["sizes"]["active"] == pytest.approx(
        done["before"]["sizes"]["active"] - gone + extra, abs=1
    )
    assert done["renormalize"] is True
    assert done["rule"]["protects"] is True
    assert done["rule"]["kept"] == pytest.approx(done["share"], abs=0.1)
    assert done["before"]["speed"] > 0
    assert done["after"]["speed"] > 0
    assert "Experts per token" in (out / "report.html").read_text()
    for line in ("watching the router", "training: ", f"writing {out}"):
        assert line in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masked", "prose.txt", "sums.jsonl"]
    _, printed, _ = coterie("top-any", checkpoint, *arguments, "--out", tmp_path / "other")
    assert "by rule (ODP)" in printed
    assert "plain transformers reads it, too, and applies no mask" in printed


def test_what_was_measured_is_what_was_written(checkpoint, plain, text):
    from coterie.hf.calibration import read_tokenizer
    from coterie.shrink import perplexity
    from coterie.shrink.calibrate import batches, held_out, read_text

    done, out = plain
    _, rest = held_out(read_text(text, read_tokenizer(out), max_tokens=65536, seq_len=32))
    assert perplexity(load(out), batches(rest)) == pytest.approx(done.after.perplexity)
    assert perplexity(load(checkpoint), batches(rest)) == pytest.approx(done.before.perplexity)


def test_plain_transformers_reads_the_folder_and_applies_no_mask(checkpoint, plain):
    found = logits(AutoModelForCausalLM.from_pretrained(plain[1]))
    assert torch.equal(found, logits(load(checkpoint)))
    assert not torch.equal(found, logits(load(plain[1])))


def test_a_quantized_checkpoint_can_be_masked(packed):
    done, out, small = packed
    assert done.packed
    assert done.share() < 1
    model = load(out)
    with unmasked(model):
        assert torch.equal(logits(model), logits(load(small)))
    assert not torch.equal(logits(model), logits(load(small)))


def test_a_dry_run_finds_the_same_and_writes_nothing(coterie, checkpoint, plain, text, tmp_path):
    status, printed, _ = coterie(
        "top-any", checkpoint, "--calib", text, "--steps", 20, "--lr", 0.05, "--sparsity", 2,
        "--seq-len", 32, "--dry-run", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert status == 0
    foretold = json.loads(printed)
    assert list(tmp_path.iterdir()) == []
    assert foretold["kept"] == plain[0].kept
    assert foretold["after"]["perplexity"] == plain[0].after.perplexity
    assert (foretold["out"], foretold["after"]["speed"]) == (None, None)
    assert foretold["after"]["disk"] == pytest.approx(plain[0].after.disk, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "transformers"], "plain transformers computes all experts that the router proposes"),
        (["--format", "onnx"], "format='onnx' is unknown; use one of transformers, coterie"),
        (["--sparsity", -1], "sparsity=-1; it is the price of an expert, use 0 or more"),
        (["--sparsity", "nan"], "sparsity=nan"),
        (["--steps", 0], "steps=0, batch_size=4, lr=0.005; all must be positive"),
        (["--lr", 0], "all must be positive"),
        (["--chat"], "the checkpoint has no chat template"),
    ],
)
def test_bad_wishes_are_refused_in_one_line_before_weights_are_read(
    coterie, checkpoint, text, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(job, "load", None)
    status, printed, err = coterie(
        "top-any", checkpoint, "--calib", text, "--out", tmp_path / "out", *options
    )
    assert (status, printed) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_are_refused(coterie, checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "load", None)
    dense, single, headless, taken = (tmp_path / name for name in ("dense", "single", "headless", "taken"))
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(dense)
    tiny(num_experts_per_tok=1).save_pretrained(single)
    tiny().model.save_pretrained(headless)
    taken.mkdir()
    (taken / "file").write_text("")
    out = tmp_path / "out"
    for folder, place, calib, message in [
        (dense, out, text, "LlamaForCausalLM has no MoE block"),
        (single, out, text, "model.layers.0.mlp sends a token to 1 expert; none can be left out"),
        (headless, out, text, "holds a Qwen3MoeModel, which gives no logits to learn from"),
        (checkpoint, taken, text, "taken exists already"),
        (checkpoint, checkpoint, text, "is the folder the model came from"),
        (checkpoint, out, tmp_path / "none.txt", "none.txt does not exist"),
        (tmp_path / "nowhere", out, text, "nowhere does not exist"),
    ]:
        status, _, err = coterie("top-any", folder, "--calib", calib, "--out", place)
        assert status == 2
        assert message in err
    assert "no output folder was given" in coterie("top-any", checkpoint, "--calib", text)[2]


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--keep", 4],
        ["prune", "--keep", 4, "--stream"],
        ["merge", "--groups", 4],
        ["quantize", "--bits", 2],
        ["top-any"],
    ],
)
def test_edits_of_a_masked_folder_are_refused(coterie, plain, text, tmp_path, command):
    name, *options = command
    status, _, err = coterie(name, plain[1], *options, "--calib", text, "--out", tmp_path / "out")
    assert status == 2
    assert f"the experts per token of {plain[1]} are masked, for its weights as they are" in err
    assert f"on a copy without {MASKS}" in err
    assert not (tmp_path / "out").exists()
    for read in (Checkpoint, outline):
        with pytest.raises(ValueError, match="are masked"):
            read(plain[1])


def test_a_copy_without_the_masks_can_be_edited(coterie, plain, text, tmp_path):
    shutil.copytree(plain[1], tmp_path / "copy")
    (tmp_path / "copy" / MASKS).unlink()
    status, _, err = coterie(
        "prune", tmp_path / "copy", "--keep", 4, "--calib", text, "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert find_moe_blocks(load(tmp_path / "out"))[0].num_experts == 4


def test_in_memory_masks_are_not_lost_in_silence(model, tmp_path):
    masks = random_masks(model)
    place_masks(model, masks, renormalize=True)
    with pytest.raises(ValueError, match='are masked, which transformers cannot do; use format="coterie"'):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has a mask already"):
        place_masks(model, masks, renormalize=True)
    block = find_moe_blocks(model)[0]
    with pytest.raises(ValueError, match="pack them, then train masks anew"):
        pack_block(model, block, *quantize_block(block, torch.randn(50, 32), [3] * 8, "rtn", group_size=32))
    block.set_top_k(1)
    with pytest.raises(ValueError, match="made for 2 experts per token, the router gives 1"):
        logits(model)
    with pytest.raises(
        ValueError, match=r"there is a mask for model\.layers\.9\.mlp\.experts, which Qwen3Moe"
    ):
        place_masks(tiny(), {"model.layers.9.mlp.experts": PrefixMask(32, 2)}, renormalize=True)


def test_damaged_masks_are_named(plain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(plain[1], folder)
    tensors = load_file(folder / MASKS)
    (folder / MASKS).write_bytes(b"no")
    with pytest.raises(ValueError, match=rf"{MASKS} is damaged"):
        load(folder)
    save_file(tensors, folder / MASKS)
    with pytest.raises(ValueError, match="version None; this coterie reads version 1"):
        load(folder)
    layout = {"model.layers.0.mlp.experts": {"dim": 31, "k": 2, "renormalize": True}}
    for content in (tensors, {"other": torch.ones(1)}):
        metadata = {"top_any": json.dumps({"version": 1, "masks": layout})}
        save_file(content, folder / MASKS, metadata=metadata)
        with pytest.raises(ValueError, match=rf"{MASKS} is damaged"):
            load(folder)


def interrupting(monkeypatch, after):
    """Ctrl-C in training, that many steps on."""
    loss, calls = torch.nn.functional.kl_div, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return loss(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "kl_div", counted)
    return calls


def test_an_interrupted_run_goes_on_and_comes_to_the_same_masks(
    coterie, checkpoint, plain, text, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    arguments = [
        "top-any", checkpoint, "--calib", text, "--steps", 20, "--lr", 0.05, "--sparsity", 2,
        "--seq-len", 32, "--out", out,
    ]  # fmt: skip
    with monkeypatch.context() as patched:
        interrupting(patched, 13)
        status, _, err = coterie(*arguments)
    assert status == 130
    assert "the same command goes on with what is left" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.calibration"]
    with monkeypatch.context() as patched:
        calls = interrupting(patched, 99)
        status, _, err = coterie(*arguments)
    assert status == 0, err
    assert len(calls) == 10  # ten of the 13 were kept
    assert (out / MASKS).read_bytes() == (plain[1] / MASKS).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_kept_for_other_settings_is_not_used(checkpoint, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupting(patched, 13)
        with pytest.raises(KeyboardInterrupt):
            top_any_checkpoint(checkpoint, tmp_path / "out", calib=[text], **QUICK)
    calls = interrupting(monkeypatch, 99)
    top_any_checkpoint(checkpoint, tmp_path / "out", calib=[text], **QUICK | {"sparsity": 1.0})
    assert len(calls) == 20


def test_a_full_disk_leaves_nothing_half_written(coterie, checkpoint, text, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.shutil, "copy2", full)
    out = tmp_path / "out"
    status, _, err = coterie(
        "top-any", checkpoint, "--calib", text, "--steps", 2, "--seq-len", 32, "--out", out
    )
    assert status == 2
    assert "No space left on device; nothing was left behind" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.calibration"]


def test_a_router_that_does_not_normalise_is_not_made_to(tmp_path, text):
    tiny(norm_topk_prob=False).save_pretrained(tmp_path / "model")
    from coterie.data import byte_tokenizer

    byte_tokenizer(64).save_pretrained(tmp_path / "model")
    done = top_any_checkpoint(tmp_path / "model", None, calib=[text], dry_run=True, **QUICK)
    assert done.renormalize is False


def test_training_of_masks_goes_on_from_its_file(model, tmp_path):
    banks = [block.bank for block in find_moe_blocks(model)]
    batches = [IDS] * 25

    def trained(texts, state=None):
        torch.manual_seed(0)
        masks = [PrefixMask(32, 2) for _ in banks]
        train_top_any(model, banks, masks, model, texts, renormalize=True, state=state)
        return [p for mask in masks for p in mask.parameters()]

    straight = trained(batches)
    with pytest.raises(AttributeError):
        trained([*batches[:15], None, *batches[16:]], tmp_path / "state")
    resumed = trained(batches, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
