"""One network for every multi-task mixture of experts: its levels say which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.nn import ExpertHealth, FeatureGate, MaskedGates, NormalizedExperts, Routing
from coterie.recsys.levels import INPUT, Level, adatt, cgc, home, mmoe, ple, shared_bottom

Preset = Literal["shared-bottom", "mmoe", "cgc", "ple", "adatt", "home"]
PRESETS = {
    "shared-bottom": shared_bottom,
    "mmoe": mmoe,
    "cgc": cgc,
    "ple": ple,
    "adatt": adatt,
    "home": home,
}


@dataclass
class LevelOutput:
    """What a level computed, for health, plots and losses.

    Args:
        outputs_TEH: outputs of every expert.
        weights_TGE: softmax weights of every gate, 0 where it does not reach.
        own_TGE: weights of the self gates; None where there are none.
    """

    outputs_TEH: Tensor
    weights_TGE: Tensor
    own_TGE: Tensor | None

    @property
    def total_TGE(self) -> Tensor:
        """What each expert's output is multiplied by in all."""
        return self.weights_TGE if self.own_TGE is None else self.weights_TGE + self.own_TGE

    def routing(self, gate: int) -> Routing:
        """One gate's softmax as a `Routing`; an expert that it does not reach is not used."""
        weights_TE = self.weights_TGE[:, gate]
        return Routing.dense(weights_TE).keep(weights_TE > 0)


class MultiTaskMoE(nn.Module):
    """Levels of experts and gates, then a small tower per task.

    Args:
        dim: D, features.
        levels: from `coterie.recsys.levels`, or of one's own; the last one's gates are the tasks.
        hidden: H, width of every expert's output.
        tower: hidden width of a task's tower, which has one hidden layer.
        expert_norm: experts with BatchNorm and SiLU; without it, ReLU experts.
        ranks: of the feature gate before each bank; () for none.

    Returns (from forward, for x [T, D]): logits [T, tasks], and one LevelOutput per level.

    Raises ValueError for levels that do not fit each other.

    Source: Wang et al. 2025 (HoME), section 3.

    >>> tasks = {"click": "watch", "long view": "watch", "like": "social"}
    >>> model = MultiTaskMoE.from_preset("home", 16, tasks)
    >>> logits, levels = model(torch.randn(5, 16))
    >>> logits.shape, [tuple(level.weights_TGE.shape) for level in levels]
    (torch.Size([5, 3]), [(5, 3, 6), (5, 3, 6)])
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[Level],
        *,
        hidden: int = 32,
        tower: int = 16,
        expert_norm: bool = True,
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.layout, widths = list(levels), {INPUT: dim}
        self.levels = nn.ModuleList()
        for level in levels:
            level.check(list(widths))
            self.levels.append(_GatedLevel(level, widths, hidden, expert_norm, ranks))
            widths = dict.fromkeys(level.gates, hidden)
        self.tasks = list(widths)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, tower), nn.ReLU(), nn.Linear(tower, 1)) for _ in self.tasks
        )

    @classmethod
    def from_preset(
        cls, preset: Preset, dim: int, tasks: Mapping[str, str], **options: Any
    ) -> "MultiTaskMoE":
        """One of the published layouts, with the experts it was published with.

        Args:
            preset: "shared-bottom", "mmoe", "cgc", "ple", "adatt" or "home".
            dim: D, features.
            tasks: task → its category, which only HoME looks at.
            options: of the layout, such as `experts=10` for "mmoe", and of this class. "home" has
                `expert_norm=True, ranks=(4, 8)` unless told otherwise, the others ReLU experts and no feature
                gate.

        Raises ValueError for an unknown preset, fewer than one task, or a task without a category.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}; use one of {', '.join(PRESETS)}")
        if not tasks or not all(isinstance(c, str) and c for c in tasks.values()):
            lost = [task for task, category in tasks.items() if not category] or "no task"
            raise ValueError(f"{lost} without a category; give every task exactly one")
        own = {"hidden", "tower", "expert_norm", "ranks"} & {*options}
        kept: dict[str, Any] = {"expert_norm": preset == "home", "ranks": (4, 8) if preset == "home" else ()}
        kept |= {name: options.pop(name) for name in own}
        return cls(dim, PRESETS[preset](tasks, **options), **kept)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, list[LevelOutput]]:
        below, levels = {INPUT: x_TD}, []
        for level in self.levels:
            below, output = level(below)
            levels.append(output)
        logits = [tower(h) for tower, h in zip(self.towers, below.values(), strict=True)]
        return torch.cat(logits, 1), levels


class _GatedLevel(nn.Module):
    bank_E: Tensor

    def __init__(
        self, level: Level, widths: Mapping[str, int], hidden: int, norm: bool, ranks: Sequence[int]
    ) -> None:
        super().__init__()
        self.level = level
        banks, gates = list(level.banks.values()), list(level.gates.values())
        dim, dim_gate = widths[banks[0].reads], sum(widths[name] for name in gates[0].reads)
        self.experts = NormalizedExperts(
            len(level.bank_of), dim, hidden, norm=norm, activation="silu" if norm else "relu"
        )
        self.feature_gate = FeatureGate(dim, ranks, len(banks)) if ranks else None
        self.gates = MaskedGates(dim_gate, level.reach)
        has_own = bool(level.own.any())
        self.self_gates = MaskedGates(dim_gate, level.own, lone="sigmoid") if has_own else None
        bank_E = [list(level.banks).index(name) for name in level.bank_of]
        self.register_buffer("bank_E", torch.tensor(bank_E), persistent=False)
        # one input for all is one matrix product, where an input each would be a batch of small ones
        self.one_input = len({bank.reads for bank in banks}) == 1 and not ranks
        self.one_gate_input = len({gate.reads for gate in gates}) == 1

    def forward(self, below: dict[str, Tensor]) -> tuple[dict[str, Tensor], LevelOutput]:
        banks, gates = list(self.level.banks.values()), list(self.level.gates.values())
        x = below[banks[0].reads]
        if not self.one_input:
            x = torch.stack([below[bank.reads] for bank in banks], 1)
            x = x if self.feature_gate is None else self.feature_gate(x)
            x = x[:, self.bank_E]
        q = torch.cat([below[name] for name in gates[0].reads], -1)
        if not self.one_gate_input:
            q = torch.stack([torch.cat([below[name] for name in gate.reads], -1) for gate in gates], 1)
        own_TGE = None if self.self_gates is None else self.self_gates(q)
        output = LevelOutput(self.experts(x), self.gates(q), own_TGE)
        h_TGH = output.total_TGE @ output.outputs_TEH
        return dict(zip(self.level.gates, h_TGH.unbind(1), strict=True)), output


@torch.no_grad()
def expert_health(model: MultiTaskMoE, batches: Sequence[Tensor]) -> list[ExpertHealth]:
    """Health of every level's experts on some data, in evaluation mode.

    Args:
        model: comes back in the mode it was in.
        batches: of features [T, D].
    """
    health, training = [ExpertHealth() for _ in model.levels], model.training
    model.eval()
    for x_TD in batches:
        for monitor, level in zip(health, model(x_TD)[1], strict=True):
            monitor.update(level.outputs_TEH, level.weights_TGE)
    model.train(training)
    return health
