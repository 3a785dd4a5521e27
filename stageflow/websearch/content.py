"""Finds the part of a page that is its content: by selector, then by the density of its text.

Pure; needs lxml through `dom`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from stageflow.websearch.dom import NEVER_TEXT, Element, select, text_of
from stageflow.websearch.errors import require

_PARAGRAPHS = frozenset({"p", "pre", "td", "blockquote", "li", "dd"})
_LIKELY = re.compile(r"article|body|content|entry|main|page|post|story|text", re.I)
_UNLIKELY = re.compile(
    r"\b(ad|ads|banner|breadcrumb|comment|cookie|footer|menu|nav|pager|promo|related|share|sidebar)", re.I
)
_LEAST_PARAGRAPH = 25  # characters: shorter ones are captions and buttons
_LEAST_SHARE = 0.4  # of the page's text: less than that and the whole page is the better answer


def body_of(root: Element) -> Element:
    """The `<body>`, else the root."""
    return next(root.iter("body"), root)


def by_density(root: Element, skip: Container[Element] = frozenset()) -> Element | None:
    """The element whose own paragraphs hold most of the text that is not links; None when no element stands out.

    One pass, linear in the size of the page.
    """
    etree = require("lxml.etree")
    body = body_of(root)
    text_size: dict[Element, int] = {}
    link_size: dict[Element, int] = {}
    score: dict[Element, float] = {}
    total = 0
    walker = etree.iterwalk(body, events=("start", "end"))
    for event, node in walker:
        hidden = node.tag in NEVER_TEXT or node in skip
        if event == "start":
            if hidden:
                walker.skip_subtree()
            else:
                text_size[node] = len((node.text or "").strip())
                link_size[node] = 0
            continue
        parent = node.getparent() if node is not body else None
        tail = len((node.tail or "").strip()) if parent is not None else 0
        if parent is not None and parent in text_size:
            text_size[parent] += tail
        if hidden:
            continue
        size = text_size.pop(node)
        links = size if node.tag == "a" else link_size.pop(node, 0)
        if node.tag in _PARAGRAPHS and size - 2 * links >= _LEAST_PARAGRAPH:
            gain = float(size - 2 * links)
            for holder, share in ((parent, 1.0), (parent.getparent() if parent is not None else None, 0.5)):
                if holder is not None and holder.tag not in {"html", "body"}:
                    score[holder] = score.get(holder, 0.0) + gain * share
        if parent is not None and parent in text_size:
            text_size[parent] += size
            link_size[parent] = link_size.get(parent, 0) + links
        if node is body:
            total = size - links  # menus are no text a page could consist of
    if not score:
        return None

    def weighed(node: Element) -> float:
        name = f"{node.get('class') or ''} {node.get('id') or ''}"
        factor = (1.25 if _LIKELY.search(name) else 1.0) * (0.3 if _UNLIKELY.search(name) else 1.0)
        return score[node] * factor

    best = max(score, key=weighed)
    return best if score[best] >= _LEAST_SHARE * total else None


def main_content(
    root: Element, selectors: Sequence[str], skip: Container[Element] = frozenset(), *, explicit: str | None = None
) -> Element:
    """The content element: `explicit` if it matches, else the first of `selectors` that holds text, else by density,
    else the body.

    Raises:
        SelectorError: a selector cannot be read.
    """
    for selector in (*((explicit,) if explicit else ()), *selectors):
        for found in select(root, (selector,)):
            if found not in skip and text_of(found, skip, limit=1):
                return found
    found = by_density(root, skip)
    return found if found is not None else body_of(root)
