"""The inverted index: folding, merging, writing, searching; and the page about it."""

from html.parser import HTMLParser

import pytest

from stageflow.demo.index import Index, Searcher, add, merge, write_index
from stageflow.demo.page import Package, render
from stageflow.demo.source import Module, SourceFile, analyse, words_of

TEXTS = ["alpha beta", "beta gamma", "alpha alpha", "gamma_ray delta", "beta"]


def fold(first: int, last: int) -> Index:
    index = Index()
    for number in range(first, last):
        text = f"# {TEXTS[number]}\n"
        add(index, words_of(analyse(SourceFile(number, f"m{number}.py", text.encode()))))
    return index


@pytest.fixture
def searcher(tmp_path) -> Searcher:
    write_index(fold(0, len(TEXTS)), tmp_path, root="/code", python="3.12")
    return Searcher(tmp_path)


@pytest.mark.parametrize("cut", range(len(TEXTS) + 1))
def test_merging_parts_gives_what_one_fold_gives(cut):
    assert merge(fold(0, cut), fold(cut, len(TEXTS))) == fold(0, len(TEXTS))


def test_merging_changes_neither_part():
    left, right = fold(0, 2), fold(2, 5)
    merge(left, right)
    assert (left, right) == (fold(0, 2), fold(2, 5))


def test_a_search_finds_modules_that_hold_every_word(searcher):
    assert [(hit.path, hit.count) for hit in searcher.search(["ALPHA"])] == [("m2.py", 2), ("m0.py", 1)]
    assert [hit.path for hit in searcher.search(["beta", "gamma"])] == ["m1.py"]
    assert [hit.path for hit in searcher.search(["gamma*"])] == ["m1.py", "m3.py"]
    assert searcher.search(["nowhere"]) == []
    assert searcher.search([]) == []
    assert searcher.search(["zzz*"]) == []


def test_the_files_are_written_whole_or_not_at_all(tmp_path):
    sizes = write_index(fold(0, 5), tmp_path, root="/code", python="3.12")
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}  # and nothing is left beside them
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match=r"modules\.json"):
        Searcher(tmp_path)
    (tmp_path / "words.txt").unlink()
    with pytest.raises(FileNotFoundError):
        Searcher(tmp_path)


def test_an_index_of_nothing_can_be_written_and_searched(tmp_path):
    write_index(Index(), tmp_path, root="/", python="3.12")
    assert Searcher(tmp_path).search(["x"]) == []


class Checker(HTMLParser):
    """Collects text and links; raises on a tag that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.links == []
    return checker


def test_the_page_is_whole_loads_nothing_and_escapes_what_it_shows():
    modules = [
        Module(
            0, "a<b>.py", lines=50, functions=2, complexity=9, worst="f<T>", worst_line=3, worst_complexity=8, public=1
        ),
        Module(1, "pkg/c.py", lines=12_000, functions=1, complexity=1, worst="g", worst_complexity=1, imports=("os",)),
        Module(2, "bad.py", skipped="not valid Python: <oops>"),
    ]
    checker = check(render(modules, [Package("click", "8.1")], title="lib", root="/x/lib", python="3.12"))
    for expected in ("a<b>.py", "f<T>", "not valid Python: <oops>", "click", "12,050", "Skipped (1)"):
        assert expected in checker.text


def test_a_page_about_nothing_is_still_a_page():
    assert "0" in check(render([], None, title="", root="/", python="3.12")).text
