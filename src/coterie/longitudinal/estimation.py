"""Maximum likelihood of a growth mixture, directly by L-BFGS or by EM; the information at the optimum."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from coterie.longitudinal.growth_mixture import GrowthMixture
from coterie.longitudinal.panel import Panel

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Optimum:
    """Where an optimiser stopped.

    Args:
        log_likelihood: summed over persons, nats.
        converged: whether no slope is left (L-BFGS), or a step gained next to nothing (EM).
        iterations: of L-BFGS or of EM.
    """

    log_likelihood: float
    converged: bool
    iterations: int


def maximize_directly(model: GrowthMixture, panel: Panel, *, iterations: int = 500) -> Optimum:
    """Maximises the mixture's log-likelihood in place by L-BFGS, from the model's parameters."""
    return _minimise(model, panel, lambda: -_log_likelihood(model, panel), iterations)


def maximize_by_em(model: GrowthMixture, panel: Panel, *, iterations: int = 500) -> Optimum:
    """Maximises the same in place by expectation maximisation, until a step gains less than 1e-6 nats."""
    reached = -np.inf
    for iteration in range(1, iterations + 1):
        with torch.no_grad():
            log_likelihood = float(_log_likelihood(model, panel))
            responsibilities_TK = model.posterior(panel).weights
        if log_likelihood - reached < 1e-6:
            return Optimum(log_likelihood, True, iteration)
        reached = log_likelihood
        m_step(model, panel, responsibilities_TK)
    return Optimum(reached, False, iterations)


def m_step(model: GrowthMixture, panel: Panel, responsibilities_TK: Tensor, *, iterations: int = 5) -> None:
    """Weighted multinomial logit for the gate and weighted maximum likelihood for each class, in place.

    The classes and the gate share no parameter, so that one L-BFGS over all of them does both. It starts
    where the last M-step ended and never loses, so that EM needs no more steps with 5 iterations each than
    with 30.
    """
    _minimise(model, panel, lambda: -(responsibilities_TK * model.log_joint(panel)).sum(), iterations)


def information(model: GrowthMixture, panel: Panel) -> _Array:
    """The observed information [V, V]: the Hessian of the negative log-likelihood at the parameters."""
    start_V = parameters_to_vector(model.parameters()).detach()

    def loss(flat_V: Tensor) -> Tensor:
        return evaluate_at(model, flat_V, lambda moved: -_log_likelihood(moved, panel))

    return torch.autograd.functional.hessian(loss, start_V).numpy()  # type: ignore[no-untyped-call, no-any-return]


def natural_covariance(
    model: GrowthMixture, information_VV: _Array, natural: Callable[[GrowthMixture], Tensor]
) -> _Array:
    """Covariance [N, N] of functions of the parameters by the delta method.

    Args:
        model: at its optimum.
        information_VV: of `information`.
        natural: the model → N numbers.

    Returns NaN in the rows and columns of what the data leave undetermined, such as a correlation of a
    variance that is estimated as zero: where a function moves along a direction without curvature.
    """
    start_V = parameters_to_vector(model.parameters()).detach()
    jacobian_NV = jacrev(lambda flat_V: evaluate_at(model, flat_V, natural))(start_V).numpy()
    curvatures_V, directions_VV = np.linalg.eigh(information_VV)
    determined_V = curvatures_V > 1e-8 * curvatures_V.max()
    moves_NV = jacobian_NV @ directions_VV
    covariance_NN = (moves_NV[:, determined_V] / curvatures_V[determined_V]) @ moves_NV[:, determined_V].T
    sizes_N = np.abs(moves_NV).max(1, initial=0)
    lost_N = (np.abs(moves_NV[:, ~determined_V]) > 1e-4 * sizes_N[:, None]).any(1)
    covariance_NN[lost_N] = covariance_NN[:, lost_N] = np.nan
    return covariance_NN  # type: ignore[no-any-return]


def evaluate_at(model: GrowthMixture, flat_V: Tensor, quantity: Callable[[GrowthMixture], Tensor]) -> Tensor:
    """A quantity of the model as if its parameters were `flat_V` [V]; differentiable in that."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = torch.split(flat_V, [shape.numel() for shape in shapes.values()])
    moved = {
        f"model.{name}": part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    value: Tensor = functional_call(_Quantity(model, quantity), moved, ())
    return value


class _Quantity(torch.nn.Module):
    """functional_call moves parameters while a forward runs; this makes a quantity one."""

    def __init__(self, model: GrowthMixture, quantity: Callable[[GrowthMixture], Tensor]) -> None:
        super().__init__()
        self.model, self.quantity = model, quantity

    def forward(self) -> Tensor:
        return self.quantity(self.model)


def _log_likelihood(model: GrowthMixture, panel: Panel) -> Tensor:
    return model.log_likelihood(panel).sum()


def _minimise(model: GrowthMixture, panel: Panel, loss: Callable[[], Tensor], iterations: int) -> Optimum:
    from scipy.optimize import minimize  # takes as long to import as torch

    parameters = list(model.parameters())

    def value_and_slope(flat_V: _Array) -> tuple[float, _Array]:
        vector_to_parameters(torch.from_numpy(flat_V), parameters)
        value = loss() / len(panel)  # per person: tolerances mean the same for every sample size
        slopes = torch.autograd.grad(value, parameters)
        return float(value.detach()), torch.cat([slope.flatten() for slope in slopes]).numpy()

    start_V = parameters_to_vector(parameters).detach().numpy()
    found = minimize(
        value_and_slope,
        start_V,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxcor": 30, "ftol": 1e-12, "gtol": 1e-6, "maxfun": 4 * iterations},
    )
    vector_to_parameters(torch.from_numpy(found.x), parameters)
    steepest = float(np.abs(found.jac).max(initial=0))  # the line search may give up at the last digits
    return Optimum(-float(found.fun) * len(panel), steepest < 1e-4, int(found.nit))
