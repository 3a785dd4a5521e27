"""The first example to read: a source tree becomes a searchable index, on every lane at once.

    walk ─▶ read ─▶ parse ─▶ terms ─▶ index ─▶ report
                                 packages ──────┘

Each stage is a plain function. A parameter named like another stage gets that stage's value (and makes it a
dependency); any other parameter is an input of the graph. Where a stage runs follows from what it is:
`stageflow plan stageflow.demo.pipeline:graph` says where, and why.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stageflow import PipelineBuilder, RetryConfig, StageKind, StageOutput, stage
from stageflow.demo.index import Index, add, merge, replace_file, write_index
from stageflow.demo.page import Package, render
from stageflow.demo.source import Parsed, SourceFile, Words, analyse, python_files, words_of


class Page(msgspec.Struct, frozen=True):
    """What the package service answers."""

    pages: int
    packages: list[Package]


class Summary(msgspec.Struct, frozen=True):
    """What the run made."""

    files: int
    indexed: int
    lines: int
    functions: int
    classes: int
    words: int
    packages: int
    nbytes: dict[str, int]  #: of the files written
    skipped: dict[str, str]  #: path -> reason


def walk(root: str) -> Iterator[tuple[int, str]]:
    """A generator is a source: it is pulled only when there is room for more."""
    yield from enumerate(python_files(root))


@stage(kind=StageKind.WORK)
def read(walk: tuple[int, str], root: str) -> SourceFile:
    """Blocking calls belong on a thread. A file that cannot be read goes on as a reason: nothing is lost."""
    number, path = walk
    try:
        return SourceFile(number, path, Path(root, path).read_bytes())
    except OSError as error:
        return SourceFile(number, path, skipped=f"cannot be read: {error.strerror or error}")


def parse(read: SourceFile) -> Parsed:
    """A plain function mapped over elements is CPU work: it gets processes."""
    return analyse(read)


def terms(parse: Parsed) -> Words:
    """The next step of the same file; the text goes from worker to worker through shared memory."""
    return words_of(parse)


@stage(kind=StageKind.ENRICH, timeout=20, retry=RetryConfig(max_attempts=3, base_delay_ms=100))
async def packages(service: str) -> list[Package] | StageOutput:
    """A coroutine runs on the event loop, where any number of requests wait at once and cost nothing."""
    try:
        httpx = await asyncio.to_thread(__import__, "httpx")  # long enough that others on the loop would notice
    except ImportError:
        return StageOutput.skip("httpx is not installed (pip install 'stageflow[web]')")
    # `verify=False` since this is plain HTTP on loopback: loading the certificates of the world would take longer.
    async with httpx.AsyncClient(base_url=service, verify=False, trust_env=False, timeout=10) as http:

        async def page(number: int) -> Page:
            reply = await http.get("/packages", params={"page": number})
            return msgspec.json.decode(reply.raise_for_status().content, type=Page)

        first = await page(1)
        rest = await asyncio.gather(*map(page, range(2, first.pages + 1)))
    return [package for each in (first, *rest) for package in each.packages]


# In a process of its own, since that is where the index is: it never passes through the parent.
@stage(kind=StageKind.WORK, executor="process")
def report(index: Index, root: str, output: str, packages: list[Package] | None = None) -> Summary:
    """Write the index and one HTML page. `packages` is None if that stage was skipped."""
    folder = Path(output)
    python = platform.python_version()
    nbytes = write_index(index, folder, root=root, python=python)
    page = render(index.modules, packages, title=os.path.basename(root), root=root, python=python)
    nbytes["report.html"] = replace_file(folder / "report.html", [page.encode()])
    good = [module for module in index.modules if not module.skipped]
    return Summary(
        files=len(index.modules),
        indexed=len(good),
        lines=sum(module.lines for module in good),
        functions=sum(module.functions for module in good),
        classes=sum(module.classes for module in good),
        words=len(index.entries),
        packages=len(packages or ()),
        nbytes=nbytes,
        skipped={module.path: module.skipped for module in index.modules if module.skipped},
    )


graph = (
    PipelineBuilder("demo")
    .stage("walk", walk)
    .map("read", read, over="walk")
    .map("parse", parse, over="read")
    .map("terms", terms, over="parse")
    .reduce("index", add, over="terms", initial=Index(), combine=merge)  # partial indexes, merged in the workers
    .stage("packages", packages)
    .stage("report", report)
    .build()
)
