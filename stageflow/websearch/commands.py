"""`stageflow web fetch|extract|crawl`: the room on the command line. The only module here that imports click.

Exit codes: 0 done, 1 it failed, 2 wrong usage, 130 interrupted. Errors are one line on stderr.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import click

from stageflow.core.errors import DefinitionError, StageflowError
from stageflow.websearch import urls
from stageflow.websearch.client import WebClient
from stageflow.websearch.config import CrawlConfig, FetchConfig, FetchRetryConfig, WebSearchConfig
from stageflow.websearch.extract import LxmlExtractor, page_from
from stageflow.websearch.fetcher import HttpxFetcher
from stageflow.websearch.journal import CrawlJournal
from stageflow.websearch.models import FetchResult, WebPage

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def _fail(message: str, code: int) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    raise SystemExit(code)


#: what an error advises to a program -> what that is on the command line
_OPTIONS = {
    "list the host in allow_hosts, or set allow_private=True, if this is meant": "--allow-host HOST, if this is meant",
    "respect_robots=False, if you may": "--no-robots, if you may",
}


def _one_line(error: StageflowError | OSError) -> str:
    text = str(error).replace("\n  ->", " ->")
    for advice, option in _OPTIONS.items():
        text = text.replace(advice, option)
    return text


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; our errors become one line and an exit code."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except DefinitionError as error:
        _fail(_one_line(error), 2)
    except (StageflowError, OSError) as error:
        _fail(_one_line(error), 1)


def _network_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--allow-private", is_flag=True, help="Also reach loopback, private and link-local addresses."
            ),
            click.option(
                "--allow-host", multiple=True, metavar="HOST", help="A host, host:port, address or network to reach."
            ),
            click.option("-H", "--header", multiple=True, metavar="NAME:VALUE", help="A request header."),
            click.option("--user-agent", metavar="TEXT", help="What to introduce oneself as."),
            click.option(
                "--timeout", type=click.FloatRange(min=0.01), default=30.0, show_default=True, help="Seconds."
            ),
            click.option(
                "--retries", type=click.IntRange(min=0), default=3, show_default=True, help="Further attempts."
            ),
            click.option("--proxy", metavar="URL", help="http://, https:// or socks5:// proxy."),
            click.option("--cache", type=click.Path(dir_okay=False), help="SQLite file of responses to revalidate."),
            click.option("--no-robots", is_flag=True, help="Do not ask robots.txt."),
            click.option("--insecure", is_flag=True, help="Do not verify TLS certificates."),
        )
    ):
        command = option(command)
    return command


def _fetch_config(options: dict[str, Any]) -> FetchConfig:
    headers: dict[str, str] = {}
    for line in options["header"]:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise click.BadParameter(f"{line!r} is not NAME:VALUE", param_hint="--header")
        headers[name.strip()] = value.strip()
    more = {"user_agent": options["user_agent"]} if options["user_agent"] else {}
    try:
        return FetchConfig(
            timeout_seconds=options["timeout"],
            headers=headers,
            verify_ssl=not options["insecure"],
            allow_private=options["allow_private"],
            allow_hosts=tuple(options["allow_host"]),
            respect_robots=not options["no_robots"],
            proxy=options["proxy"],
            cache_path=options["cache"],
            retry=FetchRetryConfig(max_retries=options["retries"]),
            **more,
        )
    except DefinitionError as error:
        raise click.UsageError(error.message) from error


def _address(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    for one in value if isinstance(value, tuple) else (value,):
        if urls.normalize(one) is None:
            raise click.BadParameter(f"{one!r} is not an absolute http or https URL")
    return value


@click.group("web")
def web() -> None:
    """Fetch, read and crawl web pages (extra: stageflow[web])."""


@web.command("fetch")
@click.argument("url", callback=_address)
@click.option("--json", "as_json", is_flag=True, help="Status, headers and text as one JSON object.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the body there, byte for byte.")
@_network_options
def fetch(url: str, as_json: bool, output: str | None, **options: Any) -> None:
    """Fetch URL and print its text."""
    config = _fetch_config(options)

    async def work() -> FetchResult:
        async with HttpxFetcher(config) as fetcher:
            result = await fetcher.fetch(url)
        if output is not None:
            await asyncio.to_thread(Path(output).write_bytes, result.body)
        return result

    result = _run(work())
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    elif output is None:
        click.echo(result.text)
    if result.status_code >= 400:
        _fail(f"{result.final_url} answered {result.status_code}", 1)


@web.command("extract")
@click.argument("source")
@click.option(
    "--format",
    "form",
    type=click.Choice(["markdown", "text"]),
    default="markdown",
    show_default=True,
    help="What to print.",
)
@click.option("--json", "as_json", is_flag=True, help="The whole page as one JSON object.")
@click.option("--selector", metavar="CSS", help="The element that holds the content.")
@_network_options
def extract(source: str, form: str, as_json: bool, selector: str | None, **options: Any) -> None:
    """Read SOURCE, a URL or a file of HTML, and print its content."""
    config = _fetch_config(options)

    async def work() -> FetchResult:
        if urls.normalize(source) is not None:
            async with HttpxFetcher(config) as fetcher:
                return await fetcher.fetch(source)
        return _from_file(source)

    class Chosen(LxmlExtractor):
        def extract(self, html: str, url: str, *, selector: str | None = selector) -> Any:
            return super().extract(html, url, selector=selector)

    async def read() -> WebPage:
        return page_from(await work(), Chosen())

    page = _run(read())
    if as_json:
        click.echo(json.dumps(page.to_dict(), ensure_ascii=False))
    else:
        click.echo(page.markdown if form == "markdown" else page.plain_text)
    if page.error is not None:
        _fail(f"{page.url}: {page.error}", 1)


def _from_file(path: str) -> FetchResult:
    url = Path(path).resolve().as_uri()
    return FetchResult(status_code=200, url=url, final_url=url, body=Path(path).read_bytes(), content_type="text/html")


@web.command("crawl")
@click.argument("start", nargs=-1, required=True, callback=_address)
@click.option("--max-pages", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--max-depth", type=click.IntRange(min=0), default=2, show_default=True)
@click.option("--any-domain", is_flag=True, help="Follow links to other hosts as well.")
@click.option("--concurrency", type=click.IntRange(min=1), default=5, show_default=True, help="Pages in flight.")
@click.option(
    "--journal", type=click.Path(dir_okay=False), help="SQLite file: a crawl given it again goes on where it ended."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Append one JSON object per page to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per page instead of one line.")
@_network_options
def crawl(
    start: tuple[str, ...],
    max_pages: int,
    max_depth: int,
    any_domain: bool,
    concurrency: int,
    journal: str | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Crawl from START, breadth first, and print one line per page."""
    config = WebSearchConfig(fetch=_fetch_config(options), max_concurrent=concurrency, auto_navigate=False)
    rules = CrawlConfig(max_pages=max_pages, max_depth=max_depth, same_domain=not any_domain)

    async def work(sink: TextIO | None, book: CrawlJournal | None) -> tuple[int, int]:
        good = bad = 0
        async with WebClient(config) as client:
            async for page in client.crawl_iter(start, rules, journal=book):
                good, bad = (good + 1, bad) if page.success else (good, bad + 1)
                line = json.dumps(page.to_dict(), ensure_ascii=False)
                if sink is not None:
                    # on disk before the journal calls the page finished, which happens when the next one is asked for
                    sink.write(line + "\n")
                    sink.flush()
                click.echo(
                    line if as_json else f"{page.status_code or '---'} {page.depth} {page.url}  {_summary(page)}"
                )
        return good, bad

    book = CrawlJournal(journal) if journal is not None else None
    try:
        with ExitStack() as open_files:
            sink = open_files.enter_context(Path(output).open("a", encoding="utf-8")) if output is not None else None
            if book is not None:
                open_files.enter_context(book)
            good, bad = _run(work(sink, book))
            done = book.counts()["finished"] if book is not None else 0
    except OSError as error:
        _fail(str(error), 1)
    except sqlite3.Error as error:
        _fail(f"{journal} is no journal of a crawl: {error}", 2)
    if not as_json:
        click.echo(f"{good} pages, {bad} failed" + (f", {done} in the journal" if book is not None else ""), err=True)
    if bad and not good:
        _fail("no page could be fetched", 1)


def _summary(page: WebPage) -> str:
    return " ".join((page.error or page.title or "").split())[:100]
