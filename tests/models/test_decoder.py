import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from coterie.models import (
    Cache,
    Decoder,
    DecoderConfig,
    active_parameters,
    forward_flops,
    from_transformers,
    generate,
    load_pretrained,
    save_pretrained,
    to_transformers,
)
from coterie.nn import CosineScore, LinearScore, MoE, Router, SwiGLUExperts, TopK

SIZES = {"vocab_size": 61, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 12, "hidden": 40}
EXPERTS = {"num_experts": 6, "top_k": 2, "expert_hidden": 24}
KINDS = {
    "moe": SIZES | EXPERTS,
    "moe, untied, not renormalised": SIZES | EXPERTS | {"tie_embeddings": False, "renormalize": False},
    "dense": SIZES,
    "dense, untied": SIZES | {"tie_embeddings": False},
}


def make(kind="moe"):
    return Decoder(DecoderConfig(**KINDS[kind])).eval()


@pytest.fixture
def ids():
    return torch.randint(61, (2, 19))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits_from_our_weights(kind, ids):
    model = make(kind)
    torch.testing.assert_close(to_transformers(model)(ids).logits, model(ids)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("renormalize", [True, False])
def test_we_compute_the_same_logits_from_their_moe_weights(renormalize, ids):
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3,
            moe_intermediate_size=20, norm_topk_prob=renormalize, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
    ).eval()  # fmt: skip
    torch.testing.assert_close(from_transformers(theirs)(ids)[0], theirs(ids).logits, atol=1e-5, rtol=0)


def test_we_compute_the_same_logits_from_their_dense_weights(ids):
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8,
        )
    ).eval()  # fmt: skip
    torch.testing.assert_close(from_transformers(theirs)(ids)[0], theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_loads_in_transformers_and_here(kind, ids, tmp_path):
    model = make(kind)
    save_pretrained(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0], atol=1e-5, rtol=0)
    ours = load_pretrained(tmp_path / "model")
    assert ours.config == model.config
    assert torch.equal(ours(ids)[0], model(ids)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_process_without_coterie_loads_the_checkpoint(ids, tmp_path):
    model = make()
    save_pretrained(model, tmp_path / "model")
    torch.save((ids, model(ids)[0].detach()), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['coterie'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"ids, logits = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, dtype='float32')\n"
        "torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_generation_with_a_cache_is_generation_without_and_that_of_transformers(kind, ids):
    model, prompt = make(kind), ids[:, :7]
    ours = torch.stack(list(generate(model, prompt, 12)), 1)
    slow = prompt
    for _ in range(12):
        slow = torch.cat([slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert ours.tolist() == slow[:, 7:].tolist()
    theirs = to_transformers(model).generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert ours.tolist() == theirs[:, 7:].tolist()


def test_a_cache_may_be_filled_in_pieces(ids):
    model, cache = make(), Cache(3)
    pieces = [model(ids[:, a:b], cache=cache)[0] for a, b in ((0, 5), (5, 6), (6, 19))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids)[0], atol=1e-5, rtol=1e-4)


def test_sampling_is_repeatable_and_stops():
    model, prompt = make(), torch.tensor([[1, 2]])
    draw = lambda: [  # noqa: E731
        int(t) for t in generate(model, prompt, 8, temperature=0.8, top_p=0.9,
                                 generator=torch.Generator().manual_seed(3))
    ]  # fmt: skip
    first = draw()
    assert first == draw()
    assert len(list(generate(model, prompt, 20, stop=int(next(iter(generate(model, prompt, 1))))))) == 1
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generate(model, torch.zeros(1, 0, dtype=torch.long), 1))


def test_nucleus_sampling_draws_only_from_the_nucleus():
    from coterie.models.generate import pick

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {int(pick(logits, 1.0, 0.7, None)) for _ in range(200)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_padding_changes_nothing_for_real_tokens(kind, ids):
    model, mask = make(kind), torch.ones(2, 19, dtype=torch.bool)
    mask[1, 11:] = False
    padded, routings = model(ids, mask=mask)
    torch.testing.assert_close(padded[1, :11], model(ids[1:, :11])[0][0], atol=1e-5, rtol=1e-4)
    assert all(int(r.load.sum()) == 2 * 30 for r in routings)
    assert bool(padded.isfinite().all())


def test_later_tokens_do_not_influence_earlier_ones(ids):
    model = make()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    torch.testing.assert_close(model(changed)[0][:, :10], model(ids)[0][:, :10])


def test_parameters_are_counted_once_and_active_ones_by_what_was_routed_to(ids):
    moe, dense = make(), make("dense")
    bank = 3 * 32 * 24
    assert moe.num_parameters() - active_parameters(moe, moe(ids)[1]) == 3 * 4 * bank
    assert dense.num_parameters() == active_parameters(dense, [])
    with pytest.raises(ValueError, match="0 routings for 3 MoE layers"):
        active_parameters(moe, [])
    tied, untied = make("dense"), make("dense, untied")
    assert untied.num_parameters() - tied.num_parameters() == 61 * 32
    # the output matrix multiplies whether it is tied or not; the embedding is looked up
    assert forward_flops(untied, [], 19) == forward_flops(tied, [], 19)


def test_any_feed_forward_part_can_be_put_in_but_only_what_qwen_knows_is_written(ids, tmp_path):
    def ffn(layer):
        return MoE(Router(CosineScore(32, 6), TopK(2)), SwiGLUExperts(6, 32, 24))

    model = Decoder(DecoderConfig(**SIZES, **EXPERTS), ffn)
    assert len(model(ids)[1]) == 3
    with pytest.raises(ValueError, match="layer 0 cannot be written as Qwen3-MoE"):
        save_pretrained(model, tmp_path / "model")
    biased = Decoder(
        DecoderConfig(**SIZES, **EXPERTS),
        lambda layer: MoE(Router(LinearScore(32, 6), TopK(2, bias=torch.zeros(6))), SwiGLUExperts(6, 32, 24)),
    )
    with pytest.raises(ValueError, match="cannot be written"):
        to_transformers(biased)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_cannot_be_read_or_written_say_why(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint \(no config.json\)"):
        load_pretrained(tmp_path / "nothing")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        save_pretrained(make(), tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ValueError, match="architecture 'gpt2'; a Decoder reads 'qwen3' and 'qwen3_moe'"):
        load_pretrained(tmp_path / "gpt2")


def test_a_failed_save_leaves_nothing_behind_and_a_good_one_replaces_the_old(tmp_path, monkeypatch, ids):
    old, new = make(), make()
    save_pretrained(old, tmp_path / "model")

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_pretrained(new, tmp_path / "model", tokenizer=Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_pretrained(tmp_path / "model")(ids)[0], old(ids)[0])
    torch.nn.init.normal_(new.lm_head.weight)
    save_pretrained(new, tmp_path / "model")
    assert torch.equal(load_pretrained(tmp_path / "model")(ids)[0], new(ids)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"num_experts": 4, "top_k": 5, "expert_hidden": 8}, "top_k=5 but num_experts=4"),
        ({"num_experts": 4, "expert_hidden": 0}, "expert_hidden=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**(SIZES | change))


def test_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"ids have shape \(5,\); should be \[B, S\]"):
        make()(torch.zeros(5, dtype=torch.long))
