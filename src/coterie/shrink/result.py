"""What became of a checkpoint that was made smaller."""

from dataclasses import asdict, dataclass, field
from typing import Any

from coterie.shrink.measure import Sizes


@dataclass
class Measured:
    """A model's sizes and what it does with held-out text.

    Args:
        sizes: parameters, and bytes in memory.
        disk: bytes of its safetensors files.
        perplexity: on the held-out end of the calibration text; None in a dry run.
        speed: tokens per second of forward passes, the two models by turns; None in a dry run.
    """

    sizes: Sizes
    disk: int
    perplexity: float | None = None
    speed: float | None = None


@dataclass
class Shrunk:
    """What became of a checkpoint.

    Args:
        source: folder of the checkpoint.
        out: new folder; None in a dry run, in which `after` is computed, not measured.
        method: by which it was made smaller.
        domains: the calibration files.
        experts: block name → for each expert that is left, the old ids it is made of.
        num_experts: block name → E before.
        before: the checkpoint.
        after: the new one.
        calibration_tokens: of each domain.
        heldout_tokens: of all domains.
    """

    source: str
    out: str | None
    method: str
    domains: list[str]
    experts: dict[str, list[list[int]]]
    num_experts: dict[str, int]
    before: Measured
    after: Measured
    calibration_tokens: list[int] = field(default_factory=list)
    heldout_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, as JSON holds them."""
        return asdict(self)
