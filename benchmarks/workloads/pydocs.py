"""An index of the Python documentation: pages fetched over loopback HTTP, parsed, tokenised, reduced.

The pages are those of the Debian package `python3.11-doc` (`apt-get install python3.11-doc`). Beside our pipeline stand
the versions one would write by hand; all give the identical index.

`python -m benchmarks.workloads.pydocs [rounds] [pages]` prints seconds, CPU seconds and the ratio to each.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

FOLDERS: Final = ("/usr/share/doc/python3.11/html", "/usr/share/doc/python3.11-doc/html")
WORD: Final = re.compile(r"[a-z_][a-z0-9_]{2,}")
AT_ONCE: Final = 16
WORKERS: Final = 2

Page = tuple[str, bytes]
Counts = tuple[str, dict[str, int]]
Index = dict[str, list[tuple[str, int]]]

SERVER: Final = """
import functools, http.server, sys
class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""


def folder() -> Path | None:
    """Where the pages are; None where the package is not installed."""
    for name in FOLDERS:
        found = Path(name)
        if (found / "index.html").exists():
            return found
    return None


def pages(root: Path, most: int = 0) -> list[str]:
    """The pages by name, in a fixed order."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.html") if path.is_file())
    return names[:most] if most else names


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """A server of its own process; its address."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/"
    finally:
        server.kill()
        server.wait()


# ---------------------------------------------------------------- the work, the same for everybody


def parse(page: Page) -> tuple[str, str]:
    """The text of a page."""
    import lxml.html

    name, html = page
    tree = lxml.html.fromstring(html)
    for element in tree.xpath("//script|//style"):
        element.drop_tree()
    return name, tree.text_content()


def tokenise(text: tuple[str, str]) -> Counts:
    """How often each word stands on the page."""
    name, words = text
    return name, dict(Counter(WORD.findall(words.lower())))


def add(index: Index, counts: Counts) -> Index:
    """Put one page into the index."""
    name, words = counts
    for word, count in words.items():
        index.setdefault(word, []).append((name, count))
    return index


def digest(index: Index) -> str:
    """Equal for equal indexes."""
    data = json.dumps({word: index[word] for word in sorted(index)}, separators=(",", ":"))
    return hashlib.sha256(data.encode()).hexdigest()


def counted(page: Page) -> Counts:
    """Both steps, for those who call one function."""
    return tokenise(parse(page))


async def get(client: Any, base: str, name: str) -> Page:
    """One page over HTTP."""
    answer = await client.get(base + name)
    answer.raise_for_status()
    return name, answer.content


def new_client() -> Any:
    """The HTTP client that all asynchronous versions use."""
    import httpx

    return httpx.AsyncClient(limits=httpx.Limits(max_connections=AT_ONCE), timeout=60.0)


def fetched(base: str, names: list[str]) -> list[Page]:
    """All pages, by threads, for the versions that have no loop."""
    from urllib.request import urlopen

    def one(name: str) -> Page:
        with urlopen(base + name) as answer:
            return name, answer.read()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, names))


# ---------------------------------------------------------------- the versions


def by_stageflow(base: str, names: list[str]) -> Index:
    """Ours: no barrier anywhere, parsing and tokenising fused."""
    from stageflow import Engine, PipelineBuilder

    client: list[Any] = []

    async def fetch(name: str) -> Page:
        if not client:
            client.append(new_client())
        return await get(client[0], base, name)

    graph = (
        PipelineBuilder("pydocs", inputs={"names": list})
        .map("page", fetch, "names", concurrency=AT_ONCE)
        .map("text", parse, "page")
        .map("words", tokenise, "text")
        .reduce("index", add, "words", initial={}, executor="thread")  # in this process, as the others do
        .build()
    )
    with Engine(processes=WORKERS) as engine:
        result = engine.run(graph, {"names": names})
        result.raise_for_failure()
        index: Index = result.data("index")
        return index


def by_hand(base: str, names: list[str]) -> Index:
    """asyncio and a ProcessPoolExecutor."""

    async def main() -> Index:
        loop = asyncio.get_running_loop()
        gate = asyncio.Semaphore(AT_ONCE)
        index: Index = {}
        with ProcessPoolExecutor(WORKERS) as pool:
            async with new_client() as client:

                async def one(name: str) -> Counts:
                    async with gate:
                        page = await get(client, base, name)
                    return await loop.run_in_executor(pool, counted, page)

                for counts in await asyncio.gather(*map(one, names)):
                    add(index, counts)
        return index

    return asyncio.run(main())


def by_pool(base: str, names: list[str]) -> Index:
    """Threads to fetch, then `multiprocessing.Pool.map`."""
    found = fetched(base, names)
    index: Index = {}
    with multiprocessing.get_context("forkserver").Pool(WORKERS) as pool:
        for counts in pool.imap(counted, found, chunksize=8):
            add(index, counts)
    return index


def by_joblib(base: str, names: list[str]) -> Index:
    """Threads to fetch, then joblib."""
    import joblib

    found = fetched(base, names)
    index: Index = {}
    for counts in joblib.Parallel(n_jobs=WORKERS)(joblib.delayed(counted)(page) for page in found):
        add(index, counts)
    return index


def by_dask(base: str, names: list[str]) -> Index:
    """Threads to fetch, then a Dask bag on processes."""
    import dask.bag

    found = fetched(base, names)
    index: Index = {}
    bag = dask.bag.from_sequence(found, partition_size=16).map(counted)
    for counts in bag.compute(scheduler="processes", num_workers=WORKERS):
        add(index, counts)
    return index


VERSIONS: Final[dict[str, Callable[[str, list[str]], Index]]] = {
    "stageflow": by_stageflow,
    "asyncio + ProcessPoolExecutor": by_hand,
    "multiprocessing.Pool": by_pool,
    "joblib": by_joblib,
    "dask": by_dask,
}


def main(rounds: int = 5, most: int = 0) -> int:
    """Run every version in turn; 0 if all agree."""
    root = folder()
    if root is None:
        print("skipped: the pages are not here; install the package python3.11-doc")
        return 0
    names = pages(root, most)
    seconds: dict[str, list[float]] = {}
    digests: dict[str, str] = {}
    with served(root) as base:
        for turn in range(rounds):
            order = list(VERSIONS) if turn % 2 else list(reversed(VERSIONS))
            for version in order:
                started = time.perf_counter()
                try:
                    index = VERSIONS[version](base, names)
                except ImportError as error:
                    digests[version] = f"skipped: {error}"
                    continue
                seconds.setdefault(version, []).append(time.perf_counter() - started)
                digests[version] = digest(index)
    ours = seconds["stageflow"]
    print(f"{len(names)} pages, {rounds} rounds, {WORKERS} workers")
    for version, taken in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, taken, strict=True))
        print(f"{version:32} {statistics.median(taken):7.3f} s   ours / theirs {ratio:5.2f}   {digests[version][:16]}")
    for version, said in digests.items():
        if version not in seconds:
            print(f"{version:32} {said}")
    agree = len({digests[version] for version in seconds}) == 1
    print("all indexes are identical" if agree else "THE INDEXES DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
