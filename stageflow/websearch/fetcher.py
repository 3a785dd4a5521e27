"""Fetches pages: the `Fetcher` protocol and its httpx implementation.

Pooled, bounded per host, polite (robots.txt), retried, redirected by hand so that every hop is checked, cut off at a
size.
httpx is imported when the first `HttpxFetcher` is entered. May not import: extraction, the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol, Self, cast, runtime_checkable

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.websearch import urls
from stageflow.websearch.addresses import AddressPolicy
from stageflow.websearch.cache import DiskCache, StoredResponse, may_store
from stageflow.websearch.config import FetchConfig
from stageflow.websearch.decompress import ACCEPT_ENCODING, BodyDecoder
from stageflow.websearch.errors import (
    BadResponseError,
    FetchError,
    FetchTimeoutError,
    RobotsDisallowedError,
    TooManyRedirectsError,
    UrlRefusedError,
    require,
)
from stageflow.websearch.models import FetchResult
from stageflow.websearch.politeness import ROBOTS_MAX_BYTES, HostGates, RobotsCache, Sleep

if TYPE_CHECKING:
    import httpx

    from stageflow.websearch.network import CheckedTransport

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization"})
Resolver = Callable[[str, int], Awaitable[list[str]]]


@runtime_checkable
class Fetcher(Protocol):
    """Gets one page. Any object with this method serves."""

    async def fetch(
        self, url: str, *, timeout: float | None = None, headers: Mapping[str, str] | None = None
    ) -> FetchResult: ...


@runtime_checkable
class FetchObserver(Protocol):
    """Hears of every call, once at its start and once at its end. What it raises is swallowed."""

    def on_fetch_start(self, url: str, request_id: str) -> None: ...

    def on_fetch_complete(
        self, url: str, request_id: str, *, status_code: int, duration_ms: float, size: int, from_cache: bool
    ) -> None: ...

    def on_fetch_error(self, url: str, request_id: str, *, error: str, duration_ms: float, retryable: bool) -> None: ...

    def on_extract_complete(self, url: str, *, duration_ms: float, word_count: int, link_count: int) -> None: ...


class NoOpObserver:
    """Hears and does nothing; a base for observers that want one method only."""

    def on_fetch_start(self, url: str, request_id: str) -> None:
        """A call begins."""

    def on_fetch_complete(
        self, url: str, request_id: str, *, status_code: int, duration_ms: float, size: int, from_cache: bool
    ) -> None:
        """A call ended with a response."""

    def on_fetch_error(self, url: str, request_id: str, *, error: str, duration_ms: float, retryable: bool) -> None:
        """A call ended with an error."""

    def on_extract_complete(self, url: str, *, duration_ms: float, word_count: int, link_count: int) -> None:
        """A page was read."""


def retry_after_seconds(value: str | None, *, now: float) -> float | None:
    """What a `Retry-After` header asks for: seconds or a date; None when absent or nonsense. Never negative."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return max(0.0, (moment - datetime.fromtimestamp(now, UTC)).total_seconds())
    except OverflowError:
        return None


