"""What scikit-learn asks of an estimator's arguments, whatever the field."""

import pytest
from sklearn.base import clone
from torch import nn

from coterie.finance import MIGARegressor
from coterie.forecast import SMETimesForecaster
from coterie.longitudinal import TrajectoryMoE
from coterie.models.estimator import check_above, check_at_least, check_choice
from coterie.recsys import AWMoERanker, MultiTaskMoEClassifier
from coterie.tabular import COMETClassifier, COMETRegressor, FEAMOEClassifier

ESTIMATORS = [
    AWMoERanker(history=7),
    COMETClassifier(hidden=7),
    COMETRegressor(hidden=7),
    FEAMOEClassifier(n_iter=7),
    MIGARegressor(window=7),
    MultiTaskMoEClassifier(hidden=7),
    SMETimesForecaster(epochs=7),
    TrajectoryMoE(n_init=7),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_a_clone_has_the_same_arguments_and_other_ones_can_be_set(estimator):
    given = estimator.get_params()
    assert 7 in given.values()
    assert clone(estimator).get_params() == given
    name = next(name for name, value in given.items() if value == 7)
    other = clone(estimator).set_params(**{name: 9})
    assert other.get_params() == {**given, name: 9}
    with pytest.raises(ValueError, match="Invalid parameter 'colour'"):
        estimator.set_params(colour=1)


def test_an_encoder_is_copied_with_its_estimator():
    encoder = nn.Linear(2, 3)
    copied = clone(MIGARegressor(encoder=encoder)).encoder
    assert copied is not encoder
    assert (copied.weight == encoder.weight).all()


def test_arguments_out_of_range_are_named_with_what_would_be_right():
    estimator = TrajectoryMoE(n_classes=0, n_init=float("nan"))
    with pytest.raises(ValueError, match="n_classes=0; should be at least 1"):
        check_at_least(estimator, 1, "n_classes")
    with pytest.raises(ValueError, match="n_init=nan; should be at least 1"):
        check_at_least(estimator, 1, "n_init")
    with pytest.raises(ValueError, match="n_classes=0; should be above 0"):
        check_above(estimator, 0, "n_classes")
    with pytest.raises(ValueError, match="curve='cubic'; use one of linear, quadratic"):
        check_choice("curve", "cubic", ["linear", "quadratic"])
    check_at_least(estimator, 0, "n_classes")
