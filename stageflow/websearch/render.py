"""Writes a tree of HTML as Markdown and as plain text in one walk.

One event-driven pass without recursion: depth costs nothing. Pure; needs lxml through `dom`.
Blocks go out one at a time through `_emit`, which alone knows prefixes (quotes, list items) and blank lines.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field

from stageflow.websearch import urls
from stageflow.websearch.config import ExtractionConfig
from stageflow.websearch.dom import BLOCKS, NEVER_TEXT, SPACES, Element, classes, collapse, pieces
from stageflow.websearch.errors import require
from stageflow.websearch.models import CodeBlock, HeadingOutline

_BLOCK = frozenset(BLOCKS)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_EMPHASIS = {"b": "**", "strong": "**", "i": "*", "em": "*"}
_CODE = frozenset({"code", "kbd", "samp", "tt"})
_CONTROLS = frozenset({"select", "textarea", "button", "input", "datalist", "canvas", "audio", "video"})
_HIDDEN = NEVER_TEXT | _CONTROLS
#: every other element is its text
_MARKUP = (
    _BLOCK | _CODE | _HEADINGS.keys() | _EMPHASIS.keys() | {"br", "hr", "pre", "img", "a", "table", "tr", "td", "th"}
)
_LANGUAGE = re.compile(r"^(?:language|lang|highlight-source|highlight|brush)[-:]\s*([\w+#.-]{1,40})$", re.I)
_TICKS = re.compile(r"`+")
_MAX_COLUMNS = 200
_MAX_ROWS = 10_000


@dataclass(slots=True, eq=False)
class _Frame:
    """A block others stand in. An item's `marker` is written once; after that its width in blanks."""

    kind: str  # "quote", "list", "item"
    marker: str = ""
    pending: bool = False
    ordered: bool = False
    number: int = 1


@dataclass(slots=True)
class _Table:
    rows: list[list[tuple[str, str]]] = field(default_factory=list)
    below: dict[int, int] = field(default_factory=dict)  # column -> rows it still covers (rowspan)


@dataclass(slots=True)
class Rendered:
    """What came out."""

    markdown: str
    plain_text: str
    headings: list[HeadingOutline]
    tables: list[list[list[str]]]
    code_blocks: list[CodeBlock]


def _span(element: Element, name: str, most: int) -> int:
    value = (element.get(name) or "").strip()
    return min(most, max(1, int(value))) if value.isascii() and value.isdigit() and len(value) < 6 else 1


def language_of(element: Element) -> str:
    """The language a block of code says it is in, lower case, "" when it does not."""
    for node in (element, *element.iter("code")):
        for attribute in ("data-lang", "data-language"):
            if value := (node.get(attribute) or "").strip():
                return value.lower() if re.fullmatch(r"[\w+#.-]{1,40}", value) else ""
        names = classes(node)
        for index, name in enumerate(names):
            if match := _LANGUAGE.match(name):
                return match[1].lower()
            if name.lower() in {"brush:", "lang", "language"} and index + 1 < len(names):
                return names[index + 1].strip(";").lower()[:40]
    return ""


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in _TICKS.findall(text)), default=0))


