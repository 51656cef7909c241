"""What a user had done before something was shown: histories without a look into the future."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike


class Events(NamedTuple):
    """Rows of a log, as arrays of one length.

    `users` are comparable values, `items` numbers of `Vocabulary` (0 for an unknown one), `times` numbers.
    """

    users: ArrayLike
    items: ArrayLike
    times: ArrayLike


def histories(impressions: Events, behaviours: Events, length: int) -> npt.NDArray[np.int64]:
    """For every impression, the items that its user acted on before it.

    Before means at a smaller time: what shares the impression's time stamp is left out, and so are the
    impression's own item and unknown ones.

    Args:
        impressions: what was shown.
        behaviours: what users acted on, in any order.
        length: M, the latest ones that are kept.

    Returns: [impressions, M], the latest last; 0 where there are fewer.

    Raises ValueError for a length below 1, or a time that is not a finite number.

    >>> shown = Events(["ann", "ann", "bob"], [7, 8, 9], [3, 5, 9])
    >>> histories(shown, Events(["ann", "ann", "ann"], [1, 2, 3], [1, 3, 4]), length=2).tolist()
    [[0, 1], [2, 3], [0, 0]]
    """
    if length < 1:
        raise ValueError(f"length={length}; a history holds at least 1 item")
    shown = len(np.asarray(impressions.users))
    times = np.concatenate([np.asarray(e.times, dtype=np.float64) for e in (impressions, behaviours)])
    if not np.isfinite(times).all():
        row = int((~np.isfinite(times)).argmax())
        which, place = ("impression", row) if row < shown else ("behaviour", row - shown)
        raise ValueError(f"the time of {which} {place} is {times[row]}; should be a finite number")
    users = np.concatenate([np.asarray(impressions.users), np.asarray(behaviours.users)])
    user = np.unique(users, return_inverse=True)[1]
    moment = np.unique(times, return_inverse=True)[1]
    key = user.astype(np.int64) * (moment.max(initial=0) + 1) + moment  # by user, then by time
    known = np.flatnonzero(np.asarray(behaviours.items) > 0)
    order = known[np.argsort(key[shown:][known], kind="stable")]
    items, keys = np.asarray(behaviours.items, dtype=np.int64)[order], key[shown:][order]
    end = np.searchsorted(keys, key[:shown], side="left")
    start = np.searchsorted(keys, key[:shown] - moment[:shown], side="left")
    place = end[:, None] - length + np.arange(length)
    items = np.append(items, 0)  # so that there is one to take where there are none
    found = np.where(place >= start[:, None], items[place.clip(0)], 0)
    found[found == np.asarray(impressions.items, dtype=np.int64)[:, None]] = 0
    return _to_the_right(found)


def _to_the_right(found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Moves the zeros of every row to its beginning."""
    order = np.argsort(found > 0, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)
