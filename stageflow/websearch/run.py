"""Short ways to the usual jobs: fetch a list, search in pages, map a site. And the pure helpers they share."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import msgspec

from stageflow.websearch import urls
from stageflow.websearch.client import ProgressCallback, WebClient, note
from stageflow.websearch.config import CrawlConfig, WebSearchConfig
from stageflow.websearch.errors import FetchError, is_transient
from stageflow.websearch.extract import ContentExtractor, LxmlExtractor, page_from
from stageflow.websearch.fetcher import Fetcher, HttpxFetcher
from stageflow.websearch.models import ExtractedLink, FetchProgress, FetchResult, SearchResult, SiteMap, WebPage
from stageflow.websearch.politeness import Sleep

EXTRACTION_WORKERS = 4
LINK_CONCURRENCY = 10

# ---------------------------------------------------------------- pure helpers


def _terms(query: str) -> list[str]:
    return list(dict.fromkeys(query.lower().split()))


def calculate_relevance_score(page: WebPage, query: str) -> float:
    """The share of distinct query terms that occur in title or text, in [0, 1]; 0 for an empty query."""
    terms = _terms(query)
    if not terms:
        return 0.0
    text = f"{page.title or ''} {page.plain_text}".lower()
    return sum(term in text for term in terms) / len(terms)


def filter_relevant_pages(
    pages: Iterable[WebPage], query: str, *, threshold: float = 0.3
) -> list[tuple[WebPage, float]]:
    """The pages that score at least `threshold`, best first; equals keep their order."""
    scored = [(page, calculate_relevance_score(page, query)) for page in pages]
    return sorted((pair for pair in scored if pair[1] >= threshold), key=lambda pair: -pair[1])


def extract_unique_links(pages: Iterable[WebPage], *, internal_only: bool = False) -> list[ExtractedLink]:
    """Every link of the pages once, the first one seen."""
    found: dict[str, ExtractedLink] = {}
    for page in pages:
        for link in page.extract_links(internal_only=internal_only):
            found.setdefault(link.url, link)
    return list(found.values())


def calculate_retry_delay(
    attempt: int, *, base_delay: float = 1.0, max_delay: float = 30.0, multiplier: float = 2.0
) -> float:
    """Seconds after the 0-based `attempt`, growing exponentially up to `max_delay`."""
    try:
        return min(base_delay * multiplier ** max(0, attempt), max_delay)
    except OverflowError:
        return max_delay


def create_error_result(url: str, error: str, *, duration_ms: float = 0.0) -> WebPage:
    """The page that stands for a failure."""
    return WebPage.error_result(url, error, duration_ms=duration_ms)


# ---------------------------------------------------------------- running


class ExtractionPool:
    """A few threads that read pages. A context manager; `shutdown` waits for what is being read.

    Threads share one interpreter: for all cores put `ExtractStage` into a pipeline.
    """

    def __init__(self, extractor: ContentExtractor | None = None, *, workers: int = EXTRACTION_WORKERS) -> None:
        self._extractor = extractor if extractor is not None else LxmlExtractor()
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="websearch-extract")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    async def read(self, result: FetchResult) -> WebPage:
        """The page a response is; runs in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, page_from, result, self._extractor)

    def shutdown(self) -> None:
        """End the threads; calling twice is fine."""
        self._threads.shutdown(wait=True)


async def fetch_pages(
    addresses: Sequence[str],
    *,
    config: WebSearchConfig | None = None,
    fetcher: Fetcher | None = None,
    concurrency: int | None = None,
    on_progress: ProgressCallback | None = None,
    pool: ExtractionPool | None = None,
) -> list[WebPage]:
    """The pages in the order asked for; `on_progress` after each. With a `pool`, its threads do the reading."""
    if pool is None:
        async with WebClient(config, fetcher=fetcher) as client:
            return await client.fetch_many(addresses, concurrency=concurrency, on_progress=on_progress)
    chosen = config if config is not None else WebSearchConfig()
    owned = HttpxFetcher(chosen.fetch) if fetcher is None else None
    source: Fetcher = fetcher if fetcher is not None else owned or HttpxFetcher(chosen.fetch)
    slots = asyncio.Semaphore(concurrency if concurrency is not None else chosen.max_concurrent)
    progress = FetchProgress(total=len(addresses))

    async def one(url: str) -> WebPage:
        async with slots:
            try:
                result = await source.fetch(url)
            except (FetchError, OSError, TimeoutError) as error:
                page = WebPage.error_result(url, str(error))
            else:
                page = await pool.read(msgspec.structs.replace(result, url=url))
        note(progress, page, on_progress)
        return page

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(url)) for url in addresses]
    finally:
        if owned is not None:
            await owned.aclose()
    return [task.result() for task in tasks]


