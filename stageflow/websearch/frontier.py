"""Which page of a crawl comes next: breadth first, each page once, every trap bounded. Pure: no I/O but the journal's.

`Frontier` decides, `walk` performs.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from stageflow.websearch import urls
from stageflow.websearch.config import CrawlConfig
from stageflow.websearch.journal import CrawlJournal

T = TypeVar("T")
LinkFilter = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Target:
    """A page to visit."""

    url: str
    depth: int


@dataclass(frozen=True, slots=True)
class Visit(Generic[T]):
    """What came of a target: something to hand out, where it really was, and the links it has."""

    item: T
    final_url: str
    links: Iterable[str] = ()


class Frontier:
    """The queue of one crawl. Deterministic: equal pages in equal order give equal targets. Belongs to one thread.

    With a journal, pages finished in an earlier run are not visited again and those it had found are not lost.
    """

    def __init__(
        self,
        start: Iterable[str],
        config: CrawlConfig | None = None,
        *,
        link_filter: LinkFilter | None = None,
        journal: CrawlJournal | None = None,
    ) -> None:
        self.config = config if config is not None else CrawlConfig()
        self._filter = link_filter
        self._journal = journal
        self._queue: deque[Target] = deque()
        self._seen: set[str] = set()
        self._reached: set[str] = set()
        self._hosts: set[str] = set()
        self._per_host: Counter[str] = Counter()
        self._shapes: Counter[str] = Counter()
        self._started = 0
        seeds = [clean for clean in (urls.normalize(url) for url in start) if clean is not None]
        self._hosts.update(urls.host_of(url) for url in seeds)
        if journal is not None:
            for url, depth, done in journal.entries():
                self._seen.add(urls.crawl_key(url) or url)
                self._admit(url)
                if done:
                    self._started += 1
                else:
                    self._queue.append(Target(url, depth))
                if depth == 0:
                    self._hosts.add(urls.host_of(url))
        self._add_all(seeds, 0)

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def started(self) -> int:
        """Pages handed out so far, those of earlier runs with the same journal included."""
        return self._started

    def pop(self) -> Target | None:
        """The next target, or None when there is none now (more may be found) or `max_pages` is reached."""
        if not self._queue or self._started >= self.config.max_pages:
            return None
        self._started += 1
        return self._queue.popleft()

    def found(self, target: Target, final_url: str, links: Iterable[str]) -> str | None:
        """Take in a visited page; None, or why it does not count: seen under another address, or it left the site."""
        final_key = urls.crawl_key(final_url) or final_url
        host = urls.host_of(final_url)
        if target.depth == 0:
            self._hosts.add(host)  # a start page may move to www.
        elif self.config.same_domain and host not in self._hosts:
            return "redirects to another site"
        if final_key in self._reached:
            return "is a page seen before"
        self._reached.add(final_key)
        self._seen.add(final_key)
        if target.depth < self.config.max_depth:
            self._add_all(links, target.depth + 1)
        return None

    def _add_all(self, links: Iterable[str], depth: int) -> None:
        fresh: list[tuple[str, int]] = []
        for link in links:
            clean = urls.normalize(link)
            if clean is None:
                continue
            key = urls.crawl_key(clean) or clean
            if key in self._seen or (depth > 0 and not self._wanted(clean)):
                continue
            self._seen.add(key)
            self._admit(clean)
            self._queue.append(Target(clean, depth))
            fresh.append((clean, depth))
        if self._journal is not None and fresh:
            self._journal.add(fresh)

    def _admit(self, url: str) -> None:
        self._per_host[urls.host_of(url)] += 1
        if self.config.max_same_shape is not None:
            self._shapes[urls.shape_of(url)] += 1

    def _wanted(self, url: str) -> bool:
        """Whether a link may be followed at all; the bounds here are what ends endless sites."""
        config = self.config
        if len(url) > config.max_url_length:
            return False
        host = urls.host_of(url)
        if config.same_domain and host not in self._hosts:
            return False
        if config.max_pages_per_host is not None and self._per_host[host] >= config.max_pages_per_host:
            return False
        segments = urls.path_segments(url)
        if len(segments) > config.max_path_depth:
            return False
        if segments and max(Counter(segments).values()) > config.max_repeated_segment:
            return False
        if config.max_same_shape is not None and self._shapes[urls.shape_of(url)] >= config.max_same_shape:
            return False
        return self._filter is None or self._filter(url)


async def walk(
    frontier: Frontier, visit: Callable[[Target], Awaitable[Visit[T]]], *, concurrency: int
) -> AsyncGenerator[tuple[Target, Visit[T], str | None], None]:
    """Visit pages breadth first, `concurrency` at once, and yield them in order with why one does not count.

    Order and set of pages do not depend on which page answers first. Closing the iterator cancels what is in flight.
    """
    running: deque[tuple[Target, asyncio.Task[Visit[T]]]] = deque()
    try:
        while True:
            while len(running) < concurrency and (target := frontier.pop()) is not None:
                running.append((target, asyncio.ensure_future(visit(target))))
            if not running:
                return
            target, task = running[0]
            outcome = await task
            running.popleft()
            reason = frontier.found(target, outcome.final_url, outcome.links)
            # the next ones start before this one is handed out: the consumer's time is not lost
            while len(running) < concurrency and (following := frontier.pop()) is not None:
                running.append((following, asyncio.ensure_future(visit(following))))
            yield target, outcome, reason
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)
