"""The labels of a stream, numbered as they come."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

_RARE, _RARE_CHECK = 0.05, 1000  # share of rows; rows between two looks


class StreamLabels:
    """Label → number, and rows of each.

    Args:
        classes: the labels, where they are known; None to take them as they come.
        grow: add a label outside `classes` instead of refusing it.

    Raises ValueError for fewer than two classes.

    >>> labels = StreamLabels(("no", "yes"), grow=False)
    >>> labels.number("yes"), labels.known, labels.rows
    (1, ['no', 'yes'], [0, 1])
    >>> labels.check("maybe", row=1)
    Traceback (most recent call last):
    ValueError: row 1: label 'maybe' is none of 'no', 'yes'; use grow_classes=True to add it
    """

    def __init__(self, classes: Sequence[Any] | None, *, grow: bool) -> None:
        self.grow = grow
        self.known: list[Any] = []
        self.rows: list[int] = []
        self.fixed = False  # whether a new label is an error
        self.warned = False  # of rare ones
        self._numbers: dict[Any, int] = {}
        if classes is not None:
            self.fix(classes)

    def fix(self, classes: Sequence[Any]) -> None:
        """Says all labels there are. ValueError for fewer than two, or others than were said before."""
        if len(set(classes)) < 2:
            raise ValueError(f"classes={list(classes)}; give at least two different labels")
        if self.fixed and set(classes) != set(self.known):
            raise ValueError(f"classes are {list(classes)}; they were {self.known} before")
        for label in classes:
            self._add(label)
        self.fixed = True

    def check(self, y: Any, row: int) -> None:
        """ValueError for a missing label, or an unknown one that may not be added."""
        if y is None or y != y:
            raise ValueError(f"row {row}: the label is missing; learn rows that have one")
        if y not in self._numbers and self.fixed and not self.grow:
            known = ", ".join(map(repr, self.known[:20]))
            raise ValueError(f"row {row}: label {y!r} is none of {known}; use grow_classes=True to add it")

    def number(self, y: Any) -> int:
        """The number of a label that passed `check`, given to it now if it is new; counts one more row."""
        self._add(y)
        number = self._numbers[y]
        self.rows[number] += 1
        return number

    def warn_of_rare_ones(self, rows_seen: int) -> None:
        """Warns once, looking now and then, of a label with few of the rows."""
        if self.warned or rows_seen % _RARE_CHECK:
            return
        share = min(self.rows) / rows_seen
        if share < _RARE:
            self.warned = True
            rarest = self.known[self.rows.index(min(self.rows))]
            warnings.warn(
                f"class {rarest!r} has {share:.1%} of the rows; mode='task' tends to ignore classes under "
                "5%, mode='data' does less so",
                stacklevel=3,
            )

    def set(self, known: Sequence[Any], rows: Sequence[int], fixed: bool, warned: bool) -> None:
        """Takes over what another one knew."""
        for label in known:
            self._add(label)
        self.rows, self.fixed, self.warned = list(rows), fixed, warned

    def _add(self, label: Any) -> None:
        if label not in self._numbers:
            self._numbers[label] = len(self.known)
            self.known.append(label.item() if isinstance(label, np.generic) else label)
            self.rows.append(0)
