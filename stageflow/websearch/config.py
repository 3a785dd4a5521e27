"""Options of the room as frozen values. Every default has a unit and a reason; nothing here does I/O."""

from __future__ import annotations

from typing import Any, Self

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.websearch import urls

KIB = 1024
MIB = 1024 * 1024
PROXY_SCHEMES = frozenset({"http", "https", "socks5", "socks5h"})


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the configuration structs: checked when made, replaceable, and a round trip through plain
    dictionaries."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            DefinitionError: an unknown key or a value of the wrong type.
        """
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise DefinitionError(f"{cls.__name__}: {error}") from error

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`."""
        return msgspec.structs.replace(self, **changes)

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise DefinitionError(
                    f"{type(self).__name__}.{name} is {value!r}; it must be at least {least}", field=name, got=value
                )


class FetchRetryConfig(Options, frozen=True, kw_only=True):
    """How often and when one URL is tried again. (The engine's `RetryConfig` retries a *stage*; this retries a
    *request*.)"""

    max_retries: int = 3  # attempts = max_retries + 1
    retry_delay_seconds: float = 1.0
    backoff_multiplier: float = 2.0
    max_delay_seconds: float = 30.0  # a `Retry-After` beyond this is not waited for: the response is returned as it is
    retry_status_codes: frozenset[int] = frozenset({429, 500, 502, 503, 504})

    def __post_init__(self) -> None:
        self._at_least(0, "max_retries", "retry_delay_seconds", "max_delay_seconds")
        self._at_least(1, "backoff_multiplier")

    def delay_for_attempt(self, attempt: int) -> float:
        """Seconds to wait after the 0-based `attempt`: delay * multiplier^attempt, at most `max_delay_seconds`."""
        if self.retry_delay_seconds == 0:
            return 0.0
        try:
            grown = self.retry_delay_seconds * self.backoff_multiplier ** max(0, attempt)
        except OverflowError:
            return self.max_delay_seconds
        return min(grown, self.max_delay_seconds)

    def should_retry_status(self, status_code: int) -> bool:
        """Whether this status means: ask again later."""
        return status_code in self.retry_status_codes


class FetchConfig(Options, frozen=True, kw_only=True):
    """How pages are fetched."""

    timeout_seconds: float = 30.0  # one attempt, connect to last byte: a page that drips is cut off as well
    max_redirects: int = 10
    user_agent: str = "stageflow-websearch/0.1"
    verify_ssl: bool = True
    max_response_size: int = 10 * MIB  # bytes, before and after decompression; the rest is cut off and `truncated` set
    headers: dict[str, str] = {}
    retry: FetchRetryConfig = FetchRetryConfig()

    allow_private: bool = False  # True: any address may be reached, also this machine and its metadata service
    # "host", "host:port", an address or a network ("10.1.0.0/16") that may be reached
    allow_hosts: tuple[str, ...] = ()
    respect_robots: bool = True
    robots_ttl_seconds: float = 3600.0
    max_crawl_delay_seconds: float = 30.0  # a longer Crawl-delay in robots.txt is taken as this

    max_connections: int = 100
    per_host_concurrency: int = 6  # what browsers open to one host
    per_host_rate: float | None = None  # requests per second to one host; None = no limit but the concurrency
    http2: bool = False  # needs httpx[http2]; only spoken over TLS
    cookies: bool = False
    proxy: str | None = None  # http://, https:// or socks5://; the environment's proxy variables are not read
    cache_path: str | None = None  # SQLite file of responses to revalidate (ETag, Last-Modified)
    cache_max_bytes: int = 512 * MIB

    def __post_init__(self) -> None:
        self._at_least(0, "max_redirects", "robots_ttl_seconds", "max_crawl_delay_seconds", "cache_max_bytes")
        self._at_least(1, "max_response_size", "max_connections", "per_host_concurrency")
        if self.timeout_seconds <= 0:
            raise DefinitionError(f"FetchConfig.timeout_seconds is {self.timeout_seconds!r}; it must be above 0")
        if self.per_host_rate is not None and self.per_host_rate <= 0:
            raise DefinitionError(f"FetchConfig.per_host_rate is {self.per_host_rate!r}; it must be above 0, or None")
        if self.proxy is not None:
            scheme, mark, rest = self.proxy.partition("://")
            if scheme not in PROXY_SCHEMES or not mark or not urls.host_of(f"http://{rest}"):
                raise DefinitionError(
                    f"FetchConfig.proxy is {self.proxy!r}; it must be http://, https:// or socks5:// and a host",
                    field="proxy",
                    got=self.proxy,
                )


