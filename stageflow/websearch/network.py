"""Connects, after asking the address policy about every address; and speaks HTTP over what it connected.

Imported only by `fetcher`, on first use: it needs httpx and httpcore. May not import: extraction.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import httpcore
import httpx

from stageflow.websearch.addresses import AddressPolicy
from stageflow.websearch.config import FetchConfig
from stageflow.websearch.errors import AddressRefusedError

Resolver = Callable[[str, int], Awaitable[list[str]]]
_KEEPALIVE = 5.0  # seconds a connection may lie idle
SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


async def resolve(host: str, port: int) -> list[str]:
    """Every address of `host`, in the system's order of preference. Raises OSError when there is none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once, checks every address, and connects to an address that was checked: never to the name again.

    One refused address refuses the name: a public and a private answer together are what a rebinding attack looks like.
    """

    def __init__(self, policy: AddressPolicy, *, resolver: Resolver = resolve, trusted: str | None = None) -> None:
        self._policy = policy
        self._resolver = resolver
        self._trusted = trusted  # the proxy: the user named it, and every connection goes to it
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first checked address that answers. Raises AddressRefusedError,
        httpcore.ConnectError/Timeout."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolver(host.strip("[]"), port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"resolving {host} took too long") from error
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"cannot resolve {host}: {error}") from error
        if host.strip("[]") != self._trusted:
            for address in addresses:
                self._policy.check(host, port, address)
        last: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[SocketOption] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Always refused: no URL leads to a socket file."""
        raise AddressRefusedError(f"refused to connect to the socket file {path}", host=path, address=path)

    async def sleep(self, seconds: float) -> None:
        """Wait on the running loop."""
        await asyncio.sleep(seconds)


class _Body(httpx.AsyncByteStream):
    def __init__(self, stream: Any, done: Callable[[], Awaitable[None]] | None = None) -> None:
        self._stream = stream
        self._done = done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        done, self._done = self._done, None
        try:
            await self._stream.aclose()
        finally:
            if done is not None:
                await done()


class _Connections:
    """HTTP/1.1 connections by origin, the last used first.

    httpcore's own pool looks at every connection whenever a request starts or ends: with 32 to one host that was two
    thirds of the time of a fetch. Here a connection belongs to one request or lies in the list of its origin.
    """

    def __init__(self, make: Callable[[httpcore.Origin], httpcore.AsyncHTTPConnection], *, most: int) -> None:
        self._make = make
        self._slots = asyncio.Semaphore(most)
        self._idle: dict[tuple[bytes, bytes, int], list[httpcore.AsyncHTTPConnection]] = {}
        self._next_sweep = 0.0

    async def send(self, request: httpcore.Request) -> tuple[httpcore.Response, Callable[[], Awaitable[None]]]:
        """The response, and what to call when its body is closed."""
        await self._slots.acquire()
        try:
            await self._sweep()
            origin = request.url.origin
            key = (origin.scheme, origin.host, origin.port)
            connection = await self._reuse(key) or self._make(origin)
            try:
                response = await connection.handle_async_request(request)
            except BaseException:
                with contextlib.suppress(Exception):
                    await connection.aclose()
                raise
        except BaseException:
            self._slots.release()
            raise

        async def done() -> None:
            self._slots.release()
            if connection.is_idle():
                self._idle.setdefault(key, []).append(connection)
            else:
                await connection.aclose()

        return response, done

    async def _reuse(self, key: tuple[bytes, bytes, int]) -> httpcore.AsyncHTTPConnection | None:
        waiting = self._idle.get(key)
        while waiting:
            connection = waiting.pop()
            if connection.is_idle() and not connection.has_expired():
                return connection
            await connection.aclose()
        return None

    async def _sweep(self) -> None:
        """Every few seconds close what the servers closed or nobody used: a crawl meets more hosts than it may keep."""
        now = asyncio.get_running_loop().time()
        if now < self._next_sweep:
            return
        self._next_sweep = now + _KEEPALIVE
        for origin, waiting in list(self._idle.items()):
            dead = [connection for connection in waiting if connection.has_expired() or not connection.is_idle()]
            self._idle[origin] = [connection for connection in waiting if connection not in dead]
            if not self._idle[origin]:
                del self._idle[origin]
            for connection in dead:
                await connection.aclose()

    async def aclose(self) -> None:
        everything = [connection for waiting in self._idle.values() for connection in waiting]
        self._idle.clear()
        for connection in everything:
            await connection.aclose()


class CheckedTransport(httpx.AsyncBaseTransport):
    """An httpx transport over a httpcore pool whose every connection is made by `CheckedBackend`.

    httpcore's own exceptions come through as they are. Belongs to one event loop.
    """

    def __init__(self, config: FetchConfig, policy: AddressPolicy, *, resolver: Resolver = resolve) -> None:
        context = ssl.create_default_context() if config.verify_ssl else ssl._create_unverified_context()
        proxy: httpcore.Proxy | None = None
        trusted: str | None = None
        if config.proxy is not None:
            given = httpx.Proxy(config.proxy)
            auth = tuple(part.encode() for part in given.auth) if given.auth else None
            proxy = httpcore.Proxy(url=httpcore.URL(str(given.url)), auth=(auth[0], auth[1]) if auth else None)
            trusted = given.url.host
        backend = CheckedBackend(policy, resolver=resolver, trusted=trusted)
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._own: _Connections | None = None
        if proxy is None and not config.http2:
            self._own = _Connections(
                lambda origin: httpcore.AsyncHTTPConnection(
                    origin, ssl_context=context, keepalive_expiry=_KEEPALIVE, network_backend=backend
                ),
                most=config.max_connections,
            )
        else:
            self._pool = httpcore.AsyncConnectionPool(
                ssl_context=context,
                proxy=proxy,
                max_connections=config.max_connections,
                max_keepalive_connections=config.max_connections,
                keepalive_expiry=_KEEPALIVE,
                http1=True,
                http2=config.http2,
                network_backend=backend,
            )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; the response's body is read by the caller, as it came (still compressed)."""
        assert isinstance(request.stream, httpx.AsyncByteStream)
        raw = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        done: Callable[[], Awaitable[None]] | None = None
        if self._own is not None:
            response, done = await self._own.send(raw)
        else:
            assert self._pool is not None
            response = await self._pool.handle_async_request(raw)
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response.stream, done),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close every connection."""
        if self._own is not None:
            await self._own.aclose()
        if self._pool is not None:
            await self._pool.aclose()
