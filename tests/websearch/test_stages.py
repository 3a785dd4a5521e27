"""A crawl as a pipeline: fetched in the async lane, read in the process lane, resumed from a journal."""

import asyncio
import gc
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stageflow import DROP, FailureMode, PipelineBuilder
from stageflow.core.errors import DefinitionError
from stageflow.websearch import (
    CrawlConfig,
    CrawlJournal,
    CrawlSource,
    ExtractStage,
    FetchConfig,
    FetchError,
    FetchProgress,
    FetchResult,
    FetchRetryConfig,
    FetchStage,
    JournalSink,
    MockFetcher,
    WebPage,
)
from tests.websearch.conftest import Site, generated_site

RULES = CrawlConfig(max_pages=500, max_depth=20, max_same_shape=80)


def config(site: Site, **changes: Any) -> FetchConfig:
    options = {"allow_hosts": (f"127.0.0.1:{site.port}",), "retry": FetchRetryConfig(max_retries=0), **changes}
    return FetchConfig(**options)


class Kept:
    """A sink's target: pages by URL, and how often each came."""

    def __init__(self) -> None:
        self.pages: dict[str, WebPage] = {}
        self.times: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, page: WebPage) -> None:
        with self._lock:
            self.pages[page.url] = page
            self.times[page.url] = self.times.get(page.url, 0) + 1


def test_the_lanes_are_the_intended_ones(site: Site) -> None:
    graph = (
        PipelineBuilder("lanes")
        .stage("found", CrawlSource(site.url))
        .map("page", ExtractStage(), "found")
        .map("fetched", FetchStage(), "addresses")
        .stage("addresses", list)
        .build()
    )
    lanes = {line.split()[0]: line for line in str(graph.plan()).splitlines() if line.startswith("  ") and line.split()}
    assert " async " in lanes["found"]
    assert " async " in lanes["fetched"]
    assert " process " in lanes["page"]


def test_a_list_of_pages_is_fetched_read_in_workers_and_kept(site: Site) -> None:
    generated_site(site, 40)
    kept = Kept()
    addresses = [f"{site.url}/p/{n}.html" for n in range(40)]
    graph = (
        PipelineBuilder("pages")
        .map("fetched", FetchStage(config(site)), "addresses")
        .map("page", ExtractStage(navigate=True), "fetched")
        .sink("keep", kept, "page")
        .stage("addresses", lambda: addresses)
        .build()
    )
    result = graph.run(processes=2)
    result.raise_for_failure()
    assert {url: page.title for url, page in kept.pages.items()} == {
        url: f"Page {n}" for n, url in enumerate(addresses)
    }
    assert all(page.navigation_actions for page in kept.pages.values())
    gc.collect()  # an unclosed connection would be a ResourceWarning, which is an error here


def test_a_whole_site_is_crawled_as_a_pipeline_with_progress(site: Site) -> None:
    generated_site(site, 60)
    kept = Kept()
    seen: list[tuple[int, int]] = []

    def progress(now: FetchProgress) -> None:
        seen.append((now.completed, now.total))

    source = CrawlSource(site.url, config(site, max_response_size=100_000), crawl=RULES, on_progress=progress)
    graph = (
        PipelineBuilder("site")
        .stage("found", source)
        .map("page", ExtractStage(), "found")
        .sink("keep", kept, "page")
        .build()
    )
    result = graph.run(processes=2)
    result.raise_for_failure()
    paths = {url.removeprefix(site.url): page for url, page in kept.pages.items()}
    assert {f"/p/{n}.html" for n in range(60)} <= paths.keys()
    assert set(kept.times.values()) == {1}
    assert paths["/trap/charset"].plain_text == "Здравствуйте"
    assert "link-local" in str(paths["/trap/inside"].error)
    assert paths["/p/0.html"].depth == 1
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_a_crawl_that_fails_goes_on_where_it_was(site: Site, tmp_path: Path) -> None:
    generated_site(site, 40)
    kept = Kept()
    book = tmp_path / "crawl.db"
    broken_at = 20

    def write(page: WebPage) -> None:
        if len(kept.pages) >= broken_at:
            raise OSError("disk full")
        kept(page)

    def graph() -> Any:
        return (
            PipelineBuilder("resumable")
            .stage("found", CrawlSource(site.url, config(site), crawl=RULES, journal=book))
            .map("page", ExtractStage(), "found")
            .sink("keep", JournalSink(book, write), "page", concurrency=1)
            .build()
        )

    first = graph().run(processes=1)
    assert not first.success
    assert len(kept.pages) == 20
    finished = set(kept.pages)
    with CrawlJournal(book) as journal:
        assert {url for url, _, done in journal.entries() if done} >= finished
    broken_at = 10_000
    second = graph().run(processes=1)
    second.raise_for_failure()
    assert {f"{site.url}/p/{n}.html" for n in range(40)} <= kept.pages.keys()
    assert set(kept.times.values()) == {1}  # nothing finished came again


