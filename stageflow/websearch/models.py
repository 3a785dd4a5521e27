"""What the room hands around: pages, links, results. Frozen values that pickle, with a dictionary round trip.

Imports msgspec and the standard library only, so that a worker or a reader of stored results needs no web extra.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import msgspec

from stageflow.websearch import encoding, urls

TRUNCATION_MARK = "[Content truncated...]"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the models. Unknown keys are ignored when reading: newer writers must not break older readers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            msgspec.ValidationError: a value has the wrong type.
        """
        return msgspec.convert(dict(data), cls)


class PageMetadata(Record, frozen=True, kw_only=True):
    """What a page says about itself."""

    title: str | None = None
    description: str | None = None
    language: str | None = None
    author: str | None = None
    published_date: str | None = None
    canonical_url: str | None = None
    og_image: str | None = None
    content_type: str | None = None
    keywords: list[str] = []


class ExtractedLink(Record, frozen=True, kw_only=True):
    """One link, absolute. `context` is the text around it."""

    url: str
    text: str = ""
    title: str | None = None
    rel: str | None = None
    is_internal: bool = False
    context: str | None = None

    @classmethod
    def from_element(
        cls,
        href: str,
        text: str,
        base_url: str,
        *,
        title: str | None = None,
        rel: str | None = None,
        context: str | None = None,
    ) -> ExtractedLink | None:
        """The link that `href` means on the page `base_url`; None when it leads to no page (`mailto:`,
        `javascript:`, `#x`)."""
        if href.strip().startswith("#"):
            return None
        url = urls.join(base_url, href, keep_fragment=True)
        if url is None:
            return None
        return cls(
            url=url,
            text=text.strip(),
            title=title,
            rel=rel,
            is_internal=urls.same_domain(url, base_url),
            context=context,
        )


class NavigationAction(Record, frozen=True, kw_only=True):
    """One thing a reader could do next; a lower `priority` comes first."""

    action_type: str
    label: str
    url: str
    selector: str | None = None
    priority: int = 5
    metadata: dict[str, Any] = {}


class PaginationInfo(Record, frozen=True, kw_only=True):
    """Where a page stands among its siblings."""

    current_page: int = 1
    total_pages: int | None = None
    next_url: str | None = None
    prev_url: str | None = None
    page_urls: list[str] = []

    @property
    def has_next(self) -> bool:
        """Whether a next page is known."""
        return self.next_url is not None

    @property
    def has_prev(self) -> bool:
        """Whether a previous page is known."""
        return self.prev_url is not None


class HeadingOutline(Record, frozen=True, kw_only=True):
    """One heading in document order; `anchor` is its id, for `#anchor` links."""

    level: int
    text: str
    anchor: str | None = None


class CodeBlock(Record, frozen=True, kw_only=True):
    """One block of code; `language` from its class, lower case, "" when not said."""

    text: str
    language: str = ""


class ExtractionResult(Record, frozen=True, kw_only=True):
    """What an extractor makes of one page. `word_count` counts the whitespace-separated tokens of `plain_text`."""

    markdown: str = ""
    plain_text: str = ""
    metadata: PageMetadata = PageMetadata()
    links: list[ExtractedLink] = []
    headings: list[HeadingOutline] = []
    tables: list[list[list[str]]] = []
    code_blocks: list[CodeBlock] = []
    word_count: int = 0
    duration_ms: float = 0.0


class NavigationResult(Record, frozen=True, kw_only=True):
    """What a navigator makes of one page. `main_content` is its text, `breadcrumbs` in order from the root."""

    pagination: PaginationInfo | None = None
    actions: list[NavigationAction] = []
    nav_links: list[ExtractedLink] = []
    breadcrumbs: list[ExtractedLink] = []
    main_content: str | None = None


