"""Extractor and navigator without any library, for where lxml is not installed: regular expressions, selectors ignored.

One linear pass over tags; worse on odd pages than `LxmlExtractor`, and it knows no main content.
"""

from __future__ import annotations

import html as entities
import re
import time
from collections.abc import Iterator

from stageflow.websearch import urls
from stageflow.websearch.config import ExtractionConfig, NavigationConfig
from stageflow.websearch.models import (
    ExtractedLink,
    ExtractionResult,
    HeadingOutline,
    NavigationResult,
    PageMetadata,
    PaginationInfo,
)
from stageflow.websearch.navigate import order_actions, says

# Each alternative starts with "<" or takes text up to the next one and is bounded, so the scan is linear.
_TOKEN = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]{0,20})([^<>]{0,5000})>|<!--|<![^<>]{0,500}>|[^<]+|<")
_ATTRIBUTE = re.compile(r"""([a-zA-Z:-]{1,40})\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
_SILENT = frozenset({"script", "style", "noscript", "iframe", "svg", "template", "nav", "footer", "header", "aside"})
_BREAKS = frozenset({"p", "div", "section", "article", "ul", "ol", "table", "tr", "blockquote", "main", "body", "dl"})
_VOID = frozenset({"br", "hr", "img", "meta", "link", "input"})
_MARKS = {"b": "**", "strong": "**", "i": "*", "em": "*", "code": "`"}


def _attributes(text: str) -> dict[str, str]:
    return {
        match[1].lower(): entities.unescape(match[2] or match[3] or match[4] or "")
        for match in _ATTRIBUTE.finditer(text)
    }


def tokens(text: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """("text", content, {}), ("start", tag, attributes), ("end", tag, {}) in order, without comments and scripts."""
    position = 0
    while (match := _TOKEN.match(text, position)) is not None:
        position = match.end()
        whole = match[0]
        if whole == "<!--":
            end = text.find("-->", position)
            position = end + 3 if end >= 0 else len(text)
        elif match[2] is not None:
            tag = match[2].lower()
            if match[1]:
                yield "end", tag, {}
                continue
            yield "start", tag, _attributes(match[3])
            if tag in {"script", "style"}:
                closing = re.compile(rf"</{tag}", re.I).search(text, position)
                position = closing.start() if closing else len(text)
        elif not whole.startswith("<!"):
            yield "text", entities.unescape(whole), {}


class FallbackExtractor:
    """`ContentExtractor` by regular expressions. Picklable, stateless, never raises on content."""

    def __init__(self, config: ExtractionConfig | None = None) -> None:
        self.config = config if config is not None else ExtractionConfig()

    def extract(self, html: str, url: str, *, selector: str | None = None) -> ExtractionResult:
        """Everything it can tell; `selector` is ignored."""
        started = time.perf_counter()
        text = html[: self.config.max_html_chars]
        markdown, headings = self._render(text, url, marks=True)
        plain, _ = self._render(text, url, marks=False)
        return ExtractionResult(
            markdown=markdown,
            plain_text=plain,
            metadata=self.extract_metadata(text, url),
            links=self.extract_links(text, url),
            headings=headings,
            word_count=len(plain.split()),
            duration_ms=(time.perf_counter() - started) * 1000,
        )

    def _render(self, text: str, url: str, *, marks: bool) -> tuple[str, list[HeadingOutline]]:
        out: list[str] = []
        headings: list[HeadingOutline] = []
        silent = depth = 0
        heading_at: tuple[int, int] | None = None
        link_at: tuple[int, str | None] | None = None
        for kind, value, attributes in tokens(text):
            opening = kind == "start"
            if kind == "text":
                if not silent and depth != -1:
                    out.append(re.sub(r"\s+", " ", value))
            elif value in {"head", "title"}:
                depth = -1 if opening else 0
            elif value == "body":
                depth = 0
            elif value in _SILENT:
                silent = silent + 1 if opening else max(0, silent - 1)
            elif silent:
                continue
            elif value[0] == "h" and value[1:].isdigit() and value[1:] in "123456":
                if opening:
                    out.append("\n\n")
                    heading_at = (len(out), int(value[1:]))
                elif heading_at is not None:
                    label = " ".join("".join(out[heading_at[0] :]).split())[: self.config.max_heading_length]
                    del out[heading_at[0] :]
                    level, heading_at = heading_at[1], None
                    if label:
                        headings.append(HeadingOutline(level=level, text=label.replace("*", "")))
                        out.append(
                            ("#" * level + " " if marks and self.config.preserve_headings else "") + label + "\n\n"
                        )
            elif value == "a" and opening:
                link_at = (len(out), urls.join(url, attributes.get("href", "")) if attributes.get("href") else None)
            elif value == "a" and link_at is not None:
                label = " ".join("".join(out[link_at[0] :]).split())
                target = link_at[1]
                if label and target and marks and self.config.preserve_links and self.config.include_link_urls:
                    del out[link_at[0] :]
                    out.append(f"[{label[: self.config.max_link_text_length]}]({target})")
                link_at = None
            elif value == "li":
                out.append("\n- " if opening and marks else "\n")
            elif value == "br":
                out.append("\n")
            elif value == "hr":
                out.append("\n\n---\n\n" if marks else "\n\n")
            elif value in _MARKS and marks:
                out.append(_MARKS[value])
            elif value in _BREAKS:
                out.append("\n\n")
        joined = "".join(out)
        lines = (re.sub(r" {2,}", " ", line).strip() for line in joined.split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip(), headings

    def extract_metadata(self, html: str, url: str) -> PageMetadata:
        """Title, description, language, keywords."""
        metas: dict[str, str] = {}
        title: list[str] = []
        language: str | None = None
        within = False
        for kind, value, attributes in tokens(html[: self.config.max_html_chars]):
            if kind == "start" and value == "meta":
                name = attributes.get("property") or attributes.get("name")
                if name and attributes.get("content"):
                    metas.setdefault(name.lower(), attributes["content"].strip())
            elif kind == "start" and value == "html":
                language = attributes.get("lang")
            elif value == "title" and kind != "text":
                within = kind == "start" and not title
            elif kind == "text" and within:
                title.append(value)
        words = [word.strip() for word in metas.get("keywords", "").split(",") if word.strip()]
        return PageMetadata(
            title=metas.get("og:title") or " ".join("".join(title).split()) or None,
            description=metas.get("og:description") or metas.get("description"),
            language=language,
            author=metas.get("author"),
            keywords=words,
        )

    def extract_links(self, html: str, url: str) -> list[ExtractedLink]:
        """Every link once, with its text."""
        found: dict[str, ExtractedLink] = {}
        current: tuple[dict[str, str], list[str]] | None = None
        for kind, value, attributes in tokens(html[: self.config.max_html_chars]):
            if kind == "text":
                if current is not None:
                    current[1].append(value)
                continue
            if value != "a":
                continue
            if current is not None:
                text = " ".join("".join(current[1]).split())[: self.config.max_link_text_length]
                title = current[0].get("title")
                link = ExtractedLink.from_element(
                    current[0].get("href", ""), text, url, title=title, rel=current[0].get("rel")
                )
                if link is not None:
                    found.setdefault(link.url, link)
                if len(found) >= self.config.max_links:
                    break
            current = (attributes, []) if kind == "start" and attributes.get("href") else None
        return list(found.values())


class FallbackNavigator:
    """`Navigator` without a library: next and previous only, by the words of links."""

    def __init__(self, config: NavigationConfig | None = None) -> None:
        self.config = config if config is not None else NavigationConfig()

    def analyze(self, html: str, url: str) -> NavigationResult:
        """Next and previous page, where a link says so."""
        links = FallbackExtractor().extract_links(html, url)
        following = next((link.url for link in links if says(link.text, self.config.next_texts)), None)
        preceding = next((link.url for link in links if says(link.text, self.config.prev_texts)), None)
        if following is None and preceding is None:
            return NavigationResult()
        pagination = PaginationInfo(next_url=following, prev_url=preceding)
        return NavigationResult(
            pagination=pagination, actions=order_actions(pagination, (), (), self.config.max_actions)
        )
