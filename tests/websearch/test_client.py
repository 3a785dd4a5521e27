"""`WebClient` and the run utilities: order, failures as pages, crawling a site full of traps, resuming."""

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stageflow.websearch import (
    CrawlConfig,
    CrawlJournal,
    ExtractionPool,
    FetchConfig,
    FetchError,
    FetchProgress,
    FetchRetryConfig,
    MockFetcher,
    NoOpObserver,
    WebClient,
    WebPage,
    WebSearchConfig,
    extract_all_links,
    fetch_pages,
    fetch_with_retry,
    map_site,
    search_and_extract,
)
from stageflow.websearch.frontier import Frontier
from tests.websearch.conftest import Site, generated_site

HTML = {"content-type": "text/html"}


def local(site: Site, **fetch: Any) -> WebSearchConfig:
    """Only this server may be reached; everything else private stays refused."""
    options = {"retry": FetchRetryConfig(max_retries=0), "allow_hosts": (f"127.0.0.1:{site.port}",), **fetch}
    return WebSearchConfig(fetch=FetchConfig(**options))


def mock(**pages: str) -> MockFetcher:
    return MockFetcher({f"http://m.test/{name}": (200, body, HTML) for name, body in pages.items()})


async def test_the_mock_answers_and_remembers() -> None:
    fetcher = MockFetcher({"http://m.test/a": (200, "<p>a</p>", HTML), "http://m.test/x": FetchError("boom")})
    fetcher.add("http://m.test/b", b"b", status=201)
    assert (await fetcher.fetch("http://m.test/a", timeout=3, headers={"h": "v"})).text == "<p>a</p>"
    assert (await fetcher.fetch("http://m.test/b")).status_code == 201
    missing = await fetcher.fetch("http://m.test/none")
    assert (missing.status_code, missing.content_type) == (404, "text/plain")
    with pytest.raises(FetchError, match="boom"):
        await fetcher.fetch("http://m.test/x")
    assert [request.url[-1] for request in fetcher.history] == ["a", "b", "e", "x"]
    assert (fetcher.history[0].timeout, fetcher.history[0].headers) == (3, {"h": "v"})


async def test_a_client_closes_only_the_fetcher_it_made() -> None:
    fetcher = mock(a="<p>x</p>")
    async with WebClient(fetcher=fetcher) as client:
        await client.fetch("http://m.test/a")
    assert not fetcher.closed


async def test_a_page_is_read_and_navigated_unless_told_otherwise() -> None:
    fetcher = mock(a="<h1>T</h1><p>x <a href=b>long label</a></p><div class=pager><a href=b>next</a></div>")
    heard: list[tuple[str, int]] = []

    class Observer(NoOpObserver):
        def on_extract_complete(self, url: str, **facts: Any) -> None:
            heard.append((url, facts["word_count"]))

    async with WebClient(fetcher=fetcher, observer=Observer()) as client:
        page = await client.fetch("http://m.test/a")
        bare = await client.fetch("http://m.test/a", extract=False, navigate=False)
    assert page.markdown.startswith("# T\n\nx [long label](http://m.test/b)")
    assert page.pagination is not None
    assert page.pagination.next_url == "http://m.test/b"
    assert page.navigation_actions[0].action_type == "next"
    assert (bare.pagination, bare.links, bare.headings) == (None, [], [])
    assert heard == [("http://m.test/a", page.word_count)]


async def test_every_failure_is_a_page(site: Site) -> None:
    site.page("/gone", "<h1>Gone</h1>", status=410)
    async with WebClient(local(site)) as client:
        pages = await client.fetch_many(
            [f"{site.url}/gone", "http://127.0.0.1:1/", "not a url", "http://localhost/", f"{site.url}/"]
        )
    assert [page.success for page in pages] == [False] * 5
    assert pages[0].markdown == "# Gone"
    assert [bool(page.error) for page in pages] == [True] * 5
    assert "loopback" in str(pages[1].error)
    assert "not an absolute" in str(pages[2].error)


