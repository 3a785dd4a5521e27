"""HTTP/2 and certificates: a loopback server that speaks both versions over TLS, with an authority of its own."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stageflow.websearch import AddressRefusedError, FetchConfig, FetchError, FetchRetryConfig, HttpxFetcher

h2_connection = pytest.importorskip("h2.connection")
h2_config = pytest.importorskip("h2.config")
h2_events = pytest.importorskip("h2.events")
trustme = pytest.importorskip("trustme")


@dataclass
class TlsSite:
    """`versions` is what each request came by, `connections` how many there were; every page says its own path."""

    url: str = ""
    authority: str = ""
    connections: int = 0
    versions: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            tls = writer.get_extra_info("ssl_object")
            if tls.selected_alpn_protocol() == "h2":
                await self._two(reader, writer)
            else:
                await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client hung up, as it may
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.versions.append("1.1")
            body = b"<h1>" + head.split(b" ")[1] + b"</h1>"
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()

    async def _two(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = h2_connection.H2Connection(h2_config.H2Configuration(client_side=False, header_encoding="utf-8"))
        server.initiate_connection()
        writer.write(server.data_to_send())
        while data := await reader.read(65_536):
            for event in server.receive_data(data):
                if isinstance(event, h2_events.RequestReceived):
                    self.versions.append("2")
                    path = dict(event.headers)[":path"]
                    if path == "/reset":
                        server.reset_stream(event.stream_id)
                        continue
                    server.send_headers(event.stream_id, [(":status", "200"), ("content-type", "text/html")])
                    body = b"x" * 200_000 if path == "/large" else f"<h1>{path}</h1>".encode()
                    for start in range(0, len(body), 10_000):
                        if server.local_flow_control_window(event.stream_id) < 10_000:
                            break
                        server.send_data(event.stream_id, body[start : start + 10_000])
                    server.end_stream(event.stream_id)
            writer.write(server.data_to_send())
            await writer.drain()


@contextlib.asynccontextmanager
async def tls_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TlsSite]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    site = TlsSite(authority=str(tmp_path / "authority.pem"))
    authority.cert_pem.write_to_path(site.authority)
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=context)
    site.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("SSL_CERT_FILE", site.authority)  # as an operator adds an authority to those of the system
    async with server:
        yield site


def config(**changes: Any) -> FetchConfig:
    retry = FetchRetryConfig(max_retries=0)
    return FetchConfig(**{"allow_private": True, "respect_robots": False, "retry": retry, **changes})


async def test_pages_come_by_http2_over_one_connection_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls_site(tmp_path, monkeypatch) as site, HttpxFetcher(config(http2=True)) as fetcher:
        first = await fetcher.fetch(site.url + "/a")
        more = await asyncio.gather(*(fetcher.fetch(f"{site.url}/{n}") for n in range(6)))
    assert first.text == "<h1>/a</h1>"
    assert [page.text for page in more] == [f"<h1>/{n}</h1>" for n in range(6)]
    assert site.versions == ["2"] * 7
    assert site.connections == 1


async def test_without_the_option_the_same_server_is_asked_by_http_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls_site(tmp_path, monkeypatch) as site, HttpxFetcher(config()) as fetcher:
        assert (await fetcher.fetch(site.url + "/a")).text == "<h1>/a</h1>"
    assert site.versions == ["1.1"]


async def test_the_bounds_hold_for_http2_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tls_site(tmp_path, monkeypatch) as site:
        async with HttpxFetcher(config(http2=True, max_response_size=20_000)) as fetcher:
            cut = await fetcher.fetch(site.url + "/large")
            assert (len(cut.body), cut.truncated) == (20_000, True)
            with pytest.raises(FetchError, match="/reset"):
                await fetcher.fetch(site.url + "/reset")
            assert (await fetcher.fetch(site.url + "/b")).text == "<h1>/b</h1>", "and it goes on"
        async with HttpxFetcher(config(http2=True, allow_private=False)) as fetcher:
            with pytest.raises(AddressRefusedError, match="loopback"):
                await fetcher.fetch(site.url.replace("127.0.0.1", "localhost"))
        assert site.versions == ["2"] * 3


@pytest.mark.parametrize("http2", [False, True])
async def test_a_certificate_nobody_vouches_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    async with tls_site(tmp_path, monkeypatch) as site:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nobody.pem"))
        async with HttpxFetcher(config(http2=http2)) as fetcher:
            with pytest.raises(FetchError, match=r"(?i)certificate") as refused:
                await fetcher.fetch(site.url)
        assert site.versions == []
        assert site.url in refused.value.message
        async with HttpxFetcher(config(http2=http2, verify_ssl=False)) as fetcher:
            assert (await fetcher.fetch(site.url + "/c")).text == "<h1>/c</h1>", "unless the user says so"