def test_finished_pages_of_a_list_are_dropped(site: Site, tmp_path: Path) -> None:
    generated_site(site, 12)
    book = tmp_path / "list.db"
    addresses = [f"{site.url}/p/{n}.html" for n in range(12)]
    with CrawlJournal(book) as journal:
        for url in addresses[:5]:
            journal.finish(url)
    kept = Kept()
    graph = (
        PipelineBuilder("list")
        .map("fetched", FetchStage(config(site), journal=book), "addresses")
        .map("page", ExtractStage(), "fetched")
        .sink("keep", JournalSink(book, kept), "page")
        .stage("addresses", lambda: addresses)
        .build()
    )
    graph.run(processes=1).raise_for_failure()
    assert sorted(kept.pages) == sorted(addresses[5:])
    with CrawlJournal(book) as journal:
        assert journal.unfinished(addresses) == []


def test_a_page_that_cannot_be_fetched_fails_its_item_or_flows_on(site: Site) -> None:
    site.page("/ok", "<p>ok</p>")
    addresses = [f"{site.url}/ok", "http://127.0.0.1:1/refused"]

    def graph(stage: FetchStage, kept: Kept) -> Any:
        return (
            PipelineBuilder("failing")
            .map("fetched", stage, "addresses")
            .map("page", ExtractStage(), "fetched")
            .sink("keep", kept, "page")
            .stage("addresses", lambda: addresses)
            .build()
        )

    strict = Kept()
    result = graph(FetchStage(config(site)), strict).run(processes=1, failure_mode=FailureMode.CONTINUE_ON_FAILURE)
    assert not result.success
    assert list(strict.pages) == addresses[:1]
    tolerant = Kept()
    graph(FetchStage(config(site), keep_errors=True), tolerant).run(processes=1).raise_for_failure()
    assert "loopback" in str(tolerant.pages[addresses[1]].error)


async def test_the_stages_are_plain_callables_too(site: Site, tmp_path: Path) -> None:
    site.page("/", "<h1>T</h1>")
    fetch = FetchStage(config(site))
    result = await fetch(site.url + "/")
    assert ExtractStage()(result).markdown == "# T"
    with pytest.raises(FetchError):
        await fetch("http://127.0.0.1:1/")
    await fetch.aclose()
    mocked = FetchStage(fetcher=MockFetcher({"http://m.test/": (200, "x", {})}), journal=tmp_path / "j.db")
    assert (await mocked("http://m.test/")).text == "x"
    JournalSink(tmp_path / "j.db")(WebPage(url="http://m.test/"))
    assert await mocked("http://m.test/") is DROP
    source = CrawlSource(site.url, config(site))
    assert [page.text async for page in source()] == ["<h1>T</h1>"]
    await source.aclose()
    with pytest.raises(DefinitionError, match="mailto"):
        CrawlSource(["http://a.test/", "mailto:x"])


def test_connections_end_with_the_loop_and_a_stage_serves_many_loops(site: Site) -> None:
    site.page("/", "x")
    fetch = FetchStage(config(site))
    for _ in range(2):
        assert asyncio.run(fetch(site.url + "/")).text == "x"
    gc.collect()
    assert len(site.requests) == 4  # robots.txt and the page, per loop


def test_stages_travel_between_processes(site: Site, tmp_path: Path) -> None:
    for made in (FetchStage(), ExtractStage(navigate=True), CrawlSource(site.url), JournalSink(tmp_path / "j.db")):
        assert type(pickle.loads(pickle.dumps(made))) is type(made)
    page = pickle.loads(pickle.dumps(ExtractStage()))(FetchResult.from_text("<h1>x</h1>", url="http://a.test/"))
    assert page.markdown == "# x"


@pytest.mark.parametrize(("limit", "bounded"), [("4MB", True), ("1GiB", False)])
def test_fetched_bytes_stay_within_the_budget(site: Site, limit: str, bounded: bool) -> None:
    size, count = 200_000, 60
    for number in range(count):
        site.page(f"/{number}", b"<p>" + b"x" * size)
    idle = threading.Event()
    ahead: list[int] = []

    class Watcher:
        def emit(self, event: Any) -> None:
            if event.type == "engine.sample" and site.requests and not event.data["running"].get("fetched"):
                idle.set()

    def hold(result: FetchResult) -> None:
        if not ahead:  # the first page keeps the only consumer busy until fetching has come to rest
            idle.wait(30)
            ahead.append(len(site.requests))

    graph = (
        PipelineBuilder("budget")
        .stage("addresses", lambda: [f"{site.url}/{n}" for n in range(count)])
        .map("fetched", FetchStage(config(site, respect_robots=False)), "addresses")
        .sink("keep", hold, "fetched", concurrency=1)
        .build()
    )
    graph.run(memory_limit=limit, event_sinks=[Watcher()]).raise_for_failure()
    assert idle.is_set()
    if bounded:
        # until the first page has been seen, each is taken for a thirty-second of the budget
        assert 2 <= ahead[0] <= 36
    else:
        assert ahead[0] == count, "nothing else holds it back"
    assert len(site.requests) == count


