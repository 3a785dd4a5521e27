"""Pages from a loopback server through fetch (async), extract (process) and a sink, beside what its parts take alone.

    python -m benchmarks.web.crawl_pages [pages] [--rounds N]

The parts, each in a process of its own, on the same pages and with the same settings: `extract`, the extraction
alone; `httpx`, a bare loop around `httpx.AsyncClient`; `fetcher`, a bare loop around `HttpxFetcher`; and `pipeline`.
The server is a further process on the same cores. What nobody could beat is the CPU time of server, httpx and
extraction spread evenly over the cores; "own" is the share of the pipeline's CPU time that is none of these. CPU time
is comparable on a machine that others use as well, wall time is not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from benchmarks.web.site import DISTINCT, address, page, served

AT_ONCE: Final = 16
WORKERS: Final = 2


class Part(msgspec.Struct):
    """What one part took: seconds of wall, CPU of its own process, CPU of its children, CPU of the server."""

    wall: float = 0.0
    own: float = 0.0
    children: float = 0.0
    server: float = 0.0

    @property
    def cpu(self) -> float:
        """Without the server."""
        return self.own + self.children


def fetch_config(base: str) -> Any:
    """The same settings for everybody."""
    from stageflow.websearch import FetchConfig

    return FetchConfig(
        allow_hosts=(base.removeprefix("http://").rstrip("/"),),
        per_host_concurrency=AT_ONCE,
        max_connections=AT_ONCE,
        user_agent="benchmark/1",
    )


# ---------------------------------------------------------------- the parts


def run_extract(base: str, pages: int) -> int:
    """Extraction alone, in this process; also decodes the bytes."""
    from stageflow.websearch import ExtractStage, FetchResult

    stage = ExtractStage()
    bodies = [page(number, pages) for number in range(min(DISTINCT, pages))]
    done = 0
    for number in range(pages):
        url = address(base, number)
        result = FetchResult(
            status_code=200,
            url=url,
            final_url=url,
            body=bodies[number % len(bodies)],
            content_type="text/html",
            headers={"content-type": "text/html; charset=utf-8"},
        )
        done += bool(stage(result).word_count)
    return done


async def _all(pages: int, one: Callable[[int], Any]) -> int:
    """`one` for every number, AT_ONCE at a time."""
    numbers = iter(range(pages))
    done = 0

    async def work() -> None:
        nonlocal done
        for number in numbers:
            got = await one(number)
            done += bool(got)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())
    return done


def run_httpx(base: str, pages: int) -> int:
    """A bare loop of httpx, as one would write it."""
    import httpx
    import uvloop

    async def work() -> int:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(limits=limits, headers={"user-agent": "benchmark/1"}) as client:

            async def one(number: int) -> bytes:
                answer = await client.get(address(base, number))
                return answer.raise_for_status().content

            return await _all(pages, one)

    return uvloop.run(work())


def run_fetcher(base: str, pages: int) -> int:
    """Our fetcher without stages."""
    import uvloop

    from stageflow.websearch import HttpxFetcher

    async def work() -> int:
        async with HttpxFetcher(fetch_config(base)) as fetcher:

            async def one(number: int) -> bytes:
                return (await fetcher.fetch(address(base, number))).body

            return await _all(pages, one)

    return uvloop.run(work())


def run_pipeline(base: str, pages: int) -> int:
    """The three stages."""
    from stageflow import PipelineBuilder
    from stageflow.websearch import ExtractStage, FetchStage, WebPage

    done = 0

    def addresses() -> Iterator[str]:
        for number in range(pages):
            yield address(base, number)

    def keep(page: WebPage) -> None:
        nonlocal done
        done += bool(page.word_count)

    graph = (
        PipelineBuilder("crawl")
        .stage("addresses", addresses)
        .map("fetched", FetchStage(fetch_config(base)), "addresses", concurrency=AT_ONCE)
        .map("page", ExtractStage(), "fetched")
        .sink("keep", keep, "page", concurrency=1)
        .build()
    )
    graph.run(processes=WORKERS).raise_for_failure()
    return done


PARTS: Final[dict[str, Callable[[str, int], int]]] = {
    "extract": run_extract,
    "httpx": run_httpx,
    "fetcher": run_fetcher,
    "pipeline": run_pipeline,
}


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def run_here(name: str, base: str, pages: int) -> Part:
    """Run one part in this process."""
    own, began = _cpu(resource.RUSAGE_SELF), time.perf_counter()
    done = PARTS[name](base, pages)
    if done != pages:
        raise SystemExit(f"{name}: {done} of {pages} pages")
    wall = time.perf_counter() - began
    return Part(wall=wall, own=_cpu(resource.RUSAGE_SELF) - own, children=_cpu(resource.RUSAGE_CHILDREN))


def run_apart(name: str, pages: int) -> Part:
    """Run one part in a process of its own, against a server of its own."""
    with served(pages) as site:
        command = [sys.executable, "-m", "benchmarks.web.crawl_pages", str(pages), "--part", name, "--base", site.base]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600)
    part = msgspec.json.decode(told.stdout, type=Part)
    part.server = site.told.cpu_seconds
    return part


# ---------------------------------------------------------------- the table


def show(pages: int, found: dict[str, Part]) -> str:
    """The lines that are printed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = 1000.0 / pages
    lines = [
        f"{'part':<10}{'wall s':>9}{'pages/s':>9}{'own ms':>9}{'workers ms':>12}{'server ms':>11}   CPU ms per page"
    ]
    for name, part in found.items():
        lines.append(
            f"{name:<10}{part.wall:>9.2f}{pages / part.wall:>9.0f}{part.own * each:>9.3f}"
            f"{part.children * each:>12.3f}{part.server * each:>11.3f}"
        )
    ours = found["pipeline"]
    needed = found["extract"].cpu + found["httpx"].cpu + ours.server
    total = ours.cpu + ours.server
    bound = needed / cores
    lines += [
        f"busy: {total / (ours.wall * cores):.0%} of {cores} cores while the pipeline ran",
        f"bound: {bound:.2f} s ({pages / bound:.0f} pages/s) = (server + httpx + extract) / {cores}",
        f"wall: {ours.wall / bound:.2f} times the bound",
        f"CPU: {total / needed:.2f} times the bound's; own: {max(0.0, total - needed) / total:.0%} of it",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.web.crawl_pages", description=__doc__)
    parser.add_argument("pages", type=int, nargs="?", default=2000)
    parser.add_argument("--rounds", type=int, default=1, help="the median of so many, the parts in turn")
    parser.add_argument("--part", choices=sorted(PARTS), help="run this part alone and print its numbers as JSON")
    parser.add_argument("--base", help="of a server that runs already")
    given = parser.parse_args()
    if given.part is not None and given.base is not None:
        print(msgspec.json.encode(run_here(given.part, given.base, given.pages)).decode())
        return
    names = [given.part] if given.part is not None else list(PARTS)
    rounds: dict[str, list[Part]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            rounds[name].append(run_apart(name, given.pages))
    found = {
        name: Part(
            *(
                statistics.median(getattr(part, field) for part in parts)
                for field in ("wall", "own", "children", "server")
            )
        )
        for name, parts in rounds.items()
    }
    if given.part is not None:
        print(found[given.part])
        return
    print(show(given.pages, found))


if __name__ == "__main__":
    main()
