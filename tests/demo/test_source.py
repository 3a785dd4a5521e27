"""What the demo reads from one file."""

import random

import pytest

from stageflow.demo.source import SourceFile, analyse, pack_entry, python_files, unpack_entries, words_of


def module(text: str | bytes, path: str = "pkg/mod.py"):
    data = text if isinstance(text, bytes) else text.encode()
    return analyse(SourceFile(3, path, data)).module


def test_functions_classes_imports_and_docstrings_are_counted():
    found = module(
        '"""Doc."""\n'
        "import os.path, json\n"
        "from collections.abc import Iterable\n"
        "from . import sibling\n"
        "class Shop:\n"
        '    """Doc."""\n'
        "    def open(self): pass\n"
        "    def _hidden(self): pass\n"
        "async def fetch():\n"
        "    def inner(): pass\n"
    )
    assert (found.functions, found.classes, found.lines) == (4, 1, 10)
    assert found.imports == ("collections", "json", "os")
    assert (found.public, found.documented) == (
        4,
        2,
    )  # module, Shop, Shop.open, fetch; an inner function is no one's API


@pytest.mark.parametrize(
    ("body", "complexity"),
    [
        ("pass", 1),
        ("if a: pass\n elif b: pass\n else: pass", 3),
        ("for x in y:\n  while x: pass", 3),
        ("return a and b and c or d", 4),
        ("return [x for x in y if x]", 2),
        ("try: pass\n except A: pass\n except B: pass", 3),
        ("match a:\n  case 1: pass\n  case _: pass", 3),
        ("return 1 if a else 2", 2),
    ],
)
def test_complexity_is_one_plus_the_branches(body, complexity):
    found = module(f"def f():\n {body}\n")
    assert found.complexity == complexity
    assert (found.worst, found.worst_line, found.worst_complexity) == ("f", 1, complexity)


def test_a_branch_counts_for_the_innermost_function():
    found = module("def outer():\n if a: pass\n def inner():\n  if b: pass\n  if c: pass\nif d: pass\n")
    assert (found.worst, found.worst_complexity, found.complexity) == ("outer.inner", 3, 5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"def f(:\n", "not valid Python: invalid syntax (line 1)"),
        (b"x = '\xff'\n", "not valid Python"),
        (b"# coding: no-such\nx = 1\n", "not valid Python: unknown encoding"),
        (b"x = 1\0\n", "null bytes"),
        (b"(" * 5000 + b")" * 5000, "not "),
    ],
)
def test_what_cannot_be_parsed_is_skipped_with_its_reason(data, reason):
    parsed = analyse(SourceFile(7, "bad.py", data))
    assert reason in parsed.module.skipped
    assert (parsed.module.number, parsed.module.path, parsed.text) == (7, "bad.py", "")
    assert words_of(parsed).entries == {}


def test_a_file_that_could_not_be_read_keeps_its_reason():
    parsed = analyse(SourceFile(0, "gone.py", skipped="cannot be read: Permission denied"))
    assert parsed.module.skipped == "cannot be read: Permission denied"


def test_a_declared_encoding_is_honoured():
    parsed = analyse(SourceFile(0, "latin.py", "# coding: latin-1\nname = 'Müller'\n".encode("latin-1")))
    assert "müller" in words_of(parsed).entries


def test_a_deep_tree_needs_no_deep_stack():
    chain = "x" + "".join(f".a{n}" for n in range(800))
    assert module(f"def f():\n return {chain}\n").functions == 1


def test_words_stand_on_their_lines():
    words = words_of(analyse(SourceFile(300, "m.py", b"alpha = beta\n\nALPHA(alpha, x)\n")))
    assert list(unpack_entries(words.entries["alpha"])) == [(300, [1, 3, 3])]
    assert list(unpack_entries(words.entries["beta"])) == [(300, [1])]
    assert "x" not in words.entries


def test_entries_survive_packing_whatever_the_distances():
    rng = random.Random(5)
    rows = [
        (rng.randrange(1 << 20), sorted(rng.randrange(1, 10 ** rng.randrange(1, 6)) for _ in range(40)))
        for _ in range(60)
    ]
    packed = b"".join(pack_entry(number, lines) for number, lines in rows)
    assert list(unpack_entries(packed)) == rows


def test_the_walk_is_ordered_and_leaves_out_what_is_no_source(tmp_path):
    for name in ("b.py", "a.py", "pkg/z.py", "pkg/data.txt", "__pycache__/c.py", "site-packages/d.py", ".git/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(python_files(str(tmp_path))) == ["a.py", "b.py", "pkg/z.py"]
