"""The bookmarks of the printed book."""

from types import SimpleNamespace

from tools import pdf


def bookmark(title, *children):
    return SimpleNamespace(title=title, children=[*children])


def titles(bookmarks):
    return [[each.title, *titles(each.children)] for each in bookmarks]


def test_bookmarks_have_the_words_of_the_headings_in_their_order():
    outline = [bookmark("OneOne", bookmark("Twofold", bookmark("3")), bookmark("Four")), bookmark("Five")]
    pdf.name_bookmarks(outline, ["One", "Two fold", "Three", "Four", "Five"])
    assert titles(outline) == [["One", ["Two fold", ["Three"]], ["Four"]], ["Five"]]


def test_where_their_number_is_another_they_stay(capsys):
    outline = [bookmark("OneOne")]
    pdf.name_bookmarks(outline, ["One", "Two"])
    assert titles(outline) == [["OneOne"]]
    assert capsys.readouterr().out == "1 bookmarks for 2 headings: they keep the browser's words\n"
