"""A recipe: read from YAML and options, checked against the parts it names, written back whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from coterie.data import VOCAB_SIZE
from coterie.models import DecoderConfig
from coterie.recipe.options import Option, options_of, read_options, suggest
from coterie.recipe.parts import (
    EXPERTS,
    GIVEN,
    GIVEN_TO_SCORES,
    NEEDS_K,
    ROUTERS,
    SCORES,
    WHOLE_ROUTERS,
    Part,
)
from coterie.recipe.systems import SYSTEMS
from coterie.train import language_model_loss

# 8 experts, top-2, half as wide each as the dense network; the 8 columns more that the dense network gets
# outweigh the router, so that the MoE never has more active parameters.
SIZES: dict[str, Any] = {
    "dim": 96,
    "layers": 3,
    "heads": 3,
    "kv_heads": 3,
    "head_dim": 32,
    "hidden": 2 * 192 + 8,
    "num_experts": 8,
    "top_k": 2,
    "expert_hidden": 192,
    "max_len": 1024,
    "tie_embeddings": False,
}

SECTIONS = ("name", "text", "model", "router", "score", "experts", "system", "loss", "train")


@dataclass(frozen=True)
class Training:
    """How a recipe trains; see `coterie.train.fit`.

    Args:
        steps: optimizer steps.
        batch_size: windows per step.
        seq_len: bytes per window.
        lr: peak learning rate.
        min_lr_ratio: share of it left at the end.
        warmup_steps: steps of linear rise; None for a twentieth of all.
        weight_decay: of matrices.
        grad_clip: largest norm of the gradient; None for no limit.
        accumulate: micro-batches per step.
        heldout: share of the text that is set aside.
        seed: of weights, split and data order.
        mixed_precision: "bf16" or "fp16"; None for float32.
    """

    steps: int = 2000
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 4e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    accumulate: int = 1
    heldout: float = 0.1
    seed: int = 0
    mixed_precision: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A language model and its training, as plain values.

    Args:
        name: what tables call it.
        text: files and folders to learn from; empty for the Python standard library's own sources.
        model: arguments of `DecoderConfig` that differ from `SIZES`.
        router, score, experts, system: {"name": …, and the part's options}; empty for the default, which is
            top-k over a linear score and SwiGLU experts. A system is router, experts and loss in one.
        loss: arguments of `language_model_loss`.
        train: the training.

    >>> recipe = Recipe.parse("{router: {name: top-p, p: 0.4}, train: {steps: 10}}")
    >>> recipe.router, recipe.train.steps, recipe.config.num_experts
    ({'name': 'top-p', 'p': 0.4}, 10, 8)
    """

    name: str = "model"
    text: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    train: Training = Training()

    @property
    def config(self) -> DecoderConfig:
        """The sizes of the decoder."""
        return DecoderConfig(VOCAB_SIZE, **{**SIZES, **self.model})

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> "Recipe":
        """Reads a YAML file; its name is the file's unless it gives one.

        Args:
            path: of the file.
            overrides: (section or section.option, value), such as ("router.p", 0.3), that win over the file.

        Raises:
            ValueError: a file that is missing or no YAML, or what its sections and options get wrong, with
                the line.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is no file; give a recipe in YAML")
        return cls.parse(path.read_text("utf-8"), overrides, source=str(path), name=path.stem)

    @classmethod
    def parse(
        cls,
        text: str,
        overrides: Sequence[tuple[str, Any]] = (),
        *,
        source: str = "recipe",
        name: str = "model",
    ) -> "Recipe":
        """The same from YAML text; `source` is what messages call it."""
        content, lines = _load(text, source)
        for key, value in overrides:
            _override(content, key, value)
            lines = {place: line for place, line in lines.items() if ".".join(place) != key}

        def at(*place: str) -> str:
            line = lines.get(place) or lines.get(place[:1])
            flag = ".".join(place).replace("_", "-")
            if any(key in (".".join(place), place[0]) for key, _ in overrides) and place not in lines:
                return f"--{flag}: "
            return f"{source}, line {line}: " if line else ""

        for section in content:
            if section not in SECTIONS:
                raise ValueError(f"{at(section)}no section {section!r}; {suggest(section, SECTIONS)}")
        return _check({"name": name, **content}, at)

    def to_yaml(self) -> str:
        """YAML that `parse` reads back as an equal recipe."""
        content = {key: value for key, value in asdict(self).items() if value}
        content["text"] = list(self.text)
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        return text


def parts() -> dict[str, dict[str, list[Option]]]:
    """section → name → options, of everything that a recipe can say."""
    named: dict[str, tuple[Mapping[str, Part], Sequence[str]]] = {
        "router": (ROUTERS, GIVEN),
        "score": (SCORES, GIVEN_TO_SCORES),
        "experts": (EXPERTS, GIVEN),
        "system": (SYSTEMS, GIVEN),
    }
    found = {
        section: {name: list(options_of(part, given).values()) for name, part in table.items()}
        for section, (table, given) in named.items()
    }
    for name in NEEDS_K:
        found["router"][name] = [_with_default_k(option) for option in found["router"][name]]
    plain = {"model": _model_options(), "loss": _loss_options(), "train": options_of(Training)}
    return {**found, **{section: {"": list(options.values())} for section, options in plain.items()}}


def _check(content: dict[str, Any], at: Callable[..., str]) -> Recipe:
    known = parts()
    read: dict[str, Any] = {"name": str(content["name"]), "text": _text(content.get("text"), at("text"))}
    for section in ("model", "loss", "train"):
        values = _mapping(content.get(section), section, at(section))
        options = {option.name: option for option in known[section][""]}
        where = {"model": "the model", "loss": "the loss", "train": "training"}[section]
        read[section] = read_options(where, options, values, lambda key, s=section: at(s, key))  # type: ignore[misc]
    for section in ("router", "score", "experts", "system"):
        read[section] = _named(content.get(section), section, known[section], at)
    read["train"] = Training(**read["train"])
    recipe = Recipe(**read)
    _check_together(recipe, at)
    return recipe


def _named(
    value: Any, section: str, known: dict[str, list[Option]], at: Callable[..., str]
) -> dict[str, Any]:
    if value is None:
        return {}
    values = dict(value) if isinstance(value, dict) else {"name": value}
    name = values.pop("name", None)
    if name is None:
        raise ValueError(f"{at(section)}{section} has no name; {suggest('', list(known))}")
    if name not in known:
        raise ValueError(f"{at(section, 'name')}no {section} {name!r}; {suggest(str(name), list(known))}")
    options = {option.name: option for option in known[name]}
    return {
        "name": name,
        **read_options(f"{section} {name}", options, values, lambda key: at(section, key)),
    }


def _check_together(recipe: Recipe, at: Callable[..., str]) -> None:
    beside = [section for section in ("router", "score", "experts") if getattr(recipe, section)]
    if recipe.system and beside:
        raise ValueError(
            f"{at(beside[0])}system {recipe.system['name']} has a router and experts of its own; "
            f"leave {' and '.join(beside)} out"
        )
    if recipe.score and recipe.router.get("name") in WHOLE_ROUTERS:
        raise ValueError(f"{at('score')}router {recipe.router['name']} scores by itself; leave score out")
    experts = recipe.config.num_experts  # DecoderConfig checks the sizes
    chosen = [*beside, *(["system"] if recipe.system else [])]
    if not experts and chosen:
        raise ValueError(
            f"{at(chosen[0])}model.num_experts is 0, which makes a dense model; leave {chosen[0]} out"
        )


def _text(value: Any, at: str) -> tuple[str, ...]:
    paths = [value] if isinstance(value, str) else value or []
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{at}text is {value!r}; should be a path or a list of paths")
    return tuple(paths)


def _mapping(value: Any, section: str, at: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{at}{section} is {value!r}; should be options, such as {{steps: 1000}}")
    return value


def _model_options() -> dict[str, Option]:
    options = options_of(DecoderConfig, ["vocab_size"])
    return {name: Option(name, o.annotation, SIZES.get(name, o.default)) for name, o in options.items()}


def _loss_options() -> dict[str, Option]:
    return options_of(language_model_loss)


def _with_default_k(option: Option) -> Option:
    return Option("k", option.annotation, None) if option.name == "k" else option  # None: the model's top_k


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    section, _, option = key.partition(".")
    if not option:
        content[section] = value
        return
    here = content.get(section)
    content[section] = {**(here if isinstance(here, dict) else {"name": here} if here else {}), option: value}


def _load(text: str, source: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The content, and the line of every section and option."""
    try:
        content, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{source}{line}: this is no YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}; should be sections such as `model:`")
    lines: dict[tuple[str, ...], int] = {}
    for key, value in node.value:
        lines[(key.value,)] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            for option, _ in value.value:
                lines[(key.value, option.value)] = option.start_mark.line + 1
    return content, lines