class HttpxFetcher:
    """`Fetcher` over httpx. Use as an async context manager, or call `aclose`; belongs to the event loop of its
    first fetch.

    HTTP error statuses are results, not errors; the retry statuses are tried again first. `resolver` and `sleep`
    exist for
    callers with their own DNS or clock.

    Raises (from `fetch`):
        FetchError: and what is below it; `transient` says whether trying again may help.
    """

    def __init__(
        self,
        config: FetchConfig | None = None,
        *,
        observer: FetchObserver | None = None,
        resolver: Resolver | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.config = config if config is not None else FetchConfig()
        self.policy = AddressPolicy(allow_private=self.config.allow_private, allow_hosts=self.config.allow_hosts)
        self._observer = observer
        self._resolver = resolver
        self._sleep = sleep
        # The transport alone, without httpx's client on top: that one reads every Location itself and raises on hostile
        # ones, obeys the proxies of the environment, and keeps cookies.
        self._transport: CheckedTransport | None = None
        self._jar: httpx.Cookies | None = None
        self._cache: DiskCache | None = None
        rate = self.config.per_host_rate
        self._gates = HostGates(
            concurrency=self.config.per_host_concurrency, interval=1.0 / rate if rate else 0.0, sleep=sleep
        )
        self._robots = RobotsCache(self._fetch_robots, ttl=self.config.robots_ttl_seconds)

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close connections and the cache. The fetcher opens again when used again."""
        await self._robots.aclose()
        transport, self._transport = self._transport, None
        cache, self._cache = self._cache, None
        if transport is not None:
            await transport.aclose()
        if cache is not None:
            cache.close()

    def _open(self) -> CheckedTransport:
        if self._transport is not None:
            return self._transport
        require("httpx")
        if self.config.http2:
            require("h2", package="httpx[http2]")
        if self.config.proxy is not None and self.config.proxy.startswith("socks5"):
            require("socksio", package="httpx[socks]")
        from httpx import Cookies

        from stageflow.websearch.network import CheckedTransport, resolve

        if self.config.cookies and self._jar is None:
            self._jar = Cookies()
        if self.config.cache_path is not None:
            try:
                self._cache = DiskCache(self.config.cache_path, max_bytes=self.config.cache_max_bytes)
            except sqlite3.Error as error:
                raise DefinitionError(f"{self.config.cache_path} cannot be a cache: {error}") from error
        self._transport = CheckedTransport(self.config, self.policy, resolver=self._resolver or resolve)
        return self._transport

    def _tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._observer is not None:
            with contextlib.suppress(Exception):
                getattr(self._observer, method)(*args, **kwargs)

    async def fetch(
        self, url: str, *, timeout: float | None = None, headers: Mapping[str, str] | None = None
    ) -> FetchResult:
        """The response for `url`, redirects followed, retries done. `timeout` is seconds per attempt."""
        request_id = uuid.uuid4().hex
        started = time.perf_counter()
        self._tell("on_fetch_start", url, request_id)
        try:
            self._open()
            result = await self._with_retries(url, request_id, timeout, headers)
        except BaseException as error:
            duration = (time.perf_counter() - started) * 1000
            retryable = isinstance(error, FetchError) and error.transient
            text = f"{type(error).__name__}: {error}"
            self._tell("on_fetch_error", url, request_id, error=text, duration_ms=duration, retryable=retryable)
            raise
        duration = (time.perf_counter() - started) * 1000
        result = msgspec.structs.replace(result, duration_ms=duration)
        self._tell(
            "on_fetch_complete",
            url,
            request_id,
            status_code=result.status_code,
            duration_ms=duration,
            size=len(result.body),
            from_cache=result.from_cache,
        )
        return result

    async def fetch_many(
        self, addresses: Sequence[str], *, concurrency: int = 5, timeout: float | None = None
    ) -> list[FetchResult | FetchError]:
        """Every response in the order asked for; a page that fails is its error. At most `concurrency` at once."""
        slots = asyncio.Semaphore(concurrency)

        async def one(url: str) -> FetchResult | FetchError:
            async with slots:
                try:
                    return await self.fetch(url, timeout=timeout)
                except FetchError as error:
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(url)) for url in addresses]
        return [task.result() for task in tasks]

    async def _with_retries(
        self, url: str, request_id: str, timeout: float | None, headers: Mapping[str, str] | None
    ) -> FetchResult:
        retry = self.config.retry
        limit = timeout if timeout is not None else self.config.timeout_seconds
        attempt = 0
        while True:
            wait = retry.delay_for_attempt(attempt)
            try:
                result = await self._follow(url, limit, headers)
            except FetchError as error:
                if not error.transient or attempt >= retry.max_retries:
                    raise
            else:
                result = msgspec.structs.replace(result, url=url, request_id=request_id, attempts=attempt + 1)
                if not retry.should_retry_status(result.status_code) or attempt >= retry.max_retries:
                    return result
                asked = retry_after_seconds(result.headers.get("retry-after"), now=time.time())
                if asked is not None:
                    if asked > retry.max_delay_seconds:
                        return result
                    wait = max(wait, asked) if asked else wait
            attempt += 1
            await self._sleep(wait)

    async def _follow(self, url: str, limit: float, headers: Mapping[str, str] | None) -> FetchResult:
        """One attempt with all its redirects; every hop is checked like the first."""
        current = self.policy.check_url(url)
        origin = urls.origin_of(current)
        own = {name.lower(): value for name, value in (headers or {}).items()}
        seen: list[str] = []
        while True:
            delay = await self._ask_robots(current)
            result = await self._attempt(current, limit, own, delay, self.config.max_response_size)
            location = result.headers.get("location")
            if result.status_code not in _REDIRECTS or not location:
                return msgspec.structs.replace(result, redirects=seen)
            following = urls.join(current, location, keep_fragment=True)
            if following is None:
                raise UrlRefusedError(f"{current} redirects to {location[:200]!r}, which is no web page", url=url)
            if "#" not in following and "#" in current:
                following += "#" + current.partition("#")[2]
            seen.append(current)
            if len(seen) > self.config.max_redirects:
                raise TooManyRedirectsError(
                    f"{url} redirects more than {self.config.max_redirects} times",
                    url=url,
                    limit=self.config.max_redirects,
                )
            if following in seen and not self.config.cookies:
                raise TooManyRedirectsError(f"{url} redirects in a circle", url=url, limit=len(seen))
            current = self.policy.check_url(following)
            if urls.origin_of(current) != origin:
                own = {name: value for name, value in own.items() if name not in _CREDENTIALS}

    async def _ask_robots(self, url: str) -> float:
        """Seconds the site wants between requests. Raises RobotsDisallowedError."""
        if not self.config.respect_robots:
            return 0.0
        answer = await self._robots.ask(url, self.config.user_agent)
        if not answer.allowed:
            raise RobotsDisallowedError(f"{url}: {answer.reason}", hint="respect_robots=False, if you may", url=url)
        return min(answer.crawl_delay, self.config.max_crawl_delay_seconds)

    async def _fetch_robots(self, url: str) -> tuple[int, bytes]:
        current = url
        for _ in range(6):  # RFC 9309: at least five redirects
            current = self.policy.check_url(current)
            result = await self._attempt(current, self.config.timeout_seconds, {}, 0.0, ROBOTS_MAX_BYTES)
            location = result.headers.get("location")
            if result.status_code not in _REDIRECTS or not location:
                return result.status_code, result.body
            following = urls.join(current, location)
            if following is None:
                break
            current = following
        return 404, b""

    async def _check_before_proxy(self, url: str) -> None:
        """A proxy makes the connection, so the name is checked here; one that only the proxy can resolve is its
        business."""
        from stageflow.websearch.network import resolve

        host, port = urls.host_of(url), int(urls.origin_of(url).rpartition(":")[2])
        try:
            found = await (self._resolver or resolve)(host, port)
        except OSError:
            return
        for address in found:
            self.policy.check(host, port, address)

    async def _attempt(
        self, url: str, limit: float, own: dict[str, str], interval: float, max_bytes: int
    ) -> FetchResult:
        """One request and its answer, within `limit` seconds from the moment the host's turn comes."""
        self._open()
        headers = {"user-agent": self.config.user_agent, "accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
        headers.update({name.lower(): value for name, value in self.config.headers.items()})
        headers.update(own)
        headers["accept-encoding"] = ACCEPT_ENCODING
        wire = url.partition("#")[0]
        use_cache = self._cache is not None and not (_CREDENTIALS & headers.keys()) and not self.config.cookies
        stored = await asyncio.to_thread(self._cache.get, wire) if use_cache and self._cache else None
        if stored is not None:
            headers.update(stored.validators())
        async with self._gates.enter(urls.host_of(url), interval=interval):
            try:
                async with asyncio.timeout(limit):
                    if self.config.proxy is not None:
                        await self._check_before_proxy(url)
                    status, got, body, cut = await self._exchange(wire, headers, max_bytes)
            except TimeoutError as error:
                message = f"{url} took longer than {limit:g} s"
                raise FetchTimeoutError(message, url=url, limit=limit, transient=True) from error
        if status == 304 and stored is not None:
            return self._result(stored.status, url, stored.body, {**stored.headers, **got}, from_cache=True)
        if use_cache and self._cache and not cut and may_store(status, got):
            await asyncio.to_thread(self._cache.put, wire, StoredResponse(status, got, body))
        return self._result(status, url, body, got, truncated=cut)

    @staticmethod
    def _result(
        status: int,
        url: str,
        body: bytes,
        headers: dict[str, str],
        *,
        from_cache: bool = False,
        truncated: bool = False,
    ) -> FetchResult:
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not media and body:
            media = "text/html" if b"<html" in body[:1024].lower() or b"<!doctype html" in body[:1024].lower() else ""
        return FetchResult(
            status_code=status,
            final_url=url,
            body=body,
            headers=headers,
            content_type=media,
            from_cache=from_cache,
            truncated=truncated,
        )

    async def _exchange(
        self, url: str, headers: dict[str, str], max_bytes: int
    ) -> tuple[int, dict[str, str], bytes, bool]:
        """Status, headers, decoded body, whether it was cut off. Errors of httpx and httpcore become FetchErrors."""
        import httpcore
        import httpx

        try:
            request = httpx.Request("GET", url, headers=headers)
            if self._jar is not None:
                self._jar.set_cookie_header(request)
            response = await self._open().handle_async_request(request)
            try:
                response.request = request
                if self._jar is not None:
                    self._jar.extract_cookies(response)
                got = {name.lower(): value for name, value in response.headers.items()}
                body, cut = await self._body(response, got.get("content-encoding", ""), max_bytes)
                return response.status_code, got, body, cut
            finally:
                await response.aclose()
        except BadResponseError as error:
            raise BadResponseError(f"{url}: {error.message}", url=url, transient=False) from error
        except (httpcore.RemoteProtocolError, httpx.RemoteProtocolError) as error:
            # a server that closes an idle connection just as it is used looks like this
            raise BadResponseError(f"{url}: {error}", url=url, transient=True) from error
        except (httpcore.TimeoutException, httpx.TimeoutException) as error:
            raise FetchTimeoutError(f"{url}: {error or 'timed out'}", url=url, transient=True) from error
        except (httpcore.NetworkError, httpcore.ProxyError, httpx.TransportError) as error:
            text = str(error) or type(error).__name__
            raise FetchError(f"{url}: {text}", url=url, transient=True) from error
        except (httpcore.UnsupportedProtocol, httpcore.ProtocolError, httpx.InvalidURL, httpx.HTTPError) as error:
            raise FetchError(f"{url}: {error}", url=url, transient=False) from error

    @staticmethod
    async def _body(response: httpx.Response, coding: str, max_bytes: int) -> tuple[bytes, bool]:
        decoder = BodyDecoder(coding, limit=max_bytes)
        taken = 0
        async with contextlib.aclosing(cast("AsyncGenerator[bytes, None]", response.aiter_raw())) as chunks:
            async for chunk in chunks:
                taken += len(chunk)
                if not decoder.feed(chunk):
                    break
                if taken > 2 * max_bytes + 65_536:  # compressed bytes that decompress to nothing
                    decoder.full = True
                    break
        return decoder.body(), decoder.full
