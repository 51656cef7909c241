"""coterie unlearn: what it writes, what it tells, what it refuses."""

import json
import shutil

import pytest
import torch
from tiny_moe import arguments, two_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coterie.hf import find_moe_blocks, load
from coterie.tune import Batch, attribute_experts
from coterie.tune import checkpoint as unlearning
from coterie.tune.measure import predict

pytestmark = pytest.mark.filterwarnings("ignore:expert . of model:UserWarning")  # near ties


def test_one_expert_forgets_the_text_and_the_rest_stays(coterie, checkpoint, texts, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "gdiff", "--stop-forget", 0.6, "--json", "--report"]
    status, printed, err = coterie(*arguments(checkpoint, texts, out, *options))
    assert status == 0, err
    done = json.loads(printed)
    assert done["before"]["forget"]["accuracy"] > 0.95
    assert done["after"]["forget"]["accuracy"] <= 0.6
    assert done["after"]["retain"]["accuracy"] > 0.9
    assert done["reached"]
    assert 0 < done["overlap"] <= 1
    for line in ("looking for the experts", "step 1: loss", "measuring the new one", f"writing {out}"):
        assert line in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forget.pt", "out", "retain.pt"]
    assert json.loads((out / "unlearned.json").read_text()) == done
    page = (out / "report.html").read_text()
    assert "Accuracy by step" in page
    assert "parameters trained" in page
    assert "tokens/s" in page
    assert done["before"]["speed"] > 0
    assert done["after"]["speed"] > 0


def test_plain_transformers_loads_it_and_only_the_target_differs(coterie, checkpoint, texts, tmp_path):
    out = tmp_path / "out"
    printed = coterie(*arguments(checkpoint, texts, out, "--steps", 3, "--json"))[1]
    done = json.loads(printed)
    [target] = done["targets"]
    model, before = AutoModelForCausalLM.from_pretrained(out), load(checkpoint)
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [97, 98]
    numbers = 0
    for name, now in model.state_dict().items():
        old = before.state_dict()[name]
        if name.startswith(f"{target['block']}.experts"):
            others = [e for e in range(4) if e != target["expert"]]
            assert torch.equal(now[others], old[others])
            assert not torch.equal(now, old)
            numbers += now[0].numel()
        elif name == f"{target['block']}.gate.weight":
            numbers += now.numel()
        else:
            assert torch.equal(now, old), name
    assert done["trained"] == numbers
    # the last of the 20 sequences are held out
    forget, retain = ([Batch(text[-2:])] for text in two_texts())
    for side, text in (("forget", forget), ("retain", retain)):
        for one, when in ((before, "before"), (model, "after")):
            assert done[when][side]["accuracy"] == pytest.approx(predict(one, text).accuracy)
            assert done[when][side]["cross_entropy"] == pytest.approx(
                predict(one, text).cross_entropy, rel=1e-4
            )
    seen = attribute_experts(before, [Batch(two_texts()[0][:-2])]).ranked()[0]
    assert (find_moe_blocks(before)[seen.layer].name, seen.expert) == (target["block"], target["expert"])


def test_a_dry_run_names_the_same_expert_and_writes_nothing(coterie, checkpoint, texts, tmp_path):
    foretold = json.loads(coterie(*arguments(checkpoint, texts, tmp_path / "a", "--dry-run", "--json"))[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forget.pt", "retain.pt"]
    done = json.loads(coterie(*arguments(checkpoint, texts, tmp_path / "a", "--steps", 1, "--json"))[1])
    assert done["before"].pop("speed") > 0
    assert foretold["before"].pop("speed") is None
    for what in ("targets", "margin", "before"):
        assert foretold[what] == done[what]
    assert (foretold["after"], foretold["out"]) == (None, None)
    _, printed, _ = coterie(*arguments(checkpoint, texts, tmp_path / "b", "--dry-run"))
    assert "Experts that know the text" in printed
    assert "nothing was trained" in printed
    assert "tokens/s" not in printed


def test_the_table_says_what_was_won_and_lost(coterie, checkpoint, texts, tmp_path):
    options = ["--steps", 2, "--stop-forget", 0, "--experts", 2, "--scope", "experts"]
    status, printed, _ = coterie(*arguments(checkpoint, texts, tmp_path / "out", *options))
    assert status == 0
    rows = (
        "text to forget: perplexity",
        "text to keep: next-token accuracy",
        "on disk",
        "tokens/s",
        "chosen",
    )
    for row in ("ga, trained: all experts", "ahead of the next by", *rows, "parameters trained"):
        assert row in printed
    assert "The accuracy to stop at, 0, was not reached." in printed
    assert f"written to {tmp_path / 'out'}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "no method 'magic'; use one of ga, gdiff, npo, rmu, kl"),
        (["--scope", "half"], "no scope 'half'; use one of expert, experts, router, all"),
        (["--experts", 9], "experts=9 of the model's 8; use 1 ≤ experts ≤ 8"),
        (["--stop-forget", 1.5], "stop_forget=1.5; it is an accuracy"),
        (["--steps", 0], "steps=0"),
        (["--lr", 0], "lr=0.0; a learning rate is more than 0"),
        (["--tokens", 0], "max_tokens=0; use at least 1"),
        (["--tokens", 9], "holds 9 tokens; give at least 32"),
        (["--seed", 2**70], "use 0 ≤ seed < 2**63"),
        (["--seq-len", 1], "seq_len=1; use at least 2"),
        (["--retain", "nowhere.txt"], "nowhere.txt"),
        (["--seq-len", 512, "--tokens", 40], "its end is held out: give more text, or shorter sequences"),
    ],
)
def test_bad_wishes_are_refused_in_one_line_before_weights_are_read(
    coterie, checkpoint, texts, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(unlearning, "load", None)
    status, printed, err = coterie(*arguments(checkpoint, texts, tmp_path / "out", *options))
    assert (status, printed) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_folders_and_texts_are_refused(coterie, checkpoint, texts, tmp_path):
    dense, taken = tmp_path / "dense", tmp_path / "taken"
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(dense)
    taken.mkdir()
    (taken / "file").write_text("")
    same = shutil.copy(texts[0], tmp_path / "same.pt")
    for folder, out, sides, message in [
        (dense, tmp_path / "out", texts, "LlamaForCausalLM has no MoE block"),
        (checkpoint, taken, texts, "taken exists already"),
        (checkpoint, checkpoint, texts, "is the folder the model came from"),
        (checkpoint, tmp_path / "out", (texts[0], same), "hold the same text"),
    ]:
        status, _, err = coterie(*arguments(folder, sides, out))
        assert status == 2
        assert message in err
    status, _, err = coterie("unlearn", checkpoint, "--forget", texts[0], "--retain", texts[1])
    assert status == 2
    assert "no output folder was given" in err
