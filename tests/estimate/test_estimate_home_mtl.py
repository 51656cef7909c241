import numpy as np
import pandas as pd
import pytest

from coterie.estimate import Columns, fit, predict


def log(rows=500):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"user": rng.integers(0, 15, rows), "x": rng.normal(size=rows), "t": rng.permutation(rows)}
    )
    return frame.assign(click=(frame["x"] > 0).astype(int), like=(frame["user"] + frame["t"] % 2) % 2)


def test_fit_and_predict_a_log_with_tasks_in_categories(tmp_path):
    log().to_csv(tmp_path / "log.csv", index=False)
    columns = Columns(("click:watch", "like:social"), group="user", time="t")
    described = fit("home-mtl", tmp_path / "log.csv", tmp_path / "out", columns, ["lr=0.03", "epochs=20"])
    assert described["report"]["rows held out"] == 100
    assert described["report"]["AUC click"] > 0.9
    assert any(name.startswith("GAUC click") for name in described["report"])
    assert set(described["usage"]) == {"click", "like"}
    assert (tmp_path / "out" / "experts.png").exists()
    rows = log()[["user", "x"]]
    rows.to_csv(tmp_path / "new.csv", index=False)
    assert predict(tmp_path / "out", tmp_path / "new.csv", tmp_path / "p.csv") == 500
    found = pd.read_csv(tmp_path / "p.csv")
    assert list(found.columns) == ["p_click", "p_like"]
    assert np.corrcoef(found["p_click"], log()["click"])[0, 1] > 0.7


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (("click:watch", "like"), [], "--target like has no category"),
        (("click:watch", "click:social"), [], "exactly one category"),
        (("click", "like"), [], "home needs a category"),
        (("click:watch", "x:watch"), [], "'x', row 0"),
        (("click:watch", "nothing:watch"), [], "no column 'nothing'"),
        (("click:watch",), ["hiden=3"], "did you mean 'hidden'"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_nothing_is_written(tmp_path, target, settings, message):
    log().to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(ValueError, match=message):
        fit("home-mtl", tmp_path / "log.csv", tmp_path / "out", Columns(target), settings)
    assert not (tmp_path / "out").exists()


def test_other_layouts_need_no_categories(tmp_path):
    log().to_csv(tmp_path / "log.csv", index=False)
    columns = Columns(("click", "like"), group="user")
    described = fit("home-mtl", tmp_path / "log.csv", tmp_path / "out", columns, ["preset=mmoe", "epochs=1"])
    assert described["report"]["parameters"] > 0
