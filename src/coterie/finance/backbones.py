"""Encoders of one instrument's window: [N, L, F] of N instruments to [N, width]."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvEncoder(nn.Module):
    """Causal convolutions along time with ReLU; the last day's channels come out.

    Args:
        num_features: F.
        width: channels of every layer.
        layers: how many, each with a kernel of 3 days: the last day's channels know 2 · layers + 1 days.
    """

    def __init__(self, num_features: int, width: int, layers: int = 2) -> None:
        super().__init__()
        widths = [num_features, *[width] * layers]
        self.layers = nn.ModuleList(nn.Conv1d(a, b, kernel_size=3) for a, b in pairwise(widths))

    def forward(self, x_NLF: Tensor) -> Tensor:
        h_NCL = x_NLF.transpose(1, 2)
        for layer in self.layers:
            h_NCL = layer(F.pad(h_NCL, (2, 0))).relu()  # days before the window, none after it
        return h_NCL[..., -1]


class RecurrentEncoder(nn.Module):
    """A GRU or LSTM over the window; its last hidden state.

    Args:
        num_features: F.
        width: of the hidden state.
        cell: `nn.GRU` or `nn.LSTM`.
    """

    def __init__(self, num_features: int, width: int, cell: type[nn.GRU] | type[nn.LSTM] = nn.GRU) -> None:
        super().__init__()
        self.rnn = cell(num_features, width, batch_first=True)

    def forward(self, x_NLF: Tensor) -> Tensor:
        states_NLC: Tensor = self.rnn(x_NLF)[0]
        return states_NLC[:, -1]


class AttentionEncoder(nn.Module):
    """The last day attends to all days of the window, positions learned; then one feed-forward layer.

    Args:
        num_features: F.
        width: of queries, keys and values.
        window: L.
    """

    def __init__(self, num_features: int, width: int, window: int) -> None:
        super().__init__()
        self.embed = nn.Linear(num_features, width)
        self.position = nn.Parameter(0.02 * torch.randn(window, width))
        self.key_value = nn.Linear(width, 2 * width)
        self.query = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x_NLF: Tensor) -> Tensor:
        h_NLC = self.embed(x_NLF) + self.position
        key_NLC, value_NLC = self.key_value(h_NLC).chunk(2, dim=-1)
        query_N1C = self.query(h_NLC[:, -1:])
        weights_N1L = (query_N1C @ key_NLC.transpose(1, 2) * query_N1C.shape[-1] ** -0.5).softmax(-1)
        z_NC: Tensor = (h_NLC[:, -1] + self.outer(weights_N1L @ value_NLC).squeeze(1)).relu()
        return z_NC


BACKBONES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "conv": lambda num_features, width, window: ConvEncoder(num_features, width),
    "gru": lambda num_features, width, window: RecurrentEncoder(num_features, width),
    "attention": AttentionEncoder,
}
"""(features, width, window) → encoder."""
