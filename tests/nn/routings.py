"""Hypothesis strategies for routings, shared by the tests of the core."""

import torch
from hypothesis import strategies as st

from coterie.nn import Routing


@st.composite
def routings(draw, max_tokens=12, max_experts=6, masked=False):
    """A valid Routing with any pattern of unused slots, signed weights, and a mask if asked."""
    num_experts = draw(st.integers(1, max_experts))
    tokens, slots = draw(st.integers(0, max_tokens)), draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :slots]
    used = torch.rand(tokens, slots, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    if mask is not None:
        used = used & mask.unsqueeze(1)
    return Routing(
        experts=experts.masked_fill(~used, -1),
        weights=torch.randn(tokens, slots, generator=generator, dtype=torch.float64).masked_fill(~used, 0),
        scores=logits.softmax(-1),
        logits=logits,
        num_experts=num_experts,
        mask=mask,
    )
