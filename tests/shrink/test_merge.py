import itertools

import pytest
import torch
from tiny_models import grouped

from coterie.hf import BlockRecord, find_moe_blocks, recording
from coterie.shrink import m_smoe
from coterie.shrink.segments import align, reordered

IDS = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(0))


def record(model, ids=IDS):
    blocks = find_moe_blocks(model)
    with recording(blocks, keep_inputs=1000) as records, torch.no_grad():
        model(ids)
    return blocks, records


@torch.no_grad()
def outputs(block, x_TD):
    return block.module(x_TD[None])[0]


def test_experts_that_are_copies_with_shuffled_neurons_merge_without_loss(model):
    block = find_moe_blocks(model)[0]
    for twin in range(4, 8):
        block.replace([twin], reordered(block.experts[[twin - 4]], torch.randperm(24)))
    block.router.rows[4:] = 0.9 * block.router.rows[:4]
    used = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3], [4, 5], [6, 7]])
    r = BlockRecord(block.name, 8, used, torch.ones(6, 2), inputs=torch.randn(50, 32))
    before = block.experts[[0, 1, 2, 3]]
    assert m_smoe(block, r, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    torch.testing.assert_close(vars(block.experts), {**vars(before)})


def test_as_many_groups_as_experts_changes_nothing(model):
    blocks, records = record(model)
    before = outputs(blocks[0], records[0].inputs)
    assert m_smoe(blocks[0], records[0], 8) == [[i] for i in range(8)]
    torch.testing.assert_close(outputs(blocks[0], records[0].inputs), before)


def test_a_merged_expert_is_the_mean_weighted_by_use(model):
    blocks, records = record(model)
    block, r = blocks[0], records[0]
    used = torch.tensor([max(1, int((r.experts == e).sum())) for e in range(8)]).double()
    rows, experts = block.router.rows.double().clone(), block.experts[list(range(8))]
    groups = m_smoe(block, r, 2)
    assert sorted(itertools.chain(*groups)) == list(range(8))
    assert {g[0] for g in groups} == set(used.topk(2).indices.tolist())
    for position, members in enumerate(groups):
        share = (used[members] / used[members].sum()).unsqueeze(1)
        torch.testing.assert_close(block.router.rows[position].double(), (share * rows[members]).sum(0))
        ups = [experts.up[e][align(experts, members[0], e)].double() for e in members]
        wanted = sum(s * up for s, up in zip(share.flatten(), ups, strict=True))
        torch.testing.assert_close(block.experts.up[position].double(), wanted)


def test_experts_are_merged_inside_their_routing_group():
    model = grouped()
    [block], [r] = record(model, IDS % 64)
    members = m_smoe(block, r, 4)
    assert [{i // 4 for i in ids} for ids in members] == [{0}, {0}, {1}, {1}]
    assert sorted(itertools.chain(*members)) == list(range(8))
    with torch.no_grad():
        assert model(IDS % 64).logits.isfinite().all()


def test_what_cannot_be_merged_is_refused(model):
    block = find_moe_blocks(model)[0]
    experts = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no inputs were recorded"):
        m_smoe(block, BlockRecord(block.name, 8, experts=experts, weights=torch.ones(1, 2)), 4)
    with pytest.raises(ValueError, match="use 2 ≤ keep ≤ 8"):
        m_smoe(block, BlockRecord(block.name, 8), 1)
    wide = BlockRecord(block.name, 8, experts, torch.ones(1, 2), inputs=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="reads 32 numbers and the block 5"):
        m_smoe(block, wide, 4)
