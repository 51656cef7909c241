"""`TrajectoryMoE`: latent classes of growth, with covariates on membership and on growth within a class."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from coterie.data import import_pandas
from coterie.longitudinal.compare import entropy_index
from coterie.longitudinal.covariates import Covariates, terms_of
from coterie.longitudinal.curves import CURVES, CurveName
from coterie.longitudinal.estimation import information, natural_covariance
from coterie.longitudinal.fitting import check_options, check_panel, fit_mixture
from coterie.longitudinal.growth_mixture import GrowthMixture
from coterie.longitudinal.inference import parameter_names, parameter_vector, summary_table, summary_text
from coterie.longitudinal.panel import Layout, Panel, read_panel
from coterie.models import load_estimator, save_estimator
from coterie.models.estimator import BaseEstimator
from coterie.nn import Routing

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[np.float64]
_LEARNT = (
    "log_likelihood_",
    "bic_",
    "aic_",
    "entropy_",
    "num_persons_",
    "num_scores_",
    "num_parameters_",
    "time_range_",
    "starts_",
    "converged_",
)


class TrajectoryMoE(BaseEstimator):  # type: ignore[misc]
    """Growth mixture model: K classes of growth curves (experts) behind a multinomial logit (gate).

    A covariate of the gate says who belongs to which class, one of the experts why persons of one class
    differ. With both it is the full model of the paper, with one of them its cluster-predictor or
    growth-predictor variant, with neither a finite mixture. Fitted by maximum likelihood in float64, with
    standard errors from the observed information.

    Args:
        n_classes: K ≥ 1. Choose it without covariates first, see `select_n_classes`.
        curve: "bilinear" (two slopes that meet at a knot of the class), "linear", "quadratic", "exponential"
            (intercept + growth · (1 - exp(-rate t))) or "jenss_bayley" (intercept + late slope · t + early
            growth · (exp(decay t) - 1)); the last two describe growth from time 0 on.
        gate: formula of its covariates, "gx1 + gx2"; texts become dummies, "a:b" is a product; "" for none.
        experts: the same for covariates of the growth factors within a class.
        covariates: "conditional" takes the experts' covariates as given, as mixtures of experts do; "joint"
            models them as normal in each class, as structural equation models do, so that they too tell the
            classes apart.
        tvc: time-varying covariates with a direct effect on the score, "a + b".
        y: prefix of the numbered columns of scores in a wide table (Y1, Y2, …), or with `person` the column
            of a long one.
        t: the same for times (T1, T2, …).
        person: the column of persons of a long table; None for a wide one.
        n_init: k-means starts; the best optimum counts.
        method: "lbfgs" maximises the likelihood directly, "em" by expectation maximisation; same optimum.
        random_state: of the starts. Global random states are left alone.

    Scores may be missing (every occasion that was observed counts); covariates and times of scores may not.

    After `fit`: `summary_` (estimates, standard errors, 95% intervals), `log_likelihood_`, `bic_`, `aic_`,
    `entropy_`, `expert_usage_` [K] shares of the classes, `starts_` log-likelihoods of the starts that kept
    every class, `converged_`, `model_`. Classes are numbered from 1, by knot (rate, decay) or else by mean
    height of their curve.

    Raises:
        ValueError: bad options, or what `read_panel` raises about the table.
        DegenerateClassError: in every start some class kept under 1% of the persons.

    Source: Liu & Perera 2022, arXiv 2007.02432.

    >>> from coterie.longitudinal import TrajectoryMoE, simulate_trajectories
    >>> frame = simulate_trajectories(200)
    >>> model = TrajectoryMoE(2, gate="gx1 + gx2", experts="ex1 + ex2", n_init=2).fit(frame)
    >>> model.summary_.loc[("class 2", "knot"), ["low", "high"]].between(4.5, 6.5).tolist()
    [True, True]
    >>> model.predict_proba(frame).shape
    (200, 2)
    """

    def __init__(
        self,
        n_classes: int = 2,
        curve: CurveName = "bilinear",
        *,
        gate: str = "",
        experts: str = "",
        covariates: Literal["conditional", "joint"] = "conditional",
        tvc: str = "",
        y: str = "Y",
        t: str = "T",
        person: str | None = None,
        n_init: int = 10,
        method: Literal["lbfgs", "em"] = "lbfgs",
        random_state: int = 0,
    ) -> None:
        self.n_classes, self.curve, self.gate, self.experts = n_classes, curve, gate, experts
        self.covariates, self.tvc, self.y, self.t, self.person = covariates, tvc, y, t, person
        self.n_init, self.method, self.random_state = n_init, method, random_state

    def fit(self, frame: "pd.DataFrame") -> "TrajectoryMoE":
        """Estimates the model from a table; returns itself."""
        check_options(self)
        self.gate_covariates_, self.expert_covariates_ = Covariates(self.gate), Covariates(self.experts)
        panel = self._panel(frame, learn=True)
        check_panel(panel, CURVES[self.curve])
        fitted = fit_mixture(
            panel,
            CURVES[self.curve],
            self.n_classes,
            gate_units=self.gate_covariates_.units,
            expert_units=self.expert_covariates_.units,
            joint=self.covariates == "joint",
            n_init=self.n_init,
            method=self.method,
            random_state=self.random_state,
        )
        self.model_, self.starts_, self.converged_ = fitted.model, fitted.starts, fitted.converged
        self._describe(panel)
        return self

    def predict(self, frame: "pd.DataFrame") -> npt.NDArray[np.int64]:
        """[T] most probable class of each person, from 1, in the table's order (of first appearance)."""
        return self.predict_proba(frame).argmax(1) + 1  # type: ignore[no-any-return]

    def predict_proba(self, frame: "pd.DataFrame") -> _Array:
        """[T, K] probability of each class given a person's scores and covariates."""
        return self.posterior(frame).weights.numpy()

    def posterior(self, frame: "pd.DataFrame") -> Routing:
        """The same as a routing of persons to classes, for everything that reads routings."""
        with torch.no_grad():
            return self._fitted().posterior(self._panel(frame))

    def score(self, frame: "pd.DataFrame") -> float:
        """Log-likelihood per person, nats."""
        with torch.no_grad():
            return float(self._fitted().log_likelihood(self._panel(frame)).mean())

    def bic(self, frame: "pd.DataFrame") -> float:
        """-2 log-likelihood + parameters · log persons, of any table; lower is better."""
        persons = len(self._panel(frame))
        return -2 * self.score(frame) * persons + self.num_parameters_ * float(np.log(persons))

    def growth_factors(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """Empirical Bayes growth factors, one row per person: means over classes, weighted by the posterior.

        The bend (knot, rate, decay) is a class's, and its column the posterior mean of the classes'.
        """
        panel, model = self._panel(frame), self._fitted()
        with torch.no_grad():
            weights_TK = model.posterior(panel).weights
            table = torch.einsum("tk,tkp->tp", weights_TK, model.factors(panel))
            table = torch.cat([table, (weights_TK @ model.bend_K())[:, None]], dim=1)
        names = [*model.curve.factors, *([model.curve.bend] if model.curve.bend else [])]
        return import_pandas().DataFrame(
            table[:, : len(names)].numpy(), index=self._index(panel), columns=names
        )

    def classes(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """Per person the most probable class and the probabilities of all, "class" and "p1" … "pK"."""
        panel = self._panel(frame)
        with torch.no_grad():
            weights_TK = self._fitted().posterior(panel).weights
        columns = {"class": weights_TK.argmax(1).numpy() + 1}
        columns |= {f"p{k + 1}": weights_TK[:, k].numpy() for k in range(self.n_classes)}
        return import_pandas().DataFrame(columns, index=self._index(panel))

    def mean_curves(self, num_times: int = 50) -> "pd.DataFrame":
        """Each class's mean trajectory at the covariates' means: columns class, t and y, a row per point."""
        model = self._fitted()
        t_J = torch.linspace(*self.time_range_, num_times, dtype=torch.float64)
        with torch.no_grad():
            loadings_KJP = model.curve.loadings(t_J[None], model.bend_K())[0]
            y_KJ = torch.einsum("kjp,kp->kj", loadings_KJP, model.mean_KPC()[:, :, 0])
        classes = np.repeat(np.arange(1, self.n_classes + 1), num_times)
        columns = {"class": classes, "t": np.tile(t_J.numpy(), self.n_classes), "y": y_KJ.numpy().ravel()}
        return import_pandas().DataFrame(columns)

    def plot(self, frame: "pd.DataFrame", file: str | Path, *, persons: int = 60) -> Path:
        """Draws the trajectories of each class's persons under its mean curve; see `draw_trajectories`."""
        from coterie.longitudinal.plot import draw_trajectories

        panel = self._panel(frame)
        with torch.no_grad():
            weights_TK = self._fitted().posterior(panel).weights.numpy()
        knots = self._fitted().bend_K().tolist() if self.curve == "bilinear" else []
        return draw_trajectories(panel, weights_TK, self.mean_curves(), knots, file, persons=persons)

    def summary(self) -> str:
        """Fit, classes and `summary_` as text; the gate's log odds with their odds ratios."""
        self._fitted()
        shares = "  ".join(f"{k}: {share:.3f}" for k, share in enumerate(self.expert_usage_, start=1))
        header = {
            "curve": f"{self.curve}, {self.n_classes} classes, {self.covariates} covariates",
            "persons, scores": f"{self.num_persons_}, {self.num_scores_}",
            "log-likelihood, parameters": f"{self.log_likelihood_:.2f}, {self.num_parameters_}",
            "AIC, BIC": f"{self.aic_:.2f}, {self.bic_:.2f}",
            "classes' shares": shares,
            "entropy": f"{self.entropy_:.3f}",
        }
        return summary_text(header, self.summary_)

    def save(self, folder: str | Path) -> Path:
        """Writes the fitted model as JSON and safetensors; `load` reads it."""
        return save_estimator(
            folder,
            "TrajectoryMoE",
            parameters=self.get_params(),
            learnt={
                "gate": self.gate_covariates_.to_dict(),
                "experts": self.expert_covariates_.to_dict(),
                **{name: getattr(self, name) for name in _LEARNT},
            },
            tensors={
                **{f"model.{name}": tensor for name, tensor in self._fitted().state_dict().items()},
                "covariance": torch.from_numpy(self.covariance_),
                "expert_usage": torch.from_numpy(self.expert_usage_),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "TrajectoryMoE":
        """The model that `save` wrote. Raises ValueError for anything else."""
        parameters, learnt, tensors = load_estimator(folder, "TrajectoryMoE")
        loaded = cls(**parameters)
        loaded.gate_covariates_ = Covariates.from_dict(learnt["gate"])
        loaded.expert_covariates_ = Covariates.from_dict(learnt["experts"])
        for name in _LEARNT:
            setattr(loaded, name, learnt[name])
        state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        loaded.time_range_ = tuple(learnt["time_range_"])
        loaded.model_ = GrowthMixture(
            CURVES[loaded.curve],
            loaded.n_classes,
            gate_units=state["gate_units"],
            expert_units=state["expert_units"],
            scale=state["scale_P"],
            times=loaded.time_range_,
            num_tvc=len(terms_of(loaded.tvc)),
            least_variance=float(state["least_variance"]),
            joint=loaded.covariates == "joint",
        )
        loaded.model_.load_state_dict(state)
        loaded.expert_usage_ = tensors["expert_usage"].numpy()
        loaded.covariance_ = tensors["covariance"].numpy()
        loaded._summarise()
        return loaded

    def _describe(self, panel: Panel) -> None:
        with torch.no_grad():
            posterior = self.model_.posterior(panel)
            self.log_likelihood_ = float(self.model_.log_likelihood(panel).sum())
        self.expert_usage_ = (posterior.importance / len(panel)).numpy()
        self.entropy_ = entropy_index(posterior.weights)
        self.num_persons_, self.num_scores_ = len(panel), int(panel.seen.sum())
        self.num_parameters_ = sum(parameter.numel() for parameter in self.model_.parameters())
        self.bic_ = -2 * self.log_likelihood_ + self.num_parameters_ * float(np.log(len(panel)))
        self.aic_ = -2 * self.log_likelihood_ + 2 * self.num_parameters_
        self.time_range_ = panel.time_range
        self.covariance_ = natural_covariance(self.model_, information(self.model_, panel), parameter_vector)
        self._summarise()
        lost = self.summary_.index[self.summary_["se"].isna()]
        if len(lost):
            warnings.warn(
                f"no standard errors for {len(lost)} parameters, such as {' '.join(lost[0])}: the data do "
                "not determine them (a variance at zero, say); fewer classes or a simpler curve may do",
                stacklevel=3,
            )

    def _summarise(self) -> None:
        gate, experts = self.gate_covariates_.names, self.expert_covariates_.names
        with torch.no_grad():
            estimates_N = parameter_vector(self.model_).numpy()
        names = parameter_names(self.model_, gate, experts, terms_of(self.tvc))
        self.summary_ = summary_table(names, estimates_N, self.covariance_)

    def _panel(self, frame: "pd.DataFrame", *, learn: bool = False) -> Panel:
        if not learn:
            self._fitted()
        layout = Layout(self.y, self.t, self.person, self.tvc)
        return read_panel(frame, layout, self.gate_covariates_, self.expert_covariates_, learn=learn)

    def _fitted(self) -> GrowthMixture:
        if not hasattr(self, "model_"):
            raise ValueError("this TrajectoryMoE is not fitted; call fit first")
        return self.model_

    def _index(self, panel: Panel) -> "pd.Index[Any]":
        return import_pandas().Index(panel.persons, name=self.person)
