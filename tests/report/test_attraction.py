import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reports import random_routing

from coterie.nn import Routing
from coterie.report import attracted_bytes, attracted_words, load_by_layer, passage
from coterie.report.attraction import MIN_LIFT, SMOOTHING

TEXT = b"if x_1 == 2:\n\treturn caf\xc3\xa9 \xe2\x80\x94 if not x_1 else \xff\xfe return\n" * 6


def ids_of(text, rows=1):
    return torch.tensor(list(text)).view(rows, -1)


def by_plain_loop(labels, occurrences, routing, min_count):
    """{expert: {label: (count, lift)}} from the definition; a label of None is a token without a word."""
    slots, on_label, of_expert, both = 0, Counter(), Counter(), Counter()
    for label, experts in zip(labels, routing.experts.tolist(), strict=True):
        for expert in experts:
            if expert < 0:
                continue
            slots += 1
            of_expert[expert] += 1
            if label is not None:
                on_label[label] += 1
                both[label, expert] += 1
    found = {e: {} for e in range(routing.num_experts)}
    for (label, expert), count in both.items():
        share = of_expert[expert] / slots
        lift = (count + SMOOTHING * share) / (on_label[label] + SMOOTHING) / share
        if occurrences[label] >= min_count and lift >= MIN_LIFT:
            found[expert][label] = (count, lift)
    return found


def words_by_plain_loop(rows):
    labels, occurrences = [], Counter()
    for row in rows:
        word_at = [None] * len(row)
        for start in range(len(row)):
            if word_at[start] is None and chr(row[start]).isascii() and re.match(r"\w", chr(row[start])):
                end = start
                while end < len(row) and row[end] < 128 and re.match(r"\w", chr(row[end])):
                    end += 1
                word = bytes(row[start:end]).decode()
                word_at[start:end] = [word] * (end - start)
                occurrences[word] += 1
        labels += word_at
    return labels, occurrences


def as_dict(attracted):
    return {e: {a.text: (a.count, pytest.approx(a.lift)) for a in words} for e, words in enumerate(attracted)}


@given(st.integers(0, 1000), st.sampled_from([1.0, 0.6, 0.0]), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_words_are_those_a_plain_loop_counts(seed, used, min_count, rows):
    text = b"if x_1 == 2:\n    return cafe - if not x_1 else return 12" * 4
    routing = random_routing(len(text), num_experts=5, seed=seed, used=used)
    labels, occurrences = words_by_plain_loop(ids_of(text, rows).tolist())
    found = attracted_words(ids_of(text, rows), routing, top=1000, min_count=min_count)
    assert as_dict(found) == by_plain_loop(labels, occurrences, routing, min_count)


@given(st.integers(0, 1000), st.sampled_from([1.0, 0.6]), st.integers(1, 5))
def test_bytes_are_those_a_plain_loop_counts(seed, used, min_count):
    routing = random_routing(len(TEXT), num_experts=5, seed=seed, used=used)
    found = attracted_bytes(ids_of(TEXT), routing, top=1000, min_count=min_count)
    names = {9: "tab", 10: "newline", 32: "space"}
    labels = [names.get(b) or (chr(b) if 32 < b < 127 else f"0x{b:02x}") for b in TEXT]
    assert as_dict(found) == by_plain_loop(labels, Counter(labels), routing, min_count)


def test_masked_tokens_are_not_counted():
    text = b"aa bb " * 20
    mask = torch.tensor([c in b"a " for c in text])
    routing = Routing.dense(torch.full((len(text), 2), 0.5), mask=mask)
    counts = {a.text: a.count for e in attracted_bytes(ids_of(text), routing, min_count=1) for a in e}
    assert "b" not in counts
    assert load_by_layer([routing]).tolist() == [[1.0, 1.0]]


def test_letters_beyond_ascii_belong_to_words_and_dashes_do_not():
    text = "é–naïve–日本 «x» ".encode() * 10
    routing = Routing.dense(torch.tensor([[1.0, 0.0], [0.0, 1.0]])[[0] * (len(text) - 1) + [1]])
    used = routing.keep(routing.weights > 0)
    words = {a.text for words in attracted_words(ids_of(text), used, top=20) for a in words}
    assert words <= {"é", "naïve", "日本", "x"}
    ids = torch.cat([ids_of(text), torch.full((1, 400), 32)], 1)
    elsewhere = torch.cat([torch.zeros(len(text)), torch.ones(400)]).long()
    split = Routing(elsewhere[:, None], torch.ones(len(ids[0]), 1), *[torch.zeros(len(ids[0]), 2)] * 2, 2)
    assert {a.text for a in attracted_words(ids, split, top=20)[0]} == {"é", "naïve", "日本", "x"}


def test_a_word_does_not_cross_rows_or_documents():
    ids_BS = torch.tensor([[97, 98, 256, 99], [100, 32, 101, 102]])
    experts = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0])[:, None]
    routing = Routing(experts, torch.ones(8, 1), torch.zeros(8, 2), torch.zeros(8, 2), 2)
    found = attracted_words(ids_BS, routing, min_count=1)
    assert {a.text for a in found[0]} <= {"ab", "c", "d", "ef"}
    assert found[1] == []


