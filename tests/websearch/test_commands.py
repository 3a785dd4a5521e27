"""`stageflow web ...`: output, exit codes, one-line errors."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stageflow.websearch.commands import web
from tests.websearch.conftest import Site, generated_site


def run(*arguments: str) -> Result:
    return CliRunner().invoke(web, list(arguments), catch_exceptions=False)


def test_fetch_prints_the_text_or_everything_as_json(site: Site, tmp_path: Path) -> None:
    site.page("/", "<p>grün</p>")
    out = run("fetch", site.url, "--allow-private")
    assert (out.exit_code, out.stdout) == (0, "<p>grün</p>\n")
    out = run("fetch", site.url, "--allow-host", f"127.0.0.1:{site.port}", "--json", "-H", "X-A: b")
    assert json.loads(out.stdout)["status_code"] == 200
    assert site.requests[-1].headers["x-a"] == "b"
    body = tmp_path / "body"
    assert run("fetch", site.url, "--allow-private", "-o", str(body)).stdout == ""
    assert body.read_bytes() == "<p>grün</p>".encode()


def test_failures_are_one_line_and_exit_1(site: Site) -> None:
    for arguments in (
        ("fetch", site.url + "/absent", "--allow-private"),
        ("fetch", site.url),  # loopback is refused unless allowed
        ("extract", "/no/such/file"),
        ("crawl", site.url),
    ):
        out = run(*arguments)
        assert out.exit_code == 1, arguments
        last = out.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "Traceback" not in out.output
    site.page("/", "x")
    unwritable = run("fetch", site.url, "--allow-private", "-o", "/no/such/folder/file")
    assert (unwritable.exit_code, unwritable.stderr.count("\n")) == (1, 1)
    assert "/no/such/folder/file" in unwritable.stderr
    refused = run("fetch", site.url).stderr
    assert "loopback" in refused
    assert "--allow-host" in refused, "the advice is one for the command line"
    assert len(refused.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("fetch", "not-a-url"),
        ("fetch", "http://a.test/", "-H", "no colon"),
        ("fetch", "http://a.test/", "--timeout", "0"),
        ("fetch", "http://a.test/", "--allow-host", "http://x/"),
        ("fetch", "http://a.test/", "--proxy", "nonsense"),
        ("fetch", "http://a.test/", "--proxy", "ftp://a.test"),
        ("fetch", "http://a.test/", "--proxy", "http://"),
        ("crawl",),
        ("crawl", "http://a.test/", "--max-pages", "0"),
        ("extract", "http://a.test/", "--format", "pdf"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_file_that_is_no_cache_exits_2(site: Site, tmp_path: Path) -> None:
    spoiled = tmp_path / "cache.db"
    spoiled.write_text("spoiled " * 1000)
    out = run("fetch", site.url, "--allow-private", "--cache", str(spoiled))
    assert (out.exit_code, "cannot be a cache" in out.stderr) == (2, True)


def test_a_wrong_selector_exits_2(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>x</p>")
    out = run("extract", str(page), "--selector", "p:::")
    assert out.exit_code == 2
    assert "p:::" in out.stderr


def test_extract_reads_pages_and_files(site: Site, tmp_path: Path) -> None:
    html = "<title>T</title><h1>H</h1><p>a <b>b</b></p><p class=x>only</p>"
    site.page("/", html)
    page = tmp_path / "page.html"
    page.write_text(html)
    for source in (site.url, str(page)):
        assert run("extract", source, "--allow-private").stdout == "# H\n\na **b**\n\nonly\n"
        assert run("extract", source, "--allow-private", "--format", "text").stdout == "H\n\na b\n\nonly\n"
        assert run("extract", source, "--allow-private", "--selector", "p.x").stdout == "only\n"
        assert json.loads(run("extract", source, "--allow-private", "--json").stdout)["metadata"]["title"] == "T"


def test_crawl_prints_a_line_per_page_and_goes_on_with_its_journal(site: Site, tmp_path: Path) -> None:
    generated_site(site, 30)
    output, journal = tmp_path / "pages.jsonl", tmp_path / "crawl.db"
    common = (site.url, "--allow-host", f"127.0.0.1:{site.port}", "--retries", "0", "--max-depth", "3")
    both = (*common, "--journal", str(journal), "-o", str(output))
    first = run("crawl", *both, "--max-pages", "10")
    assert first.exit_code == 0
    assert len(first.stdout.splitlines()) == 10
    assert first.stdout.splitlines()[0] == f"200 0 {site.url}/  Front"
    assert "10 in the journal" in first.stderr
    second = run("crawl", *both, "--max-pages", "25", "--json")
    assert len([json.loads(line) for line in second.stdout.splitlines()]) == 15
    urls = [json.loads(line)["url"] for line in output.read_text().splitlines()]
    assert len(urls) == len(set(urls)) == 25
    journal.write_text("spoiled " * 1000)
    for leftover in tmp_path.glob("crawl.db-*"):
        leftover.unlink()
    assert run("crawl", *both).exit_code == 2