async def test_following_next_stops_at_the_end_at_a_repeat_and_at_the_limit() -> None:
    def page(number: int, following: str) -> str:
        return f"<p>{number}</p><div class=pagination><a class=next href={following}>more</a></div>"

    fetcher = mock(p1=page(1, "p2"), p2=page(2, "p3"), p3="<p>3</p>", c1=page(1, "c2"), c2=page(2, "c1"))
    async with WebClient(fetcher=fetcher) as client:
        assert [p.plain_text[0] for p in await client.fetch_with_navigation("http://m.test/p1")] == ["1", "2", "3"]
        assert len(await client.fetch_with_navigation("http://m.test/p1", max_pages=2)) == 2
        assert len(await client.fetch_with_navigation("http://m.test/c1", max_pages=9)) == 2


async def test_a_crawl_is_breadth_first_within_its_bounds() -> None:
    fetcher = mock(
        a="<a href=b>b</a><a href=c>c</a><a href=http://else.test/>e</a><a href=b#x>b</a>",
        b="<a href=d>d</a><a href=a>a</a>",
        c="<a href=e>e</a>",
        d="<a href=f>f</a>",
        e="",
        f="",
    )
    async with WebClient(fetcher=fetcher) as client:
        pages = await client.crawl("http://m.test/a")
        assert [(page.url[-1], page.depth) for page in pages] == [("a", 0), ("b", 1), ("c", 1), ("d", 2), ("e", 2)]
        few = await client.crawl("http://m.test/a", max_pages=2, max_depth=5)
        assert [page.url[-1] for page in few] == ["a", "b"]
        filtered = await client.crawl("http://m.test/a", link_filter=lambda url: not url.endswith("b"))
        assert [page.url[-1] for page in filtered] == ["a", "c", "e"]
        wide = await client.crawl("http://m.test/a", max_depth=1, same_domain=False)
        assert [page.url for page in wide][-1] == "http://else.test/"


async def test_a_site_full_of_traps_is_crawled_completely_and_once(site: Site) -> None:
    generated_site(site, 300)
    rules = CrawlConfig(max_pages=1000, max_depth=30, max_same_shape=400)
    config = local(site, max_response_size=100_000).replace(max_concurrent=8, auto_navigate=False)
    async with WebClient(config) as client:
        pages = await client.crawl(site.url, rules)
    by_path = {page.url.removeprefix(site.url): page for page in pages}
    assert {f"/p/{n}.html" for n in range(300)} <= by_path.keys()
    assert all(by_path[f"/p/{n}.html"].title == f"Page {n}" for n in range(300))
    asked = Counter(request.path for request in site.requests)
    assert max(asked.values()) == 1
    # every trap was met and none was fatal
    assert by_path["/trap/charset"].plain_text == "Здравствуйте"
    assert len(by_path["/trap/huge"].plain_text) < 100_000
    assert by_path["/trap/bomb"].status_code == 200
    assert "link-local" in str(by_path["/trap/away"].error)
    assert "link-local" in str(by_path["/trap/inside"].error)
    assert "circle" in str(by_path["/trap/circle"].error)
    assert by_path["/trap/error"].error == "HTTP 500"
    assert "robots" in str(by_path["/private/x"].error)
    assert asked["/private/x"] == 0
    deep = [path for path in by_path if path.startswith("/trap/deep/")]
    assert 1 <= len(deep) <= 4  # one segment may occur three times
    calendar = [path for path in by_path if path.startswith("/trap/calendar/")]
    assert len(calendar) <= 30
    assert not any("utm_source" in path for path in by_path)
    assert not any("other.test" in page.url for page in pages)


async def test_a_calendar_without_depth_bound_is_ended_by_its_shape(site: Site) -> None:
    generated_site(site, 10)
    start = f"{site.url}/trap/calendar/2024/1"
    async with WebClient(local(site)) as client:
        pages = await client.crawl(start, CrawlConfig(max_pages=500, max_depth=500, max_same_shape=12))
    assert len(pages) == 12