def test_a_rare_word_does_not_beat_a_frequent_one_by_luck():
    text = b"rare " + b"often " * 200 + b"other " * 200
    to_zero = [True] * 5 + [True] * (6 * 190) + [False] * 60 + [False] * 1200
    experts = (~torch.tensor(to_zero)).long()[:, None]
    routing = Routing(experts, torch.ones(len(text), 1), *[torch.zeros(len(text), 2)] * 2, 2)
    assert attracted_words(ids_of(text), routing, min_count=1)[0][0].text == "often"


def test_an_expert_without_tokens_attracts_nothing():
    routing = Routing(torch.zeros(6, 1).long(), torch.ones(6, 1), torch.zeros(6, 3), torch.zeros(6, 3), 3)
    assert attracted_words(ids_of(b"aa bb "), routing, min_count=1)[1:] == [[], []]
    assert load_by_layer([routing]).tolist() == [[3.0, 0.0, 0.0]]


def test_no_tokens_attract_nothing():
    routing = random_routing(0, num_experts=3)
    assert attracted_words(torch.zeros(0, 4).long(), routing) == [[], [], []]
    assert load_by_layer([routing]).tolist() == [[0.0, 0.0, 0.0]]
    assert load_by_layer([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(6).long(), r"ids have shape \(6,\); should be \[B, S\]"),
        (torch.zeros(1, 5).long(), "5 ids, but a routing of 6 tokens"),
        (torch.full((1, 6), 257), "ids run from 257 to 257; should lie in 0 … 256"),
    ],
)
def test_wrong_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        attracted_bytes(ids, random_routing(6))


def test_layers_of_different_width_have_no_common_heat_map():
    with pytest.raises(ValueError, match=r"layers have \[4, 8\] experts"):
        load_by_layer([random_routing(6, 4), random_routing(6, 8)])


def test_passage_keeps_characters_whole_with_their_last_bytes_experts():
    ids = [*"aé日😀".encode(), 256, *b"\xff\xe6\x97z\x1b\n\t", 0xF0, 0x9F]
    routing = random_routing(len(ids))
    shown = passage(torch.tensor(ids), [routing], 0, len(ids))
    assert shown.texts == ["a", "é", "日", "😀", "<|endoftext|>", *"···z·\n\t··"]
    lasts = [0, 2, 5, 9, *range(10, len(ids))]
    by_weight = routing.weights.argsort(1, descending=True)
    expected = routing.experts.gather(1, by_weight)[lasts]
    assert shown.experts[0] == expected.tolist()
    assert shown.weights[0] == routing.weights.gather(1, by_weight)[lasts].tolist()


@given(st.lists(st.integers(0, 256), min_size=1, max_size=30))
def test_passage_loses_no_byte(ids):
    shown = passage(torch.tensor(ids), [random_routing(len(ids))], 0, len(ids))
    text = "".join(shown.texts).replace("<|endoftext|>", "")
    plain = bytes(i for i in ids if i < 128 and (31 < i < 127 or i in (9, 10)))
    assert bytes(b for b in text.encode() if b < 128) == plain
    assert len(shown.experts[0]) == len(shown.weights[0]) == len(shown.texts)


def test_passage_leaves_out_unused_slots_and_orders_signed_weights():
    experts = torch.tensor([[2, 0, 1], [-1, -1, -1], [-1, 3, 0]])
    weights = torch.tensor([[0.1, -0.5, 0.9], [0.0, 0.0, 0.0], [0.0, 0.2, 0.3]])
    routing = Routing(experts, weights.requires_grad_(), torch.zeros(3, 4), torch.zeros(3, 4), 4)
    shown = passage(torch.tensor([97, 98, 99]), [routing], 0, 3)
    assert shown.experts == [[[1, 2, 0], [], [0, 3]]]
    np.testing.assert_allclose(shown.weights[0][0], [0.9, 0.1, -0.5], rtol=1e-6)


def test_passage_starts_where_it_is_told():
    routing = random_routing(6)
    shown = passage(torch.tensor([list(b"abc"), list(b"def")]), [routing], 2, 3)
    assert shown.texts == ["c", "d", "e"]
    whole = passage(torch.tensor(list(b"abcdef")), [routing], 0, 6)
    assert shown.experts[0] == whole.experts[0][2:5]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (5, 2)])
def test_a_passage_outside_the_text_is_refused(start, length):
    with pytest.raises(ValueError, match=f"start={start} and length={length} lie outside the 6 tokens"):
        passage(torch.zeros(6).long(), [random_routing(6)], start, length)
