"""`write_report`: a run as one HTML file that works offline, in light and dark, on a desk and on a phone.

The page holds no link, no remote font, no image and no request: its content policy forbids them. Everything that came
from a run (names, errors, reasons) is escaped.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from stageflow.events.event import Event
from stageflow.observability.stats import RunStats, StageStats
from stageflow.observability.wide import iso_time
from stageflow.report import page, text
from stageflow.report.advice import advice, verdict
from stageflow.report.charts import (
    esc,
    graph_svg,
    lane_class,
    memory_chart,
    throughput_chart,
    timeline,
    wait_bar,
)
from stageflow.report.fold import MAX_FAILURES, Failure, ReportFold, Slow

#: Rows of the stage table; a graph of more stages shows those with the most work and says so.
MAX_STAGES = 500


def write_report(
    path: str | os.PathLike[str], source: ReportFold | Iterable[Event], *, graph: str | None = None
) -> Path:
    """Write the report of a run to `path` and return it. Folders are made; the file appears complete or not at all.

    `graph` is an SVG (as `graph.draw("svg")` makes it) shown where the events alone cannot draw the graph.
    """
    fold = source if isinstance(source, ReportFold) else ReportFold().emit_all(source)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = render_page(fold, graph=graph).encode("utf-8", "replace")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp's files are private; a report is made to be shown, as far as the user's umask lets it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return target


def render_page(fold: ReportFold, *, graph: str | None = None, live: str = "") -> str:
    """The whole page. `live` is a script that keeps it up to date, for the live page only."""
    title = f"{fold.pipeline}: {fold.status}"
    return page.document(title, render_body(fold, graph=graph), script=page.SCRIPT + live, live=bool(live))


def render_body(fold: ReportFold, *, graph: str | None = None) -> str:
    """What changes while a run goes on: everything inside the page's frame."""
    stats = fold.stage_stats()
    totals = fold.totals()
    workers = fold.run.get("workers") or 0
    span = max(totals.wall_seconds, fold.busy.end)
    shown = _shown(stats)
    drawing = graph_svg(fold, stats) or (graph or "")
    parts = [
        _header(fold, totals),
        _verdict(stats, totals, workers, fold),
        _cards(fold, totals, workers),
        _section("Graph", f'<div class="scroll">{drawing}</div>' if drawing else "", "graph"),
        _section("Stages", _stage_table(shown, len(stats), fold), "stages"),
        _section("Timeline", timeline(fold, stats, span), "timeline"),
        _section("Throughput", throughput_chart(fold, stats, span), "throughput"),
        _section("Memory", memory_chart(fold, span), "memory"),
        _section("Failures", _failures(fold), "failures"),
        _section("Slowest", _slowest(fold.slowest_first()), "slowest"),
        _section("What happened", _notes(fold), "notes"),
        _section("Environment", _environment(fold, workers), "environment"),
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, content: str, ident: str) -> str:
    return f'<section id="{ident}"><h2>{title}</h2>{content}</section>' if content else ""


def _shown(stats: Mapping[str, StageStats]) -> dict[str, StageStats]:
    if len(stats) <= MAX_STAGES:
        return dict(stats)
    busiest = sorted(stats.values(), key=lambda s: (s.failed, s.busy_seconds), reverse=True)[:MAX_STAGES]
    keep = {s.stage for s in busiest}
    return {name: s for name, s in stats.items() if name in keep}


def _header(fold: ReportFold, totals: RunStats) -> str:
    status = fold.status if fold.status in ("completed", "failed", "cancelled", "running") else "running"
    began = iso_time(fold.started_ns)[:19].replace("T", " ") + " UTC" if fold.started_ns else ""
    reason = fold.error or fold.reason
    why = f'<p class="why">{esc(reason)}</p>' if reason and status != "completed" else ""
    return (
        f'<header><div><h1>{esc(fold.pipeline)}</h1><p class="sub">run {esc(fold.run_id or "")}'
        f"{f' · started {began}' if began else ''}</p></div>"
        f'<div class="state"><span class="pill {status}">{status}</span>'
        f'<span class="took">{esc(text.duration(totals.wall_seconds))}</span></div></header>{why}'
    )


def _verdict(stats: Mapping[str, StageStats], totals: RunStats, workers: int, fold: ReportFold) -> str:
    lines = "".join(
        f"<li>{f'<b>{esc(a.stage)}</b>: ' if a.stage else ''}{esc(a.text)}</li>" for a in advice(stats, totals, workers)
    )
    todo = f"<ul>{lines}</ul>" if lines else ""
    said = verdict(stats, totals, workers, fold.waiting if fold.status == "running" else {})
    return f'<div class="verdict"><p>{esc(said)}</p>{todo}</div>'


