import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from coterie.recsys.metrics import auc, gauc, masked_bce, ndcg

rows = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40)


@given(rows)
def test_auc_within_users_is_the_mean_of_each_users_auc_weighted_by_rows(rows):
    labels, scores, users = np.array(rows).T
    each = []
    for user in np.unique(users):
        mine = users == user
        if len(set(labels[mine])) == 2:
            each.append((roc_auc_score(labels[mine], scores[mine]), mine.sum()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found, skipped = gauc(labels, scores, users)
    assert skipped == len(set(users)) - len(each)
    if each:
        values, weights = zip(*each, strict=True)
        assert found == pytest.approx(np.average(values, weights=weights))
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    else:
        assert np.isnan(found)


def test_ndcg_is_scikit_learns_where_there_are_no_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.permutation(60).reshape(5, 12), rng.integers(0, 2, (5, 12))
    users = np.repeat(np.arange(5), 12)
    expected = ndcg_score(labels, scores, k=4)
    assert ndcg(labels.ravel(), scores.ravel(), users, k=4) == pytest.approx(expected)
    shuffled = rng.permutation(60)  # users need not be in a row
    mixed = [column.ravel()[shuffled] for column in (labels, scores, users)]
    assert ndcg(*mixed, k=4) == pytest.approx(expected)


def test_one_class_has_no_auc_and_says_so():
    with pytest.warns(RuntimeWarning, match="one class"):
        assert np.isnan(auc([1, 1, np.nan], [0, 1, 2]))
    with pytest.warns(RuntimeWarning, match="no user of 2"):
        value, skipped = gauc([1, 0], [0, 1], [7, 8])
    assert np.isnan(value)
    assert skipped == 2


def test_rows_without_a_label_do_not_count():
    assert auc([0, np.nan, 1], [0.1, 0.9, 0.2]) == 1
    assert gauc([0, np.nan, 1], [0.1, 0.9, 0.2], [1, 1, 1]) == (1, 0)
    with pytest.raises(ValueError, match="label 2 in row 1"):
        auc([0, 2], [0, 1])
    with pytest.raises(ValueError, match="2 labels"):
        auc([0, 1], [0])


def test_masked_labels_have_no_gradient_and_each_task_is_a_mean_over_its_own_rows():
    logits = torch.randn(4, 2, requires_grad=True)
    labels = torch.tensor([[1.0, torch.nan], [0.0, 1.0], [1.0, torch.nan], [0.0, torch.nan]])
    loss = masked_bce(logits, labels)
    alone = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss, alone(logits[:, 0], labels[:, 0]) + alone(logits[1, 1], labels[1, 1]))
    loss.backward()
    assert bool((logits.grad[labels.isnan()] == 0).all())
    assert bool((logits.grad[~labels.isnan()] != 0).all())
    assert masked_bce(logits, torch.full((4, 2), torch.nan)).item() == 0