CONTENT_SELECTORS = (
    "article",
    "main",
    '[role="main"]',
    "#content",
    ".content",
    ".post-content",
    ".article-content",
    ".entry-content",
)


class ExtractionConfig(Options, frozen=True, kw_only=True):
    """What of a page is kept and how it is written down."""

    preserve_headings: bool = True
    preserve_lists: bool = True
    preserve_links: bool = True
    preserve_emphasis: bool = True
    preserve_code: bool = True
    preserve_blockquotes: bool = True
    preserve_tables: bool = True
    max_link_text_length: int = 100  # characters
    max_heading_length: int = 200  # characters
    include_link_urls: bool = True
    min_text_length: int = 1  # characters; a shorter block of text is dropped
    remove_selectors: tuple[str, ...] = (
        "script",
        "style",
        "noscript",
        "iframe",
        "svg",
        "nav",
        "footer",
        "header",
        "aside",
        ".ad",
        ".ads",
        ".advertisement",
        ".sidebar",
        ".cookie-banner",
        ".cookie-notice",
        "#cookie-banner",
    )
    main_content_selectors: tuple[str, ...] = CONTENT_SELECTORS
    max_html_chars: int = 10 * MIB  # the rest is not parsed
    max_links: int = 10_000  # per page; a link farm ends here
    max_nesting: int = 32  # lists and quotes nested deeper are written at this depth

    def __post_init__(self) -> None:
        self._at_least(0, "min_text_length", "max_links")
        self._at_least(1, "max_link_text_length", "max_heading_length", "max_html_chars", "max_nesting")


class NavigationConfig(Options, frozen=True, kw_only=True):
    """How pagination, menus and content links are recognised."""

    pagination_selectors: tuple[str, ...] = (
        ".pagination",
        ".pager",
        ".page-nav",
        '[role="navigation"]',
        "nav.pagination",
    )
    pagination_url_patterns: tuple[str, ...] = (
        r"[?&]page=(\d+)",
        r"[?&]p=(\d+)",
        r"/page/(\d+)",
        r"[?&]offset=(\d+)",
    )
    next_texts: tuple[str, ...] = ("next", "→", "»", ">", "older", "more")
    prev_texts: tuple[str, ...] = ("prev", "previous", "←", "«", "<", "newer", "back")
    nav_link_selectors: tuple[str, ...] = ("nav a", ".menu a", ".nav a", '[role="navigation"] a')
    content_selectors: tuple[str, ...] = CONTENT_SELECTORS
    min_nav_links: int = 3
    max_actions: int = 20

    def __post_init__(self) -> None:
        self._at_least(0, "min_nav_links", "max_actions")


class WebSearchConfig(Options, frozen=True, kw_only=True):
    """Everything a `WebClient` needs."""

    fetch: FetchConfig = FetchConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    navigation: NavigationConfig = NavigationConfig()
    max_concurrent: int = 5  # pages of one call in flight
    auto_extract: bool = True
    auto_navigate: bool = True

    def __post_init__(self) -> None:
        self._at_least(1, "max_concurrent")


class CrawlConfig(Options, frozen=True, kw_only=True):
    """How far a crawl goes. Together these bound every trap a site can set."""

    max_pages: int = 10
    max_depth: int = 2  # links away from a start page; a start page has depth 0
    same_domain: bool = True
    max_pages_per_host: int | None = None
    max_path_depth: int = 16  # segments of the path: /a/b/a/b/... ends here
    max_repeated_segment: int = 3  # how often one segment may occur in a path
    max_url_length: int = 2048
    # pages whose URLs differ only in digits (calendars); None = no bound but max_pages
    max_same_shape: int | None = None

    def __post_init__(self) -> None:
        self._at_least(0, "max_depth")
        self._at_least(1, "max_pages", "max_path_depth", "max_repeated_segment", "max_url_length")
        self._at_least(1, "max_pages_per_host", "max_same_shape")
