from coterie.hf.progress import showing


def test_a_note_stays_above_the_bar_and_is_a_line_where_there_is_none(capsys):
    for show, seen in [(True, True), (None, True), (False, False)]:
        with showing(2, show) as shown:
            shown.note("a [note] that stays")
            shown.step("one step")
        assert ("a [note] that stays" in capsys.readouterr().err) == seen
        assert shown.done == 1
