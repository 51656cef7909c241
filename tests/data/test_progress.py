import io
import sys

from coterie.data import counted, progress_shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_only_where_it_is_asked_for_and_can_be_seen(monkeypatch):
    drawn = {}
    for shown in (True, False):
        for stream in (Terminal(), io.StringIO()):
            monkeypatch.setattr(sys, "stderr", stream)
            if shown:
                with progress_shown():
                    items = list(counted(iter("abc"), "letters", total=3))
            else:
                items = list(counted(iter("abc"), "letters", total=3))
            assert items == ["a", "b", "c"]
            drawn[shown, stream.isatty()] = "letters" in stream.getvalue()
    assert drawn == {(True, True): True, (True, False): False, (False, True): False, (False, False): False}


def test_an_error_inside_the_loop_comes_through_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    seen = []
    try:
        with progress_shown():
            for item in counted(range(3), "numbers"):
                seen.append(item)
                raise KeyError(item)
    except KeyError:
        pass
    assert seen == [0]
    assert list(counted(range(2), "numbers")) == [0, 1]  # and is off again
