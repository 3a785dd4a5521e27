"""Reading HTML with lxml, safely: no network, no entities, libxml2's own bounds on depth and size left on.

Imports lxml on first use, never at import. Everything here is pure and runs in any lane; lxml trees belong to one
thread at a time.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from typing import Any

from stageflow.websearch import urls
from stageflow.websearch.errors import SelectorError, require

# lxml has no types of its own; an element is whatever its parser makes.
Element = Any

SPACES = re.compile(r"[ \t\r\n\f\v\xa0\u2028\u2029]+")
# What XML's data model cannot hold and a browser shows as U+FFFD or nothing.
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
NEVER_TEXT = frozenset({"script", "style", "template", "head", "title", "noframes", "object", "embed", "applet"})
BLOCKS = (
    *("p", "div", "section", "article", "main", "header", "footer", "nav", "aside", "address", "center", "figure"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd", "blockquote", "pre", "hr", "figcaption"),
    *(
        "table",
        "caption",
        "thead",
        "tbody",
        "tfoot",
        "tr",
        "td",
        "th",
        "form",
        "fieldset",
        "legend",
        "details",
        "summary",
    ),
    *("body", "html", "hgroup", "search", "menu", "dialog"),
)


def collapse(text: str) -> str:
    """Runs of blanks and line ends as one blank, none at the ends."""
    return " ".join(text.split())


def parse_html(text: str, *, max_chars: int) -> Element | None:
    """The root element of `text`, or None when nothing in it can be a page. Never raises on content.

    The tree is at most 256 deep (libxml2 stops there), `max_chars` are read, and no entity is expanded but HTML's own.
    """
    etree = require("lxml.etree")
    clean = _UNSEEN.sub("", text[:max_chars])
    if not clean.strip():
        return None
    parser = etree.HTMLParser(
        encoding="utf-8", no_network=True, huge_tree=False, remove_comments=True, remove_pis=True, recover=True
    )
    try:
        return etree.fromstring(clean.encode("utf-8", "replace"), parser)
    except etree.XMLSyntaxError:
        return None


@lru_cache(maxsize=512)
def _compiled(selectors: tuple[str, ...]) -> Any:
    require("cssselect")  # lxml would say "does not seem to be installed" without saying what to install
    css = require("lxml.cssselect")
    for selector in selectors:
        try:
            css.CSSSelector(selector, translator="html")
        except Exception as error:
            raise SelectorError(
                f"{selector!r} is not a CSS selector that can be used here: {error}", selector=selector
            ) from error
    return css.CSSSelector(", ".join(selectors), translator="html")


def select(root: Element, selectors: Sequence[str]) -> list[Element]:
    """Every element that any of `selectors` matches, in document order.

    Raises:
        SelectorError: one of them cannot be read.
    """
    if not selectors:
        return []
    return list(_compiled(tuple(selectors))(root))


def pieces(element: Element, skip: Container[Element] = frozenset()) -> Iterator[str]:
    """The texts inside `element` in order, without those of `skip` and of scripts; blocks and breaks separate words."""
    etree = require("lxml.etree")
    walker = etree.iterwalk(element, events=("start", "end"))
    for event, node in walker:
        tag = node.tag
        if event == "start":
            if node is not element and (tag in NEVER_TEXT or node in skip):
                walker.skip_subtree()
            elif node.text:
                yield node.text
            if tag == "br" or tag in _BLOCK_SET:
                yield "\n"
        else:
            if tag in _BLOCK_SET:
                yield "\n"
            if node is not element and node.tail:
                yield node.tail


_BLOCK_SET = frozenset(BLOCKS)
_NOT_WORDS = _BLOCK_SET | NEVER_TEXT | {"br"}
_FEW = 16


def _holds_only_words(element: Element, skip: Container[Element]) -> bool:
    """Whether its children are a few leaves inside a line: then the library can join the texts, without a walk."""
    if len(element) > _FEW:
        return False
    return all(not len(child) and child.tag not in _NOT_WORDS and child not in skip for child in element)


def text_of(element: Element, skip: Container[Element] = frozenset(), *, limit: int | None = None) -> str:
    """The collapsed text inside `element`; reading stops soon after `limit` characters."""
    if not len(element):  # most links and headings: no walk needed
        return collapse(element.text or "")[:limit].rstrip() if element.tag not in NEVER_TEXT else ""
    if _holds_only_words(element, skip):
        return collapse("".join(element.itertext()))[:limit].rstrip()
    if limit is None:
        return collapse("".join(pieces(element, skip)))
    parts: list[str] = []
    size = 0
    for piece in pieces(element, skip):
        parts.append(piece[: limit * 4])
        size += len(piece.strip())
        if size >= limit or len(parts) > 4 * limit:
            break
    return collapse("".join(parts))[:limit].rstrip()


def base_url(root: Element, page_url: str) -> str:
    """What relative links on the page are relative to: `<base href>` where it is a web address, else the page."""
    for element in root.iter("base"):
        href = element.get("href")
        if href:
            return urls.join(page_url, href) or page_url
    return page_url


def classes(element: Element) -> list[str]:
    """The class names of an element."""
    return (element.get("class") or "").split()
