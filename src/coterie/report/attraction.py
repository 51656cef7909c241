"""What each expert attracts: its load, its words and bytes, and a passage coloured by expert.

Letters: L MoE layers, B sequences, S positions, T = B·S tokens in row-major order, E experts, K slots per
token, W distinct words or bytes. Ids are bytes 0 … 255, and 256 for <|endoftext|>.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coterie.data import END_OF_TEXT

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.hf import BlockRecord
    from coterie.nn import Routing

    Ids = Tensor | NDArray[np.integer]

END_TEXT = "<|endoftext|>"
SMOOTHING = 32  # slots every word is imagined to have had at the experts' overall shares

MIN_LIFT = 1.1  # a word nearer its fair share than this says nothing about an expert

# ASCII words, and any character of several bytes except General Punctuation (dashes, quotes: E2 80 xx)
# and Latin-1 symbols (C2 xx), which end a word.
_WORD = re.compile(rb"(?:[A-Za-z0-9_]|(?!\xe2\x80)[\xc3-\xf4][\x80-\xbf]+)+")
_BYTE_NAMES = {9: "tab", 10: "newline", 13: "return", 32: "space", END_OF_TEXT: END_TEXT}


@dataclass(frozen=True)
class Attracted:
    """A word or byte that an expert attracts.

    Args:
        text: the word, or the byte's name.
        count: slots the expert spent on it.
        lift: share of the expert's slots on it over the share of all slots on it, smoothed toward 1.
    """

    text: str
    count: int
    lift: float


@dataclass(frozen=True)
class Passage:
    """A passage of C characters and where every layer sent them.

    Args:
        texts: the C characters; see `passage` for those that cannot be shown.
        experts: L × C lists of expert ids by falling combine weight; empty if no slot was used.
        weights: L × C lists of the combine weights of those experts.
    """

    texts: list[str]
    experts: list[list[list[int]]]
    weights: list[list[list[float]]]


def load_by_layer(routings: Sequence["Routing"]) -> NDArray[np.float64]:
    """Load of every expert, [L, E], as a multiple of its fair share: 1.0 is balanced, E is collapse.

    Raises:
        ValueError: the layers do not all have the same number of experts.

    >>> import torch; from coterie.nn import Routing
    >>> load_by_layer([Routing.dense(torch.tensor([[0.9, 0.1], [0.2, 0.8]]))]).tolist()
    [[1.0, 1.0]]
    """
    sizes = [routing.num_experts for routing in routings]
    if len(set(sizes)) > 1:
        raise ValueError(f"layers have {sizes} experts; one heat map needs the same number in each")
    if not routings:
        return np.zeros((0, 0))
    load_LE = np.stack([routing.load.cpu().numpy().astype(np.float64) for routing in routings])
    share_LE: NDArray[np.float64] = load_LE / load_LE.mean(1, keepdims=True).clip(min=1e-9)
    return share_LE


def attracted_words(
    ids_BS: "Ids", routing: "Routing", top: int = 8, *, min_count: int = 8
) -> list[list[Attracted]]:
    """The words each expert attracts most, by lift.

    A word is a maximal run of letters, digits and underscores within a row; a token counts for the word it
    lies in. Slots on other tokens count in the shares only.

    Args:
        ids_BS: int64 [B, S], 0 … 256.
        routing: of those B·S tokens, in row-major order.
        top: words per expert, at most.
        min_count: a word counts only if it occurs this often in the text.

    Returns: for each of E experts, up to `top` words with a lift of at least `MIN_LIFT`, the largest first.

    Raises:
        ValueError: the ids are not [B, S], not in 0 … 256, or not as many as the routing's tokens.

    Lift is P(expert | word) / P(expert); the former is smoothed with a Beta prior of `SMOOTHING` slots around
    the latter, so that a rare word needs more than luck. For a given expert, lift and log odds rank alike.

    >>> import torch; from coterie.nn import Routing
    >>> ids_BS = torch.tensor([list(b"do " * 9 + b"if " * 9)])
    >>> is_if_T = torch.tensor([0.0] * 27 + [1.0] * 27)
    >>> one_hot_TE = torch.stack([1 - is_if_T, is_if_T], 1)
    >>> routing = Routing.dense(one_hot_TE)
    >>> [[word.text for word in words] for words in attracted_words(ids_BS, routing.keep(one_hot_TE > 0))]
    [['do'], ['if']]
    """
    ids = _checked(ids_BS, routing)
    number_of: dict[bytes, int] = {}
    words_T = np.full(ids.shape, -1)
    occurrences: list[int] = []
    for row, numbers in zip(np.where(ids == END_OF_TEXT, 0, ids).astype(np.uint8), words_T, strict=True):
        for match in _WORD.finditer(row.tobytes()):
            number = number_of.setdefault(match.group(), len(number_of))
            if number == len(occurrences):
                occurrences.append(0)
            occurrences[number] += 1
            numbers[match.start() : match.end()] = number
    names = [show(word.decode("utf-8", "replace")) for word in number_of]
    return _rank(words_T.reshape(-1), np.array(occurrences, np.int64), names, routing, top, min_count)


def attracted_bytes(
    ids_BS: "Ids", routing: "Routing", top: int = 8, *, min_count: int = 8
) -> list[list[Attracted]]:
    """The bytes each expert attracts most, by lift; see `attracted_words`.

    Bytes without a printable character are named: "space", "newline", "0xe2".
    """
    ids_T = _checked(ids_BS, routing).reshape(-1)
    names = [byte_name(number) for number in range(END_OF_TEXT + 1)]
    return _rank(ids_T, np.bincount(ids_T, minlength=END_OF_TEXT + 1), names, routing, top, min_count)


def attracted_tokens(
    ids_T: "Ids", name: Callable[[int], str], record: "BlockRecord", top: int = 8, *, min_count: int = 4
) -> list[list[Attracted]]:
    """The tokens of any vocabulary that each expert attracts most, by lift; see `attracted_words`.

    Args:
        ids_T: [T].
        name: what an id is shown as.
        record: of those T tokens.
        top: tokens per expert, at most.
        min_count: a token counts only if it occurs this often.
    """
    distinct_W, words_T, occurrences_W = np.unique(np.asarray(ids_T), return_inverse=True, return_counts=True)
    names = [show(name(int(number))) for number in distinct_W]
    return _rank(words_T.astype(np.int64), occurrences_W, names, record, top, min_count)


def passage(ids_S: "Ids", routings: Sequence["Routing"], start: int, length: int) -> Passage:
    """A passage, character by character, with the experts that every layer chose.

    A character of several UTF-8 bytes is kept whole and shows its last byte's experts, which have seen all
    of it. A byte that belongs to no character, and a character without a printable form, become "·".

    Args:
        ids_S: int64 [S], 0 … 256 (or any shape with S tokens in row-major order).
        routings: one per MoE layer, of those S tokens.
        start: first token shown.
        length: tokens shown, at least 1.

    Raises:
        ValueError: the passage is not inside the S tokens, or a routing is of another number of tokens.

    >>> import torch; from coterie.nn import Routing
    >>> ids_S = torch.tensor([*"né".encode(), 255])
    >>> shown = passage(ids_S, [Routing.dense(torch.eye(4))], 0, 4)
    >>> shown.texts, [experts[0] for experts in shown.experts[0]]
    (['n', 'é', '·'], [0, 2, 3])
    """
    ids = np.asarray(ids_S).reshape(-1)
    for routing in routings:
        _checked(ids.reshape(1, -1), routing)
    if length < 1 or start < 0 or start + length > len(ids):
        raise ValueError(
            f"start={start} and length={length} lie outside the {len(ids)} tokens; "
            f"use 0 ≤ start, 1 ≤ length, start + length ≤ {len(ids)}"
        )
    texts, lasts = _characters(ids[start : start + length].tolist())
    pairs = [_by_weight(routing, [start + last for last in lasts]) for routing in routings]
    return Passage(texts, [experts for experts, _ in pairs], [weights for _, weights in pairs])


def show(text: str) -> str:
    """The text with every character that has no printable form as "·"; newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def byte_name(number: int) -> str:
    """A byte as a reader knows it.

    >>> byte_name(97), byte_name(32), byte_name(226), byte_name(256)
    ('a', 'space', '0xe2', '<|endoftext|>')
    """
    return _BYTE_NAMES.get(number) or (chr(number) if 32 < number < 127 else f"0x{number:02x}")