class FetchResult(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One response. The body stays bytes until `text` is asked for, so that decoding happens where the text is used.

    `dict=True` holds the decoded text of `cached_property`; it is no field, so it is neither compared nor pickled.
    """

    status_code: int
    final_url: str
    body: bytes = b""
    headers: dict[str, str] = {}  # names in lower case; repeated ones joined with ", "
    content_type: str = ""  # media type without parameters, lower case
    duration_ms: float = 0.0
    url: str = ""  # what was asked for
    request_id: str = ""
    attempts: int = 1
    redirects: list[str] = []  # every URL that answered with a redirect, in order
    truncated: bool = False  # the body was longer than `max_response_size`
    from_cache: bool = False  # the server said 304; the body is the stored one
    error: str | None = None  # why there is no response; only where a failure must flow on (a crawl)
    depth: int = 0  # links away from the start page of a crawl

    @classmethod
    def error_result(cls, url: str, error: str, *, depth: int = 0) -> FetchResult:
        """The response that stands for none."""
        return cls(status_code=0, final_url=url, url=url, error=error, depth=depth)

    @classmethod
    def from_text(cls, text: str, *, url: str, status_code: int = 200, content_type: str = "text/html") -> FetchResult:
        """A response made by hand, for tests and for text that was not fetched."""
        return cls(
            status_code=status_code,
            final_url=url,
            url=url,
            body=text.encode("utf-8", "replace"),
            headers={"content-type": f"{content_type}; charset=utf-8"},
            content_type=content_type,
        )

    @cached_property
    def _decoded(self) -> tuple[str, str]:
        return encoding.decode(self.body, self.headers.get("content-type", self.content_type))

    @property
    def text(self) -> str:
        """The body as text: byte order mark, header, `<meta>`, detection, in this order; never raises."""
        return self._decoded[0]

    @property
    def encoding(self) -> str:
        """The encoding `text` was read in."""
        return self._decoded[1]

    @property
    def is_html(self) -> bool:
        """Whether the content type is that of a web page."""
        return self.content_type in {"text/html", "application/xhtml+xml", "application/xhtml"}

    @property
    def is_success(self) -> bool:
        """2xx only."""
        return 200 <= self.status_code < 300

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values with the text instead of the bytes."""
        built = msgspec.structs.asdict(self)
        del built["body"]
        return {**built, "text": self.text, "encoding": self.encoding}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FetchResult:
        """The inverse of `to_dict`; the text comes back as UTF-8."""
        known = {key: value for key, value in data.items() if key not in {"text", "encoding", "headers"}}
        headers = dict(data.get("headers", {}))
        content_type = str(data.get("content_type", "")) or "text/plain"
        headers["content-type"] = f"{content_type}; charset=utf-8"
        body = str(data.get("text", "")).encode("utf-8", "replace")
        return msgspec.convert({**known, "headers": headers, "body": body}, cls)


class WebPage(Record, frozen=True, kw_only=True):
    """One page, fetched and read. Durations in milliseconds, `fetched_at` in seconds since the epoch."""

    url: str
    final_url: str = ""
    status_code: int = 0
    markdown: str = ""
    plain_text: str = ""
    metadata: PageMetadata = PageMetadata()
    links: list[ExtractedLink] = []
    headings: list[HeadingOutline] = []
    navigation_actions: list[NavigationAction] = []
    pagination: PaginationInfo | None = None
    fetch_duration_ms: float = 0.0
    extract_duration_ms: float = 0.0
    fetched_at: float = 0.0
    word_count: int = 0
    error: str | None = None
    depth: int = 0  # links away from the start page of a crawl

    @property
    def success(self) -> bool:
        """No error, and a 2xx or 3xx status."""
        return self.error is None and 200 <= self.status_code < 400

    @property
    def title(self) -> str | None:
        """The page's title."""
        return self.metadata.title

    @property
    def description(self) -> str | None:
        """The page's own description."""
        return self.metadata.description

    @property
    def internal_links(self) -> list[ExtractedLink]:
        """Links to the same host."""
        return [link for link in self.links if link.is_internal]

    @property
    def external_links(self) -> list[ExtractedLink]:
        """Links to other hosts."""
        return [link for link in self.links if not link.is_internal]

    def extract_links(
        self, *, internal_only: bool = False, external_only: bool = False, limit: int | None = None
    ) -> list[ExtractedLink]:
        """The links that pass; both restrictions together pass none."""
        found = [
            link
            for link in self.links
            if (link.is_internal or not internal_only) and not (link.is_internal and external_only)
        ]
        return found if limit is None else found[: max(0, limit)]

    @classmethod
    def error_result(cls, url: str, error: str, *, status_code: int = 0, duration_ms: float = 0.0) -> WebPage:
        """The page that stands for a failure."""
        return cls(
            url=url,
            final_url=url,
            status_code=status_code,
            error=error,
            fetch_duration_ms=duration_ms,
            fetched_at=time.time(),
        )

    def truncate(self, max_chars: int) -> WebPage:
        """A copy whose texts have at most `max_chars` characters each (the marker excepted); itself when they
        already have.

        Markdown is cut back to the last blank line, plain text to the last end of a sentence, where that lies past
        half.
        """
        limit = max(0, max_chars)
        if len(self.markdown) <= limit and len(self.plain_text) <= limit:
            return self
        markdown, plain = self.markdown, self.plain_text
        if len(markdown) > limit:
            cut = markdown[:limit]
            blank = cut.rfind("\n\n")
            markdown = (cut[:blank] if blank > limit / 2 else cut).rstrip() + f"\n\n{TRUNCATION_MARK}"
        if len(plain) > limit:
            cut = plain[:limit]
            ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", cut)]
            plain = cut[: ends[-1]] if ends and ends[-1] > limit / 2 else cut
        return msgspec.structs.replace(self, markdown=markdown, plain_text=plain)


class SearchResult(Record, frozen=True, kw_only=True):
    """Pages for a query, best first. `relevance` maps a page's URL to its score in [0, 1]."""

    query: str
    pages: list[WebPage] = []
    relevance: dict[str, float] = {}
    total_fetched: int = 0
    duration_ms: float = 0.0


class SiteMap(Record, frozen=True, kw_only=True):
    """What a crawl of one site found. `depth_reached` is the depth asked for."""

    base_url: str
    pages: list[WebPage] = []
    internal_links: list[str] = []
    external_links: list[str] = []
    depth_reached: int = 0
    duration_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Counts instead of contents: a map of 50,000 pages must fit on a screen."""
        return {
            "base_url": self.base_url,
            "pages": len(self.pages),
            "internal_links": len(self.internal_links),
            "external_links": len(self.external_links),
            "depth_reached": self.depth_reached,
            "duration_ms": self.duration_ms,
        }


class FetchProgress(msgspec.Struct, kw_only=True):
    """A running count; the one mutable model. Not thread-safe: it belongs to the loop that fetches."""

    total: int = 0
    completed: int = 0
    succeeded: int = 0
    failed: int = 0
    current_url: str | None = None
    errors: list[str] = []

    @property
    def percent(self) -> float:
        """0 to 100; 0 while nothing is to be done."""
        return 100.0 * self.completed / self.total if self.total else 0.0

    def record_success(self, url: str | None = None) -> None:
        """Count one page that came."""
        self.completed += 1
        self.succeeded += 1
        self.current_url = url

    def record_error(self, error: str, url: str | None = None) -> None:
        """Count one page that did not."""
        self.completed += 1
        self.failed += 1
        self.current_url = url
        self.errors.append(error)

    def to_dict(self) -> dict[str, Any]:
        """The counts and the percentage."""
        return {**msgspec.structs.asdict(self), "percent": self.percent}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FetchProgress:
        """The inverse of `to_dict`."""
        return msgspec.convert(dict(data), cls)
