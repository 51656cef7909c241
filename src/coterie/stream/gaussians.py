"""What a leaf's classes look like by feature: Gaussians in planes of one array, told row by row.

Shapes: N leaves, D features, C classes. The planes of [N, 8, D, C] are named below; what naive Bayes reads
comes first, and is brought up to date when the leaf learns.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MEAN, SCALE, BASE, HALF_LOG, COUNT, SQUARES, LOW, HIGH = range(8)
EMPTY = np.array([0.0, -math.inf, 0.0, 0.0, 0.0, 0.0, math.inf, -math.inf])[:, None, None]
_HALF_LOG_TAU = 0.5 * math.log(math.tau)


def log_likelihoods(gaussians_NPDC: Floats, x_D: Floats, priors_NC: Floats) -> Floats:
    """Votes of naive Bayes [N, C]: log prior plus log densities, missing values (NaN) left out.

    Args:
        gaussians_NPDC: planes of N leaves; none after HALF_LOG is read.
        x_D: a row [D], or [N, D] with one for each leaf.
        priors_NC: log class shares.
    """
    leaves, _, features, classes = gaussians_NPDC.shape
    terms_NDC = np.empty((leaves, features + 1, classes))
    terms_NDC[:, 0] = priors_NC
    log_NDC = terms_NDC[:, 1:]
    np.subtract(x_D[..., :, None], gaussians_NPDC[:, MEAN], out=log_NDC)
    log_NDC *= log_NDC
    log_NDC /= gaussians_NPDC[:, SCALE]
    log_NDC -= gaussians_NPDC[:, BASE]
    log_NDC -= gaussians_NPDC[:, HALF_LOG]
    if np.isnan(x_D.sum()):
        log_NDC[np.broadcast_to(np.isnan(x_D)[..., :, None], log_NDC.shape)] = 0.0
    votes_NC: Floats = np.add.reduce(terms_NDC, axis=1)  # feature after feature, as river adds
    return votes_NC


def add_row(gaussians_NPD: Floats, x_D: Floats, missing_D: npt.NDArray[np.bool_] | None) -> None:
    """Welford's update of one class's Gaussians in N leaves, in place, and of what naive Bayes reads of them.

    Args:
        gaussians_NPD: their planes.
        x_D: the row.
        missing_D: where it is NaN; None for nowhere.
    """
    before = gaussians_NPD.copy() if missing_D is not None else gaussians_NPD
    mean, count = gaussians_NPD[:, MEAN], gaussians_NPD[:, COUNT]
    count += 1.0
    off_ND = x_D - mean
    mean += (1.0 / count) * off_ND
    squares = gaussians_NPD[:, SQUARES]
    off_ND *= x_D - mean
    squares += off_ND
    np.minimum(gaussians_NPD[:, LOW], x_D, out=gaussians_NPD[:, LOW])
    np.maximum(gaussians_NPD[:, HIGH], x_D, out=gaussians_NPD[:, HIGH])
    spread = squares > 0  # where it is, there are at least two rows
    variance = np.ones_like(squares)
    np.divide(squares, count - 1.0, out=variance, where=spread)
    gaussians_NPD[:, SCALE] = np.where(spread, -2.0 * variance, -math.inf)
    gaussians_NPD[:, BASE] = np.where(spread, _HALF_LOG_TAU, 0.0)
    # math.log: numpy's differs in the last bit on some processors, which may decide a tie
    logs = [math.log(v) for v in variance.ravel().tolist()]
    gaussians_NPD[:, HALF_LOG] = 0.5 * np.array(logs).reshape(variance.shape)
    if missing_D is not None:
        gaussians_NPD[:, :, missing_D] = before[:, :, missing_D]
