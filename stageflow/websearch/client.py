"""`WebClient`: fetch, read and follow pages, without an engine. Every failure is a page, never an exception.

Reading runs in a thread so that a large page does not hold up the loop; for all cores use the stages in a pipeline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Self

import msgspec

from stageflow.core.errors import StageflowError
from stageflow.websearch import urls
from stageflow.websearch.config import CrawlConfig, WebSearchConfig
from stageflow.websearch.errors import FetchError
from stageflow.websearch.extract import ContentExtractor, LxmlExtractor, page_from
from stageflow.websearch.fetcher import Fetcher, FetchObserver, HttpxFetcher
from stageflow.websearch.frontier import Frontier, LinkFilter, Target, Visit, walk
from stageflow.websearch.journal import CrawlJournal
from stageflow.websearch.models import ExtractedLink, FetchProgress, FetchResult, WebPage
from stageflow.websearch.navigate import LxmlNavigator, Navigator

PageCallback = Callable[[WebPage], None]
ProgressCallback = Callable[[FetchProgress], None]


class WebClient:
    """An async context manager; closes the fetcher only if it made it. Belongs to one event loop.

    Its methods raise only what is the caller's mistake (`DefinitionError`); network and content end as error pages.
    """

    def __init__(
        self,
        config: WebSearchConfig | None = None,
        *,
        fetcher: Fetcher | None = None,
        extractor: ContentExtractor | None = None,
        navigator: Navigator | None = None,
        observer: FetchObserver | None = None,
    ) -> None:
        self.config = config if config is not None else WebSearchConfig()
        self._observer = observer
        self._owned = HttpxFetcher(self.config.fetch, observer=observer) if fetcher is None else None
        self._fetcher: Fetcher = fetcher if fetcher is not None else self._owned or HttpxFetcher(self.config.fetch)
        self._extractor = extractor if extractor is not None else LxmlExtractor(self.config.extraction)
        self._navigator = navigator if navigator is not None else LxmlNavigator(self.config.navigation)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the fetcher if this client made it; closing twice is fine."""
        if self._owned is not None:
            await self._owned.aclose()

    async def fetch(
        self,
        url: str,
        *,
        extract: bool | None = None,
        navigate: bool | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> WebPage:
        """One page. `extract` and `navigate` override the configuration; `timeout` is seconds per attempt."""
        try:
            result = await self._fetcher.fetch(url, timeout=timeout, headers=headers)
        except FetchError as error:
            return WebPage.error_result(url, error.message or type(error).__name__)
        except (OSError, TimeoutError) as error:
            return WebPage.error_result(url, f"{type(error).__name__}: {error}")
        return await self._read(msgspec.structs.replace(result, url=url), extract, navigate)

    async def _read(self, result: FetchResult, extract: bool | None = None, navigate: bool | None = None) -> WebPage:
        wants_text = self.config.auto_extract if extract is None else extract
        wants_ways = self.config.auto_navigate if navigate is None else navigate

        def read() -> WebPage:
            page = page_from(result, self._extractor if wants_text else None)
            if wants_ways and result.is_html:
                ways = self._navigator.analyze(result.text, result.final_url)
                page = msgspec.structs.replace(page, navigation_actions=ways.actions, pagination=ways.pagination)
            return page

        page = await asyncio.to_thread(read)
        if self._observer is not None and wants_text:
            with contextlib.suppress(Exception):
                self._observer.on_extract_complete(
                    page.url,
                    duration_ms=page.extract_duration_ms,
                    word_count=page.word_count,
                    link_count=len(page.links),
                )
        return page

    async def fetch_many(
        self,
        addresses: Sequence[str],
        *,
        concurrency: int | None = None,
        extract: bool | None = None,
        navigate: bool | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> list[WebPage]:
        """The pages in the order asked for, at most `concurrency` (5) in flight; `on_progress` is called after each."""
        slots = asyncio.Semaphore(concurrency if concurrency is not None else self.config.max_concurrent)
        progress = FetchProgress(total=len(addresses))

        async def one(url: str) -> WebPage:
            async with slots:
                page = await self.fetch(url, extract=extract, navigate=navigate)
            note(progress, page, on_progress)
            return page

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(url)) for url in addresses]
        return [task.result() for task in tasks]

    async def fetch_with_navigation(self, url: str, *, max_pages: int = 5) -> list[WebPage]:
        """The page and those after it by "next", until there is none, `max_pages` are there, or one repeats."""
        pages: list[WebPage] = []
        seen: set[str] = set()
        following: str | None = url
        while following is not None and len(pages) < max_pages:
            key = urls.crawl_key(following) or following
            if key in seen:
                break
            seen.add(key)
            page = await self.fetch(following, navigate=True)
            pages.append(page)
            seen.add(urls.crawl_key(page.final_url) or page.final_url)
            following = page.pagination.next_url if page.pagination is not None else None
        return pages

    async def crawl_iter(
        self,
        start: str | Sequence[str],
        config: CrawlConfig | None = None,
        *,
        link_filter: LinkFilter | None = None,
        journal: CrawlJournal | None = None,
        concurrency: int | None = None,
    ) -> AsyncGenerator[WebPage, None]:
        """Pages breadth first as they come. With a journal, a page is finished when the next one is asked for.

        Failed pages are yielded too; pages reached twice through redirects are not.
        """
        frontier = Frontier(
            [start] if isinstance(start, str) else start, config, link_filter=link_filter, journal=journal
        )

        async def visit(target: Target) -> Visit[WebPage]:
            try:
                result = await self._fetcher.fetch(target.url)
            except (FetchError, OSError, TimeoutError) as error:
                text = error.message if isinstance(error, StageflowError) else f"{type(error).__name__}: {error}"
                page = WebPage.error_result(target.url, text)
                return Visit(msgspec.structs.replace(page, depth=target.depth), target.url)
            page = await self._read(msgspec.structs.replace(result, url=target.url, depth=target.depth))
            links = page.links if self.config.auto_extract or not result.is_html else await self._links(result)
            return Visit(page, page.final_url, [link.url for link in links])

        most = concurrency if concurrency is not None else self.config.max_concurrent
        async with contextlib.aclosing(walk(frontier, visit, concurrency=most)) as visits:
            async for target, outcome, reason in visits:
                if reason is None:
                    yield outcome.item
                if journal is not None:
                    journal.finish(target.url, error=outcome.item.error or reason)

    async def _links(self, result: FetchResult) -> list[ExtractedLink]:
        return await asyncio.to_thread(self._extractor.extract_links, result.text, result.final_url)

    async def crawl(
        self,
        start: str | Sequence[str],
        config: CrawlConfig | None = None,
        *,
        max_pages: int | None = None,
        max_depth: int | None = None,
        same_domain: bool | None = None,
        link_filter: LinkFilter | None = None,
        journal: CrawlJournal | None = None,
        on_page: PageCallback | None = None,
    ) -> list[WebPage]:
        """The pages of a site, breadth first. The three short keywords replace those of `config`."""
        given = {"max_pages": max_pages, "max_depth": max_depth, "same_domain": same_domain}
        chosen = {name: value for name, value in given.items() if value is not None}
        rules = (config if config is not None else CrawlConfig()).replace(**chosen)
        pages: list[WebPage] = []
        async for page in self.crawl_iter(start, rules, link_filter=link_filter, journal=journal):
            pages.append(page)
            if on_page is not None:
                on_page(page)
        return pages


def note(progress: FetchProgress, page: WebPage, on_progress: ProgressCallback | None) -> None:
    """Count one page and tell the listener, whose exceptions are swallowed."""
    if page.error is None:
        progress.record_success(page.url)
    else:
        progress.record_error(page.error, page.url)
    if on_progress is not None:
        with contextlib.suppress(Exception):
            on_progress(progress)