def _cards(fold: ReportFold, totals: RunStats, workers: int) -> str:
    ended = [s for s in fold.stage_stats().values() if s.status not in ("pending", "running")]
    cards = [
        ("stages ended", f"{len(ended):,} of {totals.stages:,}", ""),
        ("items", text.number(totals.items_in), f"{text.number(totals.items_out)} out, {totals.dropped:,} dropped"),
        ("failed", text.number(totals.failed), "bad" if totals.failed else ""),
        ("retried", text.number(totals.retried), ""),
        ("work", text.duration(totals.busy_seconds), f"{text.duration(totals.cpu_seconds)} CPU"),
        ("moved", text.size(totals.bytes_out), f"{text.size(totals.bytes_in)} read"),
    ]
    if workers or totals.workers_started:
        lost = f"{totals.workers_lost} lost, {totals.workers_recycled} replaced"
        cards.append(("workers", str(workers or totals.workers_started), lost if totals.workers_lost else ""))
    peak = max((s.rss for s in fold.samples), default=0)
    if peak:
        cards.append(("peak memory", text.size(peak), "engine and workers"))
    made = []
    for label, value, small in cards:
        css = ' class="bad"' if small == "bad" else ""
        note = f"<small>{esc(small)}</small>" if small and small != "bad" else ""
        made.append(f"<div{css}><dt>{label}</dt><dd>{esc(value)}{note}</dd></div>")
    return f'<dl class="cards">{"".join(made)}</dl>'


class _Column(msgspec.Struct, frozen=True):
    """One column of the stage table: what a cell shows, and the number it is sorted by (None: by its text)."""

    head: str
    show: Callable[[StageStats], str]
    key: Callable[[StageStats], float] | None = None
    tip: str = ""
    css: Callable[[StageStats], str] | None = None
    optional: bool = False  #: left out when every cell is empty


def _when(show: Callable[[float], str], value: Callable[[StageStats], float]) -> Callable[[StageStats], str]:
    """Shows a number that is not zero."""
    return lambda s: show(value(s)) if value(s) else ""


def _many(show: Callable[[float], str], value: Callable[[StageStats], float]) -> Callable[[StageStats], str]:
    """Shows a number of stages with several items."""
    return lambda s: show(value(s)) if s.items_in > 1 else ""


def _lane(s: StageStats) -> str:
    return f'<span class="lane {lane_class(s.lane)}">{esc(s.lane or "-")}</span>'


def _count(head: str, value: Callable[[StageStats], float], css: str = "") -> _Column:
    mark: Callable[[StageStats], str] | None = (lambda s: css if value(s) else "") if css else None
    return _Column(head, _when(text.number, value), value, css=mark, optional=True)


_COLUMNS = (
    _Column("lane", _lane),
    _Column("in", lambda s: text.number(s.items_in), lambda s: s.items_in, "items that ended"),
    _Column("out", lambda s: text.number(s.items_out), lambda s: s.items_out, "items that ended well"),
    _count("dropped", lambda s: s.dropped),
    _count("failed", lambda s: s.failed, "bad"),
    _count("retried", lambda s: s.retried),
    _Column("waited for", wait_bar, lambda s: sum(s.wait.values()), "while it could not run", optional=True),
    _Column("per s", _many(lambda v: text.number(round(v, 1)), lambda s: s.rate), lambda s: s.rate, optional=True),
    _Column("p50", _when(text.duration, lambda s: s.p50_seconds), lambda s: s.p50_seconds, "the middle attempt"),
    _Column("p95", _many(text.duration, lambda s: s.p95_seconds), lambda s: s.p95_seconds, optional=True),
    _Column("max", _many(text.duration, lambda s: s.max_seconds), lambda s: s.max_seconds, optional=True),
    _Column("busy", _when(text.duration, lambda s: s.busy_seconds), lambda s: s.busy_seconds, "all attempts together"),
    _Column("CPU", _when(text.duration, lambda s: s.cpu_seconds), lambda s: s.cpu_seconds, optional=True),
    _Column("wall", _when(text.duration, lambda s: s.wall_seconds), lambda s: s.wall_seconds, "start to end"),
    _Column("read", _when(text.size, lambda s: s.bytes_in), lambda s: s.bytes_in, optional=True),
    _Column("written", _when(text.size, lambda s: s.bytes_out), lambda s: s.bytes_out, optional=True),
)


def _now(fold: ReportFold) -> tuple[_Column, ...]:
    """What stages do at this moment; nothing when the run has ended."""
    if fold.status != "running":
        return ()

    def doing(s: StageStats) -> str:
        if s.status != "running":
            return ""
        why, busy = fold.waiting.get(s.stage), fold.running.get(s.stage)
        return f"waits for {esc(why)}" if why else f"{text.number(busy)} at work" if busy else ""

    def queued(s: StageStats) -> float:
        return fold.queued.get(s.stage, 0)

    return (_Column("now", doing, optional=True), _count("queued", queued))


_STATES = {"ok": "done", "fail": "failed", "skip": "skipped", "cancel": "cancelled"}