async def test_an_interrupted_crawl_goes_on_without_loss_or_repeat(site: Site, tmp_path: Path) -> None:
    generated_site(site, 40)
    rules = CrawlConfig(max_pages=500, max_depth=10, max_same_shape=80)
    done: list[str] = []
    with CrawlJournal(tmp_path / "crawl.db") as journal:
        async with WebClient(local(site)) as client:
            pages = client.crawl_iter(site.url, rules, journal=journal)
            async for page in pages:
                done.append(page.url)
                if len(done) == 25:
                    break  # the 25th is in our hands but the journal was not told so
            await pages.aclose()
        assert journal.counts()["finished"] == 24
        async with WebClient(local(site)) as client:
            rest = [page.url async for page in client.crawl_iter(site.url, rules, journal=journal)]
            assert done[-1] in rest  # what was not finished comes again
            assert not set(done[:-1]) & set(rest)  # what was finished does not
            assert {f"{site.url}/p/{n}.html" for n in range(40)} <= {*done, *rest}
            assert len(rest) == len(set(rest))
            assert [page async for page in client.crawl_iter(site.url, rules, journal=journal)] == []
        assert journal.counts()["finished"] == journal.counts()["known"]


async def test_max_pages_counts_over_restarts(tmp_path: Path) -> None:
    fetcher = mock(**{f"p{n}": f"<a href=p{n + 1}>next</a>" for n in range(20)})
    rules = CrawlConfig(max_pages=5, max_depth=50)
    with CrawlJournal(tmp_path / "c.db") as journal:
        async with WebClient(fetcher=fetcher) as client:
            assert len(await client.crawl("http://m.test/p0", rules, journal=journal)) == 5
            assert len(await client.crawl("http://m.test/p0", rules, journal=journal)) == 0
            more = await client.crawl("http://m.test/p0", rules, max_pages=8, journal=journal)
    assert [page.url for page in more] == [f"http://m.test/p{n}" for n in (5, 6, 7)]