async def search_and_extract(
    query: str,
    addresses: Sequence[str],
    *,
    config: WebSearchConfig | None = None,
    fetcher: Fetcher | None = None,
    threshold: float = 0.0,
) -> SearchResult:
    """The pages sorted by how many terms of `query` they hold; failed pages are left out, equals keep their order."""
    started = time.perf_counter()
    pages = await fetch_pages(addresses, config=config, fetcher=fetcher)
    scored = filter_relevant_pages((page for page in pages if page.success), query, threshold=threshold)
    return SearchResult(
        query=query,
        pages=[page for page, _ in scored],
        relevance={page.url: score for page, score in scored},
        total_fetched=len(pages),
        duration_ms=(time.perf_counter() - started) * 1000,
    )


async def map_site(
    url: str,
    *,
    max_pages: int = 50,
    max_depth: int = 2,
    config: WebSearchConfig | None = None,
    fetcher: Fetcher | None = None,
    link_filter: Callable[[str], bool] | None = None,
) -> SiteMap:
    """What a site consists of, by crawling it; `depth_reached` is the depth asked for."""
    started = time.perf_counter()
    async with WebClient(config, fetcher=fetcher) as client:
        pages = await client.crawl(url, CrawlConfig(max_pages=max_pages, max_depth=max_depth), link_filter=link_filter)
    links = extract_unique_links(pages)
    return SiteMap(
        base_url=url,
        pages=pages,
        internal_links=[link.url for link in links if urls.same_domain(link.url, url)],
        external_links=[link.url for link in links if not urls.same_domain(link.url, url)],
        depth_reached=max_depth,
        duration_ms=(time.perf_counter() - started) * 1000,
    )


async def fetch_with_retry(
    url: str,
    *,
    max_retries: int = 3,
    retry_delay: float = 1.0,
    config: WebSearchConfig | None = None,
    fetcher: Fetcher | None = None,
    sleep: Sleep = asyncio.sleep,
) -> WebPage:
    """One page, tried up to `max_retries` + 1 times, `retry_delay` * (attempt + 1) seconds between.

    Then an error page that names the attempts. What will not get better (a refused address) is not repeated.
    """
    chosen = config if config is not None else WebSearchConfig()
    # two retry loops inside each other would multiply
    single = chosen.replace(fetch=chosen.fetch.replace(retry=chosen.fetch.retry.replace(max_retries=0)))
    owned = HttpxFetcher(single.fetch) if fetcher is None else None
    source: Fetcher = fetcher if fetcher is not None else owned or HttpxFetcher(single.fetch)
    attempt = 0
    try:
        while True:
            try:
                result = await source.fetch(url)
                problem = f"HTTP {result.status_code}"
                if not chosen.fetch.retry.should_retry_status(result.status_code):
                    return await asyncio.to_thread(page_from, result, LxmlExtractor(chosen.extraction))
            except Exception as error:
                problem = re.sub(r"\s*\n.*", "", str(error), flags=re.S) or type(error).__name__
                if not is_transient(error):
                    return WebPage.error_result(url, f"failed after {attempt + 1} attempt(s): {problem}")
            attempt += 1
            if attempt > max_retries:
                return WebPage.error_result(url, f"failed after {attempt} attempt(s): {problem}")
            await sleep(retry_delay * attempt)
    finally:
        if owned is not None:
            await owned.aclose()


async def extract_all_links(
    addresses: Sequence[str],
    *,
    config: WebSearchConfig | None = None,
    fetcher: Fetcher | None = None,
    concurrency: int = LINK_CONCURRENCY,
    internal_only: bool = False,
) -> list[ExtractedLink]:
    """Every link on any of the pages, once, in the order of the pages."""
    pages = await fetch_pages(addresses, config=config, fetcher=fetcher, concurrency=concurrency)
    return extract_unique_links(pages, internal_only=internal_only)
