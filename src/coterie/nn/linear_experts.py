"""Linear experts: one matrix each."""

import torch
from torch import Tensor, nn

from coterie.nn.experts import check_routing
from coterie.nn.routing import Routing


class LinearExperts(nn.Module):
    """E linear maps: y = W x + b. With a sigmoid behind them they are logistic regressions.

    Computes every expert for every token, in one multiplication: meant for dense gates and small experts.

    Args:
        num_experts: E.
        dim: D, width of a token.
        dim_out: O, width of the result.
        bias: a bias per expert.

    Returns (from forward, for x [T, D]): [T, O]. `each(x)` gives every expert's own result, [T, E, O], for
    mixtures of something else than the outputs, such as their sigmoids.

    >>> bank = LinearExperts(num_experts=4, dim=8, dim_out=3)
    >>> bank(torch.randn(5, 8), Routing.dense(torch.rand(5, 4))).shape, bank.each(torch.randn(5, 8)).shape
    (torch.Size([5, 3]), torch.Size([5, 4, 3]))
    """

    def __init__(self, num_experts: int, dim: int, dim_out: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim
        self.weight = nn.Parameter(torch.randn(num_experts, dim_out, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_experts, dim_out)) if bias else None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        y_TEO = self.each(x_TD)
        return torch.einsum("te,teo->to", routing.weights_TE.to(y_TEO), y_TEO)

    def each(self, x_TD: Tensor) -> Tensor:
        """Every expert's result, [T, E, O]."""
        y_TEO = (x_TD @ self.weight.flatten(0, 1).t()).view(len(x_TD), *self.weight.shape[:2])
        return y_TEO if self.bias is None else y_TEO + self.bias
