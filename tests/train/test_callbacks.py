import pytest
import torch
from test_checkpoint import CtrlC
from tiny import TinyMoE, same_tensors, tiny_run
from torch import nn

from coterie.nn import LearnedPermutation, PermuteLabels
from coterie.train import PermutationSearch, Run


def permuted() -> nn.Module:
    torch.manual_seed(0)
    model = TinyMoE()
    model.moe.router = PermuteLabels(model.moe.router, LearnedPermutation(4))
    return model


def search_of(model: nn.Module) -> LearnedPermutation:
    return model.moe.router.permutation


def test_a_permutation_search_sharpens_then_rounds_and_keeps_it() -> None:
    seen = []

    class Watch:
        def on_step(self, run: Run) -> None:
            search = search_of(run.model)
            seen.append((round(float(search.progress), 3), bool(search.hard), search.permutation.tolist()))

    model, _ = tiny_run(permuted(), steps=6, callbacks=[PermutationSearch(4), Watch()])
    assert [progress for progress, _, _ in seen] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [hard for _, hard, _ in seen] == [False, False, False, True, True, True]
    assert search_of(model).final.tolist() == seen[3][2] == seen[5][2]


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_search_goes_on_where_it_stopped(tmp_path, stop) -> None:
    settings = {"steps": 7, "callbacks": [PermutationSearch(4)]}
    whole, _ = tiny_run(permuted(), **settings)
    tiny_run(permuted(), **{**settings, "callbacks": [PermutationSearch(4), CtrlC(stop)]}, out=tmp_path)
    resumed, history = tiny_run(permuted(), **settings, out=tmp_path, resume=True)
    assert history.steps == 7
    assert same_tensors(whole, resumed)


def test_a_search_without_permutations_is_refused() -> None:
    with pytest.raises(ValueError, match="found no LearnedPermutation; wrap routers in PermuteLabels"):
        tiny_run(callbacks=[PermutationSearch(4)])
    with pytest.raises(ValueError, match="steps=0"):
        PermutationSearch(0)
