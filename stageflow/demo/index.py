"""The inverted index: how it grows module by module, how two of them merge, how it lies on disk, how it is searched.

On disk an index is four files: `words.txt` (sorted, one a line), `offsets.bin` (where the entries of each word begin:
64-bit little-endian), `entries.bin` (packed by `source.pack_entry`), `modules.json`. A search reads the entries of its
words only.

Pure but for `write_index` and `Searcher`. May not import the engine.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from stageflow.demo.source import Module, Words, unpack_entries

FILES: Final = ("words.txt", "offsets.bin", "entries.bin", "modules.json")


class Index(msgspec.Struct):
    """Word -> packed entries of every module that has it, in module order; and the modules themselves."""

    entries: dict[str, bytes] = {}
    modules: list[Module] = []


class Catalogue(msgspec.Struct, frozen=True):
    """`modules.json`: what was indexed."""

    root: str
    python: str
    modules: list[Module]


class Hit(msgspec.Struct, frozen=True):
    """One module that holds every word of a query: how often in all, on which lines, and the line that holds most."""

    path: str
    count: int
    lines: list[int]
    best: int


def add(index: Index, words: Words) -> Index:
    """Take one module into `index`, in place; returns it."""
    entries = index.entries
    for word, entry in words.entries.items():
        entries[word] = entries.get(word, b"") + entry
    index.modules.append(words.module)
    return index


def merge(left: Index, right: Index) -> Index:
    """A new index with the modules of both, those of `left` first."""
    entries = dict(left.entries)
    for word, entry in right.entries.items():
        entries[word] = entries.get(word, b"") + entry
    return Index(entries, left.modules + right.modules)


def write_index(index: Index, folder: Path, *, root: str, python: str) -> dict[str, int]:
    """Write the four files, each in one step so that a reader never sees half of one; returns bytes by file name."""
    words = sorted(index.entries)
    offsets = array("Q", [0])
    place = 0
    for word in words:
        place += len(index.entries[word])
        offsets.append(place)
    if sys.byteorder == "big":
        offsets.byteswap()
    contents: Mapping[str, Iterable[bytes]] = {
        "words.txt": ["\n".join(words).encode()],
        "offsets.bin": [offsets.tobytes()],
        "entries.bin": map(index.entries.__getitem__, words),
        "modules.json": [msgspec.json.encode(Catalogue(root, python, index.modules))],
    }
    folder.mkdir(parents=True, exist_ok=True)
    return {name: replace_file(folder / name, chunks) for name, chunks in contents.items()}


def replace_file(path: Path, chunks: Iterable[bytes]) -> int:
    """Write beside `path`, then move over it; returns the bytes written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as out:
            out.writelines(chunks)
            size = out.tell()
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return size


class Searcher:
    """Reads what `write_index` wrote. FileNotFoundError where there is nothing, ValueError if damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        text = (folder / "words.txt").read_text("utf-8")
        self.words = text.split("\n") if text else []
        self._offsets = array("Q")
        self._offsets.frombytes((folder / "offsets.bin").read_bytes())
        if sys.byteorder == "big":
            self._offsets.byteswap()
        try:
            self.catalogue = msgspec.json.decode((folder / "modules.json").read_bytes(), type=Catalogue)
        except msgspec.MsgspecError as error:
            raise ValueError(f"modules.json: {error}") from error
        if len(self._offsets) != len(self.words) + 1:
            raise ValueError(f"{len(self.words)} words but {len(self._offsets)} offsets")

    def matching(self, pattern: str) -> range:
        """Rows of the words that equal `pattern`, or begin with it if it ends in `*`. Case does not matter."""
        wanted = pattern.lower()
        if wanted.endswith("*"):
            stem = wanted[:-1]
            return range(bisect_left(self.words, stem), bisect_left(self.words, stem + "\U0010ffff"))
        row = bisect_left(self.words, wanted)
        return range(row, row + (row < len(self.words) and self.words[row] == wanted))

    def search(self, patterns: Iterable[str]) -> list[Hit]:
        """Modules that hold every pattern, those with the most occurrences first."""
        found: dict[int, Counter[int]] | None = None  # module -> line -> how many of the patterns stand there
        count: Counter[int] = Counter()
        with (self._folder / "entries.bin").open("rb") as file:
            for pattern in patterns:
                here: dict[int, Counter[int]] = {}
                for row in self.matching(pattern):
                    file.seek(self._offsets[row])
                    for number, lines in unpack_entries(file.read(self._offsets[row + 1] - self._offsets[row])):
                        here.setdefault(number, Counter()).update(dict.fromkeys(lines, 1))
                        count[number] += len(lines)
                if found is None:
                    found = here
                else:
                    found = {number: lines + here[number] for number, lines in found.items() if number in here}
        paths = {module.number: module.path for module in self.catalogue.modules}
        hits = [
            Hit(paths[number], count[number], sorted(lines), min(lines, key=lambda line: (-lines[line], line)))
            for number, lines in (found or {}).items()
        ]
        return sorted(hits, key=lambda hit: (-hit.count, hit.path))
