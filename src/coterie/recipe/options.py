"""Options of a part, read from its signature: what may be given, of what type, and what it is by default."""

import difflib
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN: tuple[Any, ...] = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Option:
    """One argument that a user may set. `default` is `inspect.Parameter.empty` for one that must be given."""

    name: str
    annotation: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        kind = str(self.annotation) if get_args(self.annotation) else self.annotation.__name__
        kind = kind.replace("collections.abc.", "").replace("typing.", "")
        return f"{self.name}: {kind}" + ("" if self.required else f" = {self.default!r}")


def options_of(part: Callable[..., Any], given: Collection[str] = ()) -> dict[str, Option]:
    """The plainly typed arguments of a function or class, without those that the caller gives.

    Numbers, texts, truth values, choices and lists of numbers are plain; tensors and modules are not.

    >>> def part(dim: int, *, p: float = 0.4, kind: Literal["a", "b"] = "a"): ...
    >>> [str(option) for option in options_of(part, given=["dim"]).values()]
    ['p: float = 0.4', "kind: Literal['a', 'b'] = 'a'"]
    """
    hints = get_type_hints(part.__init__ if inspect.isclass(part) else part)
    found = {}
    for name, parameter in inspect.signature(part).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and name not in given and _is_plain(hints.get(name)):
            found[name] = Option(name, hints[name], parameter.default)
    return found


def read_options(
    where: str, options: Mapping[str, Option], values: Mapping[str, Any], at: Callable[[str], str]
) -> dict[str, Any]:
    """The values as their options' types.

    Args:
        where: what the options belong to, for messages: "router top-p".
        options: what `options_of` found.
        values: option → what was written.
        at: option → where it was written: "a.yaml, line 3: ".

    Raises:
        ValueError: an unknown option (the closest is named), one missing, or a value of another type.

    >>> options = options_of(lambda: None) | {"p": Option("p", float, 0.4)}
    >>> read_options("top-p", options, {"p": "4e-1"}, lambda name: "")
    {'p': 0.4}
    """
    read = {}
    for name, value in values.items():
        if name not in options:
            raise ValueError(f"{at(name)}{where} has no option {name!r}; {suggest(name, list(options))}")
        read[name] = _convert(value, options[name], f"{at(name)}{where}: {name}")
    missing = [name for name, option in options.items() if option.required and name not in read]
    if missing:
        raise ValueError(f"{at(missing[0])}{where} needs {', '.join(missing)}")
    return read


def suggest(name: str, known: Sequence[str]) -> str:
    """What to use instead of an unknown name: the closest known one, or the list of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (
        f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known) or 'none: it takes none'}"
    )


def _is_plain(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType):
        return all(map(_is_plain, get_args(hint)))
    if origin in (Sequence, list):
        return get_args(hint) in ((float,), (int,))
    return hint in _PLAIN


def _convert(value: Any, option: Option, where: str) -> Any:
    hint = option.annotation
    for each in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(each) is Literal and value in get_args(each):
            return value
        if get_origin(each) in (Sequence, list) and isinstance(value, list):
            return [_convert(v, Option(option.name, get_args(each)[0], None), where) for v in value]
        if each is type(None) and value is None:
            return None
        if each is float and not isinstance(value, bool) and _is_number(value):
            return float(value)  # YAML reads 4e-3, without a point, as text
        if each is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if each in (bool, str) and isinstance(value, each):
            return value
    wanted = str(option).partition(": ")[2].partition(" = ")[0]
    raise ValueError(f"{where} is {value!r}; should be {wanted}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
