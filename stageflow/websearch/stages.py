"""The room as stages of a pipeline: fetch in the async lane, read in the process lane, crawl as a source.

    graph = (
        PipelineBuilder("site")
        .stage("found", CrawlSource(["http://127.0.0.1:8000/"], crawl=CrawlConfig(max_pages=500)))
        .map("page", ExtractStage(), "found")
        .sink("save", JournalSink("crawl.db", write), "page")
        .build()
    )

May import: pipeline (the mark of `@stage`) and what is below. Never an executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import DROP, StageKind
from stageflow.pipeline.decorator import stage
from stageflow.websearch import urls
from stageflow.websearch.config import CrawlConfig, ExtractionConfig, FetchConfig, NavigationConfig
from stageflow.websearch.errors import FetchError
from stageflow.websearch.extract import ContentExtractor, LxmlExtractor, page_from
from stageflow.websearch.fetcher import Fetcher, HttpxFetcher
from stageflow.websearch.frontier import Frontier, LinkFilter, Target, Visit, walk
from stageflow.websearch.journal import CrawlJournal
from stageflow.websearch.models import FetchProgress, FetchResult, WebPage
from stageflow.websearch.navigate import LxmlNavigator

Loop = asyncio.AbstractEventLoop


async def _keeper(fetcher: HttpxFetcher) -> AsyncGenerator[None, None]:
    """Closes `fetcher` when the loop that first advanced this generator shuts its generators down, as runners do."""
    try:
        yield
    finally:
        await fetcher.aclose()


class _FetcherPerLoop:
    """One open fetcher per event loop: all runs of a graph share a stage, and runs may have loops of their own."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._open: weakref.WeakKeyDictionary[Loop, tuple[HttpxFetcher, AsyncGenerator[None, None]]]
        self._open = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[_FetcherPerLoop], tuple[FetchConfig]]:
        return type(self), (self.config,)

    async def get(self) -> HttpxFetcher:
        loop = asyncio.get_running_loop()
        kept = self._open.get(loop)
        if kept is None:
            fetcher = HttpxFetcher(self.config)
            kept = self._open[loop] = (fetcher, _keeper(fetcher))
            await anext(kept[1])
        return kept[0]

    async def aclose(self) -> None:
        kept = self._open.pop(asyncio.get_running_loop(), None)
        if kept is not None:
            await kept[1].aclose()


def _journal(given: CrawlJournal | str | Path | None) -> CrawlJournal | None:
    return given if given is None or isinstance(given, CrawlJournal) else CrawlJournal(given)


@stage(kind=StageKind.ENRICH)
class FetchStage:
    """A stage or map that takes a URL and gives its `FetchResult`; runs in the async lane.

    A page that cannot be fetched fails the stage or item (`FetchError`), so retries and failure modes are the engine's;
    `keep_errors=True` lets it flow on as a result with `error`. With a journal, finished pages are dropped (in a map).
    The connections live as long as the event loop that runs the stage. `fetcher` replaces HTTP (tests).
    """

    def __init__(
        self,
        config: FetchConfig | None = None,
        *,
        fetcher: Fetcher | None = None,
        journal: CrawlJournal | str | Path | None = None,
        headers: Mapping[str, str] | None = None,
        keep_errors: bool = False,
    ) -> None:
        self._own = _FetcherPerLoop(config if config is not None else FetchConfig())
        self._fetcher = fetcher
        self._journal = _journal(journal)
        self._headers = dict(headers or {})
        self._keep_errors = keep_errors

    async def __call__(self, url: str) -> FetchResult:
        """The response for `url`."""
        if self._journal is not None and self._journal.is_finished(url):
            return DROP  # type: ignore[return-value] # the engine takes it out; the annotation is for the next stage
        fetcher: Fetcher = self._fetcher if self._fetcher is not None else await self._own.get()
        try:
            result = await fetcher.fetch(url, headers=self._headers)
        except FetchError as error:
            if not self._keep_errors:
                raise
            return FetchResult.error_result(url, error.message)
        return msgspec.structs.replace(result, url=url)

    async def aclose(self) -> None:
        """Close this loop's connections now instead of at its end."""
        await self._own.aclose()


@stage(kind=StageKind.TRANSFORM)
class ExtractStage:
    """A stage or map that takes a `FetchResult` and gives a `WebPage`; pure CPU, made for the process lane.

    `navigate=True` fills `pagination` and `navigation_actions` as well, at the price of a second reading.
    """

    def __init__(
        self,
        config: ExtractionConfig | None = None,
        *,
        extractor: ContentExtractor | None = None,
        navigate: bool = False,
        navigation: NavigationConfig | None = None,
    ) -> None:
        self._extractor: ContentExtractor = extractor if extractor is not None else LxmlExtractor(config)
        self._navigator = LxmlNavigator(navigation) if navigate else None

    def __call__(self, result: FetchResult) -> WebPage:
        """The page a response is."""
        page = page_from(result, self._extractor)
        if self._navigator is not None and result.is_html:
            ways = self._navigator.analyze(result.text, result.final_url)
            page = msgspec.structs.replace(page, navigation_actions=ways.actions, pagination=ways.pagination)
        return page


