"""Panels of persons: latent classes of growth with covariates on membership and within classes."""

from coterie.longitudinal.compare import (
    align_classes,
    compare_fits,
    entropy_index,
    latent_kappa,
    select_n_classes,
)
from coterie.longitudinal.fitting import DegenerateClassError
from coterie.longitudinal.forest import SemForest
from coterie.longitudinal.simulate import simulate_trajectories
from coterie.longitudinal.trajectory_moe import TrajectoryMoE

__all__ = [
    "DegenerateClassError",
    "SemForest",
    "TrajectoryMoE",
    "align_classes",
    "compare_fits",
    "entropy_index",
    "latent_kappa",
    "select_n_classes",
    "simulate_trajectories",
]