def _checked(ids_BS: "Ids", routing: "Routing") -> NDArray[np.int64]:
    ids = np.asarray(ids_BS)
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {ids.shape}; should be [B, S]")
    if ids.size != routing.experts.shape[0]:
        raise ValueError(
            f"{ids.size} ids, but a routing of {routing.experts.shape[0]} tokens; should be equal"
        )
    if ids.size and not (ids.min() >= 0 and ids.max() <= END_OF_TEXT):
        raise ValueError(f"ids run from {ids.min()} to {ids.max()}; should lie in 0 … {END_OF_TEXT}")
    return ids.astype(np.int64)


def _rank(
    names_T: NDArray[np.int64],
    occurrences_W: NDArray[np.int64],
    names: list[str],
    routing: "Routing | BlockRecord",
    top: int,
    min_count: int,
) -> list[list[Attracted]]:
    experts_TK = routing.experts.cpu().numpy()
    words_TK = np.broadcast_to(names_T[:, None], experts_TK.shape)
    used_TK, E, W = experts_TK >= 0, routing.num_experts, len(names)
    share_E = np.bincount(experts_TK[used_TK], minlength=E) / max(int(used_TK.sum()), 1)
    named_TK = used_TK & (words_TK >= 0)
    counts_WE = np.bincount(words_TK[named_TK] * E + experts_TK[named_TK], minlength=W * E).reshape(W, E)

    probability_WE = (counts_WE + SMOOTHING * share_E) / (counts_WE.sum(1, keepdims=True) + SMOOTHING)
    lift_WE = probability_WE / share_E.clip(min=1e-12)
    lift_WE[(counts_WE == 0) | (occurrences_W < min_count)[:, None]] = 0
    best_E = np.argsort(-lift_WE, axis=0, kind="stable")[:top].T
    return [
        [
            Attracted(names[w], int(counts_WE[w, e]), float(lift_WE[w, e]))
            for w in best_W
            if lift_WE[w, e] >= MIN_LIFT
        ]
        for e, best_W in enumerate(best_E)
    ]