def test_the_journal_is_one_file_for_many(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with CrawlJournal(path) as one, CrawlJournal(path) as two:
        one.add([("http://a.test/1", 0), ("http://a.test/2", 1), ("http://a.test/1#again", 3)])
        assert two.entries() == [("http://a.test/1", 0, False), ("http://a.test/2", 1, False)]
        assert two.finish("http://a.test/2", error="gone")
        assert not one.finish("http://a.test/2")
        assert one.unfinished(["http://a.test/2", "http://a.test/3", "http://a.test/1"]) == [
            "http://a.test/3",
            "http://a.test/1",
        ]
        assert one.counts() == {"known": 2, "finished": 1, "failed": 1}
    broken = tmp_path / "not.db"
    broken.write_text("this is no database, and long enough to be seen as none" * 40)
    with pytest.raises(sqlite3.DatabaseError):
        CrawlJournal(broken).counts()


async def test_pages_reached_twice_through_redirects_come_once(site: Site) -> None:
    site.page("/", "<a href=/one>1</a><a href=/two>2</a><a href=/real>3</a>")
    site.redirect("/one", "/real")
    site.redirect("/two", "/real")
    site.page("/real", "<p>real</p>")
    async with WebClient(local(site, respect_robots=False)) as client:
        pages = await client.crawl(site.url)
    assert [page.final_url.removeprefix(site.url) for page in pages] == ["/", "/real"]


def test_the_frontier_bounds_hosts_lengths_and_depths() -> None:
    rules = CrawlConfig(max_pages=99, max_pages_per_host=4, max_path_depth=3, max_url_length=60, same_domain=False)
    frontier = Frontier(["http://a.test/"], rules)
    first = frontier.pop()
    assert first is not None
    links = [
        "http://a.test/x",
        "http://a.test/1/2/3/4",
        "http://a.test/" + "y" * 60,
        "http://a.test/x#f",
        "http://b.test/",
    ]
    assert frontier.found(first, first.url, [*links, *(f"http://a.test/{n}" for n in range(9)), "junk:", "%%%"]) is None
    rest = []
    while (target := frontier.pop()) is not None:
        rest.append(target.url)
    assert rest == ["http://a.test/x", "http://b.test/", "http://a.test/0", "http://a.test/1"]


# ---------------------------------------------------------------- run utilities


@pytest.mark.parametrize("pooled", [False, True])
async def test_fetch_pages_keeps_order_and_reports_each_page(pooled: bool) -> None:
    fetcher = mock(a="<p>a</p>", b="<p>b</p>", c="<p>c</p>")
    seen: list[float] = []

    def progress(now: FetchProgress) -> None:
        seen.append(now.percent)
        raise RuntimeError("a listener's own trouble")

    addresses = [f"http://m.test/{name}" for name in "cab"] + ["http://m.test/none"]
    if pooled:
        with ExtractionPool() as pool:
            pages = await fetch_pages(addresses, fetcher=fetcher, on_progress=progress, pool=pool)
    else:
        pages = await fetch_pages(addresses, fetcher=fetcher, on_progress=progress)
    assert [page.plain_text for page in pages] == ["c", "a", "b", "not found"]
    assert pages[3].error == "HTTP 404"
    assert seen == [25, 50, 75, 100]


async def test_searching_sorts_by_matching_terms() -> None:
    fetcher = mock(none="<p>nothing here</p>", one="<p>python</p>", two="<p>python and async</p>")
    addresses = [f"http://m.test/{name}" for name in ("none", "one", "two", "missing")]
    found = await search_and_extract("python async", addresses, fetcher=fetcher)
    assert [page.url.rpartition("/")[2] for page in found.pages] == ["two", "one", "none"]
    assert [round(found.relevance[page.url], 1) for page in found.pages] == [1.0, 0.5, 0.0]
    assert found.total_fetched == 4
    assert len((await search_and_extract("python async", addresses, fetcher=fetcher, threshold=0.9)).pages) == 1


async def test_mapping_a_site_and_all_its_links() -> None:
    fetcher = mock(a="<a href=b>b</a><a href=http://else.test/>e</a>", b="<a href=a>a</a><a href=c>c</a>", c="")
    site = await map_site("http://m.test/a", fetcher=fetcher, max_depth=1)
    assert site.to_dict() | {"duration_ms": 0} == {
        "base_url": "http://m.test/a",
        "pages": 2,
        "internal_links": 3,
        "external_links": 1,
        "depth_reached": 1,
        "duration_ms": 0,
    }
    links = await extract_all_links(["http://m.test/a", "http://m.test/b"], fetcher=fetcher, internal_only=True)
    assert [link.url[-1] for link in links] == ["b", "a", "c"]


async def test_fetching_with_retry_waits_longer_each_time_and_names_the_attempts() -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    fetcher = mock(ok="<p>ok</p>")
    fetcher.add("http://m.test/busy", "x", status=503)
    fetcher.add("http://m.test/reset", ConnectionResetError("connection reset by peer"))
    fetcher.add("http://m.test/odd", ValueError("something else"))
    page = await fetch_with_retry("http://m.test/ok", fetcher=fetcher, sleep=sleep)
    assert (page.plain_text, waits) == ("ok", [])
    page = await fetch_with_retry("http://m.test/busy", fetcher=fetcher, sleep=sleep, max_retries=2, retry_delay=0.5)
    assert (page.error, waits) == ("failed after 3 attempt(s): HTTP 503", [0.5, 1.0])
    page = await fetch_with_retry("http://m.test/reset", fetcher=fetcher, sleep=sleep)
    assert page.error == "failed after 4 attempt(s): connection reset by peer"
    page = await fetch_with_retry("http://m.test/odd", fetcher=fetcher, sleep=sleep)
    assert page.error == "failed after 1 attempt(s): something else"
    assert len(fetcher.history) == 1 + 3 + 4 + 1
    assert isinstance(page, WebPage)
