"""What a model is unlearned on: token ids, and which of them count."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of S tokens.

    Args:
        ids_BS: token ids [B, S].
        present_BS: bool, False for padding; None if there is none.
        scored_BS: bool, the tokens whose prediction from those before them counts in losses and accuracies;
            None for all. Padding and the first token of a sequence never count.
        anchored_BS: bool, the tokens that the router anchor pulls to the target; None for all.

    Raises ValueError if the shapes differ, or no token can be predicted.

    >>> batch = Batch(torch.tensor([[5, 6, 7]]), present_BS=torch.tensor([[True, True, False]]))
    >>> batch.targets().tolist()
    [[6, -100]]
    """

    ids_BS: Tensor
    present_BS: Tensor | None = None
    scored_BS: Tensor | None = None
    anchored_BS: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.ids_BS.shape
        for name, mask in self._masks().items():
            if mask.shape != shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; should be bool of {tuple(shape)}"
                )
        if self.ids_BS.dim() != 2 or not bool((self.targets() != -100).any()):
            raise ValueError(f"ids of shape {tuple(shape)} hold no token to predict; give [B, S], S ≥ 2")

    def targets(self) -> Tensor:
        """[B, S - 1]: the token that follows, or -100 where its prediction does not count."""
        counts_BS = torch.ones_like(self.ids_BS, dtype=torch.bool)
        for mask in (self.present_BS, self.scored_BS):
            counts_BS = counts_BS if mask is None else counts_BS & mask
        return self.ids_BS.masked_fill(~counts_BS, -100)[:, 1:]

    def inputs(self) -> dict[str, Tensor]:
        """What a transformers model takes."""
        if self.present_BS is None:
            return {"input_ids": self.ids_BS}
        return {"input_ids": self.ids_BS, "attention_mask": self.present_BS.long()}

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(
            self.ids_BS.to(device), **{name: mask.to(device) for name, mask in self._masks().items()}
        )

    def _masks(self) -> dict[str, Any]:
        names = ("present_BS", "scored_BS", "anchored_BS")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
