"""Are the experts of a layer with several gates healthy? Streaming, a few sums per batch."""

import torch
from torch import Tensor


class ExpertHealth:
    """Sums outputs and gate weights of E experts under G gates, and says what is wrong with which.

    Three things go wrong in multi-task mixtures: *collapse*, experts of different scales or mostly zero;
    *degradation*, an expert meant for all gates that one gate has to itself; *underfitting*, a gate that
    leaves its own experts unused.

    Source: Wang et al. 2025 (HoME), section 1.

    >>> health = ExpertHealth()
    >>> outputs = torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])  # one token, two experts
    >>> health.update(outputs, torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]))
    >>> health.zero_fraction.tolist(), health.gate_share[:, 1].tolist()
    ([1.0, 0.0], [0.1..., 0.8...])
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, outputs_TEH: Tensor, weights_TGE: Tensor) -> None:
        """Adds a batch.

        Args:
            outputs_TEH: outputs of every expert, [T, E, H].
            weights_TGE: combine weights of every gate, [T, G, E].

        Raises ValueError for shapes that do not fit each other or the batches before.
        """
        if outputs_TEH.shape[:2] != (weights_TGE.shape[0], weights_TGE.shape[2]):
            raise ValueError(
                f"outputs {tuple(outputs_TEH.shape)} and gate weights {tuple(weights_TGE.shape)} differ; "
                "should be [T, E, H] and [T, G, E]"
            )
        outputs = outputs_TEH.double()
        news = {
            "zeros_E": (outputs.abs() < 1e-6).double().mean(2).sum(0),
            "sum_EH": outputs.sum(0),
            "squares_EH": outputs.square().sum(0),
            "mass_GE": weights_TGE.double().sum(0),
        }
        if self._tokens:
            if news["mass_GE"].shape != self._sums["mass_GE"].shape:
                raise ValueError(
                    f"{tuple(news['mass_GE'].shape)} gates and experts; batches before had "
                    f"{tuple(self._sums['mass_GE'].shape)}"
                )
            news = {name: self._sums[name] + new for name, new in news.items()}
        self._sums, self._tokens = news, self._tokens + len(outputs)

    @property
    def zero_fraction(self) -> Tensor:
        """[E]: share of an expert's outputs below 1e-6 in size."""
        return self._sums["zeros_E"] / self._tokens

    @property
    def std(self) -> Tensor:
        """[E]: deviation of an expert's outputs over tokens, root mean square over its width."""
        mean_EH = self._sums["sum_EH"] / self._tokens
        return (self._sums["squares_EH"] / self._tokens - mean_EH.square()).clamp(min=0).mean(1).sqrt()

    @property
    def gate_weight(self) -> Tensor:
        """[G, E]: mean weight."""
        return self._sums["mass_GE"] / self._tokens

    @property
    def gate_share(self) -> Tensor:
        """[G, E]: whose weight an expert gets; a column sums to 1, or is 0 where no gate uses the expert."""
        mass_GE = self._sums["mass_GE"]
        return mass_GE / mass_GE.sum(0).clamp(min=torch.finfo(mass_GE.dtype).tiny)
