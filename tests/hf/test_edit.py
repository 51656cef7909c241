"""Edits of a block's tensors, compared with plain loops; and what is refused, with its message."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from coterie.hf import BankLayout, block_layout, edit, find_moe_blocks, pack, unpack
from coterie.hf.layout import read_field

BANKS = [
    BankLayout(gated, biased, transposed, interleaved)
    for gated in (True, False)
    for biased in (True, False)
    for transposed in (True, False)
    for interleaved in ((True, False) if gated else (False,))
]
D, F, V = 5, 3, 11


def make_block(bank=BANKS[0], experts=6, top_k=2, tail=0, hashed=False, **groups):
    """A layout and stored tensors of a block that exists nowhere else."""
    w_in = "gate_up_proj" if bank.gated else "up_proj"
    inner = 2 * F if bank.gated else F
    shapes = {f"m.experts.{w_in}": (experts, inner, D), "m.experts.down_proj": (experts, D, F)}
    if bank.transposed:
        shapes = {n: (e, b, a) for n, (e, a, b) in shapes.items()}
    if bank.biased:
        shapes |= {f"m.experts.{w_in}_bias": (experts, inner), "m.experts.down_proj_bias": (experts, D)}
    shapes |= {
        "m.gate.weight": (experts + tail, D),
        "m.gate.moe_statics.e_score_correction_bias": (1, experts),
    }
    if hashed:
        shapes["m.gate.tid2eid"] = (V, top_k)
    layout = block_layout("m", "experts", shapes, bank, top_k=top_k, **groups)
    generator = torch.Generator().manual_seed(0)
    names = {**layout.experts, **layout.router}
    stored = {role: torch.randn(shapes[name], generator=generator) for role, name in names.items()}
    if hashed:
        stored["hash_table"] = torch.arange(V * top_k).view(V, top_k) % experts
    return layout, stored


@pytest.mark.parametrize("bank", BANKS, ids=str)
def test_every_storage_is_undone_by_pack(bank):
    _, stored = make_block(bank)
    packed = pack(unpack(stored, bank), bank)
    assert set(packed) == set(stored) & {"in", "down", "in_bias", "down_bias"}
    for role, tensor in packed.items():
        assert torch.equal(tensor, stored[role])


@pytest.mark.parametrize("bank", BANKS, ids=str)
def test_unpacked_experts_compute_what_the_experts_interface_computes(bank):
    from transformers.integrations import moe

    _, stored = make_block(bank)
    w_in = "gate_up_proj" if bank.gated else "up_proj"
    act = torch.nn.functional.silu
    order = (0, 1) if not bank.interleaved else (slice(0, None, 2), slice(1, None, 2))

    class Bank(torch.nn.Module):
        has_gate, has_bias, is_transposed = bank.gated, bank.biased, bank.transposed
        is_concatenated, has_post_expert_norm, _is_expert_parallel = not bank.interleaved, False, False
        num_experts, act_fn = 6, staticmethod(act)

        def _apply_gate(self, h):
            gate, up = (h[..., order[0]], h[..., order[1]]) if bank.interleaved else h.chunk(2, -1)
            return act(gate) * up

    module = Bank()
    for role, name in (("in", w_in), ("down", "down_proj"), ("in_bias", f"{w_in}_bias")):
        setattr(module, name, stored.get(role))
    module.down_proj_bias = stored.get("down_bias")
    x_TD = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
    chosen_TK = torch.arange(6)[:, None]
    wanted_TD = moe.batched_mm_experts_forward(module, x_TD, chosen_TK, torch.ones(6, 1))

    e = unpack(stored, bank)
    for i, x_D in enumerate(x_TD):
        up_F = e.up[i] @ x_D + (e.up_bias[i] if bank.biased else 0)
        if bank.gated:
            hidden_F = act(e.gate[i] @ x_D + (e.gate_bias[i] if bank.biased else 0)) * up_F
        else:
            hidden_F = act(up_F)
        y_D = e.down[i] @ hidden_F + (e.down_bias[i] if bank.biased else 0)
        torch.testing.assert_close(y_D, wanted_TD[i])


@given(st.permutations(range(6)), st.integers(2, 6), st.integers(0, 2))
def test_take_moves_every_entry_of_an_expert_and_leaves_the_tail_last(order, kept, tail):
    layout, stored = make_block(tail=tail)
    edited = edit.take(layout, stored, order[:kept])
    for role, tensor in edited.items():
        old = stored[role].flatten(0, 1) if role == "selection_bias" else stored[role]
        new = tensor.flatten(0, 1) if role == "selection_bias" else tensor
        for i in range(kept):
            assert torch.equal(new[i], old[order[i]]), role
        assert torch.equal(new[kept:], old[6:])


@given(st.permutations(range(6)))
def test_take_is_undone_by_the_inverse_permutation(order):
    layout, stored = make_block(tail=1, hashed=True)
    inverse = sorted(range(6), key=lambda i: order[i])
    back = edit.take(layout, edit.take(layout, stored, order), inverse)
    assert all(torch.equal(back[role], stored[role]) for role in stored)


def test_merge_is_the_weighted_mean_of_a_plain_loop():
    layout, stored = make_block(tail=1)
    groups, weights = [[0, 3], [1], [5, 2, 4]], [[1, 3], [2], [0.5, 0.25, 0.25]]
    edited = edit.merge(layout, stored, groups, weights)
    for role in ("in", "down", "in_bias", "down_bias", "rows"):
        for new, (members, shares) in enumerate(zip(groups, weights, strict=True)):
            mean = sum(w * stored[role][i].double() for i, w in zip(members, shares, strict=True)) / sum(
                shares
            )
            torch.testing.assert_close(edited[role][new].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        edited["selection_bias"][0, 0], stored["selection_bias"][0, [0, 3]] @ torch.tensor([0.25, 0.75])
    )
    assert torch.equal(edited["rows"][3:], stored["rows"][6:])


def test_merge_sends_hashed_tokens_to_the_merged_expert():
    layout, stored = make_block(hashed=True)
    edited = edit.merge(layout, stored, [[0, 1, 2], [3, 4, 5]], [[1, 1, 1]] * 2)
    assert torch.equal(edited["hash_table"], stored["hash_table"] // 3)


def test_appended_experts_come_before_the_tail_and_replaced_ones_in_their_places():
    layout, stored = make_block(tail=1)
    new = {role: t[..., :1] if role == "selection_bias" else t[:1] for role, t in stored.items()}
    longer = edit.append(layout, stored, {role: t + 1 for role, t in new.items()})
    assert torch.equal(longer["rows"][6], stored["rows"][0] + 1)
    assert torch.equal(longer["rows"][7], stored["rows"][6])
    assert float(longer["selection_bias"][0, 6]) == float(stored["selection_bias"][0, 0] + 1)
    assert longer["in"].shape[0] == longer["down"].shape[0] == 7

    edited = edit.replace(layout, stored, [4], {"down": stored["down"][:1]})
    assert torch.equal(edited["down"][4], stored["down"][0])
    assert torch.equal(edited["down"][[0, 1, 2, 3, 5]], stored["down"][[0, 1, 2, 3, 5]])
    assert edited["in"] is stored["in"]


GROUPED = {"experts": 8, "groups": 2, "top_groups": 1, "group_min": 2}


@pytest.mark.parametrize(
    ("block", "ids", "message"),
    [
        ({}, [0], "top_k=2 experts, so 1 are too few"),
        ({}, [0, 6], "has experts 0 … 5, not 6"),
        ({}, [0, 0, 1], "named twice"),
        (GROUPED, [0, 1, 4], "3 experts cannot be divided evenly"),
        (GROUPED, [0, 1, 2, 4], "mix groups [0, 1]"),
        (GROUPED, [0, 4], "1 experts in a group are too few"),
        ({"hashed": True}, [0, 1, 2, 3, 4], "3 tokens of its vocabulary"),
    ],
)
def test_take_refuses(block, ids, message):
    layout, stored = make_block(**block)
    with pytest.raises(ValueError, match=re.escape(message)):
        edit.take(layout, stored, ids)


def test_merge_and_append_refuse_what_they_cannot_do():
    layout, stored = make_block()
    with pytest.raises(ValueError, match="one weight for each member"):
        edit.merge(layout, stored, [[0, 1], [2]], [[1], [1]])
    with pytest.raises(ValueError, match="add up to 0"):
        edit.merge(layout, stored, [[0, 1], [2]], [[1, -1], [1]])
    with pytest.raises(ValueError, match="at least one old expert"):
        edit.merge(layout, stored, [[0], []], [[1], []])
    grouped = make_block(**GROUPED)
    with pytest.raises(ValueError, match="lift the limit first"):
        edit.append(*grouped, grouped[1])
    with pytest.raises(ValueError, match=r"without gate"):
        pack(unpack(stored, BANKS[0]), BankLayout(gated=False, biased=True))


def test_unknown_names_are_refused():
    shapes = {
        "m.experts.gate_up_proj": (4, 6, 5),
        "m.experts.down_proj": (4, 5, 3),
        "m.chooser.weight": (4, 5),
    }
    with pytest.raises(ValueError, match="no router found beside the experts"):
        block_layout("m", "experts", shapes, BankLayout(), top_k=2)
    shapes |= {"m.gate.weight": (4, 5), "m.experts.down_proj_scale_inv": (4, 1, 1)}
    with pytest.raises(ValueError, match="down_proj_scale_inv also has an entry per expert"):
        block_layout("m", "experts", shapes, BankLayout(), top_k=2)
    with pytest.raises(ValueError, match="holds top_k under none of"):
        read_field({"experts_each": 2}, "top_k")


def test_a_dense_model_is_refused():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE block"):
        find_moe_blocks(LlamaForCausalLM(config))


@pytest.fixture
def deepseek():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config).eval()


IDS = torch.arange(12).view(2, 6)


def test_a_hybrid_stack_shows_its_sparse_layers_and_their_shared_experts(deepseek):
    blocks = find_moe_blocks(deepseek)
    assert [block.name for block in blocks] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert blocks[0].shared is deepseek.model.layers[1].mlp.shared_experts
    assert (blocks[0].layout.groups, blocks[0].layout.top_groups) == (4, 2)


def test_lifting_the_group_limit_frees_the_edits_and_reaches_the_configuration(deepseek):
    for block in find_moe_blocks(deepseek):
        with pytest.raises(ValueError, match="set_groups"):
            block.keep([0, 1, 2])
        block.set_groups(1, 1)
        block.keep([0, 1, 2])
        block.set_top_k(1)
    config = deepseek.config
    assert (config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok) == (
        3,
        1,
        1,
        1,
    )
    assert torch.isfinite(deepseek(IDS).logits).all()
    with pytest.raises(ValueError, match="top_k=4 but"):
        block.set_top_k(4)


def test_an_appended_copy_that_is_never_chosen_changes_nothing(deepseek):
    for block in find_moe_blocks(deepseek):
        block.set_groups(1, 1)
    before = deepseek(IDS).logits
    for block in find_moe_blocks(deepseek):
        entry = block.router[[3]]
        entry.selection_bias -= 100
        block.append(block.experts[[3]], entry)
        assert block.num_experts == 9
    torch.testing.assert_close(deepseek(IDS).logits, before)
    for block in find_moe_blocks(deepseek):
        block.replace([8], router=block.router[[0]])
        block.replace([0], experts=block.experts[[8]])
        assert torch.equal(block.experts.up[0], block.experts.up[3])
    assert not torch.allclose(deepseek(IDS).logits, before)


def test_merging_each_expert_with_itself_changes_nothing(deepseek):
    before = deepseek(IDS).logits
    for block in find_moe_blocks(deepseek):
        block.merge([[i] for i in range(8)])
    torch.testing.assert_close(deepseek(IDS).logits, before)


def test_the_view_is_refused_wrong_parts(deepseek):
    block = find_moe_blocks(deepseek)[0]
    entry = block.router[[0]]
    entry.selection_bias = None
    with pytest.raises(ValueError, match=r"router entries must be \['rows', 'selection_bias'\]"):
        block.replace([0], router=entry)
    with pytest.raises(ValueError, match="order must hold each of"):
        block.permute([0, 1])


def test_new_experts_and_router_entries_must_be_as_many(deepseek):
    block = find_moe_blocks(deepseek)[0]
    with pytest.raises(ValueError, match="in: expected entries of 2 experts, got 1"):
        block.replace([0, 1], experts=block.experts[[0]])
    block.set_groups(1, 1)
    with pytest.raises(ValueError, match="rows: expected entries of 1 experts, got 2"):
        block.append(block.experts[[0]], block.router[[0, 1]])


def test_blocks_that_share_only_a_part_are_refused(deepseek):
    first, second = (layer.mlp.experts for layer in deepseek.model.layers[1:])
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    with pytest.raises(ValueError, match="share their experts but not their rows"):
        find_moe_blocks(deepseek)


def test_on_the_meta_device_a_block_tells_names_and_numbers_without_memory(deepseek):
    with torch.device("meta"):
        skeleton = DeepseekV3ForCausalLM(deepseek.config)
    layouts = [block.layout for block in find_moe_blocks(skeleton)]
    assert layouts == [block.layout for block in find_moe_blocks(deepseek)]
    assert layouts[0].experts["in"] == "model.layers.1.mlp.experts.gate_up_proj"
    assert skeleton.model.layers[1].mlp.experts.down_proj.device.type == "meta"
