"""Finds where a reader can go from a page: next and previous, menus, breadcrumbs, content links. Pure; needs lxml."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from stageflow.websearch import urls
from stageflow.websearch.config import NavigationConfig
from stageflow.websearch.content import body_of
from stageflow.websearch.dom import Element, base_url, classes, collapse, parse_html, select, text_of
from stageflow.websearch.models import ExtractedLink, NavigationAction, NavigationResult, PaginationInfo

_MAX_HTML_CHARS = 10 * 1024 * 1024
_LABEL_CHARS = 100
_LEAST_CONTENT = 200  # characters: a shorter element is a teaser
_LEAST_LABEL = 3
_MAX_NUMBER = 9  # digits
_CURRENT = (".current", ".active", "[aria-current]")
_BREADCRUMBS = (
    ".breadcrumb a",
    ".breadcrumbs a",
    '[aria-label="breadcrumb"] a',
    '[aria-label="Breadcrumb"] a',
    '[aria-label="breadcrumbs"] a',
    '[itemtype$="BreadcrumbList"] a',
)
_CONTENT_NAME = re.compile(r"content|main|article|post|entry|body|story", re.I)


@runtime_checkable
class Navigator(Protocol):
    """Reads where a page leads. Any object with this method serves."""

    def analyze(self, html: str, url: str) -> NavigationResult: ...


def says(label: str, texts: Sequence[str]) -> bool:
    """Whether a short label is one of `texts`: words as whole words, signs at either end."""
    text = collapse(label).lower()
    if not text or len(text) > 40:
        return False
    words = set(re.findall(r"[^\W_]+", text))
    for wanted in texts:
        if wanted.isalpha():
            if wanted in words:
                return True
        elif text == wanted or text.startswith(f"{wanted} ") or text.endswith(f" {wanted}"):
            return True
    return False


def order_actions(
    pagination: PaginationInfo | None, nav: Iterable[ExtractedLink], content: Iterable[ExtractedLink], most: int
) -> list[NavigationAction]:
    """Next (1), previous (2), menu (3), content (4); every URL once; at most `most`."""
    wanted: list[NavigationAction] = []
    if pagination is not None and pagination.next_url:
        wanted.append(NavigationAction(action_type="next", label="Next page", url=pagination.next_url, priority=1))
    if pagination is not None and pagination.prev_url:
        wanted.append(
            NavigationAction(action_type="previous", label="Previous page", url=pagination.prev_url, priority=2)
        )
    wanted += [NavigationAction(action_type="navigation", label=link.text, url=link.url, priority=3) for link in nav]
    wanted += [
        NavigationAction(action_type="content", label=link.text, url=link.url, priority=4)
        for link in content
        if len(link.text) >= _LEAST_LABEL
    ]
    first: dict[str, NavigationAction] = {}
    for action in wanted:
        first.setdefault(action.url, action)
    return sorted(first.values(), key=lambda action: action.priority)[:most]


def number_in(url: str, patterns: Sequence[str]) -> int | None:
    """The page number that the first fitting pattern finds in `url`."""
    for pattern in patterns:
        if (match := re.search(pattern, url)) and len(match[1]) <= _MAX_NUMBER:
            return int(match[1])
    return None


def pages_by_url(found: Iterable[str], own: str, patterns: Sequence[str]) -> PaginationInfo | None:
    """Pagination guessed from two or more links whose URLs carry page numbers; None with fewer."""
    numbered: dict[int, str] = {}
    for url in found:
        number = number_in(url, patterns)
        if number is not None:
            numbered.setdefault(number, url)
    if len(numbered) < 2:
        return None
    current = number_in(own, patterns)
    here = current if current is not None else 1
    others = {number: url for number, url in numbered.items() if number != here}
    return PaginationInfo(
        current_page=here,
        total_pages=len(others) + 1,
        next_url=next((others[number] for number in sorted(others) if number > here), None),
        prev_url=next((others[number] for number in sorted(others, reverse=True) if number < here), None),
        page_urls=[others[number] for number in sorted(others)],
    )


class LxmlNavigator:
    """The default navigator. Stateless, picklable, never raises on content; linear in the size of the page."""

    def __init__(self, config: NavigationConfig | None = None) -> None:
        self.config = config if config is not None else NavigationConfig()

    def analyze(self, html: str, url: str) -> NavigationResult:
        """Pagination, menu, breadcrumbs, main text, and what to do next in order.

        Raises:
            SelectorError: a selector of the configuration cannot be read.
        """
        root = parse_html(html, max_chars=_MAX_HTML_CHARS)
        if root is None:
            return NavigationResult()
        base = base_url(root, url)
        pagination = self._pagination(root, base, url)
        nav = self._links(select(root, self.config.nav_link_selectors), base, url)
        if len(nav) < self.config.min_nav_links:
            nav = []
        crumbs = self._links(select(root, _BREADCRUMBS), base, url)
        main = self._main(root)
        content = self._links(main.iter("a"), base, url) if main is not None else []
        return NavigationResult(
            pagination=pagination,
            actions=order_actions(pagination, nav, content, self.config.max_actions),
            nav_links=nav,
            breadcrumbs=crumbs,
            main_content=text_of(main) if main is not None else None,
        )

    @staticmethod
    def _links(elements: Iterable[Element], base: str, url: str) -> list[ExtractedLink]:
        found: dict[str, ExtractedLink] = {}
        for element in elements:
            href = (element.get("href") or "").strip()
            target = urls.join(base, href, keep_fragment=True) if href and not href.startswith("#") else None
            if target is None or target in found:
                continue
            text = text_of(element, limit=_LABEL_CHARS) or collapse(element.get("aria-label") or "")[:_LABEL_CHARS]
            found[target] = ExtractedLink(url=target, text=text, is_internal=urls.same_domain(target, url))
        return list(found.values())

    def _main(self, root: Element) -> Element | None:
        for selector in self.config.content_selectors:
            for element in select(root, (selector,)):
                if len(text_of(element, limit=_LEAST_CONTENT + 1)) > _LEAST_CONTENT:
                    return element
        # the longest text among divisions named like content; outermost named ones only, so that reading stays linear
        best: tuple[int, Element | None] = (0, None)
        inside: set[Element] = set()
        for element in body_of(root).iter("div", "section"):
            parent = element.getparent()
            named = bool(_CONTENT_NAME.search(f"{element.get('class') or ''} {element.get('id') or ''}"))
            if parent in inside:
                inside.add(element)
            elif named:
                inside.add(element)
                size = len(text_of(element))
                if size > best[0]:
                    best = (size, element)
        return best[1]

    # ------------------------------------------------------------ pagination

    def _pagination(self, root: Element, base: str, url: str) -> PaginationInfo | None:
        for container in select(root, self.config.pagination_selectors):
            found = self._in_container(container, base, url)
            if found is not None:
                return found
        declared = self._declared(root, base)
        if declared is not None:
            return declared
        targets = (urls.join(base, link.get("href") or "") for link in root.iter("a"))
        return pages_by_url((target for target in targets if target), url, self.config.pagination_url_patterns)

    @staticmethod
    def _declared(root: Element, base: str) -> PaginationInfo | None:
        """What `rel="next"` and `rel="prev"` say."""
        ends: dict[str, str] = {}
        for element in root.iter("link", "a"):
            for word in (element.get("rel") or "").lower().split():
                if word in {"next", "prev", "previous"} and element.get("href"):
                    target = urls.join(base, element.get("href"))
                    if target:
                        ends.setdefault("next" if word == "next" else "prev", target)
        return PaginationInfo(next_url=ends.get("next"), prev_url=ends.get("prev")) if ends else None

    def _role(self, link: Element, label: str) -> str:
        """Which link of a pagination this is: "next", "prev" or "page"."""
        named = [name.lower() for name in classes(link)]
        parent = link.getparent()
        if parent is not None and parent.tag == "li":
            named += [name.lower() for name in classes(parent)]
        named += (link.get("rel") or "").lower().split()
        hints = f"{link.get('aria-label') or ''}"
        if any("prev" in name for name in named):
            return "prev"
        if any("next" in name for name in named):
            return "next"
        if says(label, self.config.prev_texts) or (hints and says(hints, self.config.prev_texts)):
            return "prev"
        if says(label, self.config.next_texts) or (hints and says(hints, self.config.next_texts)):
            return "next"
        return "page"

    def _in_container(self, container: Element, base: str, url: str) -> PaginationInfo | None:
        """The pagination in `container`; None when it is a menu that merely has the role of navigation."""
        ends: dict[str, str] = {}
        pages: dict[str, None] = {}
        numbered = False
        for link in container.iter("a"):
            href = (link.get("href") or "").strip()
            target = urls.join(base, href) if href and not href.startswith("#") else None
            if target is None:
                continue
            label = text_of(link, limit=_LABEL_CHARS)
            role = self._role(link, label)
            if role != "page":
                ends.setdefault(role, target)
                continue
            numbered = numbered or label.isdigit()
            pages.setdefault(target)
        if not ends and not numbered:
            return None
        for target in ends.values():
            pages.pop(target, None)
        current = self._current(container)
        own = urls.normalize(url)
        if own is not None:
            pages.pop(own, None)
        return PaginationInfo(
            current_page=current if current is not None else number_in(url, self.config.pagination_url_patterns) or 1,
            total_pages=len(pages) + 1 if pages else None,
            next_url=ends.get("next"),
            prev_url=ends.get("prev"),
            page_urls=list(pages),
        )

    @staticmethod
    def _current(container: Element) -> int | None:
        for element in select(container, _CURRENT):
            label = text_of(element, limit=20)
            if label.isascii() and label.isdigit() and len(label) <= _MAX_NUMBER:
                return int(label)
        return None
