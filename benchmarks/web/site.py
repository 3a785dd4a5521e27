"""A site of generated pages on loopback, served by a process of its own.

`python -m benchmarks.web.site PAGES` prints its port and serves until its standard input ends; then it prints its CPU
seconds, how many requests it answered, and how many of them asked for a page that had been asked for before.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final, cast

import msgspec

#: different pages; further ones repeat them under other addresses
DISTINCT: Final = 200
_TEXT: Final = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her she there would their we him been has when who will no more if out so up said what its
about than into them can only other time new some could these two may first then do any like my now over such
our man even most made after also did many off before must well back through years much where your way down
should because pipeline scheduler worker process memory segment budget extraction content language markdown
heading paragraph
"""
_WORDS: Final = _TEXT.split()


def page(number: int, of: int) -> bytes:
    """Page `number` of a site of `of` pages: menus, an article with lists, code and a table, a sidebar, a footer."""
    dice = random.Random(number % DISTINCT)

    def words(count: int) -> str:
        return " ".join(dice.choice(_WORDS) for _ in range(count))

    def link(text: str) -> str:
        return f'<a href="/p/{dice.randrange(of)}.html?from={number}">{text}</a>'

    menu = "".join(f'<li class="item"><a href="/s/{n}/">{words(2)}</a></li>' for n in range(24))
    parts: list[str] = []
    for section in range(dice.randrange(4, 9)):
        parts.append(f'<h2 id="s{section}">{words(5).title()}</h2>')
        parts += [
            f"<p>{words(30)}, <em>{words(3)}</em> {words(20)} {link(words(3))} and <strong>{words(2)}</strong>"
            f" {words(25)} &mdash; <code>{words(1)}()</code> {words(15)}.</p>"
            for _ in range(dice.randrange(2, 5))
        ]
        if section % 3 == 0:
            parts.append("<ul>" + "".join(f"<li>{words(8)} {link(words(2))}</li>" for _ in range(6)) + "</ul>")
        if section % 3 == 1:
            code = "\n".join(f"    {words(1)} = {words(1)}({words(1)})  # {words(4)}" for _ in range(8))
            parts.append(f'<pre><code class="language-python">def {words(1)}():\n{code}</code></pre>')
        if section % 3 == 2:
            rows = "".join("<tr>" + "".join(f"<td>{words(2)}</td>" for _ in range(4)) + "</tr>" for _ in range(6))
            parts.append(f"<table><tr><th>a</th><th>b</th><th>c</th><th>d</th></tr>{rows}</table>")
    aside = "".join(f'<div class="card"><h3>{words(3)}</h3><p>{link(words(4))} {words(12)}</p></div>' for _ in range(8))
    script = f"<script>window.data = {{{','.join(f'k{n}: {dice.random()}' for n in range(60))}}};</script>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page {number}: {words(4)}</title>'
        f'<meta name="description" content="{words(15)}"><meta property="og:title" content="Page {number}">'
        f'<link rel="canonical" href="/p/{number}.html"><style>.item{{margin:0}} .card{{padding:4px}}</style>{script}'
        f'</head><body><header><nav><ul class="menu">{menu}</ul></nav></header><main><article><h1>Page {number}</h1>'
        f'{"".join(parts)}</article></main><aside class="sidebar">{aside}</aside>'
        f"<footer>{words(40)} <a href='/imprint'>imprint</a></footer></body></html>"
    ).encode()


def address(base: str, number: int) -> str:
    """Where page `number` is."""
    return f"{base}p/{number}.html"


class Told(msgspec.Struct):
    """What the server says when it ends."""

    cpu_seconds: float
    requests: int
    repeated: int


class _Server(asyncio.Protocol):
    asked: Counter[bytes] = Counter()
    answers: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        while b"\r\n\r\n" in data:
            head, _, data = data.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            self.asked[path] += 1
            self.transport.write(self.answer(path))
        self.rest = data

    def answer(self, path: bytes) -> bytes:
        if path == b"/robots.txt":
            return _answer(b"User-agent: *\nDisallow: /private/\n", "text/plain")
        number = path[3:].partition(b".")[0]
        if not path.startswith(b"/p/") or not number.isdigit():
            return b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        return self.answers[int(number) % len(self.answers)]


def _answer(body: bytes, kind: str = "text/html; charset=utf-8") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def serve(pages: int) -> None:
    """Serve until standard input ends."""
    _Server.answers = [_answer(page(number, pages)) for number in range(min(DISTINCT, pages))]
    began = time.process_time()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    asked = _Server.asked
    told = Told(time.process_time() - began, asked.total(), asked.total() - len(asked))
    print(msgspec.json.encode(told).decode(), flush=True)


class Site:
    """The running server. `told` is set when it has ended."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.told = Told(0.0, 0, 0)


@contextlib.contextmanager
def served(pages: int) -> Iterator[Site]:
    """A server of its own process."""
    command = [sys.executable, "-m", "benchmarks.web.site", str(pages)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        site = Site(f"http://127.0.0.1:{int(server.stdout.readline())}/")
        yield site
        site.told = msgspec.json.decode(server.communicate(timeout=30)[0], type=Told)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(int(sys.argv[1])))
