import pytest
import torch

from coterie.data.topic_facts import KEYS, TOPIC_KEYS, TOPICS, topic_facts, topic_of


def test_a_key_has_one_response_whatever_the_seed_and_a_topics_responses_differ():
    ids = torch.cat([topic_facts(200, seed) for seed in (0, 1)])
    responses = {}
    for key, response in ids.view(-1, 2).tolist():
        assert responses.setdefault(key, response) == response
    assert len(responses) == KEYS
    for topic in range(TOPICS):
        own = [responses[topic * TOPIC_KEYS + k] for k in range(TOPIC_KEYS)]
        assert len(set(own)) == TOPIC_KEYS


def test_half_of_the_pairs_are_of_the_sequences_one_topic():
    about = topic_of(topic_facts(400, 0)[:, ::2])
    assert 0.45 < (about >= 0).double().mean() < 0.55
    for row in about.tolist():
        assert len(set(row) - {-1}) == 1


def test_a_topic_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"topics=\(8,\); name some of 0 to 7"):
        topic_facts(2, 0, topics=(8,))