LISTED = """
import sys
from stageflow import PipelineBuilder
from stageflow.websearch import ExtractStage, FetchConfig, FetchRetryConfig, FetchStage, JournalSink

url, host = sys.argv[1:]
out = open("pages.txt", "a")

def write(page):
    out.write(page.url + "\\n")
    out.flush()

config = FetchConfig(allow_hosts=(host,), respect_robots=False, retry=FetchRetryConfig(max_retries=0))
graph = (
    PipelineBuilder("listed")
    .stage("addresses", lambda: [f"{url}p/{n}.html" for n in range(150)])
    .map("fetched", FetchStage(config, journal="list.db"), "addresses")
    .map("page", ExtractStage(), "fetched")
    .sink("keep", JournalSink("list.db", write), "page", concurrency=1)
    .build()
)
if __name__ == "__main__":
    graph.run(processes=1).raise_for_failure()
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_a_list_of_pages_goes_on_where_it_was_killed(site: Site, tmp_path: Path, signal_name: str) -> None:
    generated_site(site, 150)
    (tmp_path / "listed.py").write_text(LISTED)
    command = [sys.executable, "listed.py", site.url + "/", f"127.0.0.1:{site.port}"]
    _end_when_written(command, tmp_path, 40, signal_name)
    finished = Counter((tmp_path / "pages.txt").read_text().split())
    before = len(site.requests)
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    written = Counter((tmp_path / "pages.txt").read_text().split())
    assert set(written) == {f"{site.url}/p/{n}.html" for n in range(150)}
    # killed between writing a page and noting it, that one page comes again
    allowed = 1 if signal_name == "SIGKILL" else 0
    assert sum(written.values()) - 150 <= allowed
    again = [request.path for request in site.requests[before:] if f"{site.url}{request.path}" in finished]
    assert len(again) <= allowed, "the server was not asked for a finished page"
    asked = len(site.requests)
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    assert len(site.requests) == asked, "and the third time for none"


def _end_when_written(command: list[str], folder: Path, count: int, signal_name: str) -> None:
    """Start the program and send it a signal when it has written so many pages."""
    pages, pause = folder / "pages.txt", threading.Event()
    first = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
    try:
        while not pages.exists() or len(pages.read_text().splitlines()) < count:
            assert first.poll() is None, first.communicate()
            pause.wait(0.01)
        first.send_signal(getattr(signal, signal_name))
        first.communicate(timeout=30)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode != 0


CRAWLER = """
import sys
from stageflow import PipelineBuilder
from stageflow.websearch import CrawlConfig, CrawlSource, ExtractStage, FetchConfig, FetchRetryConfig, JournalSink

url, host = sys.argv[1:]
out = open("pages.txt", "a")

def write(page):
    out.write(page.url + "\\n")
    out.flush()

config = FetchConfig(allow_hosts=(host,), retry=FetchRetryConfig(max_retries=0))
rules = CrawlConfig(max_pages=500, max_depth=30, max_same_shape=200)
graph = (
    PipelineBuilder("interrupted")
    .stage("found", CrawlSource(url, config, crawl=rules, journal="crawl.db"))
    .map("page", ExtractStage(), "found")
    .sink("keep", JournalSink("crawl.db", write), "page", concurrency=1)
    .build()
)
if __name__ == "__main__":
    graph.run(processes=1)
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_a_killed_crawl_neither_loses_nor_repeats_what_it_finished(
    site: Site, tmp_path: Path, signal_name: str
) -> None:
    generated_site(site, 150)
    script = tmp_path / "crawler.py"
    script.write_text(CRAWLER)
    command = [sys.executable, str(script), site.url + "/", f"127.0.0.1:{site.port}"]
    pages = tmp_path / "pages.txt"
    _end_when_written(command, tmp_path, 40, signal_name)
    with CrawlJournal(tmp_path / "crawl.db") as journal:
        finished = [url for url, _, done in journal.entries() if done]
    assert len(finished) < 150
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    written = Counter(pages.read_text().splitlines())
    assert {f"{site.url}/p/{n}.html" for n in range(150)} <= written.keys()
    assert all(written[url] <= 1 for url in finished)
    # killed between writing a page and noting it, that one page comes again
    assert sum(written.values()) - len(written) <= (1 if signal_name == "SIGKILL" else 0)