class Writer:
    """One use: `run(root)` once."""

    def __init__(self, config: ExtractionConfig, base: str, skip: Container[Element] = frozenset()) -> None:
        self._config = config
        self._base = base
        self._skip = skip
        self._md: list[str] = []  # the inline text being collected, twice; "\n" in it is a hard break
        self._tx: list[str] = []
        self._generation = 0  # counts flushes: a capture that began before a flush is void
        self._captures: dict[Element, tuple[int, int]] = {}
        self._open_marks: dict[str, Element] = {}  # "**", "*", "a" -> the outermost element that opened it
        self._hold = 0  # > 0: inside a heading, a link or a table, where a block boundary is only a blank
        self._frames: list[_Frame] = []
        self._last_frames: list[_Frame] | None = None
        self._lines: list[str] = []
        self._plain: list[str] = []
        self._tables: list[_Table] = []
        self._layout: set[Element] = set()
        self._wide_links: set[Element] = set()
        self.headings: list[HeadingOutline] = []
        self.tables: list[list[list[str]]] = []
        self.code_blocks: list[CodeBlock] = []

    def run(self, root: Element) -> Rendered:
        """Walk `root` once and return everything it says."""
        etree = require("lxml.etree")
        self._survey(root)
        skip = self._skip
        walker = etree.iterwalk(root, events=("start", "end"))
        for event, node in walker:
            tag = node.tag
            if event == "start":
                if tag in _HIDDEN or node in skip or (tag in _MARKUP and not self._start(node, tag)):
                    walker.skip_subtree()
                else:
                    text = node.text
                    if text:
                        self._text(text)
            else:
                if tag in _MARKUP and node not in skip:
                    self._end(node, tag)
                if node is not root:
                    text = node.tail
                    if text:
                        self._text(text)
        self._flush()
        return Rendered(
            "\n".join(self._lines).strip("\n"),
            "".join(self._plain).strip(),
            self.headings,
            self.tables,
            self.code_blocks,
        )

    def _survey(self, root: Element) -> None:
        """Find tables that only lay out the page, and links that hold whole blocks: both are walked through."""
        for table in root.iter("table"):
            for parent in table.iterancestors("table"):
                self._layout.add(parent)
                break
            inside = next(table.iter("h1", "h2", "h3", "h4", "h5", "h6", "pre"), None)
            if (table.get("role") or "").lower() == "presentation" or inside is not None:
                self._layout.add(table)
        for link in root.iter("a"):
            if next(link.iter(*BLOCKS), None) is not None:
                self._wide_links.add(link)

    # ------------------------------------------------------------ events

    def _start(self, node: Element, tag: str) -> bool:
        """Take the beginning of an element; False when its inside is already dealt with."""
        config = self._config
        if tag == "br":
            self._push(" " if self._hold else "\n")
        elif tag == "hr":
            self._break()
            if not self._hold:
                self._emit(["---"], None)
        elif tag == "pre" and not self._hold:
            self._pre(node)
            return False
        elif tag in _CODE and config.preserve_code:
            self._inline_code(node)
            return False
        elif tag == "img":
            if "a" in self._open_marks and node.get("alt"):
                self._text(node.get("alt"))
        elif tag in _EMPHASIS:
            self._open(_EMPHASIS[tag], node)
        elif tag == "a":
            if node not in self._wide_links and self._open("a", node):
                self._hold += 1
        elif tag in _HEADINGS:
            self._break()
            self._capture(node)
            self._hold += 1
        elif tag == "table":
            self._start_table(node)
        elif tag in {"tr", "td", "th"} and self._tables:
            self._start_cell(node)
        elif tag in _BLOCK:
            self._break()
            self._start_container(node)
        return True

    def _end(self, node: Element, tag: str) -> None:
        if tag in _EMPHASIS:
            self._close_emphasis(_EMPHASIS[tag], node)
        elif tag == "a":
            if self._open_marks.get("a") is node:
                self._hold -= 1
                self._close_link(node)
        elif tag in _HEADINGS:
            self._hold -= 1
            self._close_heading(node, _HEADINGS[tag])
        elif tag == "table":
            self._end_table(node)
        elif tag in {"td", "th"} and self._tables:
            self._end_cell(node)
        elif tag == "pre" and not self._hold:
            pass
        elif tag in _BLOCK:
            self._break()
            self._end_container(node)

    # ------------------------------------------------------------ inline text

    def _text(self, text: str) -> None:
        # what is printable has no line ends; runs of blanks are collapsed when the block is written
        self._push(text if text.isprintable() else SPACES.sub(" ", text))

    def _push(self, text: str) -> None:
        self._md.append(text)
        self._tx.append(text)

    def _capture(self, node: Element) -> None:
        self._captures[node] = (self._generation, len(self._md))

    def _captured(self, node: Element) -> tuple[str, str] | None:
        """Take back what was collected since `_capture`; None when a block ended in between."""
        generation, start = self._captures.pop(node, (-1, 0))
        if generation != self._generation:
            return None
        md, tx = "".join(self._md[start:]), "".join(self._tx[start:])
        del self._md[start:], self._tx[start:]
        return md, tx

    def _open(self, mark: str, node: Element) -> bool:
        if mark in self._open_marks:
            return False  # bold in bold is bold
        self._open_marks[mark] = node
        self._capture(node)
        return True

    def _close_emphasis(self, mark: str, node: Element) -> None:
        if self._open_marks.get(mark) is not node:
            return
        del self._open_marks[mark]
        got = self._captured(node)
        if got is None:
            return
        md, tx = got
        inner = md.strip()
        if inner and self._config.preserve_emphasis:
            lead = md[: len(md) - len(md.lstrip())]
            md = f"{lead}{mark}{inner}{mark}{md[len(lead) + len(inner) :]}"
        self._md.append(md)
        self._tx.append(tx)

    def _close_link(self, node: Element) -> None:
        del self._open_marks["a"]
        got = self._captured(node)
        if got is None:
            return
        md, tx = got
        most = self._config.max_link_text_length
        plain = collapse(tx)
        label = collapse(md) if len(plain) <= most else plain[:most].rstrip()
        href = (node.get("href") or "").strip()
        url = urls.join(self._base, href, keep_fragment=True) if href and not href.startswith("#") else None
        if label and url and self._config.preserve_links and self._config.include_link_urls:
            target = url.replace("(", "%28").replace(")", "%29")
            lead, trail = md[:1].isspace(), md[-1:].isspace()
            md = f"{' ' if lead else ''}[{label}]({target}){' ' if trail else ''}"
        self._md.append(md)
        self._tx.append(tx)

    def _inline_code(self, node: Element) -> None:
        text = collapse("".join(pieces(node, self._skip)))
        if text:
            fence = _fence(text, 1)
            pad = " " if text.startswith("`") or text.endswith("`") else ""
            self._md.append(f"{fence}{pad}{text}{pad}{fence}")
            self._tx.append(text)

    # ------------------------------------------------------------ blocks

    def _break(self) -> None:
        if self._hold:
            self._push(" ")
        else:
            self._flush()

    def _take_inline(self) -> tuple[str, str]:
        md, tx = "".join(self._md), "".join(self._tx)
        self._md.clear()
        self._tx.clear()
        self._generation += 1
        return md, tx

    def _flush(self) -> None:
        """End the paragraph being collected."""
        if not self._md:
            return
        md, tx = self._take_inline()
        if "\n" not in tx:  # no break in it: most paragraphs
            text = collapse(tx)
            if len(text) >= max(1, self._config.min_text_length):
                self._emit([text if md == tx else collapse(md)], text)
            return
        plain = [collapse(line) for line in tx.split("\n")]
        text = "\n".join(plain).strip("\n")
        if len(text) < max(1, self._config.min_text_length):
            return
        lines = [collapse(line) for line in md.split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        # an empty line between two breaks would end the paragraph: one break says as much
        lines = [line for line in lines if line]
        self._emit([line + "  " for line in lines[:-1]] + lines[-1:], re.sub(r"\n{3,}", "\n\n", text))

    def _emit(self, lines: list[str], plain: str | None) -> None:
        """Put out one block: a blank line before it, except inside a list, then the prefixes of what it stands in."""
        frames = list(self._frames)
        fresh = any(frame.pending for frame in frames)
        if self._last_frames is not None:
            shared = 0
            for left, right in zip(self._last_frames, frames, strict=False):
                if left is not right:
                    break
                shared += 1
            tight = fresh and any(frame.kind == "list" for frame in frames[:shared])
            if not tight:
                self._lines.append("".join(self._later(frame) for frame in frames[:shared]).rstrip())
            if plain is not None and self._plain:
                self._plain.append("\n" if tight else "\n\n")
        self._last_frames = frames
        first = "".join(frame.marker if frame.pending else self._later(frame) for frame in frames)
        rest = "".join(self._later(frame) for frame in frames)
        for frame in frames:
            frame.pending = False
        self._lines.extend(
            (prefix + line) if line else prefix.rstrip()
            for prefix, line in zip([first] + [rest] * (len(lines) - 1), lines, strict=True)
        )
        if plain is not None:
            self._plain.append(plain)

    @staticmethod
    def _later(frame: _Frame) -> str:
        return "> " if frame.kind == "quote" else " " * len(frame.marker)

    def _start_container(self, node: Element) -> None:
        tag, config = node.tag, self._config
        if self._hold or len(self._frames) >= 2 * config.max_nesting:
            return
        if tag == "blockquote" and config.preserve_blockquotes:
            self._frames.append(_Frame("quote"))
            self._captures[node] = (-2, len(self._frames))
        elif tag in {"ul", "ol", "menu"} and config.preserve_lists:
            start = (node.get("start") or "").strip()
            number = int(start) if start.isascii() and start.isdigit() and len(start) < 9 else 1
            self._frames.append(_Frame("list", ordered=tag == "ol", number=number))
            self._captures[node] = (-2, len(self._frames))
        elif tag == "li" and config.preserve_lists:
            above = self._frames[-1] if self._frames and self._frames[-1].kind == "list" else None
            marker = "- "
            if above is not None and above.ordered:
                value = (node.get("value") or "").strip()
                if value.isascii() and value.isdigit() and len(value) < 9:
                    above.number = int(value)
                marker = f"{above.number}. "
                above.number += 1
            self._frames.append(_Frame("item", marker=marker, pending=True))
            self._captures[node] = (-2, len(self._frames))

    def _end_container(self, node: Element) -> None:
        kind, depth = self._captures.pop(node, (0, 0))
        if kind == -2:
            del self._frames[depth - 1 :]

    def _close_heading(self, node: Element, level: int) -> None:
        got = self._captured(node)
        if got is None:
            return
        md, tx = got
        most = self._config.max_heading_length
        plain = collapse(tx)
        if not plain:
            return
        text = collapse(md) if len(plain) <= most else plain[:most].rstrip()
        plain = plain[:most].rstrip()
        self.headings.append(HeadingOutline(level=level, text=plain, anchor=node.get("id") or None))
        if self._hold:
            self._md.append(f" {text} ")
            self._tx.append(f" {plain} ")
        else:
            self._emit([f"{'#' * level} {text}" if self._config.preserve_headings else text], plain)

    def _pre(self, node: Element) -> None:
        self._flush()
        parts: list[str] = []
        for part in pieces(node, self._skip):
            parts.append(part)
        # the boundaries of <pre> itself count as breaks in `pieces`; a first line end after <pre> is no content
        text = "".join(parts).replace("\r\n", "\n").replace("\r", "\n").strip("\n").expandtabs(4).rstrip()
        if not text.strip():
            return
        language = language_of(node)
        self.code_blocks.append(CodeBlock(text=text, language=language))
        lines = [line.rstrip() for line in text.split("\n")]
        if self._config.preserve_code:
            fence = _fence(text, 3)
            self._emit([f"{fence}{language}", *lines, fence], text)
        else:
            self._emit([line for line in lines if line], text)

    # ------------------------------------------------------------ tables

    def _is_data(self, node: Element) -> bool:
        return node not in self._layout and self._config.preserve_tables and not self._tables

    def _start_table(self, node: Element) -> None:
        self._break()
        if self._is_data(node):
            self._tables.append(_Table())
            self._captures[node] = (-3, self._hold)
            self._hold += 1

    def _start_cell(self, node: Element) -> None:
        table = self._tables[-1]
        if node.tag == "tr":
            if len(table.rows) < _MAX_ROWS:
                table.rows.append([])
                self._fill_spans(table)
            return
        if not table.rows:
            table.rows.append([])
        self._capture(node)

    @staticmethod
    def _fill_spans(table: _Table) -> None:
        """Empty cells where a cell of an earlier row reaches down."""
        row = table.rows[-1]
        while table.below.get(len(row), 0) > 0 and len(row) < _MAX_COLUMNS:
            table.below[len(row)] -= 1
            row.append(("", ""))

    def _end_cell(self, node: Element) -> None:
        got = self._captured(node)
        table = self._tables[-1]
        if got is None or not table.rows:
            return
        row = table.rows[-1]
        column = len(row)
        wide = min(_span(node, "colspan", _MAX_COLUMNS), max(0, _MAX_COLUMNS - column))
        cells = [(collapse(got[0]), collapse(got[1]))] + [("", "")] * (wide - 1)
        down = _span(node, "rowspan", _MAX_ROWS) - 1
        for offset, cell in enumerate(cells[:wide]):
            row.append(cell)
            if down:
                table.below[column + offset] = down
        self._fill_spans(table)

    def _end_table(self, node: Element) -> None:
        kind, hold = self._captures.pop(node, (0, 0))
        if kind != -3 or not self._tables:
            self._break()
            return
        table = self._tables.pop()
        self._hold = hold
        self._break()  # the caption and whatever else stood outside of the cells
        rows = [row for row in table.rows if any(text for _, text in row)]
        if not rows:
            return
        width = max(len(row) for row in rows)
        for row in rows:
            row.extend([("", "")] * (width - len(row)))
        self.tables.append([[text for _, text in row] for row in rows])
        plain = "\n".join("\t".join(text for _, text in row).rstrip() for row in rows)
        if hold:
            self._push(collapse(plain))
            return
        written = ["| " + " | ".join(md.replace("|", "\\|") for md, _ in row) + " |" for row in rows]
        self._emit([written[0], "|" + " --- |" * width, *written[1:]], plain)
