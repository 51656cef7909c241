"""What became of a checkpoint whose experts per token were masked."""

from dataclasses import asdict, dataclass
from typing import Any

from coterie.shrink.result import Measured


@dataclass
class Rule:
    """What the rule of MC, without training, does with as many experts per token.

    Args:
        kept: share of the experts per token, on held-out text.
        perplexity: on held-out text.
        protects: whether the 2% of tokens that get most attention keep all their experts, as MC has it; not
            where a layer has no attention that gives its weights.
    """

    kept: float
    perplexity: float
    protects: bool


@dataclass
class Masked:
    """What became of a checkpoint.

    Args:
        source: its folder.
        sparsity: λ.
        top_k: block name → K, of the blocks that have a mask.
        kept: block name → share of the K experts per token that run, on held-out text.
        before: the checkpoint.
        after: with masks.
        heldout_tokens: tested on.
        calibration_tokens: read.
        packed: whether the experts are.
        renormalize: whether its router's weights have the same sum for all tokens; then masked ones have it,
            too.
        rule: the predecessor.
        out: the new folder; None in a dry run.
    """

    source: str
    sparsity: float
    top_k: dict[str, int]
    kept: dict[str, float]
    before: Measured
    after: Measured
    heldout_tokens: int
    calibration_tokens: int = 0
    packed: bool = False
    renormalize: bool = True
    rule: Rule | None = None
    out: str | None = None

    def experts(self) -> tuple[float, float]:
        """Routed experts per token and layer, (before, after)."""
        after = [k * self.kept[name] for name, k in self.top_k.items()]
        return sum(self.top_k.values()) / len(after), sum(after) / len(after)

    def share(self) -> float:
        """Experts per token after / before."""
        before, after = self.experts()
        return after / before

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, as JSON holds them."""
        return {**asdict(self), "experts": list(self.experts()), "share": self.share()}
