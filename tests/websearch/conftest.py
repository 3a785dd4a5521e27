"""Loopback servers for this room's tests: the only network there is."""

import gzip
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Request:
    path: str
    headers: dict[str, str]


@dataclass
class Site:
    """A server whose pages are functions of the request. `requests` is what it was asked."""

    port: int = 0
    pages: dict[str, Callable[[Request], Answer]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    otherwise: Callable[[Request], Answer | None] = lambda request: None
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)  # slow pages wait for it
    in_flight: int = 0
    most_in_flight: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def page(self, path: str, body: str | bytes = "", *, status: int = 200, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        names.setdefault("content-type", "text/html; charset=utf-8")
        self.pages[path] = lambda request: (status, names, data)

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.pages[path] = lambda request: (status, {"location": to}, b"")

    def asked(self, path: str) -> int:
        return sum(request.path == path for request in self.requests)


@dataclass
class Slow:
    """Not an answer: the handler waits for `released` first."""

    answer: Answer


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            request = Request(self.path, {name.lower(): value for name, value in self.headers.items()})
            with site.lock:
                site.requests.append(request)
                site.in_flight += 1
                site.most_in_flight = max(site.most_in_flight, site.in_flight)
            try:
                make = site.pages.get(self.path)
                answer: Any = make(request) if make is not None else site.otherwise(request)
                if isinstance(answer, Slow):
                    site.released.wait(20)
                    answer = answer.answer
                status, headers, body = answer or (404, {"content-type": "text/plain"}, b"not found")
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status != 304:
                    self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()
            except OSError:
                self.close_connection = True  # the client hung up, as it may
            finally:
                with site.lock:
                    site.in_flight -= 1

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that resets a connection is part of these tests


def start(site: Site) -> Server:
    server = Server(("127.0.0.1", 0), _handler(site))
    site.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def make_site() -> Iterator[Callable[[], Site]]:
    running: list[tuple[Site, Server]] = []

    def make() -> Site:
        site = Site()
        running.append((site, start(site)))
        return site

    yield make
    for site, server in running:
        site.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(make_site: Callable[[], Site]) -> Site:
    return make_site()


def bomb(megabytes: int) -> bytes:
    """gzip of zeros: about a thousandth of its size on the wire."""
    machine = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    block = b"\0" * (1 << 20)
    return b"".join(machine.compress(block) for _ in range(megabytes)) + machine.flush()


def gzipped(text: str) -> bytes:
    return gzip.compress(text.encode())


def generated_site(site: Site, pages: int = 300) -> None:
    """A site of `pages` ordinary pages, ten links each, and every trap a crawler can fall into."""
    private = "http://169.254.169.254/latest/meta-data/"

    def ordinary(number: int) -> str:
        links = "".join(f'<a href="/p/{(number * 7 + step) % pages}.html">page {step}</a> ' for step in range(1, 11))
        return (
            f"<html><head><title>Page {number}</title></head><body><nav><a href='/'>home</a></nav>"
            f"<main><h1>Page {number}</h1><p>The text of page {number}.</p>{links}</main>"
            f"<div class=pagination><a href='/p/{(number + 1) % pages}.html'>next</a></div></body></html>"
        )

    traps = {
        "/trap/loop": "<a href='/trap/loop'>self</a><a href='/trap/loop?utm_source=x'>self again</a>",
        "/trap/deep/": "<a href='deep/'>deeper</a>",
        "/trap/huge": "<p>" + "x" * 200_000 + "</p>",
    }
    front = "".join(f'<a href="/p/{number}.html">{number}</a> ' for number in range(0, pages, 10))
    more = "".join(
        f'<a href="{path}">{path}</a> '
        for path in (
            *traps,
            *("/trap/calendar/2024/1", "/trap/bomb", "/trap/charset", "/trap/away", "/trap/inside", "/trap/circle"),
            *("/trap/error", "/private/x", "mailto:me@site.test", "javascript:x", "http://other.test/"),
        )
    )
    site.page("/", f"<title>Front</title><main><p>Start here</p>{front}{more}</main>")
    for path, body in traps.items():
        site.page(path, body)
    site.page("/trap/bomb", bomb(50), content_encoding="gzip")
    site.page("/trap/charset", "<p>Здравствуйте</p>".encode("koi8-r"), content_type="text/html; charset=koi8-r")
    site.redirect("/trap/away", "http://169.254.169.254/")
    site.redirect("/trap/inside", private)
    site.redirect("/trap/circle", "/trap/circle")
    site.page("/trap/error", "broken", status=500)
    site.page("/robots.txt", "User-agent: *\nDisallow: /private/\n", content_type="text/plain")

    def otherwise(request: Request) -> Answer | None:
        html = {"content-type": "text/html; charset=utf-8"}
        if request.path.startswith("/p/") and request.path.endswith(".html"):
            name = request.path[3:-5]
            if name.isdigit() and int(name) < pages:
                return 200, html, ordinary(int(name)).encode()
        if request.path.startswith("/trap/calendar/"):
            year, month = (int(part) for part in request.path.split("/")[3:5])
            following = f"/trap/calendar/{year + month // 12}/{month % 12 + 1}"
            return 200, html, f"<a href='{following}'>next month</a>".encode()
        if request.path.startswith("/trap/deep/"):
            return 200, html, b"<a href='deep/'>deeper</a>"
        return None

    site.otherwise = otherwise
