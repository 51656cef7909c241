import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import DriftStream
from coterie.stream import prequential


class Model:
    """Says what it was told last, and keeps what it is taught."""

    def __init__(self):
        self.taught, self.log = [], []

    def predict_one(self, x):
        self.log.append(("predict", x["t"]))
        return self.taught[-1][1] if self.taught else None

    def learn_one(self, x, y):
        self.log.append(("learn", x["t"]))
        self.taught.append((x["t"], y))


def stream(labels):
    return [({"t": t}, y) for t, y in enumerate(labels)]


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=60), st.integers(1, 20))
def test_the_metrics_are_their_definitions(labels, window):
    frame = prequential(Model(), stream(labels), window=window)
    last = frame.iloc[-1]
    repeat = [a == b for a, b in pairwise(labels)]
    accuracy = sum(repeat) / len(labels)
    assert last["instances"] == len(labels)
    assert last["acc"] == pytest.approx(accuracy)
    counts, majority, majority_right = {}, None, 0
    for y in labels:
        majority_right += majority == y
        counts[y] = counts.get(y, 0) + 1
        if majority is None or counts[y] > counts[majority]:
            majority = y
    baseline = majority_right / len(labels)
    assert last["kappa_m"] == pytest.approx((accuracy - baseline) / (1 - baseline))
    assert last["kappa_t"] == pytest.approx(0)  # the model is that baseline
    recent = [False, *repeat][-window:]
    assert last["window_acc"] == pytest.approx(sum(recent) / len(recent))


def test_a_row_is_predicted_before_it_is_learnt():
    model = Model()
    prequential(model, stream("aab"))
    assert model.log == [(what, t) for t in range(3) for what in ("predict", "learn")]


def test_a_delayed_label_is_learnt_with_its_own_row():
    model = Model()
    frame = prequential(model, stream("abcdefgh"), label_delay=3)
    assert model.taught == list(enumerate("abcde"))
    assert model.log.index(("learn", 0)) == model.log.index(("predict", 3)) + 1
    assert len(frame) == 1


def test_recovery_counts_rows_from_the_drift():
    class Oracle:
        """Wrong for the first 7 rows of the new concept."""

        def predict_one(self, x):
            return "b" if x["t"] >= 27 else "a"

        def learn_one(self, x, y): ...

    rows = stream("a" * 20 + "b" * 30)
    frame = prequential(Oracle(), rows, ("acc", "recovery"), window=5, drifts=[20])
    assert frame.loc[frame["instances"] == 30, "recovery"].isna().all()
    assert frame["recovery"].iloc[-1] == 12  # 7 wrong ones, then a whole window
    assert list(frame.columns) == ["instances", "acc", "recovery", "window_acc"]


def test_a_streams_own_drifts_are_used():
    drifting = DriftStream([stream("a" * 50), stream("b" * 50)], [10], width=1, length=30)
    assert prequential(Model(), drifting, window=5)["recovery"].iloc[-1] == 6


def test_kappa_is_nan_where_its_baseline_makes_no_mistake():
    from coterie.stream import PrequentialScore

    score = PrequentialScore(window=5)
    score.update("a", "a")
    score._repeat_right = 1  # no first row is right by repetition; a stream cannot reach it
    assert math.isnan(score.values()["kappa_t"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["f1"]}, "no metric 'f1'; use some of acc"),
        ({"window": 0}, "window=0"),
        ({"label_delay": -1}, "label_delay=-1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prequential(Model(), stream("ab"), **options)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        prequential(Model(), [])
