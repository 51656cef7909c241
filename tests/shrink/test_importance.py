import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.hf import BlockRecord
from coterie.shrink import IMPORTANCE, importance, kept_experts, mixed


def record(seed, tokens=40, slots=3, experts=7):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :slots]
    chosen[torch.rand(tokens, slots, generator=generator) < 0.2] = -1
    draw = [torch.rand(tokens, slots, generator=generator) for _ in range(2)]
    return BlockRecord("mlp", experts, chosen, *draw, torch.rand(tokens, generator=generator))


@given(st.integers(0, 1000))
def test_every_score_is_its_formula_summed_slot_by_slot(seed):
    r = record(seed)
    sums = {name: [0.0] * 7 for name in IMPORTANCE}
    filled = [0] * 7
    for t in range(40):
        for k in range(3):
            e = int(r.experts[t, k])
            if e < 0:
                continue
            w, n, s = float(r.weights[t, k]), float(r.norms[t, k]), float(r.moved[t])
            filled[e] += 1
            for name, value in {
                "frequency": 1,
                "gating": w,
                "gating-norm": w * n,
                "gating-token": w * s,
                "reap": w * n,
                "easy-ep": w * n * s,
            }.items():
                sums[name][e] += value
    sums["reap"] = [v / max(f, 1) for v, f in zip(sums["reap"], filled, strict=True)]
    for name in IMPORTANCE:
        torch.testing.assert_close(
            importance([r], name)[0], torch.tensor(sums[name], dtype=torch.float64), atol=1e-5, rtol=1e-5
        )


@given(st.integers(0, 1000), st.integers(1, 3))
def test_kept_experts_are_the_best_of_each_group(seed, per_group):
    score = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    kept = kept_experts(score, 3 * per_group, groups=3)
    assert kept == sorted(set(kept))
    for group in range(3):
        inside = [e for e in kept if e // 4 == group]
        left_out = [e for e in range(4 * group, 4 * group + 4) if e not in inside]
        assert len(inside) == per_group
        assert min(score[inside]) >= max(score[left_out])


def test_a_text_that_used_nothing_counts_as_nothing_in_a_mixture():
    assert mixed([[torch.zeros(2)], [torch.tensor([1.0, 3.0])]])[0].tolist() == [0.125, 0.375]


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no method 'magic'; use one of frequency"):
        importance([record(0)], "magic")
    with pytest.raises(ValueError, match="nothing was recorded for mlp"):
        importance([BlockRecord("mlp", 4)], "gating")
    still = record(0)
    still.moved = torch.empty(0)
    assert importance([still], "reap")[0].sum() > 0
    with pytest.raises(ValueError, match="use a score without it, such as gating-norm"):
        importance([still], "easy-ep")
    with pytest.raises(ValueError, match="use 1 ≤ keep ≤ 4"):
        kept_experts(torch.zeros(4), 5)
    with pytest.raises(ValueError, match="cannot be shared out among 2 routing groups"):
        kept_experts(torch.zeros(4), 3, groups=2)
