"""Fetching over a loopback server: statuses, retries, redirects, sizes, caches, politeness."""

import asyncio
import email.utils
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.websearch import (
    BadResponseError,
    FetchConfig,
    FetchError,
    FetchRetryConfig,
    FetchTimeoutError,
    HttpxFetcher,
    NoOpObserver,
    RobotsDisallowedError,
    TooManyRedirectsError,
    UrlRefusedError,
)
from stageflow.websearch.decompress import decode_all
from stageflow.websearch.fetcher import retry_after_seconds
from tests.websearch.conftest import Request, Site, Slow, bomb, gzipped

NO_RETRY = FetchRetryConfig(max_retries=0)


def config(**changes: Any) -> FetchConfig:
    return FetchConfig(**{"allow_private": True, "respect_robots": False, **changes})


class Waits:
    """Stands for asyncio.sleep: remembers instead of waiting."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


async def test_a_page_comes_with_status_headers_and_text(site: Site) -> None:
    site.page("/", "<p>grüße</p>", x_more="yes")
    async with HttpxFetcher(config()) as fetcher:
        result = await fetcher.fetch(site.url)
    assert (result.status_code, result.text, result.content_type) == (200, "<p>grüße</p>", "text/html")
    assert result.headers["x-more"] == "yes"
    assert result.is_html
    assert result.is_success
    assert result.final_url == site.url + "/"
    assert len(result.request_id) == 32
    assert result.duration_ms > 0


async def test_header_precedence_is_user_agent_then_config_then_call(site: Site) -> None:
    site.page("/", "x")
    async with HttpxFetcher(config(headers={"X-One": "config", "X-Two": "config"})) as fetcher:
        await fetcher.fetch(site.url, headers={"x-two": "call"})
        await fetcher.fetch(site.url, headers={"User-Agent": "me"})
    first, second = site.requests
    assert first.headers["user-agent"] == "stageflow-websearch/0.1"
    assert (first.headers["x-one"], first.headers["x-two"]) == ("config", "call")
    assert second.headers["user-agent"] == "me"


async def test_an_error_status_is_a_result(site: Site) -> None:
    async with HttpxFetcher(config()) as fetcher:
        result = await fetcher.fetch(site.url + "/absent")
    assert (result.status_code, result.is_success, result.attempts) == (404, False, 1)


async def test_retry_statuses_are_tried_again_with_growing_waits(site: Site) -> None:
    answers = iter([503, 429, 200])
    site.pages["/"] = lambda request: (next(answers), {"content-type": "text/plain"}, b"body")
    waits = Waits()
    async with HttpxFetcher(config(), sleep=waits) as fetcher:
        result = await fetcher.fetch(site.url)
    assert (result.status_code, result.attempts) == (200, 3)
    assert waits.seconds == [1.0, 2.0]


async def test_retry_after_is_honoured_and_too_long_a_wait_is_declined(site: Site) -> None:
    answers = iter(["7", None, "3600"])

    def busy(request: Request) -> tuple[int, dict[str, str], bytes]:
        wanted = next(answers)
        return (503, {"retry-after": wanted} if wanted else {}, b"")

    site.pages["/"] = busy
    waits = Waits()
    async with HttpxFetcher(config(), sleep=waits) as fetcher:
        result = await fetcher.fetch(site.url)
    assert waits.seconds == [7.0, 2.0]
    assert (result.status_code, result.attempts) == (503, 3)


async def test_the_last_retry_status_is_returned_not_raised(site: Site) -> None:
    site.page("/", "busy", status=503)
    async with HttpxFetcher(config(retry=FetchRetryConfig(max_retries=2)), sleep=Waits()) as fetcher:
        result = await fetcher.fetch(site.url)
    assert (result.status_code, result.text, site.asked("/")) == (503, "busy", 3)


async def test_connection_errors_are_retried_and_then_raised() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        waits = Waits()
        async with HttpxFetcher(config(), sleep=waits) as fetcher:
            with pytest.raises(FetchError, match="127") as caught:
                await fetcher.fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert caught.value.transient
    assert waits.seconds == [1.0, 2.0, 4.0]


async def test_a_connection_cut_in_the_middle_is_retried() -> None:
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        await reader.readuntil(b"\r\n\r\n")
        cut = served == 1
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\n" + (b"ha" if cut else b"half")
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, HttpxFetcher(config(), sleep=Waits()) as fetcher:
        result = await fetcher.fetch(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert (result.text, result.attempts) == ("half", 2)


async def test_a_page_that_drips_is_cut_off_by_the_deadline_of_the_attempt(site: Site) -> None:
    site.pages["/"] = lambda request: Slow((200, {}, b"late"))  # type: ignore[return-value, arg-type]
    async with HttpxFetcher(config(retry=NO_RETRY)) as fetcher:
        with pytest.raises(FetchTimeoutError) as caught:
            await fetcher.fetch(site.url, timeout=0.2)
    assert caught.value.transient


async def test_redirects_are_followed_and_listed(site: Site) -> None:
    site.redirect("/a", "/b/")
    site.redirect("/b/", "../c?x=1", 307)
    site.page("/c?x=1", "there")
    async with HttpxFetcher(config()) as fetcher:
        result = await fetcher.fetch(site.url + "/a#part")
    assert result.text == "there"
    assert result.final_url == site.url + "/c?x=1#part"
    assert [url.removeprefix(site.url) for url in result.redirects] == ["/a#part", "/b/#part"]


async def test_a_circle_and_too_many_redirects_end(site: Site) -> None:
    site.redirect("/a", "/b")
    site.redirect("/b", "/a")
    site.otherwise = lambda request: (302, {"location": f"{request.path}x"}, b"")
    async with HttpxFetcher(config(max_redirects=4)) as fetcher:
        with pytest.raises(TooManyRedirectsError, match="circle"):
            await fetcher.fetch(site.url + "/a")
        with pytest.raises(TooManyRedirectsError, match="more than 4"):
            await fetcher.fetch(site.url + "/n")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)", "gopher://x/"])
async def test_a_redirect_to_another_scheme_is_refused(site: Site, target: str) -> None:
    site.redirect("/a", target)
    async with HttpxFetcher(config()) as fetcher:
        with pytest.raises(UrlRefusedError):
            await fetcher.fetch(site.url + "/a")


async def test_credentials_do_not_follow_to_another_origin(site: Site, make_site: Callable[[], Site]) -> None:
    other = make_site()
    site.redirect("/a", other.url + "/b")
    other.page("/b", "x")
    async with HttpxFetcher(config()) as fetcher:
        await fetcher.fetch(site.url + "/a", headers={"Authorization": "Bearer secret", "Cookie": "a=b", "X-Kept": "1"})
    assert site.requests[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in other.requests[0].headers
    assert "cookie" not in other.requests[0].headers
    assert other.requests[0].headers["x-kept"] == "1"


async def test_a_huge_body_is_cut_at_the_limit_and_says_so(site: Site) -> None:
    site.page("/", b"x" * 300_000)
    site.page("/exact", b"x" * 1000)
    async with HttpxFetcher(config(max_response_size=1000)) as fetcher:
        huge = await fetcher.fetch(site.url)
        exact = await fetcher.fetch(site.url + "/exact")
    assert (len(huge.body), huge.truncated) == (1000, True)
    assert (len(exact.body), exact.truncated) == (1000, False)


async def test_compressed_pages_are_read_and_a_bomb_is_stopped_at_the_limit(site: Site) -> None:
    site.page("/gzip", gzipped("hello " * 100), content_encoding="gzip")
    site.page("/deflate", zlib.compress(b"zlib"), content_encoding="deflate")
    site.page("/raw", zlib.compress(b"raw")[2:-4], content_encoding="deflate")
    site.page("/bomb", bomb(200), content_encoding="gzip")
    async with HttpxFetcher(config(max_response_size=65_536)) as fetcher:
        assert (await fetcher.fetch(site.url + "/gzip")).text == "hello " * 100
        assert (await fetcher.fetch(site.url + "/deflate")).text == "zlib"
        assert (await fetcher.fetch(site.url + "/raw")).text == "raw"
        stopped = await fetcher.fetch(site.url + "/bomb")
    assert (len(stopped.body), stopped.truncated) == (65_536, True)
    assert site.requests[0].headers["accept-encoding"] == "gzip, deflate"


async def test_broken_and_unknown_compression_are_errors_that_name_the_page(site: Site) -> None:
    site.page("/broken", b"\x1f\x8bnonsense and more nonsense", content_encoding="gzip")
    site.page("/odd", b"x", content_encoding="br")
    async with HttpxFetcher(config()) as fetcher:
        for path in ("/broken", "/odd"):
            with pytest.raises(BadResponseError, match=path) as caught:
                await fetcher.fetch(site.url + path)
            assert not caught.value.transient


def test_layers_of_compression_stay_within_the_limit() -> None:
    twice = gzipped("x") and zlib.compress(zlib.compress(b"\0" * 50_000_000, 9), 9)
    body, cut = decode_all([twice], "deflate, deflate", limit=100_000)
    assert (len(body), cut) == (100_000, True)
    with pytest.raises(BadResponseError):
        decode_all([b""], "gzip, gzip, gzip, gzip", limit=10)


async def test_cookies_are_off_unless_asked_for(site: Site) -> None:
    site.page("/", "x", set_cookie="session=1; Path=/")
    async with HttpxFetcher(config()) as fetcher:
        await fetcher.fetch(site.url)
        await fetcher.fetch(site.url)
    async with HttpxFetcher(config(cookies=True)) as fetcher:
        await fetcher.fetch(site.url)
        await fetcher.fetch(site.url)
    assert [request.headers.get("cookie") for request in site.requests] == [None, None, None, "session=1"]


async def test_connections_are_kept_and_bounded_per_host(site: Site) -> None:
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(request: Request) -> Any:
        if site.in_flight >= 3:
            loop.call_soon_threadsafe(arrived.set)
        return Slow((200, {"content-type": "text/plain"}, b"ok"))

    site.otherwise = slow
    async with HttpxFetcher(config(per_host_concurrency=3)) as fetcher:
        everything = asyncio.ensure_future(fetcher.fetch_many([f"{site.url}/{n}" for n in range(12)], concurrency=12))
        await asyncio.wait_for(arrived.wait(), 10)
        site.released.set()
        results = await everything
    assert [result.text for result in results if not isinstance(result, FetchError)] == ["ok"] * 12
    assert site.most_in_flight == 3


async def test_a_rate_spaces_the_starts(site: Site) -> None:
    site.page("/", "x")
    waits = Waits()
    async with HttpxFetcher(config(per_host_rate=0.01), sleep=waits) as fetcher:
        await asyncio.gather(*(fetcher.fetch(site.url) for _ in range(3)))
    assert len(waits.seconds) == 2
    assert waits.seconds[0] == pytest.approx(100, abs=5)
    assert waits.seconds[1] == pytest.approx(200, abs=5)


async def test_robots_txt_is_asked_once_and_obeyed(site: Site) -> None:
    site.page("/robots.txt", "User-agent: *\nDisallow: /secret\nCrawl-delay: 50\n", content_type="text/plain")
    site.page("/open", "x")
    waits = Waits()
    async with HttpxFetcher(config(respect_robots=True), sleep=waits) as fetcher:
        many = await asyncio.gather(*(fetcher.fetch(site.url + "/open") for _ in range(3)))
        with pytest.raises(RobotsDisallowedError, match="disallows"):
            await fetcher.fetch(site.url + "/secret/page")
    assert [result.status_code for result in many] == [200] * 3
    assert site.asked("/robots.txt") == 1
    assert site.asked("/secret/page") == 0
    assert waits.seconds[0] == pytest.approx(30, abs=2)  # max_crawl_delay_seconds


async def test_a_redirect_into_what_robots_disallow_is_not_followed(site: Site) -> None:
    site.page("/robots.txt", "User-agent: *\nDisallow: /secret\n", content_type="text/plain")
    site.redirect("/door", "/secret")
    async with HttpxFetcher(config(respect_robots=True)) as fetcher:
        with pytest.raises(RobotsDisallowedError):
            await fetcher.fetch(site.url + "/door")
    assert site.asked("/secret") == 0


@pytest.mark.parametrize(("status", "allowed"), [(404, True), (403, True), (500, False), (503, False)])
async def test_what_a_failing_robots_txt_means(site: Site, status: int, allowed: bool) -> None:
    site.page("/robots.txt", "", status=status)
    site.page("/", "x")
    async with HttpxFetcher(config(respect_robots=True)) as fetcher:
        if allowed:
            assert (await fetcher.fetch(site.url)).text == "x"
        else:
            with pytest.raises(RobotsDisallowedError, match=str(status)):
                await fetcher.fetch(site.url)


async def test_the_cache_revalidates_and_survives_the_fetcher(site: Site, tmp_path: Path) -> None:
    def page(request: Request) -> tuple[int, dict[str, str], bytes]:
        if request.headers.get("if-none-match") == '"v1"':
            return 304, {"etag": '"v1"'}, b""
        return 200, {"etag": '"v1"', "content-type": "text/html"}, b"<p>stored</p>"

    site.pages["/"] = page
    cached = config(cache_path=str(tmp_path / "cache.db"))
    for expected in (False, True):
        async with HttpxFetcher(cached) as fetcher:
            result = await fetcher.fetch(site.url)
        assert (result.text, result.from_cache, result.status_code) == ("<p>stored</p>", expected, 200)
    async with HttpxFetcher(cached) as fetcher:
        private = await fetcher.fetch(site.url, headers={"Authorization": "x"})
    assert not private.from_cache
    assert "if-none-match" not in site.requests[-1].headers


async def test_what_may_not_be_stored_is_not(site: Site, tmp_path: Path) -> None:
    site.page("/private", "x", etag='"1"', cache_control="private, max-age=3")
    site.page("/vary", "x", etag='"1"', vary="Cookie")
    site.page("/big", b"x" * 5000, last_modified="Mon, 01 Jan 2024 00:00:00 GMT")
    async with HttpxFetcher(config(cache_path=str(tmp_path / "c.db"), cache_max_bytes=3000)) as fetcher:
        for _ in range(2):
            for path in ("/private", "/vary", "/big"):
                await fetcher.fetch(site.url + path)
    assert not any("if-none-match" in request.headers for request in site.requests)
    assert not any("if-modified-since" in request.headers for request in site.requests)


async def test_a_proxy_gets_the_request_and_private_targets_are_still_refused(site: Site) -> None:
    site.otherwise = lambda request: (200, {"content-type": "text/plain"}, request.path.encode())
    proxied = FetchConfig(proxy=site.url, respect_robots=False, retry=NO_RETRY)

    async def public(host: str, port: int) -> list[str]:
        return ["93.184.216.34"] if host == "example.test" else ["127.0.0.1"]

    async with HttpxFetcher(proxied, resolver=public) as fetcher:
        result = await fetcher.fetch("http://example.test/page")
        with pytest.raises(FetchError, match="loopback"):
            await fetcher.fetch("http://inside.test/")
    assert result.text == "http://example.test/page"
    assert len(site.requests) == 1


async def test_a_socks_proxy_is_told_the_name_and_carries_the_page(site: Site) -> None:
    pytest.importorskip("socksio")
    site.page("/page", "through the tunnel")
    asked: list[bytes] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = (await reader.readexactly(2))[1]
        await reader.readexactly(count)
        writer.write(b"\x05\x00")  # no password wanted
        *_, kind, length = await reader.readexactly(5)
        assert kind == 3, "a name: the proxy resolves it"
        asked.append(await reader.readexactly(length + 2))
        there_in, there_out = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
        there_out.write(await reader.readuntil(b"\r\n\r\n"))
        writer.write(await there_in.readuntil(b"tunnel"))
        await writer.drain()
        for end in (there_out, writer):
            end.close()

    async def public(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "127.0.0.1" else ["93.184.216.34"]

    server = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    proxied = FetchConfig(
        proxy=f"socks5://127.0.0.1:{server.sockets[0].getsockname()[1]}", respect_robots=False, retry=NO_RETRY
    )
    async with server, HttpxFetcher(proxied, resolver=public) as fetcher:
        assert (await fetcher.fetch("http://example.test/page")).text == "through the tunnel"
    assert asked == [b"example.test\x00\x50"]


async def test_observers_hear_start_and_end_and_cannot_break_a_fetch(site: Site) -> None:
    site.page("/", "body")
    heard: list[tuple[str, str]] = []

    class Loud(NoOpObserver):
        def on_fetch_start(self, url: str, request_id: str) -> None:
            heard.append(("start", request_id))
            raise RuntimeError("an observer's own trouble")

        def on_fetch_complete(self, url: str, request_id: str, **facts: Any) -> None:
            heard.append(("complete", request_id))
            assert (facts["status_code"], facts["size"]) == (200, 4)

        def on_fetch_error(self, url: str, request_id: str, **facts: Any) -> None:
            heard.append(("error", request_id))
            raise ValueError("more of it")

    async with HttpxFetcher(config(retry=NO_RETRY), observer=Loud()) as fetcher:
        result = await fetcher.fetch(site.url)
        with pytest.raises(UrlRefusedError):
            await fetcher.fetch("mailto:nobody")
    assert [what for what, _ in heard] == ["start", "complete", "start", "error"]
    assert heard[0][1] == heard[1][1] == result.request_id
    assert heard[2][1] == heard[3][1] != result.request_id


async def test_fetch_many_keeps_the_order_and_puts_errors_in_place(site: Site) -> None:
    for number in range(5):
        site.page(f"/{number}", str(number))
    async with HttpxFetcher(config(retry=NO_RETRY)) as fetcher:
        results = await fetcher.fetch_many([f"{site.url}/0", "nonsense", f"{site.url}/4", f"{site.url}/2"])
    assert [r.text if not isinstance(r, FetchError) else type(r).__name__ for r in results] == [
        "0",
        "UrlRefusedError",
        "4",
        "2",
    ]


async def test_a_cancelled_fetch_leaves_the_fetcher_usable(site: Site) -> None:
    site.pages["/slow"] = lambda request: Slow((200, {}, b""))  # type: ignore[return-value, arg-type]
    site.page("/", "x")
    async with HttpxFetcher(config(per_host_concurrency=1)) as fetcher:
        task = asyncio.ensure_future(fetcher.fetch(site.url + "/slow"))
        while not site.asked("/slow"):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await fetcher.fetch(site.url)).text == "x"


def test_retry_after_reads_seconds_and_dates_and_nothing_else() -> None:
    now = 1_700_000_000.0
    assert retry_after_seconds("120", now=now) == 120
    assert retry_after_seconds(email.utils.formatdate(now + 60, usegmt=True), now=now) == pytest.approx(60)
    assert retry_after_seconds(email.utils.formatdate(now - 60, usegmt=True), now=now) == 0
    for nonsense in (None, "", "soon", "-5", "1e9", "²"):
        assert retry_after_seconds(nonsense, now=now) is None


def test_retry_delays_grow_to_their_cap() -> None:
    retry = FetchRetryConfig()
    assert [retry.delay_for_attempt(n) for n in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert retry.delay_for_attempt(100_000) == 30
    assert [status for status in (200, 404, 429, 500, 502, 503, 504) if retry.should_retry_status(status)] == [
        429,
        500,
        502,
        503,
        504,
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"timeout_seconds": 0}, {"per_host_concurrency": 0}, {"max_response_size": 0}, {"per_host_rate": -1}],
)
def test_a_wrong_option_is_named_when_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match=next(iter(wrong))):
        FetchConfig(**wrong)


async def test_http2_is_offered_and_plain_http_still_works(site: Site) -> None:
    pytest.importorskip("h2")
    site.page("/", "x")
    async with HttpxFetcher(config(http2=True)) as fetcher:
        assert (await fetcher.fetch(site.url)).text == "x"


async def test_an_idle_fetcher_costs_nothing_and_opens_again_after_close(site: Site) -> None:
    site.page("/", "x")
    fetcher = HttpxFetcher(config())
    await fetcher.aclose()
    started = time.perf_counter()
    assert (await fetcher.fetch(site.url)).text == "x"
    await fetcher.aclose()
    await fetcher.aclose()
    assert time.perf_counter() - started < 10
