import numpy as np
import pandas as pd
import pytest

from coterie.estimate import Columns, fit, predict

COLUMNS = Columns(("rating",), time="timestamp", group="user_id", item="item_id")


def write(folder, rows=400):
    rng = np.random.default_rng(0)
    file = folder / "likes.inter"
    lines = [f"{rng.integers(20)}\t{rng.integers(15)}\t{rng.integers(1, 6)}\t{time}" for time in range(rows)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    file.write_text("\n".join([header, *lines]) + "\n")
    return file


def test_fit_and_predict_interactions(tmp_path):
    file = write(tmp_path)
    described = fit("aw-moe", file, tmp_path / "out", COLUMNS, ["epochs=1", "history=8"])
    assert described["report"]["rows held out"] == 80
    assert 0 <= described["report"]["AUC, at most 2 liked before"] <= 1
    assert sum(described["usage"]["gate"]) == pytest.approx(1)
    assert predict(tmp_path / "out", file, tmp_path / "p.csv") == 400
    found = pd.read_csv(tmp_path / "p.csv")
    assert list(found.columns) == ["user_id", "item_id", "timestamp", "probability"]
    assert found["probability"].between(0, 1).all()


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (Columns(("rating",), group="user_id", item="item_id"), [], "needs --time"),
        (Columns(("rating", "x"), "timestamp", "user_id", "item_id"), [], "one target"),
        (Columns(("rating",), "timestamp", "user_id", "film"), [], "no column 'film'"),
        (COLUMNS, ["user=me"], "give the column as --group"),
        (COLUMNS, ["threshold=9"], "not positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(tmp_path, columns, settings, message):
    with pytest.raises(ValueError, match=message):
        fit("aw-moe", write(tmp_path), tmp_path / "out", columns, settings)
    assert not (tmp_path / "out").exists()