def _stage_table(stats: Mapping[str, StageStats], total: int, fold: ReportFold) -> str:
    if not stats:
        return ""
    columns = [c for c in (*_now(fold), *_COLUMNS) if not c.optional or any(c.show(s) for s in stats.values())]
    heads = ['<th scope="col">stage</th><th scope="col">state</th>']
    for c in columns:
        css = ' class="n"' if c.key is not None and c.head != "waited for" else ""
        tip = f' title="{esc(c.tip)}"' if c.tip else ""
        heads.append(f'<th scope="col"{css}{tip}>{c.head}</th>')
    rows = "".join(_stage_row(s, columns, fold.reasons.get(s.stage, "")) for s in stats.values())
    left = f'<p class="more">The {len(stats):,} busiest of {total:,} stages.</p>' if len(stats) < total else ""
    table = f'<table class="sortable"><thead><tr>{"".join(heads)}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>{left}'


def _stage_row(s: StageStats, columns: list[_Column], reason: str) -> str:
    css = f' class="{s.status}"' if s.status in ("fail", "skip", "cancel") else ""
    tip = f' title="{esc(reason)}"' if reason else ""
    made = [f'<th scope="row">{esc(s.stage)}</th><td{css}{tip}>{esc(_STATES.get(s.status, s.status))}</td>']
    for c in columns:
        classes = [c.css(s)] if c.css is not None else []
        if c.key is not None and c.head != "waited for":
            classes.append("n")
        chosen = " ".join(name for name in classes if name)
        attributes = f' class="{chosen}"' if chosen else ""
        if c.key is not None:
            attributes += f' data-v="{c.key(s):.9g}"'
        made.append(f"<td{attributes}>{c.show(s)}</td>")
    return f"<tr>{''.join(made)}</tr>"


def _failures(fold: ReportFold) -> str:
    if not fold.failures:
        return ""
    more = fold.failed_items - len(fold.failures)
    blocks = "".join(_failure(failure, fold) for failure in fold.failures)
    beyond = f"{text.plural(more, 'more failure')} beyond the first {MAX_FAILURES}."
    tail = f'<p class="more">{beyond}</p>' if more > 0 else ""
    return f'<div class="failures">{blocks}</div>{tail}'


def _failure(f: Failure, fold: ReportFold) -> str:
    where = esc(f.stage) + (f"<span class='item'>item {esc(text.item(f.item))}</span>" if f.item is not None else "")
    details = [f"{f.lane} lane" if f.lane else "", f"attempt {f.attempt}" if f.attempt else ""]
    details.append(f"worker {f.worker_pid}" if f.worker_pid else "")
    if fold.started_ns:
        details.append(f"{text.duration((f.time_unix_ns - fold.started_ns) / 1e9)} after the start")
    trace = f"<pre>{esc(f.traceback.rstrip())}</pre>" if f.traceback else ""
    again = (
        f"<p>Run it again, alone, in a debugger:</p><pre class='cmd'>{esc(replay_line(f.saved))}</pre>"
        if f.saved
        else "<p class='more'>Its input was not saved: give the run a FailedItemSink to be able to replay it.</p>"
    )
    short = f.error_type.rpartition(".")[2]
    return (
        f"<details><summary><b>{where}</b> <code>{esc(short)}</code> {esc(f.error[:300])}</summary>"
        f'<p class="sub">{esc(" · ".join(d for d in details if d))}</p>{trace}{again}</details>'
    )


def replay_line(saved: str) -> str:
    """The command that runs a saved failure again; the path is quoted for a shell."""
    import shlex

    return f"stageflow replay {shlex.quote(saved)} --pdb"


def _slowest(slow: list[Slow]) -> str:
    if not slow:
        return ""
    longest = slow[0].seconds or 1.0
    rows = []
    for s in slow[:15]:
        where = "" if s.lo < 0 else f"item {s.lo}" if s.hi - s.lo <= 1 else f"items {s.lo}-{s.hi - 1}"
        rows.append(
            f'<tr><th scope="row">{esc(s.stage)}</th><td>{where}</td><td class="n">{esc(text.duration(s.seconds))}</td>'
            f'<td class="barcell"><i style="width:{100 * s.seconds / longest:.1f}%"></i></td>'
            f"<td>{f'worker {s.worker_pid}' if s.worker_pid else ''}</td></tr>"
        )
    return f'<div class="scroll"><table class="slow"><tbody>{"".join(rows)}</tbody></table></div>'


def _notes(fold: ReportFold) -> str:
    rows = "".join(f"<li><time>{esc(text.duration(n.at))}</time>{esc(n.text)}</li>" for n in fold.notes)
    return f'<ol class="notes">{rows}</ol>' if rows else ""


def _environment(fold: ReportFold, workers: int) -> str:
    entries = dict(fold.environment)
    if workers:
        entries["worker processes"] = str(workers)
    if fold.run.get("memory_limit"):
        entries["memory budget"] = text.size(fold.run["memory_limit"])
    rows = "".join(f"<div><dt>{esc(key)}</dt><dd>{esc(value)}</dd></div>" for key, value in entries.items())
    return f'<dl class="env">{rows}</dl>'
