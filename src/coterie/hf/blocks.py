"""The MoE blocks of a transformers model, as one editable view.

for block in find_moe_blocks(model):
    block.keep(range(8))
save(model, folder)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from coterie.hf import edit, modules
from coterie.hf.layout import FIELDS, SHARED, BankLayout, BlockLayout, block_layout, join
from coterie.hf.tensors import ExpertTensors, RouterTensors, pack, unpack


def find_moe_blocks(model: PreTrainedModel) -> list["MoEBlock"]:
    """Every MoE block of a model whose experts use transformers' experts interface, in order of depth.

    Args:
        model: on any device; on "meta" the blocks tell names and numbers, and their tensors are empty.

    Raises ValueError if there is none, a block's router is unknown, or two blocks share only a part.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> for block in find_moe_blocks(model):
    ...     block.keep([0, 2, 3])
    >>> block.name, block.num_experts, block.experts.up.shape, model.config.num_local_experts
    ('model.layers.1.mlp', 3, torch.Size([3, 8, 16]), 3)
    """
    blocks: dict[int, MoEBlock] = {}
    for name, module in model.named_modules():
        if not modules.is_bank(module):
            continue
        block = MoEBlock(model, name)
        tied = blocks.setdefault(id(module.down_proj), block)
        if tied is not block:  # two stacks of layers share these experts
            for role, tensor in block._stored().items():
                if tensor.data_ptr() != tied._stored()[role].data_ptr():
                    raise ValueError(f"{block.name} and {tied.name} share their experts but not their {role}")
            tied.also.append(block)
    if not blocks:
        hint = (
            "; it is quantised: load it dequantised" if hasattr(model.config, "quantization_config") else ""
        )
        raise ValueError(
            f"{type(model).__name__} has no MoE block with transformers' experts interface{hint}"
        )
    return list(blocks.values())


@dataclass(frozen=True)
class Snapshot:
    """The tensors and numbers of a block at one time; `MoEBlock.snapshot` makes it."""

    stored: Mapping[str, Tensor]
    layout: BlockLayout


class MoEBlock:
    """One MoE block: its router, its experts, its shared experts, and edits of them.

    An edit changes modules and the configuration at once, so that the model computes with the edited block
    right away. `find_moe_blocks` makes these.

    Attributes:
        layout: names and numbers, without tensors.
        module: the module that holds router and experts.
        also: blocks elsewhere in the model that share these tensors and are edited with them.
    """

    def __init__(self, model: PreTrainedModel, bank_name: str) -> None:
        self._model = model
        self._bank: Any = model.get_submodule(bank_name)
        name, _, experts = bank_name.rpartition(".")
        self.module = model.get_submodule(name)
        self.also: list[MoEBlock] = []
        bank = BankLayout(
            gated=bool(self._bank.has_gate),
            biased=bool(self._bank.has_bias),
            transposed=bool(self._bank.is_transposed),
            interleaved=not self._bank.is_concatenated,
        )
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        self.layout = block_layout(
            name,
            experts,
            {join(name, n): t.shape for n, t in tensors},
            bank,
            **modules.read_numbers(self.module, self._bank),
        )

    def __repr__(self) -> str:
        return f"MoEBlock({self.name!r}, num_experts={self.num_experts}, top_k={self.top_k})"

    @property
    def name(self) -> str:
        """Of the block in its model."""
        return self.layout.name

    @property
    def num_experts(self) -> int:
        """E, shared experts not counted."""
        return self.layout.num_experts

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return self.layout.top_k

    @property
    def config(self) -> PretrainedConfig:
        """The configuration that holds this block's numbers."""
        config: PretrainedConfig = self._bank.config
        return config

    @property
    def bank(self) -> nn.Module:
        """The module of the experts, which transformers' experts interface calls."""
        bank: nn.Module = self._bank
        return bank

    @property
    def layer(self) -> nn.Module:
        """The layer that the block is in."""
        return self._model.get_submodule(self.name.rpartition(".")[0])

    @property
    def experts(self) -> ExpertTensors:
        """All experts in one orientation: views of the model's parameters, which can be edited in place."""
        return unpack(self._stored(), self.layout.bank)

    @property
    def router(self) -> RouterTensors:
        """The router's entries of the E routed experts: views, which can be edited in place."""
        stored, e = self._stored(), self.num_experts
        selection = stored.get("selection_bias")
        return RouterTensors(
            rows=stored["rows"][:e],
            bias=stored["bias"][:e] if "bias" in stored else None,
            selection_bias=None if selection is None else selection.flatten()[:e],
            scale=stored["scale"][:e] if "scale" in stored else None,
        )

    @property
    def shared(self) -> nn.Module | None:
        """The experts that every token goes to, or None."""
        parent = self._model.get_submodule(self.name.rpartition(".")[0])
        for holder in (self.module, parent):
            for name in SHARED:
                found = getattr(holder, name, None)
                if isinstance(found, nn.Module) and self._bank not in found.modules():
                    return found
        return None

    def keep(self, ids: Iterable[int]) -> None:
        """Drops all experts but `ids`; those keep their order.

        Raises ValueError if fewer than top_k are left, or the routing groups would not survive.
        """
        self._write(edit.take(self.layout, self._stored(), sorted(ids)))

    def permute(self, order: Sequence[int]) -> None:
        """Renumbers the experts: the new expert i is the old `order[i]`. The model computes the same.

        Raises ValueError if `order` is no permutation, or would mix routing groups.
        """
        if sorted(order) != list(range(self.num_experts)):
            raise ValueError(f"{self.name}: order must hold each of 0 … {self.num_experts - 1} once")
        self._write(edit.take(self.layout, self._stored(), order))

    def merge(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Makes one expert of each group: the weighted mean of its members, router entries included.

        Args:
            groups: ids; an expert in no group is dropped.
            weights: one for each member, divided by their sum; all equal if None.
        """
        weights = [[1.0] * len(g) for g in groups] if weights is None else weights
        self._write(edit.merge(self.layout, self._stored(), groups, weights))

    def append(self, experts: ExpertTensors, router: RouterTensors) -> None:
        """Adds n experts after the last.

        Args:
            experts: [n, …] each, such as `block.experts[[3]]` for a copy of expert 3.
            router: their entries, [n, …] each, such as `block.router[[3]]`.
        """
        new = pack(experts, self.layout.bank) | self._router_roles(router)
        self._write(edit.append(self.layout, self._stored(), new))

    def replace(
        self, ids: Sequence[int], experts: ExpertTensors | None = None, router: RouterTensors | None = None
    ) -> None:
        """Puts other experts, router entries or both in the places `ids`; arguments as in `append`."""
        new = pack(experts, self.layout.bank) if experts is not None else {}
        new |= self._router_roles(router) if router is not None else {}
        self._write(edit.replace(self.layout, self._stored(), ids, new))

    def snapshot(self) -> "Snapshot":
        """What the block is now, for `restore`. Copies nothing: values changed in place stay changed."""
        return Snapshot(self._stored(), self.layout)

    def restore(self, state: "Snapshot") -> None:
        """Makes the block what it was, or was made into, at a snapshot."""
        self._write(dict(state.stored))
        self._set_numbers(state.layout)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Undoes, when the context closes, whatever edits were made inside."""
        state = self.snapshot()
        try:
            yield
        finally:
            self.restore(state)

    def set_top_k(self, k: int) -> None:
        """Sends each token to `k` experts from now on; raises ValueError unless 1 ≤ k ≤ E."""
        if not 1 <= k <= self.num_experts:
            raise ValueError(f"top_k={k} but {self.name} has {self.num_experts} experts; use 1 ≤ top_k ≤ E")
        edit.check_groups(replace(self.layout, top_k=k), self.num_experts)
        self._set_numbers(replace(self.layout, top_k=k))

    def set_groups(self, groups: int, top_groups: int) -> None:
        """Divides the experts into `groups` groups, `top_groups` of which a token may choose from.

        (1, 1) lifts the limit of a group-limited router, which frees `keep`, `permute` and `append`.
        """
        layout = replace(self.layout, groups=groups, top_groups=top_groups)
        if not 1 <= top_groups <= groups:
            raise ValueError(f"top_groups={top_groups} but there are {groups} groups")
        edit.check_groups(layout, self.num_experts)
        self._set_numbers(layout)

    def resize(self, num_experts: int, top_k: int, groups: int, top_groups: int) -> None:
        """Gives a block other numbers, and tensors of that size without values, before weights are loaded."""
        layout = replace(self.layout, top_k=top_k, groups=groups, top_groups=top_groups)
        edit.check_groups(layout, num_experts)
        if num_experts != self.num_experts:
            self._write(edit.empty(self.layout, self._stored(), num_experts))
        self._set_numbers(replace(layout, num_experts=num_experts))

    def _stored(self) -> dict[str, Tensor]:
        names = {**self.layout.experts, **self.layout.router}
        return {role: modules.get_tensor(self._model, name).detach() for role, name in names.items()}

    def _router_roles(self, router: RouterTensors) -> dict[str, Tensor]:
        given = {role: t for role, t in vars(router).items() if t is not None}
        wanted = set(self.layout.router) - {"hash_table"}
        if set(given) != wanted:
            raise ValueError(f"{self.name}: router entries must be {sorted(wanted)}, got {sorted(given)}")
        return given

    def _write(self, stored: dict[str, Tensor]) -> None:
        """Puts tensors in place of the present ones, and the numbers that follow from them."""
        num_experts = stored["down"].shape[0]
        if num_experts != self.num_experts:
            self._check_config()
        for block in (self, *self.also):
            names = {**block.layout.experts, **block.layout.router}
            for role, tensor in stored.items():  # the first block makes parameters of them, the others share
                stored[role] = modules.set_tensor(self._model, names[role], tensor)
        self._set_numbers(replace(self.layout, num_experts=num_experts))

    def _set_numbers(self, layout: BlockLayout) -> None:
        """Writes the numbers of a layout into the modules, the configuration and the layouts."""
        changed = {what: getattr(layout, what) for what in FIELDS}
        changed = {what: n for what, n in changed.items() if n != getattr(self.layout, what)}
        if not changed:
            return
        self._check_config()
        for block in (self, *self.also):
            block.layout = replace(block.layout, **changed)
            modules.write_numbers(self._model, block.layout, block._bank, changed)

    def _check_config(self) -> None:
        if not any(config is self.config for config in modules.configs(self._model.config)):
            raise ValueError(
                f"{self.name} takes its numbers from a configuration made for its layer alone, "
                f"which {type(self._model.config).__name__} does not save; it can only be permuted"
            )
