"""The report page: complete, self-contained, escaped, and made of the same numbers as everything else."""

import html.parser
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stageflow.events.event import Event
from stageflow.observability.stats import RunStats, StageStats, StatsFold
from stageflow.report import text
from stageflow.report.advice import advice, verdict
from stageflow.report.fold import CELLS, MAX_FAILURES, MAX_SLOWEST, Grid, ReportFold
from stageflow.report.html import render_body, replay_line, write_report

EVIL = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
    """Collects tags, the attributes that could load something, and checks that tags close in order."""

    VOID = {"meta", "link", "br", "img", "input", "rect", "line", "polyline", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def page(docs_run: list[Event], tmp_path: Path) -> str:
    fold = ReportFold(saved=lambda e: f"failed/{e.stage}/{e.item[0]}.sfail")
    return write_report(tmp_path / "out" / "run.html", fold.emit_all(docs_run)).read_text()


def test_well_formed_with_one_script_and_no_request(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("script") == 1
    assert parsed.loads == ["data:,"]
    assert "default-src 'none'" in page
    assert "connect-src 'none'" in page
    assert not re.search(r"https?://", page)
    assert "@import" not in page
    assert "url(http" not in page


def test_hostile_names_are_text(page: str) -> None:
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "".join(Page(page).texts).count(EVIL) >= 3


def test_it_shows_everything_the_run_has(page: str) -> None:
    for ident in ("graph", "stages", "timeline", "throughput", "memory", "failures", "slowest", "notes", "environment"):
        assert f'<section id="{ident}">' in page
    assert "stageflow replay failed/parse/7.sfail --pdb" in page
    assert "ValueError: bad 7" in page
    assert "worker lost" in page
    assert "request_id" not in page
    assert "user-1" not in page


def test_its_numbers_are_those_of_the_stats(docs_run: list[Event]) -> None:
    stats = StatsFold()
    for event in docs_run:
        stats.add(event)
    body = render_body(ReportFold().emit_all(docs_run))
    for s in stats.result().values():
        row = re.search(rf'<tr><th scope="row">{re.escape(text_of(s.stage))}</th>(.*?)</tr>', body)
        assert row is not None
        numbers = [float(v) for v in re.findall(r'data-v="([^"]+)"', row[1])]
        assert numbers[:2] == [s.items_in, s.items_out]
        assert numbers[2:5] == [s.dropped, s.failed, s.retried]


def text_of(name: str) -> str:
    return name.replace("<", "&lt;").replace(">", "&gt;")


@pytest.mark.parametrize("keep", [0, 1, 5, 30])
def test_a_report_of_any_part_of_a_run(docs_run: list[Event], keep: int, tmp_path: Path) -> None:
    content = write_report(tmp_path / "r.html", docs_run[:keep]).read_text()
    assert Page(content).open == []
    assert list(tmp_path.iterdir()) == [tmp_path / "r.html"]


def test_an_svg_of_the_graph_serves_where_events_cannot_draw_it(docs_run: list[Event]) -> None:
    fold = ReportFold().emit_all(docs_run)
    fold.edges = [("a", "b")]
    assert "MINE" not in render_body(fold, graph="<svg>MINE</svg>")
    many = ReportFold()
    many.emit(Event("run.started", 1, 0, "r", data={"stages": [f"s{n}" for n in range(600)]}))
    body = render_body(many, graph="<svg>MINE</svg>")
    assert "MINE" in body
    assert "500 busiest of 600" in body


def test_edges_that_are_no_dag_draw_nothing(docs_run: list[Event]) -> None:
    fold = ReportFold().emit_all(docs_run)
    fold.edges = [("urls", "fetch"), ("fetch", "urls")]
    assert 'id="graph"' not in render_body(fold)


def test_failures_beyond_the_limit_are_counted(make_events: Callable[..., list[Event]]) -> None:
    fold = ReportFold()
    fold.emit(make_events()[0])
    for n in range(MAX_FAILURES + 5):
        fold.emit(Event("stage.failed", n, n, "run-1", "parse", (n,), 1, "process", {"error": "x" * 100_000}))
    assert len(fold.failures) == MAX_FAILURES
    assert "5 more failures" in render_body(fold)
    assert len(fold.failures[0].error) < 20_000


def test_memory_is_bounded(endless_events: Callable[[int], Iterator[Event]]) -> None:
    fold = ReportFold()
    for event in endless_events(60_000):
        fold.emit(event)
    assert len(fold.samples) <= 2 * CELLS + 1
    assert len(fold.slowest) == MAX_SLOWEST
    assert all(len(cells) <= CELLS for cells in fold.busy.rows.values())
    assert len(fold.workers.rows) <= 200
    assert len(render_body(fold)) < 600_000


def test_grid_keeps_the_sum_while_it_coarsens() -> None:
    grid = Grid(0.1)
    for n in range(1_000):
        grid.add("a", n * 1.0, n * 1.0 + 0.75, 0.5)
    assert sum(grid.rows["a"].values()) == pytest.approx(500.0)
    assert max(grid.rows["a"]) < CELLS


def test_another_run_on_the_same_engine_is_not_mixed_in(make_events: Callable[..., list[Event]]) -> None:
    alone = ReportFold().emit_all(make_events())
    mixed = ReportFold().emit_all(make_events())
    mixed.emit_all(make_events("run-2"))
    assert mixed.totals() == alone.totals()


def stats(stage: str, **fields: object) -> StageStats:
    return StageStats(stage=stage, status="ok", attempts=100, items_in=100, items_out=100, **fields)  # type: ignore[arg-type]


def test_verdicts() -> None:
    run = RunStats(wall_seconds=10.0, workers_started=2)
    parse = stats("parse", lane="process", busy_seconds=19.0, cpu_seconds=19.0)
    fetch = stats("fetch", lane="async", busy_seconds=4.0, wait={"downstream": 7.1})
    said = verdict({"fetch": fetch, "parse": parse}, run)
    assert "cores are the limit" in said
    assert "95 %" in said
    assert "fetch waited 71 %" in said
    assert said.endswith("100 % of that was computing: more cores would help.")
    napping = stats("parse", lane="process", busy_seconds=19.0, cpu_seconds=0.2)
    said = verdict({"fetch": fetch, "parse": napping}, run)
    assert said.startswith("The workers are the limit")
    assert "Only 1 % of that was computing" in said
    assert "more workers (processes=)" in said
    slow = stats("fetch", lane="async", busy_seconds=5.0, wait={"rate": 8.0})
    held_up = stats("ask", lane="async", busy_seconds=300.0, wait={"downstream": 9.0})
    behind = stats("parse", lane="process", busy_seconds=8.0, wait={"slot": 8.0})
    assert verdict({"ask": held_up, "parse": behind}, run).startswith("parse is the bottleneck")
    running = {"ask": stats("ask", busy_seconds=300.0), "parse": behind}
    assert verdict(running, run, waiting={"ask": "parse to catch up"}).startswith("parse is the bottleneck")
    assert verdict(running, run).startswith("ask is the bottleneck")
    assert "its rate limit; a higher rate= would help." in verdict({"fetch": slow}, run)
    assert "a free slot of its lane; more workers (processes=) would help." in verdict({"parse": behind}, run)
    before = stats("before", lane="process", busy_seconds=0.1, wait={"downstream": 9.0})
    sink = stats("store", lane="async", busy_seconds=9.5)
    said = verdict({"before": before, "store": sink}, run)
    assert said.endswith("It ran one at a time: more at once, larger batches (batch=) or a faster far end would help.")
    assert verdict({"store": sink}, run).endswith("9.5 s of work in 10 s."), "nothing waits for it: it has no backlog"
    waited_for = stats("store", lane="thread", busy_seconds=19.0, cpu_seconds=0.2, queued_seconds=90.0)
    assert "the rest waiting, 1.9 at a time: more at once" in verdict({"store": waited_for}, run)
    chain = stats("fold", lane="process", busy_seconds=9.5, cpu_seconds=9.4, queued_seconds=90.0)
    assert "more of it at once would help" in verdict({"fold": chain}, RunStats(wall_seconds=10.0, workers_started=4))
    alone = stats("load", lane="thread", busy_seconds=9.5)
    assert verdict({"load": alone}, run).startswith("load is the bottleneck")
    assert "too short" in verdict({"load": alone}, RunStats(wall_seconds=0.01))
    assert verdict({}, run) == "Nothing ran."
    assert "No stage" in verdict({"a": stats("a", busy_seconds=1.0)}, run)
    held = RunStats(wall_seconds=10.0, backpressure_seconds={"memory": 6.0})
    assert "60 %" in verdict({"a": stats("a", busy_seconds=1.0)}, held)


def test_advice_names_the_cure() -> None:
    run = RunStats(wall_seconds=10.0)
    tiny = stats("tiny", lane="process", busy_seconds=0.005)
    gil = stats("gil", lane="thread", busy_seconds=9.0, cpu_seconds=8.9)
    block = stats("block", lane="async", busy_seconds=3.0, cpu_seconds=2.9, max_seconds=0.5)
    skew = stats("skew", lane="process", busy_seconds=5.0, p50_seconds=0.01, max_seconds=4.0)
    retry = StageStats(stage="retry", attempts=10, retried=5)
    said = {a.stage: a.text for a in advice({s.stage: s for s in (tiny, gil, block, skew, retry)}, run)}
    assert "batch=" in said["tiny"]
    assert "executor='process'" in said["gil"]
    assert "event loop" in said["block"]
    assert "slowest item took 4 s" in said["skew"]
    assert "repeated" in said["retry"]
    assert advice({"fine": stats("fine", lane="process", busy_seconds=9.0, p50_seconds=0.09)}, run) == []


def test_numbers_for_people() -> None:
    assert [text.duration(v) for v in (0, 12e-6, 0.0034, 1.234, 125, 3600, 12_000)] == [
        "0",
        "12 µs",
        "3.4 ms",
        "1.23 s",
        "2 min 5 s",
        "1 h",
        "3 h 20 min",
    ]
    assert [text.size(v) for v in (0, 512, 1_500, 20_000_000, 3.2e9)] == ["0 B", "512 B", "1.5 kB", "20 MB", "3.2 GB"]
    assert [text.rate(v) for v in (0, 12, 0.05, 0.001)] == ["", "12/s", "3/min", "3.6/h"]
    assert text.item((4, 2)) == "4.2"
    assert text.plural(1, "item") == "1 item"
    assert replay_line("my file; rm") == "stageflow replay 'my file; rm' --pdb"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it_without_an_error(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page)
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=1000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert "alert(1)" in done.stdout
    assert done.stdout.count("<details>") == 2
