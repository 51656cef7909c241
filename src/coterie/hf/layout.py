"""Which tensors and which configuration fields belong to an MoE block of a transformers model.

This file alone knows the names. It works on names and shapes, so that a checkpoint can be edited tensor by
tensor; a live module is one source of them. How an expert bank stores its matrices is not a matter of names:
transformers' experts interface says it by four flags.

Letters: E experts, F their hidden width, D the width they read and write, V vocabulary, K experts per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The experts interface: how the two matrices of a bank are named, by whether the experts are gated.
MATRICES = {True: ("gate_up_proj", "down_proj"), False: ("up_proj", "down_proj")}

# Outside the bank, tensors with one entry per expert, by their name inside the block. Entries after the
# first E are not routed experts (a skip expert, the gates of shared experts) and stay last.
ROUTER = {
    "rows": (
        "gate.weight",
        "router.weight",
        "router.gate.weight",
        "router.proj.weight",
        "gate.wg.weight",
        "gate.router_mlp.out_proj.weight",
    ),
    "bias": ("router.bias", "gate.bias"),
    "selection_bias": (  # added to the scores for the choice of experts only
        "gate.e_score_correction_bias",
        "e_score_correction_bias",
        "expert_bias",
        "gate.moe_statics.e_score_correction_bias",
        "gate.balancing_biases",
    ),
    "scale": ("router.per_expert_scale",),  # multiplies the combine weight
    "hash_table": ("gate.tid2eid",),  # [V, K]: which experts a token of the vocabulary goes to
}

# Experts that every token goes to: in the block, or beside it in its parent.
SHARED = ("shared_experts", "shared_expert", "shared_mlp", "mlp")

# The fields of a configuration, and the attributes of modules, that hold a number.
FIELDS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    "groups": ("n_group", "num_expert_group"),
    "top_groups": ("topk_group",),
}
ATTRIBUTES = {
    "num_experts": ("num_experts", "num_local_experts"),
    "top_k": ("top_k", "num_experts_per_tok"),
    "groups": ("num_group",),
    "top_groups": ("topk_group",),
    "rows": ("out_features", "num_router_classes", "n_total_experts"),
}

# An attribute that means something else than its name says.
MISNAMED = {("OpenAIPrivacyFilterMLP", "num_experts"): "top_k"}


@dataclass(frozen=True)
class BankLayout:
    """How a bank stores its experts: the flags of transformers' experts interface.

    Args:
        gated: one matrix holds gate and up; otherwise there is up alone.
        biased: both matrices have biases.
        transposed: stored [E, in, out] instead of [E, out, in].
        interleaved: gate and up alternate row by row instead of lying one after the other.
    """

    gated: bool = True
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class BlockLayout:
    """One MoE block, told by names and numbers.

    Args:
        name: of the block in its model, such as "model.layers.0.mlp".
        bank: how the experts are stored.
        num_experts: E.
        top_k: K.
        groups: routing groups that the experts are divided into, in order, each E / groups experts.
        top_groups: groups that a token may choose from.
        group_min: experts that a group must have at least, 2 where it is scored by its two best.
        experts: the bank's tensors by role ("in", "in_bias", "down", "down_bias"), as names in the model.
        router: what else has an entry per expert, by role (see ROUTER), as names in the model.
    """

    name: str
    bank: BankLayout
    num_experts: int
    top_k: int
    groups: int
    top_groups: int
    group_min: int
    experts: Mapping[str, str]
    router: Mapping[str, str]


def block_layout(
    name: str,
    experts: str,
    shapes: Mapping[str, Sequence[int]],
    bank: BankLayout,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    group_min: int = 1,
) -> BlockLayout:
    """Finds a block's tensors among the names of a model.

    Args:
        name: of the block.
        experts: of its bank of experts, inside the block.
        shapes: of the tensors of the model, or of this block, by their names in the model.
        bank: how the bank stores its experts.
        top_k: K; `read_field` finds it in a configuration.
        groups: routing groups.
        top_groups: groups that a token may choose from.
        group_min: experts that a group must have at least.

    Raises ValueError if the router's rows are not among `shapes`, two tensors claim one role, or the bank
    holds more than its matrices and biases, as a quantised one does.

    >>> shapes = {"mlp.experts.gate_up_proj": (4, 12, 8), "mlp.experts.down_proj": (4, 8, 6),
    ...           "mlp.gate.weight": (4, 8)}
    >>> layout = block_layout("mlp", "experts", shapes, BankLayout(), top_k=2)
    >>> layout.num_experts, layout.top_k, layout.router
    (4, 2, {'rows': 'mlp.gate.weight'})
    """
    w_in, w_out = (join(name, experts, matrix) for matrix in MATRICES[bank.gated])
    stored = {"in": w_in, "down": w_out}
    if bank.biased:
        stored |= {"in_bias": f"{w_in}_bias", "down_bias": f"{w_out}_bias"}
    router: dict[str, str] = {}
    for role, candidates in ROUTER.items():
        present = [join(name, c) for c in candidates if join(name, c) in shapes]
        if len(present) > 1:
            raise ValueError(f"{name}: both {present[0]} and {present[1]} could be the router's {role}")
        if present:
            router[role] = present[0]
    if "rows" not in router:
        raise ValueError(
            f"{name}: no router found beside the experts; looked for {', '.join(ROUTER['rows'])}. "
            "A new family's name belongs into ROUTER of coterie/hf/layout.py"
        )
    num_experts = shapes[w_out][0]
    bank_name = join(name, experts)
    for other, shape in shapes.items():
        direct = other.startswith(f"{bank_name}.") and "." not in other.removeprefix(f"{bank_name}.")
        if direct and other not in stored.values() and num_experts in shape[:1]:
            raise ValueError(
                f"{other} also has an entry per expert, as in a quantised model; load it dequantised"
            )
    return BlockLayout(name, bank, num_experts, top_k, groups, top_groups, group_min, stored, router)


def read_field(config: Mapping[str, Any], what: str) -> int:
    """The number that a configuration holds under its family's own name; `what` is a key of FIELDS.

    >>> read_field({"moe_topk": 6}, "top_k")
    6
    """
    fields = fields_of(config, what)
    if not fields:
        raise ValueError(f"the configuration holds {what} under none of {', '.join(FIELDS[what])}")
    return int(config[fields[0]])


def fields_of(config: Mapping[str, Any], what: str) -> list[str]:
    """The names under which a family's configuration holds a number; `what` is a key of FIELDS.

    >>> fields_of({"moe_topk": 6, "moe_num_experts": 64}, "num_experts")
    ['moe_num_experts']
    """
    return [field for field in FIELDS[what] if isinstance(config.get(field), int)]


def join(*parts: str) -> str:
    """Parts of a dotted name, the empty ones left out.

    >>> join("", "mlp", "gate.weight")
    'mlp.gate.weight'
    """
    return ".".join(part for part in parts if part)
