"""The commands: what they write, what they print, what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coterie.hf import find_moe_blocks, load, save
from coterie.hf.progress import showing
from coterie.shrink import calibrate, load_mask, prune
from coterie.shrink import checkpoint as shrinking

IDS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_prune_writes_what_plain_transformers_loads(coterie, checkpoint, texts, tmp_path):
    out = tmp_path / "half"
    arguments = ["--calib", texts[0], "--calib", texts[1], "--keep", 4, "--out", out, "--report"]
    status, printed, err = coterie("prune", checkpoint, *arguments)
    assert status == 0, err
    assert "4 of 8 experts in each layer, by easy-ep" in printed
    for row in ("on disk", "in memory", "parameters", "active per token", "perplexity", "tokens/s"):
        assert row in printed
    assert "bound to the text" in printed
    assert "model.layers.1.mlp: 4 of 8 experts" in err
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_experts == 4
    whole = load(checkpoint)
    kept = load_mask(out / "kept_experts.json", find_moe_blocks(whole))
    prune(find_moe_blocks(whole), kept)
    assert torch.equal(logits(model), logits(whole))
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [97, 98]
    assert "model.layers.0.mlp" in (out / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "prose.txt", "sums.jsonl"]


def test_merge_writes_what_plain_transformers_loads(coterie, checkpoint, texts, tmp_path):
    out = tmp_path / "merged"
    status, printed, err = coterie("merge", checkpoint, "--calib", texts[0], "--groups", 3, "--out", out)
    assert status == 0, err
    assert "3 of 8 experts in each layer, by m-smoe" in printed
    assert [b.num_experts for b in find_moe_blocks(AutoModelForCausalLM.from_pretrained(out))] == [3, 3]
    assert not (out / "kept_experts.json").exists()


def test_dern_recombines_and_writes_what_plain_transformers_loads(coterie, checkpoint, texts, tmp_path):
    out, arguments = tmp_path / "out", ["--method", "dern", "--groups", 4, "--calib", texts[0], "--json"]
    status, printed, err = coterie("merge", checkpoint, *arguments, "--threshold", 0.2, "--out", out)
    assert status == 0, err
    experts = json.loads(printed)["experts"]
    pruned = shrinking.prune_checkpoint(
        checkpoint, None, keep=4, method="gating", calib=texts[:1], dry_run=True, progress=False
    )
    kept = {name: [[members[0]] for members in groups] for name, groups in experts.items()}
    assert kept == pruned.experts
    assert any(len(members) > 1 for groups in experts.values() for members in groups)
    model, whole = AutoModelForCausalLM.from_pretrained(out), load(checkpoint)
    for block, old in zip(find_moe_blocks(model), find_moe_blocks(whole), strict=True):
        ids = [members[0] for members in experts[block.name]]
        assert torch.equal(block.router.rows, old.router.rows[ids])
        for members, up, old_up in zip(
            experts[block.name], block.experts.up, old.experts.up[ids], strict=True
        ):
            assert torch.equal(up, old_up) == (len(members) == 1)
    assert not (out / "kept_experts.json").exists(), "a mask cannot say what moved"


def test_dern_that_moves_nothing_is_pruning(coterie, checkpoint, texts, tmp_path):
    merged, pruned = tmp_path / "merged", tmp_path / "pruned"
    coterie("merge", checkpoint, "--method", "dern", "--groups", 4, "--calib", texts[0], "--out", merged,
            "--threshold", 1)  # fmt: skip
    coterie("prune", checkpoint, "--method", "gating", "--keep", 4, "--calib", texts[0], "--out", pruned)
    for name in ("model.safetensors", "config.json", "kept_experts.json"):
        assert (merged / name).read_bytes() == (pruned / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--threshold": 2}, "threshold=2.0; it is a cosine, use -1 ≤ threshold ≤ 1"),
        ({"--groups": 1}, "sends each token to 2; use 2 ≤ keep ≤ 8"),
        ({"--method": "dearn"}, "no method 'dearn'; use one of m-smoe, dern"),
    ],
)
def test_a_merge_that_cannot_be_is_refused_before_the_model_runs(
    coterie, checkpoint, texts, tmp_path, changes, message
):
    options = {"--calib": texts[0], "--groups": 4, "--method": "dern", "--out": tmp_path / "out"} | changes
    status, printed, err = coterie("merge", checkpoint, *(x for pair in options.items() for x in pair))
    assert (status, printed) == (2, "")
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prose.txt", "sums.jsonl"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # tiny text: some experts see no token
@pytest.mark.parametrize(
    "command", [["prune", "--keep", 4], ["merge", "--groups", 4], ["quantize", "--bits", 2]]
)
def test_conversations_calibrate_when_asked_for(coterie, checkpoint, tmp_path, command):
    model, calib = tmp_path / "model", tmp_path / "chat.jsonl"
    shutil.copytree(checkpoint, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    line = json.dumps({"messages": [{"role": "user", "content": "why " * 10}]})
    calib.write_text("\n".join([line] * 20))
    name, *size = command
    arguments = [name, model, *size, "--calib", calib, "--dry-run", "--json"]
    status, printed, err = coterie(*arguments, "--chat")
    assert status == 0, err
    tokens = json.loads(printed)["calibration_tokens"]
    assert tokens in (18 * 47, [18 * 47]), "user: , forty letters, a new line; the last two are held out"
    status, _, err = coterie(*arguments)
    assert status == 2
    assert "ask for it (--chat)" in err


DERN = ["merge", "--groups", 4, "--method", "dern", "--threshold", 0.2]


@pytest.mark.parametrize("command", [["prune", "--keep", 4], ["merge", "--groups", 4], DERN])
def test_a_dry_run_tells_what_the_real_one_does_and_writes_nothing(
    coterie, checkpoint, texts, tmp_path, command
):
    name, *size = command
    arguments = [name, checkpoint, *size, "--calib", texts[0], "--json"]
    status, printed, _ = coterie(*arguments, "--dry-run")
    assert status == 0
    foretold = json.loads(printed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prose.txt", "sums.jsonl"]
    status, printed, _ = coterie(*arguments, "--out", tmp_path / "out")
    done = json.loads(printed)
    assert foretold["experts"] == done["experts"]
    assert foretold["after"]["sizes"] == done["after"]["sizes"]
    assert foretold["after"]["disk"] == pytest.approx(done["after"]["disk"], rel=0.05)
    assert foretold["out"] is None
    assert foretold["after"]["perplexity"] is None
    assert done["after"]["perplexity"] > 1
    _, printed, _ = coterie(name, checkpoint, *size, "--calib", texts[0], "--dry-run")
    assert "estimated after" in printed
    assert "nothing was written" in printed


def test_the_perplexities_are_those_of_the_two_checkpoints(checkpoint, texts, tmp_path):
    options = {"calib": [texts[0]], "progress": False}
    done = shrinking.prune_checkpoint(checkpoint, tmp_path / "a", keep=3, **options)
    again = shrinking.prune_checkpoint(tmp_path / "a", tmp_path / "b", keep=3, **options)
    assert again.before.perplexity == pytest.approx(done.after.perplexity)
    assert again.after.perplexity == pytest.approx(done.after.perplexity)
    assert done.before.perplexity != pytest.approx(done.after.perplexity)


def test_an_interrupted_run_goes_on_with_the_calibration_that_was_done(
    coterie, checkpoint, texts, tmp_path, monkeypatch
):
    arguments = ["prune", checkpoint, "--calib", texts[0], "--keep", 4, "--json"]
    ran, steps, recording, step = [], [], calibrate.recording, shrinking.Show.step
    monkeypatch.setattr(calibrate, "recording", lambda *a, **k: ran.append(0) or recording(*a, **k))
    unbroken, batches = json.loads(coterie(*arguments, "--out", tmp_path / "a")[1]), len(ran)

    def interrupt(show, text):
        steps.append(text)
        if len(steps) == 3:
            raise KeyboardInterrupt
        step(show, text)

    monkeypatch.setattr(shrinking.Show, "step", interrupt)
    status, printed, err = coterie(*arguments, "--out", tmp_path / "b")
    assert (status, printed) == (130, "")
    assert "interrupted; the same command goes on" in err
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(shrinking.Show, "step", step)
    ran.clear()
    resumed = json.loads(coterie(*arguments, "--out", tmp_path / "b")[1])
    assert len(ran) == batches - 3, "what was done is not done again"
    assert resumed["experts"] == unbroken["experts"]
    assert not (tmp_path / "b.calibration").exists()


def test_layers_that_differ_are_kept_in_coteries_own_format(checkpoint, texts, tmp_path):
    model = load(checkpoint)
    find_moe_blocks(model)[0].set_top_k(3)
    save(model, tmp_path / "uneven", "coterie")
    options = {"keep": 4, "calib": [texts[1]], "progress": False, "dry_run": True}
    shutil.copy(checkpoint / "tokenizer.json", tmp_path / "uneven")
    shutil.copy(checkpoint / "tokenizer_config.json", tmp_path / "uneven")
    with pytest.raises(ValueError, match=r"holds one number for all layers.*use format=.coterie"):
        shrinking.prune_checkpoint(tmp_path / "uneven", None, **options)
    done = shrinking.prune_checkpoint(tmp_path / "uneven", None, format="coterie", **options)
    assert [len(groups) for groups in done.experts.values()] == [4, 4]


@pytest.fixture
def dense(tmp_path):
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--keep": 1}, "sends each token to 2; use 2 ≤ keep ≤ 8"),
        ({"--keep": 9}, "use 2 ≤ keep ≤ 8"),
        ({"--method": "magic"}, "no method 'magic'; use one of frequency"),
        ({"--format": "gguf"}, "no format 'gguf'; use transformers or coterie"),
        ({"--calib": "empty.txt"}, "empty.txt is empty"),
        ({"--calib": "short.txt"}, "short.txt holds 100 tokens"),
        ({"--calib": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"--calib": "other.jsonl"}, "token id 999, the model 257 tokens"),
        ({"--out": "MODEL"}, "is the folder the model came from"),
        ({"--out": "taken"}, "taken exists already"),
        ({"--out": None}, "no output folder was given"),
        ({"MODEL": "dense"}, "LlamaForCausalLM has no MoE block"),
        ({"MODEL": "taken"}, "has no config.json"),
        ({"--out": "taken/file/out"}, "taken/file is a file"),
        ({"--seq-len": 0}, "seq_len=0; use tokens ≥ 256 and seq_len ≥ 2"),
        ({"--tokens": -1}, "tokens=-1, seq_len=64; use tokens ≥ 256"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(
    coterie, checkpoint, texts, dense, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("a" * 100)
    Path("other.jsonl").write_text('{"input_ids": [999, 3]}\n' * 200)
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(tmp_path.rglob("*"))
    options = {"MODEL": checkpoint, "--calib": texts[0], "--keep": 4, "--out": "out"} | changes
    model = options.pop("MODEL")
    arguments = [
        x
        for name, value in options.items()
        if value is not None
        for x in (name, model if value == "MODEL" else value)
    ]
    status, printed, err = coterie("prune", model, *arguments)
    assert (status, printed) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_fails_while_it_is_written_leaves_no_folder(checkpoint, texts, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(shrinking, "save_mask", fail)
    with pytest.raises(OSError, match="no space"):
        shrinking.prune_checkpoint(checkpoint, tmp_path / "out", keep=4, calib=[texts[0]], progress=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("command", [("prune", "--keep", 4), ("merge", "--groups", 4)])
def test_one_layer_at_a_time_writes_what_the_whole_model_in_memory_does(
    coterie, command, checkpoint, texts, tmp_path
):
    arguments = [command[0], checkpoint, "--calib", texts[0], "--calib", texts[1], *command[1:]]
    status, _, err = coterie(*arguments, "--out", tmp_path / "whole")
    assert status == 0, err
    status, printed, err = coterie(*arguments, "--out", tmp_path / "streamed", "--stream")
    assert status == 0, err
    assert "4 of 8 experts in each layer" in printed
    whole, streamed = (load(tmp_path / name) for name in ("whole", "streamed"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[name], tensor, msg=name)
    if command[0] == "prune":
        masks = [(tmp_path / name / "kept_experts.json").read_text() for name in ("whole", "streamed")]
        assert masks[0] == masks[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "streamed")("ab")["input_ids"] == [97, 98]
    status, printed, err = coterie(*arguments, "--dry-run", "--stream")
    assert status == 0, err
    assert "nothing was written" in printed


SIDE = {"LICENSE": "free", "generation_config.json": '{"temperature": 0.7}', "chat_template.jinja": "{{ m }}"}


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_what_lies_beside_the_weights_comes_along_but_not_what_told_of_the_source(
    coterie, checkpoint, texts, tmp_path, stream
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    (model / "additional_chat_templates").mkdir()
    others = SIDE | {"additional_chat_templates/tools.jinja": "tools"}
    stale = ["kept_experts.json", "report.html", "pytorch_model.bin", "q4.gguf", ".cache"]
    for name, text in others.items():
        (model / name).write_text(text)
    for name in stale:
        (model / name).write_text("of the source")
    status, _, err = coterie("merge", model, "--groups", 4, "--calib", texts[0], "--out", out, *stream)
    assert status == 0, err
    for name, text in others.items():
        assert (out / name).read_text() == text
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not [name for name in stale if (out / name).exists()]


def test_streamed_sizes_are_those_of_the_model_in_memory_and_nothing_is_said_to_be_measured(
    coterie, checkpoint, texts, tmp_path
):
    half = load(checkpoint).to(torch.bfloat16)
    save(half, tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "half")
    arguments = ["prune", tmp_path / "half", "--keep", 4, "--calib", texts[0]]
    _, whole, _ = coterie(*arguments, "--dry-run", "--json")
    _, streamed, _ = coterie(*arguments, "--dry-run", "--json", "--stream")
    for when in ("before", "after"):
        assert json.loads(streamed)[when]["sizes"] == json.loads(whole)[when]["sizes"]
    status, printed, err = coterie(*arguments, "--out", tmp_path / "out", "--stream", "--report")
    assert status == 0, err
    for text in (printed, (tmp_path / "out" / "report.html").read_text()):
        assert "perplexity and speed were not measured" in text
        assert "perplexity on held-out text" not in text
        assert "0 held-out tokens" not in text
    assert "coterie prune" in (tmp_path / "out" / "report.html").read_text(), "how it was made"


def test_a_function_of_a_record_is_a_method(checkpoint, texts):
    def frequency(record):
        return record.sum_by_expert(torch.ones_like(record.weights))

    run = {"calib": texts[:1], "dry_run": True, "progress": False}
    own = shrinking.prune_checkpoint(checkpoint, None, keep=4, method=frequency, **run)
    named = shrinking.prune_checkpoint(checkpoint, None, keep=4, method="frequency", **run)
    assert own == named
    with pytest.raises(ValueError, match=r"a score should be 8 finite numbers, one per expert; found \[\]"):
        shrinking.prune_checkpoint(checkpoint, None, keep=4, method=lambda record: torch.empty(0), **run)


def test_a_function_of_a_record_makes_groups(checkpoint, texts):
    def pairs(record):
        return [[i, i + 1] for i in range(0, record.num_experts, 2)]

    run = {"calib": texts[:1], "dry_run": True, "progress": False, "method": pairs}
    merged = shrinking.merge_checkpoint(checkpoint, None, groups=4, **run)
    assert merged.method == "pairs"
    assert list(merged.experts.values()) == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    with pytest.raises(ValueError, match="4 groups were made; there should be 3"):
        shrinking.merge_checkpoint(checkpoint, None, groups=3, **run)


def test_outside_a_terminal_a_long_calibration_says_each_tenth(capsys):
    with showing(40) as show:
        for _ in range(40):
            show.step("calibrating")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/40] calibrating"
    assert lines[-1] == "[40/40] calibrating"
    assert len(lines) == 11
