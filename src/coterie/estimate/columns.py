"""Which column of a table plays which role."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from coterie.data import check_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns by role; what is not given is empty.

    Args:
        target: what is predicted; several for several tasks.
        time: by which rows are in order.
        group: whom rows belong to: a user, a person, an instrument.
        item: what was shown to the group: a product, a film.
        sensitive: the protected attribute.
        features: what it is predicted from; empty for every column without another role.
    """

    target: tuple[str, ...] = ()
    time: str | None = None
    group: str | None = None
    item: str | None = None
    sensitive: str | None = None
    features: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """The roles that were given, as JSON can hold them."""
        return {role: names for role, names in asdict(self).items() if names}

    def check_roles(self, system: str, needs: Collection[str], takes: Collection[str]) -> None:
        """ValueError naming the option that is missing, or that the system has no use for."""
        for role in needs:
            if role not in self.given():
                raise ValueError(f"{system} needs --{role} COLUMN")
        for role in self.given():
            if role not in (*needs, *takes):
                known = ", ".join(f"--{role}" for role in (*needs, *takes))
                raise ValueError(f"{system} has no use for --{role}; it takes {known or 'no columns'}")

    def split(self, frame: "pd.DataFrame", where: str) -> tuple["pd.DataFrame", "pd.DataFrame"]:
        """(features, targets) of a frame. ValueError for missing columns and for targets that are empty."""
        check_columns(frame, self._named(), where)
        targets = frame[[*self.target]]
        for name in self.target:
            missing = targets[name].isna().to_numpy().nonzero()[0]
            if len(missing):
                row = frame.index[missing[0]]
                raise ValueError(
                    f"{where}: column {name!r}, row {row}: the target is missing; drop such rows"
                )
        return frame[self.feature_names(list(frame.columns))], targets

    def feature_names(self, names: Sequence[str]) -> list[str]:
        """The feature columns among a table's."""
        roles = self._named()
        return list(self.features) or [name for name in names if name not in roles]

    def _named(self) -> list[str]:
        single = [self.time, self.group, self.item, self.sensitive]
        return [*self.target, *(name for name in single if name), *self.features]
