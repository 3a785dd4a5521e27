"""Turns the HTML of a page into its metadata, links, headings, Markdown and plain text.

`LxmlExtractor` is the default, `TrafilaturaExtractor` (extra `extract`) an alternative for the main text,
`FallbackExtractor` (in `fallback`) needs no library. All are picklable, hold no state, and never raise on content.
"""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import msgspec

from stageflow.websearch import urls
from stageflow.websearch.config import ExtractionConfig
from stageflow.websearch.content import main_content
from stageflow.websearch.dom import Element, base_url, collapse, parse_html, select, text_of
from stageflow.websearch.errors import require
from stageflow.websearch.models import ExtractedLink, ExtractionResult, FetchResult, PageMetadata, WebPage
from stageflow.websearch.render import Writer

_CONTEXT_CHARS = 160
_META_CHARS = 2000
PLAIN_CHARS = 10_000  # of a page that is not HTML


@runtime_checkable
class ContentExtractor(Protocol):
    """Reads HTML. Any object with these methods serves."""

    def extract(self, html: str, url: str, *, selector: str | None = None) -> ExtractionResult: ...

    def extract_metadata(self, html: str, url: str) -> PageMetadata: ...

    def extract_links(self, html: str, url: str) -> list[ExtractedLink]: ...


def _metas(root: Element) -> dict[str, str]:
    """The first non-empty content of every named `<meta>`, by lower-case name."""
    found: dict[str, str] = {}
    for meta in root.iter("meta"):
        name = meta.get("property") or meta.get("name") or meta.get("itemprop") or meta.get("http-equiv")
        content = collapse((meta.get("content") or "")[:_META_CHARS])
        if name and content:
            found.setdefault(name.strip().lower(), content)
    return found


def _first(metas: dict[str, str], *names: str) -> str | None:
    return next((metas[name] for name in names if name in metas), None)


def _title(root: Element) -> str | None:
    for element in root.iter("title"):
        parent = element.getparent()
        if parent is not None and parent.tag == "svg":
            continue
        if text := collapse("".join(element.itertext())[:_META_CHARS]):
            return text
    return None


def read_metadata(root: Element, url: str) -> PageMetadata:
    """What the page's head says: Open Graph first, then the plain tags."""
    metas = _metas(root)
    base = base_url(root, url)
    canonical = image = published = None
    for link in root.iter("link"):
        if "canonical" in (link.get("rel") or "").lower().split() and link.get("href"):
            canonical = urls.join(base, link.get("href"))
            break
    if picture := _first(metas, "og:image", "og:image:url", "twitter:image"):
        image = urls.join(base, picture)
    published = _first(metas, "article:published_time", "datepublished", "date", "dc.date", "pubdate")
    if published is None:
        published = next(
            (t.get("datetime").strip() for t in root.iter("time") if (t.get("datetime") or "").strip()), None
        )
    html = next(root.iter("html"), None)
    language = (
        (html.get("lang") or html.get("{http://www.w3.org/XML/1998/namespace}lang")) if html is not None else ""
    ) or ""
    words = [collapse(word) for word in (_first(metas, "keywords") or "").split(",")]
    return PageMetadata(
        title=_first(metas, "og:title") or _title(root) or _first(metas, "title", "twitter:title", "dc.title"),
        description=_first(metas, "og:description", "description", "twitter:description"),
        language=collapse(language)[:40] or _first(metas, "content-language", "og:locale"),
        author=_first(metas, "author", "article:author", "dc.creator"),
        published_date=published[:64] if published else None,
        canonical_url=canonical,
        og_image=image,
        content_type=_first(metas, "og:type"),
        keywords=list(dict.fromkeys(word for word in words if word)),
    )


def _context(node: Element, memo: dict[Element, str]) -> str | None:
    """The beginning of the text around a link; one reading per parent, so that a page of links stays linear."""
    parent = node.getparent()
    if parent is None:
        return None
    if parent not in memo:
        memo[parent] = text_of(parent, limit=_CONTEXT_CHARS)
    return memo[parent] or None


def read_links(root: Element, url: str, config: ExtractionConfig) -> list[ExtractedLink]:
    """Every link of the page, menus included, in order, once per address; the first with a text wins."""
    base = base_url(root, url)
    found: dict[str, ExtractedLink] = {}
    memo: dict[Element, str] = {}
    for node in root.iter("a", "area"):
        href = (node.get("href") or "").strip()
        if not href or href.startswith("#"):
            continue
        target = urls.join(base, href, keep_fragment=True)
        if target is None or (target in found and found[target].text):
            continue
        if target not in found and len(found) >= config.max_links:
            break
        text = text_of(node, limit=config.max_link_text_length)
        if not text:
            images = (image.get("alt") for image in node.iter("img"))
            spoken = next((alt for alt in images if alt), None) or node.get("aria-label") or node.get("alt") or ""
            text = collapse(spoken)[: config.max_link_text_length]
        if target in found and not text:
            continue
        found[target] = ExtractedLink(
            url=target,
            text=text,
            title=collapse(node.get("title") or "")[:_META_CHARS] or None,
            rel=collapse(node.get("rel") or "")[:200] or None,
            is_internal=urls.same_domain(target, url),
            context=_context(node, memo),
        )
    return list(found.values())