@stage(kind=StageKind.ENRICH)
class CrawlSource:
    """A source that yields the `FetchResult` of every page of a site, breadth first; runs in the async lane.

    It reads only the links (in a thread); the rest is for the stages behind it. Failed pages flow on with `error` set.
    With a journal, a restart goes on where the last run ended: pages that `JournalSink` finished are not fetched again,
    those found and not finished are. `on_progress` is called after each page; it must not block.
    """

    def __init__(
        self,
        start: str | Sequence[str],
        config: FetchConfig | None = None,
        *,
        crawl: CrawlConfig | None = None,
        fetcher: Fetcher | None = None,
        extractor: ContentExtractor | None = None,
        journal: CrawlJournal | str | Path | None = None,
        link_filter: LinkFilter | None = None,
        concurrency: int = 8,
        on_progress: Callable[[FetchProgress], None] | None = None,
    ) -> None:
        self._start = [start] if isinstance(start, str) else list(start)
        bad = [url for url in self._start if urls.normalize(url) is None]
        if bad or not self._start:
            raise DefinitionError(f"CrawlSource cannot start at {bad}: not absolute http or https URLs", urls=bad)
        if concurrency < 1:
            raise DefinitionError(f"CrawlSource(concurrency={concurrency!r}): at least 1", got=concurrency)
        self._crawl = crawl if crawl is not None else CrawlConfig()
        self._own = _FetcherPerLoop(config if config is not None else FetchConfig())
        self._fetcher = fetcher
        self._extractor: ContentExtractor = extractor if extractor is not None else LxmlExtractor()
        self._journal = _journal(journal)
        self._filter = link_filter
        self._concurrency = concurrency
        self._on_progress = on_progress

    async def _visit(self, target: Target) -> Visit[FetchResult]:
        fetcher: Fetcher = self._fetcher if self._fetcher is not None else await self._own.get()
        try:
            result = await fetcher.fetch(target.url)
        except FetchError as error:
            return Visit(FetchResult.error_result(target.url, error.message, depth=target.depth), target.url)
        result = msgspec.structs.replace(result, url=target.url, depth=target.depth)
        if not result.is_html or target.depth >= self._crawl.max_depth:
            return Visit(result, result.final_url)
        links = await asyncio.to_thread(self._links, result)
        return Visit(result, result.final_url, links)

    def _links(self, result: FetchResult) -> list[str]:
        return [link.url for link in self._extractor.extract_links(result.text, result.final_url)]

    async def __call__(self, ctx: Any = None) -> AsyncGenerator[FetchResult, None]:
        """The pages; `ctx` is the stage's context, which is told of the progress."""
        frontier = Frontier(self._start, self._crawl, link_filter=self._filter, journal=self._journal)
        progress = FetchProgress()
        async with contextlib.aclosing(walk(frontier, self._visit, concurrency=self._concurrency)) as visits:
            async for target, outcome, reason in visits:
                self._note(progress, frontier, outcome.item, ctx)
                if reason is None:
                    yield outcome.item
                elif self._journal is not None:
                    self._journal.finish(target.url, error=reason)

    def _note(self, progress: FetchProgress, frontier: Frontier, result: FetchResult, ctx: Any) -> None:
        progress.total = min(self._crawl.max_pages, frontier.started + len(frontier))
        if result.error is None:
            progress.record_success(result.url)
        else:
            progress.record_error(result.error, result.url)
            del progress.errors[:-100]  # a source may run for days
        if self._on_progress is not None:
            with contextlib.suppress(Exception):
                self._on_progress(progress)
        if ctx is not None:
            ctx.progress(progress.completed, progress.total, result.url)

    async def aclose(self) -> None:
        """Close this loop's connections now instead of at its end."""
        await self._own.aclose()


@stage(kind=StageKind.WORK)
class JournalSink:
    """A sink that hands each page to `write` and then notes it as finished in the journal.

    If the process dies between the two, the page comes again: `write` should be idempotent (by URL). Thread-safe if
    `write` is.
    """

    def __init__(self, journal: CrawlJournal | str | Path, write: Callable[[WebPage], object] | None = None) -> None:
        self._journal = journal if isinstance(journal, CrawlJournal) else CrawlJournal(journal)
        self._write = write

    def __call__(self, page: WebPage) -> None:
        """Take one page."""
        if self._write is not None:
            self._write(page)
        self._journal.finish(page.url, error=page.error)
