"""Who reaches whom: multi-task mixtures of experts as data, from shared-bottom to HoME.

A level is banks of experts and gates. A gate's output is the weighted sum of the experts it reaches; banks
and gates of a level read outputs of the level below, or "input". The gates of the last level are the tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INPUT = "input"


@dataclass(frozen=True)
class Bank:
    """Experts that read the same thing.

    Args:
        experts: how many.
        reads: the output below that they are applied to.
    """

    experts: int
    reads: str = INPUT


@dataclass(frozen=True)
class Gate:
    """One softmax over some banks.

    Args:
        reaches: banks.
        reads: outputs below, whose concatenation its weights depend on.
        own: a bank that is added once more, with weights of a gate of its own (self gate); "" for none.
    """

    reaches: tuple[str, ...]
    reads: tuple[str, ...] = (INPUT,)
    own: str = ""


@dataclass(frozen=True)
class Level:
    """Banks and gates by name.

    >>> level = mmoe({"click": "watch", "like": "social"}, experts=3)[0]
    >>> level.reach.tolist()
    [[True, True, True], [True, True, True]]
    """

    banks: Mapping[str, Bank]
    gates: Mapping[str, Gate]

    @property
    def reach(self) -> Tensor:
        """bool [G, E]: which gate reaches which expert."""
        return self._mask([gate.reaches for gate in self.gates.values()])

    @property
    def own(self) -> Tensor:
        """bool [G, E]: which experts are a gate's own."""
        return self._mask([(gate.own,) for gate in self.gates.values()])

    @property
    def bank_of(self) -> list[str]:
        """The bank of each expert."""
        return [name for name, bank in self.banks.items() for _ in range(bank.experts)]

    def check(self, below: Sequence[str]) -> None:
        """ValueError for a name that nothing has, a bank without experts, or a gate that reaches none."""
        for name, bank in self.banks.items():
            if bank.experts < 1:
                raise ValueError(f"bank {name!r} has {bank.experts} experts; give it at least 1")
        for name, gate in self.gates.items():
            unknown = {*gate.reaches, gate.own} - {*self.banks, ""}
            if unknown or not gate.reaches:
                raise ValueError(
                    f"gate {name!r} reaches {sorted(unknown) or 'no bank'}; it should reach some of "
                    f"{list(self.banks)}"
                )
        wanted = {bank.reads for bank in self.banks.values()}.union(*(g.reads for g in self.gates.values()))
        if wanted - {*below}:
            raise ValueError(f"a level reads {sorted(wanted - {*below})}; below it there is {list(below)}")

    def _mask(self, rows: Sequence[Sequence[str]]) -> Tensor:
        return torch.tensor([[bank in row for bank in self.bank_of] for row in rows])


def shared_bottom(tasks: Mapping[str, str]) -> list[Level]:
    """One network for all tasks, which differ in their towers alone."""
    return [Level({"shared": Bank(1)}, {task: Gate(("shared",)) for task in tasks})]


def mmoe(tasks: Mapping[str, str], *, experts: int = 4) -> list[Level]:
    """One bank; every task's gate reaches all of it. Source: Ma et al. 2018."""
    return [Level({"shared": Bank(experts)}, {task: Gate(("shared",)) for task in tasks})]


def cgc(tasks: Mapping[str, str], *, shared: int = 2, own: int = 1) -> list[Level]:
    """Shared experts, and some for every task alone. Source: Tang et al. 2020 (PLE), section 4.1."""
    return [_cgc_level(tasks, shared, own)]


def ple(tasks: Mapping[str, str], *, shared: int = 2, own: int = 1) -> list[Level]:
    """Two levels of CGC; the lower one has a gate more, which sees all and feeds the shared experts above.

    Source: Tang et al. 2020, section 4.2.
    """
    lower, upper = _cgc_level(tasks, shared, own), _cgc_level(tasks, shared, own)
    everything = Gate(tuple(lower.banks))
    banks = {name: Bank(bank.experts, reads=name) for name, bank in upper.banks.items()}
    gates = {task: Gate(("shared", task), reads=(task,)) for task in tasks}
    return [Level(lower.banks, {**lower.gates, "shared": everything}), Level(banks, gates)]


def adatt(tasks: Mapping[str, str], *, shared: int = 1, own: int = 1) -> list[Level]:
    """Two levels in which a task's gate reaches every expert, and its own ones once more.

    Source: Li et al. 2023 (AdaTT), section 3; their own experts have weights that do not depend on the input.
    """
    _check_names(tasks, ["shared"])
    names = ("shared", *tasks)
    counts = {"shared": shared, **dict.fromkeys(tasks, own)}
    levels = []
    for reads in (dict.fromkeys(names, INPUT), {name: name for name in names}):
        banks = {name: Bank(counts[name], reads[name]) for name in names}
        gates = {name: Gate(names, (reads[name],), own=name) for name in names}
        levels.append(Level(banks, gates))
    last = levels[-1]
    return [levels[0], Level(last.banks, {task: last.gates[task] for task in tasks})]


def home(
    tasks: Mapping[str, str],
    *,
    meta: int = 2,
    group: int = 1,
    own: int = 1,
    hierarchy: bool = True,
    self_gate: bool = True,
) -> list[Level]:
    """Experts of all, of each category of tasks, and of each task; no gate reaches another category's.

    Args:
        tasks: task → its category.
        meta: experts of a bank on the first level, which has one for all and one for each category.
        group: shared experts on the second level, for all and for each category.
        own: experts of each task.
        hierarchy: without it, every gate reaches every expert of its level.
        self_gate: a gate's own experts are added once more, so that they learn whatever the gate does.

    Source: Wang et al. 2025 (HoME), section 3.
    """
    categories = list(dict.fromkeys(tasks.values()))
    names = {category: f"category {category}" for category in categories}
    groups = ("all", *names.values())
    _check_names(tasks, groups)
    lower = {name: Bank(meta) for name in groups}
    upper = {
        **{name: Bank(group, reads=name) for name in groups},
        **{task: Bank(own, reads=names[category]) for task, category in tasks.items()},
    }
    lower_gates, upper_gates = {}, {}
    for name in groups:
        reaches = groups if name == "all" or not hierarchy else ("all", name)
        lower_gates[name] = Gate(reaches, own=name if self_gate else "")
    for task, category in tasks.items():
        reaches = ("all", names[category], task) if hierarchy else tuple(upper)
        upper_gates[task] = Gate(reaches, (names[category], "all"), own=task if self_gate else "")
    return [Level(lower, lower_gates), Level(upper, upper_gates)]


def _cgc_level(tasks: Mapping[str, str], shared: int, own: int) -> Level:
    _check_names(tasks, ["shared"])
    banks = {"shared": Bank(shared), **{task: Bank(own) for task in tasks}}
    return Level(banks, {task: Gate(("shared", task)) for task in tasks})


def _check_names(tasks: Mapping[str, str], banks: Sequence[str]) -> None:
    for task in tasks:
        if task in banks:
            raise ValueError(f"a task is called {task!r}, as a bank of this layout is; rename it")