class LxmlExtractor:
    """The default extractor.

    Linear in the size of the page; keeps the interpreter busy: belongs in the process lane.
    """

    def __init__(self, config: ExtractionConfig | None = None) -> None:
        self.config = config if config is not None else ExtractionConfig()

    def _parse(self, html: str) -> Element | None:
        return parse_html(html, max_chars=self.config.max_html_chars)

    def extract(self, html: str, url: str, *, selector: str | None = None) -> ExtractionResult:
        """Everything about one page; `selector` names its content element, if the caller knows.

        Raises:
            SelectorError: a selector cannot be read.
        """
        started = time.perf_counter()
        root = self._parse(html)
        if root is None:
            return ExtractionResult(duration_ms=(time.perf_counter() - started) * 1000)
        skip = set(select(root, self.config.remove_selectors))
        content = main_content(root, self.config.main_content_selectors, skip, explicit=selector)
        rendered = Writer(self.config, base_url(root, url), skip).run(content)
        return ExtractionResult(
            markdown=rendered.markdown,
            plain_text=rendered.plain_text,
            metadata=read_metadata(root, url),
            links=read_links(root, url, self.config),
            headings=rendered.headings,
            tables=rendered.tables,
            code_blocks=rendered.code_blocks,
            word_count=len(rendered.plain_text.split()),
            duration_ms=(time.perf_counter() - started) * 1000,
        )

    def extract_metadata(self, html: str, url: str) -> PageMetadata:
        """Only what the page says about itself."""
        root = self._parse(html)
        return read_metadata(root, url) if root is not None else PageMetadata()

    def extract_links(self, html: str, url: str) -> list[ExtractedLink]:
        """Only the links."""
        root = self._parse(html)
        return read_links(root, url, self.config) if root is not None else []


class TrafilaturaExtractor(LxmlExtractor):
    """Main text by trafilatura (extra `extract`), which knows more about news pages; everything else by lxml.

    Where trafilatura finds nothing, the text is lxml's.
    """

    def extract(self, html: str, url: str, *, selector: str | None = None) -> ExtractionResult:
        """As `LxmlExtractor.extract`; `selector` asks for one element and is lxml's business."""
        trafilatura = require("trafilatura", extra="extract")
        started = time.perf_counter()
        own = super().extract(html, url, selector=selector)
        if selector is not None:
            return own
        options: dict[str, Any] = {
            "url": url,
            "include_links": self.config.preserve_links and self.config.include_link_urls,
            "include_tables": self.config.preserve_tables,
            "include_formatting": self.config.preserve_emphasis,
            "include_comments": False,
        }
        try:
            markdown = trafilatura.extract(html[: self.config.max_html_chars], output_format="markdown", **options)
            plain = trafilatura.extract(
                html[: self.config.max_html_chars], output_format="txt", **{**options, "include_links": False}
            )
        except Exception:  # somebody else's bug on hostile input must not cost the page
            return own
        if not markdown or not plain:
            return own
        return msgspec.structs.replace(
            own,
            markdown=markdown,
            plain_text=plain,
            word_count=len(plain.split()),
            duration_ms=(time.perf_counter() - started) * 1000,
        )


def page_from(result: FetchResult, extractor: ContentExtractor | None) -> WebPage:
    """The page a response is. Without an extractor, and for what is not HTML, the text is the first 10,000 characters.

    A status of 400 and above is an error, but the page keeps what it says.
    """
    extracted = ExtractionResult()
    if extractor is not None and result.is_html:
        extracted = extractor.extract(result.text, result.final_url)
    elif not _is_binary(result):
        text = result.text[:PLAIN_CHARS]
        extracted = ExtractionResult(markdown=text, plain_text=text, word_count=len(text.split()))
    status = result.status_code
    return WebPage(
        url=result.url or result.final_url,
        final_url=result.final_url,
        status_code=status,
        markdown=extracted.markdown,
        plain_text=extracted.plain_text,
        metadata=extracted.metadata,
        links=extracted.links,
        headings=extracted.headings,
        fetch_duration_ms=result.duration_ms,
        extract_duration_ms=extracted.duration_ms,
        fetched_at=time.time(),
        word_count=extracted.word_count,
        error=result.error or (f"HTTP {status}" if status >= 400 else None),
        depth=result.depth,
    )


def _is_binary(result: FetchResult) -> bool:
    kind = result.content_type.partition("/")[0]
    return kind in {"image", "audio", "video", "font"} or (
        b"\0" in result.body[:1024] and not result.encoding.startswith("utf-16")
    )
