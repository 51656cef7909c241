import pytest

from coterie.data import DriftStream, led_drift, rbf_drift, sea_drift


def constant(label, n=1000):
    return [({"x": i}, label) for i in range(n)]


def labels(stream):
    return "".join(y for _, y in stream)


def test_an_abrupt_change_is_at_its_position():
    stream = DriftStream([constant("a"), constant("b"), constant("c")], [3, 5], width=1, length=8)
    assert labels(stream) == "aaabbccc"


def test_a_gradual_change_is_even_at_its_position_and_over_within_its_width():
    stream = DriftStream([constant("a", 9000), constant("b", 9000)], [4000], width=1000, length=8000)
    drawn = labels(stream)
    assert set(drawn[:1000]) == {"a"}
    assert set(drawn[7000:]) == {"b"}
    assert 0.4 < drawn[3900:4100].count("b") / 200 < 0.6
    assert 0.10 < drawn[3400:3600].count("b") / 200 < 0.16  # 1 / (1 + e²) = 0.119


def test_a_concept_given_twice_goes_on_where_it_was_left():
    a, b = constant("a"), constant("b")
    rows = list(DriftStream([a, b, a], [2, 4], width=1, length=6))
    assert [(x["x"], y) for x, y in rows] == [(0, "a"), (1, "a"), (0, "b"), (1, "b"), (2, "a"), (3, "a")]


@pytest.mark.parametrize(
    "make", [lambda s: sea_drift(50, width=20, seed=s), lambda s: led_drift(50, width=20, seed=s)]
)
def test_the_same_seed_gives_the_same_rows_every_time(make):
    stream = make(1)
    assert list(stream) == list(stream) == list(make(1))
    assert list(stream) != list(make(2))
    assert len(list(stream)) == 200


def test_streams_have_the_features_of_the_literature():
    assert [len(next(iter(stream))[0]) for stream in (sea_drift(5), led_drift(5), rbf_drift(5))] == [
        3,
        24,
        10,
    ]
    assert list(rbf_drift(20, seed=1)) == list(rbf_drift(20, seed=1))


def test_the_first_concept_of_sea_recurs():
    rows = list(sea_drift(500, seed=0))
    for quarter, threshold in enumerate((8, 9, 9.5, 8)):
        assert all(y == (x[0] + x[1] > threshold) for x, y in rows[500 * quarter : 500 * (quarter + 1)])


@pytest.mark.parametrize(
    ("concepts", "positions", "options", "message"),
    [
        (1, [], {}, "1 concepts and 0 positions"),
        (2, [3, 5], {}, "2 concepts and 2 positions"),
        (3, [5, 3], {}, "should increase"),
        (2, [0], {}, "begin at 1"),
        (2, [3], {"width": 0}, "width=0"),
    ],
)
def test_impossible_changes_are_refused(concepts, positions, options, message):
    with pytest.raises(ValueError, match=message):
        DriftStream([constant("a")] * concepts, positions, **options)
