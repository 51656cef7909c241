import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import Events, histories

event = st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 8))
logs = st.lists(event, max_size=30)


def events(rows):
    users, items, times = np.array(rows, dtype=int).reshape(-1, 3).T
    return Events(users, items, times)


@given(logs, logs, st.integers(1, 4))
def test_a_history_is_what_a_loop_finds(shown, acted, length):
    found = histories(events(shown), events(acted), length)
    assert found.shape == (len(shown), length)
    ordered = sorted(acted, key=lambda row: row[2])
    for (user, item, time), row in zip(shown, found, strict=True):
        before = [i for u, i, t in ordered if u == user and t < time and i > 0][-length:]
        before = [i for i in before if i != item]
        assert row.tolist() == [0] * (length - len(before)) + before


@given(logs, logs, st.integers(0, 1000))
def test_shuffling_the_future_changes_nothing(shown, acted, seed):
    """What happens at the time of a row, or later, to whomever, is not seen by it."""
    now = 4
    shown = [(user, item, min(time, now)) for user, item, time in shown]
    past = [row for row in acted if row[2] < now]
    future = [row for row in acted if row[2] >= now]
    rng = np.random.default_rng(seed)
    shuffled = [(int(rng.integers(4)), int(rng.integers(7)), int(rng.integers(now, 20))) for _ in future]
    expected = histories(events(shown), events(past + future), 3)
    np.testing.assert_array_equal(histories(events(shown), events(shuffled + past), 3), expected)
    np.testing.assert_array_equal(histories(events(shown), events(past), 3), expected)


def test_times_may_be_far_apart_and_users_texts():
    shown = Events(["b", "a"], [9, 9], [1e9 + 2, 1e9])
    acted = Events(["a", "b", "b"], [1, 2, 3], [-1e9, 1e9, 1e9 + 1])
    assert histories(shown, acted, 2).tolist() == [[2, 3], [0, 1]]


def test_what_is_no_time_and_no_length_is_refused():
    with pytest.raises(ValueError, match="time of behaviour 1 is nan"):
        histories(Events([1], [1], [0]), Events([1, 1], [1, 1], [0, np.nan]), 2)
    with pytest.raises(ValueError, match="time of impression 0 is inf"):
        histories(Events([1], [1], [np.inf]), Events([], [], []), 2)
    with pytest.raises(ValueError, match="length=0"):
        histories(Events([1], [1], [0]), Events([], [], []), 0)