def _characters(ids: list[int]) -> tuple[list[str], list[int]]:
    """Characters of a run of ids, and the position of each one's last byte."""
    texts, lasts, position = [], [], 0
    while position < len(ids):
        text, size = _character(ids[position : position + 4])
        position += size
        texts.append(text)
        lasts.append(position - 1)
    return texts, lasts


def _character(ids: list[int]) -> tuple[str, int]:
    if ids[0] == END_OF_TEXT:
        return END_TEXT, 1
    for size in range(1, len(ids) + 1):
        if ids[size - 1] == END_OF_TEXT:
            break
        try:
            return show(bytes(ids[:size]).decode("utf-8")), size
        except UnicodeDecodeError:
            continue
    return "·", 1


def _by_weight(routing: "Routing", tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
    experts_CK = routing.experts[tokens].cpu().numpy()
    weights_CK = routing.weights[tokens].detach().float().cpu().numpy()
    order_CK = np.argsort(np.where(experts_CK >= 0, -weights_CK, np.inf), axis=1, kind="stable")
    experts_CK = np.take_along_axis(experts_CK, order_CK, 1)
    weights_CK = np.take_along_axis(weights_CK, order_CK, 1)
    used = (experts_CK >= 0).sum(1)
    experts = [row[:n].tolist() for row, n in zip(experts_CK, used, strict=True)]
    weights = [row[:n].tolist() for row, n in zip(weights_CK, used, strict=True)]
    return experts, weights
