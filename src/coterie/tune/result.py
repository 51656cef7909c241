"""What became of a checkpoint that was made to forget."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coterie.tune.history import Step
from coterie.tune.measure import Prediction


@dataclass(frozen=True)
class Known:
    """How a model predicts the held-out ends of two texts.

    Args:
        forget: the text to forget.
        retain: the text to keep.
        disk: bytes of the safetensors files.
        speed: tokens per second of forward passes, the two models by turns; None in a dry run.
    """

    forget: Prediction
    retain: Prediction
    disk: int
    speed: float | None = None


@dataclass(frozen=True)
class TargetExpert:
    """An expert that knows the text to forget.

    Args:
        block: name of its block.
        expert: its id.
        affinity: mean gate mass that the text to forget gives it, 0 to 1 in most families.
    """

    block: str
    expert: int
    affinity: float


@dataclass
class Unlearned:
    """What became of a checkpoint.

    Args:
        source: its folder.
        out: the new folder; None in a dry run.
        method: one of METHODS.
        scope: one of SCOPES.
        targets: the experts with the most affinity.
        margin: by which share of its affinity the last of them is before the next expert.
        texts: the files to forget and to keep.
        tokens: that were read of each, without the held-out ones.
        heldout_tokens: of each.
        before: the checkpoint.
        after: the new one; None in a dry run.
        trained: numbers that were trained; None in a dry run, like all that follow.
        trained_share: of all parameters.
        overlap: share of the experts of held-out tokens to forget that are still chosen.
        stop_forget: the accuracy on text to forget that ended it; None if only the steps did.
        reached: whether it was reached.
        history: losses by step, and the accuracies on both texts where they were measured.
    """

    source: str
    out: str | None
    method: str
    scope: str
    targets: list[TargetExpert]
    margin: float
    texts: tuple[str, str]
    tokens: tuple[int, int]
    heldout_tokens: tuple[int, int]
    before: Known
    after: Known | None = None
    trained: int | None = None
    trained_share: float | None = None
    overlap: float | None = None
    stop_forget: float | None = None
    reached: bool | None = None
    history: Sequence[Step] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, as JSON holds them."""
        steps = [{k: v for k, v in asdict(step).items() if v == v} for step in self.history]  # no NaN
        return {**asdict(self), "history": steps}
