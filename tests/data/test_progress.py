import io
import sys

from coterie.data import counted, progress_bar, progress_shown


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


def test_a_bar_on_a_terminal_lines_elsewhere_and_silence_when_asked_for(monkeypatch):
    def printed(stream, show):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("[layers]", 3, done=1, show=show) as shown:
            shown.update(2, left="9 s", note="loss 0.5")
            shown.line("layer 2 is done")
        return stream.getvalue()

    for stream, show in ((Terminal(), None), (Terminal(), True), (io.StringIO(), True)):
        bar = printed(stream, show)
        assert "layer 2" not in bar
        assert all(text in bar for text in ("[layers]", "2/3", "9 s left", "loss 0.5"))
    assert printed(io.StringIO(), None) == "layer 2 is done\n"
    assert printed(io.StringIO(), False) == printed(Terminal(), False) == ""


def test_a_bar_without_an_end_says_nothing_of_the_time_left(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("chunks", None) as shown:
        shown.update(4)
    assert "4/?" in stream.getvalue()
    assert "left" not in stream.getvalue()
