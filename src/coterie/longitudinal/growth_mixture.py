"""The mixture: a dense router over covariates, growth curves as experts. Letters: see `panel`."""

import math

import torch
from torch import Tensor, nn

from coterie.longitudinal.curves import Curve
from coterie.longitudinal.panel import Panel
from coterie.nn import Dense, LinearScore, ReferenceExpert, Router, Routing


class GrowthMixture(nn.Module):
    """K growth curve models behind a gate; every parameter is free on the whole line, in float64.

    Of class k, with Λ the curve's loadings at a person's times:
    y ~ N(Λ B x, Λ Ψ Λ' + θ I), where B [P, C] takes the experts' covariates x to the mean growth factors, Ψ
    is what is left of their covariance, and θ the residual variance.

    Args:
        curve: the functional form.
        num_classes: K.
        gate_units: [D, D] `Covariates.units` of the gate's design.
        expert_units: [C, C] those of the experts' design.
        scale: [P] sizes of the growth factors; parameters are kept in these, so that all are of order 1.
        times: first and last time, between which the bend is looked for.
        num_tvc: M, time-varying covariates.
        least_variance: floor of θ, which keeps a class from collapsing onto a few persons.
        joint: model the experts' covariates too, N(μ, Φ) in each class.

    Source: Liu & Perera 2022, equations 1 to 12.
    """

    gate_units: Tensor
    expert_units: Tensor
    scale_P: Tensor
    bounds: Tensor
    least_variance: Tensor

    def __init__(
        self,
        curve: Curve,
        num_classes: int,
        *,
        gate_units: Tensor,
        expert_units: Tensor,
        scale: Tensor,
        times: tuple[float, float],
        num_tvc: int,
        least_variance: float,
        joint: bool,
    ) -> None:
        super().__init__()
        self.curve, self.num_classes, self.joint = curve, num_classes, joint
        factors, width = len(curve.factors), len(expert_units)
        for name, value in (
            ("gate_units", gate_units),
            ("expert_units", expert_units),
            ("scale_P", scale),
            ("bounds", torch.tensor(curve.bounds(*times), dtype=torch.float64)),
            ("least_variance", torch.tensor(least_variance, dtype=torch.float64)),
        ):
            self.register_buffer(name, value)
        with torch.random.fork_rng(devices=[]):  # a scorer draws weights; here they start at zero
            score = LinearScore(len(gate_units), num_classes - 1).double()
        nn.init.zeros_(score.weight)
        self.router = Router(ReferenceExpert(score), Dense())

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_classes, *shape, dtype=torch.float64))

        self.coefficients = zeros(factors, width)
        self.factor_root = zeros(factors * (factors + 1) // 2)
        self.log_variance = zeros()
        self.bend = zeros() if curve.bend else None
        self.tvc = zeros(num_tvc) if num_tvc else None
        self.covariate_mean = zeros(width - 1) if joint else None
        self.covariate_root = zeros((width - 1) * width // 2) if joint else None

    def bend_K(self) -> Tensor:
        """[K] knot, rate or decay; zeros for a curve that has none."""
        if self.bend is None:
            return torch.zeros_like(self.log_variance)
        return self.bounds[0] + (self.bounds[1] - self.bounds[0]) * self.bend.sigmoid()

    def mean_KPC(self) -> Tensor:
        """[K, P, C] B on the standardised design."""
        return self.coefficients * self.scale_P[:, None]

    def root_KPP(self) -> Tensor:
        """[K, P, P] Cholesky factor of Ψ."""
        return self.scale_P[:, None] * cholesky_factor(self.factor_root, len(self.scale_P))

    def variance_K(self) -> Tensor:
        """[K] θ."""
        return self.least_variance + self.log_variance.exp()

    def residuals(self, panel: Panel) -> tuple[Tensor, Tensor, Tensor]:
        """(loadings [T, K, J, P], mean factors [T, K, P], y - mean [T, K, J]); 0 where y is missing."""
        loadings_TKJP = self.curve.loadings(panel.t, self.bend_K()) * panel.seen[:, None, :, None]
        mean_TKP = torch.einsum("tc,kpc->tkp", panel.experts, self.mean_KPC())
        expected_TKJ = torch.einsum("tkjp,tkp->tkj", loadings_TKJP, mean_TKP)
        if self.tvc is not None:
            expected_TKJ = expected_TKJ + torch.einsum("tjm,km->tkj", panel.tvc, self.tvc)
        return loadings_TKJP, mean_TKP, panel.y[:, None] - expected_TKJ

    def log_density(self, panel: Panel) -> Tensor:
        """[T, K] log density of a person's scores in each class (with `joint`: and of its covariates)."""
        loadings_TKJP, _, rest_TKJ = self.residuals(panel)
        white_TKPP, inner_TKP = self._in_factor_space(loadings_TKJP, rest_TKJ)
        variance_K = self.variance_K()
        log_determinant_TK = 2 * white_TKPP.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        explained_TK = inner_TKP.square().sum(-1)
        square_TK = rest_TKJ.square().sum(-1) / variance_K - explained_TK
        occasions_T1 = panel.seen.sum(1, keepdim=True)
        log_scale_TK = occasions_T1 * (math.log(2 * math.pi) + variance_K.log())
        density_TK = -0.5 * (log_scale_TK + log_determinant_TK + square_TK)
        return density_TK + self._covariate_density(panel) if self.joint else density_TK

    def factors(self, panel: Panel) -> Tensor:
        """[T, K, P] expected growth factors given a person's scores, in each class (empirical Bayes)."""
        loadings_TKJP, mean_TKP, rest_TKJ = self.residuals(panel)
        white_TKPP, inner_TKP = self._in_factor_space(loadings_TKJP, rest_TKJ)
        z_TKP = torch.linalg.solve_triangular(white_TKPP.mT, inner_TKP[..., None], upper=True)
        factors_TKP: Tensor = mean_TKP + (self.root_KPP() @ z_TKP)[..., 0]
        return factors_TKP

    def log_joint(self, panel: Panel) -> Tensor:
        """[T, K] log P(class | gate covariates) + log density in the class."""
        gate: Routing = self.router(panel.gate)
        return gate.logits.log_softmax(-1) + self.log_density(panel)

    def log_likelihood(self, panel: Panel) -> Tensor:
        """[T] log density of each person."""
        return self.log_joint(panel).logsumexp(-1)

    def posterior(self, panel: Panel) -> Routing:
        """Responsibilities as a routing of persons to classes: weights are P(class | scores, covariates)."""
        return Dense()(self.log_joint(panel))  # type: ignore[no-any-return]

    def natural(self) -> dict[str, Tensor]:
        """The model's parameters in the units of the table.

        Returns gate [K - 1, D] log odds against the first class, coefficients [K, P, C], covariance [K, P,
        P], residual [K], and, where the model has them, bend [K], tvc [K, M], covariate_mean [K, C - 1] and
        covariate_covariance [K, C - 1, C - 1].
        """
        root_KPP = self.root_KPP()
        natural = {
            "gate": self._gate_weight() @ self.gate_units,
            "coefficients": self.mean_KPC() @ self.expert_units,
            "covariance": root_KPP @ root_KPP.mT,
            "residual": self.variance_K(),
        }
        if self.bend is not None:
            natural["bend"] = self.bend_K()
        if self.tvc is not None:
            natural["tvc"] = self.tvc
        if self.covariate_mean is not None and self.covariate_root is not None:
            deviation_C = 1 / self.expert_units.diagonal()[1:]
            natural["covariate_mean"] = deviation_C * (self.covariate_mean - self.expert_units[1:, 0])
            root_KCC = deviation_C[:, None] * cholesky_factor(self.covariate_root, len(deviation_C))
            natural["covariate_covariance"] = root_KCC @ root_KCC.mT
        return natural

    def reorder(self, order: list[int]) -> None:
        """Class `order[i]` becomes class i; the first one is the gate's new reference."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not name.startswith("router."):
                    parameter.copy_(parameter[order].clone())
            weight = self._gate_weight()
            full_KD = torch.cat([weight.new_zeros(1, weight.shape[1]), weight])[order]
            weight.copy_(full_KD[1:] - full_KD[:1])

    def _gate_weight(self) -> Tensor:
        """[K - 1, D] log odds against the first class, on the standardised design."""
        weight: Tensor = self.router.get_submodule("score.score").weight  # type: ignore[assignment]
        return weight

    def _in_factor_space(self, loadings_TKJP: Tensor, rest_TKJ: Tensor) -> tuple[Tensor, Tensor]:
        """The Woodbury identity's small matrices: R with R R' = I + L'Λ'ΛL / θ, and R⁻¹ L'Λ'(y - mean) / θ.

        P x P in the place of J x J, and never worse conditioned than the identity: no jitter is needed, also
        for a Ψ without full rank. A missing score is a zero row of Λ and of the residual.
        """
        variance_K1 = self.variance_K()[:, None]
        rooted_TKJP = loadings_TKJP @ self.root_KPP() / variance_K1.sqrt()[..., None]
        identity = torch.eye(rooted_TKJP.shape[-1], dtype=torch.float64)
        white_TKPP, _ = torch.linalg.cholesky_ex(identity + rooted_TKJP.mT @ rooted_TKJP)
        right_TKP1 = rooted_TKJP.mT @ (rest_TKJ / variance_K1.sqrt())[..., None]
        return white_TKPP, torch.linalg.solve_triangular(white_TKPP, right_TKP1, upper=False)[..., 0]

    def _covariate_density(self, panel: Panel) -> Tensor:
        assert self.covariate_mean is not None
        assert self.covariate_root is not None
        x_TC = panel.experts[:, 1:]
        root_KCC = cholesky_factor(self.covariate_root, x_TC.shape[1])
        apart_KCT = (x_TC - self.covariate_mean[:, None]).mT
        white_KCT = torch.linalg.solve_triangular(root_KCC, apart_KCT, upper=False)
        log_root_K1 = root_KCC.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        density_KT: Tensor = -0.5 * (white_KCT.square() + math.log(2 * math.pi)).sum(1) - log_root_K1
        log_units = self.expert_units.diagonal()[1:].log().sum()  # densities of x in the table's units
        return density_KT.T + log_units


def cholesky_factor(packed_KV: Tensor, size: int) -> Tensor:
    """[K, size, size] lower triangular from its packed rows, with the logarithm of the diagonal.

    >>> cholesky_factor(torch.tensor([[0.0, 5.0, 0.0]]), 2).tolist()
    [[[1.0, 0.0], [5.0, 1.0]]]
    """
    row, column = torch.tril_indices(size, size)
    values_KV = torch.where(row == column, packed_KV.exp(), packed_KV)
    place_VN = nn.functional.one_hot(row * size + column, size * size).to(packed_KV)
    return (values_KV @ place_VN).view(-1, size, size)
