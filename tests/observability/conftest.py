"""A made-up run as events: streams with retries, drops and failures, a lost worker, backpressure, logs, prints,
hostile names."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stageflow.events.event import Event

START = 1_700_000_000_000_000_000
MS = 1_000_000
EVIL = "<script>alert(1)</script>"
STAGES = ["urls", "fetch", "parse", EVIL, "store", "summary"]
EDGES = [["urls", "fetch"], ["fetch", "parse"], ["parse", EVIL], ["parse", "store"], ["store", "summary"]]


class Run:
    """Makes events with growing seq and time."""

    def __init__(self, run_id: str = "run-1") -> None:
        self.run_id = run_id
        self.events: list[Event] = []

    def add(
        self,
        type_: str,
        at_ms: float,
        stage: str | None = None,
        item: tuple[int, ...] | None = None,
        attempt: int | None = None,
        lane: str | None = None,
        **data: Any,
    ) -> None:
        when = START + int(at_ms * MS)
        self.events.append(Event(type_, when, len(self.events), self.run_id, stage, item, attempt, lane, data))


def make_run(run_id: str = "run-1", items: int = 100, block: int = 10) -> list[Event]:
    """`items` documents in blocks of `block`: one in ten is dropped by parse, items 7 and 33 fail there; fetch 3 is
    retried."""
    run = Run(run_id)
    run.add(
        "run.started",
        0,
        pipeline="docs",
        stages=STAGES,
        edges=EDGES,
        workers=2,
        monotonic=50.0,
        memory_limit=512 << 20,
        lanes={
            "urls": "async",
            "fetch": "async",
            "parse": "process",
            EVIL: "thread",
            "store": "thread",
            "summary": "async",
        },
        kinds={
            "urls": "work",
            "fetch": "enrich",
            "parse": "transform",
            EVIL: "work",
            "store": "work",
            "summary": "transform",
        },
        shapes={"urls": "source", "fetch": "map", "parse": "map", EVIL: "stage", "store": "sink", "summary": "stage"},
        request_id="req-9",
        user_id="user-1",
        org_id="org-1",
        session_id="sess-1",
        service="docs-service",
    )
    for pid in (101, 102):
        run.add("worker.started", 1, pid=pid, start_ms=40.0)
    for n, (stage, lane) in enumerate(
        [("urls", "async"), ("fetch", "async"), ("parse", "process"), ("store", "thread")]
    ):
        run.add("stage.started", 2 + n, stage, None, 1, lane)
    run.add(
        "stage.attempt",
        20,
        "fetch",
        (3,),
        1,
        "async",
        status="retry",
        final=False,
        seconds=0.005,
        error="timed out",
        error_type="TimeoutError",
    )
    run.add("stage.retrying", 20, "fetch", (3,), 1, "async", delay_ms=5.0, error="timed out", error_type="TimeoutError")
    failed_total = dropped_total = 0
    for lo in range(0, items, block):
        hi = min(lo + block, items)
        n = hi - lo
        t = 10.0 + lo * 20
        base = 50.0 + t / 1000
        run.add(
            "stage.items",
            t + 1,
            "urls",
            lane="async",
            lo=lo,
            hi=hi,
            ok=n,
            dropped=0,
            failed=0,
            seconds=0.001,
            bytes_out=n * 20,
            started=base,
        )
        run.add(
            "stage.items",
            t + 22,
            "fetch",
            lane="async",
            lo=lo,
            hi=hi,
            ok=n,
            dropped=0,
            failed=0,
            seconds=0.01 * n,
            cpu_seconds=0.0002 * n,
            bytes_in=n * 20,
            bytes_out=n * 1000,
            queued_ms=2.0,
            started=base + 0.002,
        )
        failed = [i for i in (7, 33) if lo <= i < hi]
        for i in failed:
            run.add(
                "stage.failed",
                t + 320,
                "parse",
                (i,),
                1,
                "process",
                error=f"bad page {i} {EVIL}",
                error_type="builtins.ValueError",
                retryable=False,
                duration_ms=3.0,
                worker_pid=101,
                traceback=f"Traceback (most recent call last):\n  File 'docs.py', line 3\nValueError: bad {i}",
            )
        dropped = n // 10
        failed_total += len(failed)
        dropped_total += dropped
        run.add(
            "stage.items",
            t + 325,
            "parse",
            lane="process",
            lo=lo,
            hi=hi,
            ok=n - dropped - len(failed),
            dropped=dropped,
            failed=len(failed),
            seconds=0.03 * n,
            max_seconds=0.09,
            cpu_seconds=0.029 * n,
            bytes_in=n * 1000,
            bytes_out=n * 100,
            worker_pid=101 + (lo // block) % 2,
            queued_ms=15.0,
            started=base + 0.022,
            rss_bytes=50 << 20,
        )
        left = n - dropped - len(failed)
        run.add(
            "stage.items",
            t + 340,
            "store",
            lane="thread",
            lo=lo,
            hi=hi,
            ok=left,
            dropped=0,
            failed=0,
            seconds=0.001 * left,
            bytes_in=left * 100,
            started=base + 0.328,
        )
        run.add(
            "engine.sample",
            t + 341,
            rss_bytes=(200 << 20) + lo * 100_000,
            live_bytes=lo * 1000 + 10_000,
            memory_limit=512 << 20,
            cpu_percent=150.0,
            loop_lag_ms=0.4,
            queued={"parse": 20 - lo // 10, "store": 1},
            running={"parse": 2},
            waiting={"fetch": "downstream"},
            workers={101: 50 << 20, 102: 51 << 20},
        )
    end = 10.0 + items * 20 + 200
    run.add("worker.lost", 60, pid=102, reason="signal", signal=9, oom_killed=False, rss_bytes=60 << 20, stderr_tail="")
    run.add("worker.started", 61, pid=103, start_ms=30.0)
    run.add("backpressure.entered", 70, reason="bytes", level=1)
    run.add("backpressure.left", 120, reason="bytes", level=0)
    run.add("stage.log", 80, "parse", (4,), 1, "process", level=30, logger="docs", message="odd page %", worker_pid=101)
    run.add("stage.print", 81, "parse", (4,), 1, "process", stream="stdout", text="hello\n", worker_pid=101)
    run.add("stage.progress", 82, "parse", (4,), 1, "process", done=3, total=10, note="tokens")
    out = items - failed_total - dropped_total
    run.add(
        "stage.completed",
        end,
        "urls",
        None,
        1,
        "async",
        duration_ms=end - 2,
        items_in=items,
        items_out=items,
        dropped=0,
        failed=0,
        wait={"downstream": 0.2},
    )
    run.add(
        "stage.completed",
        end + 1,
        "fetch",
        None,
        1,
        "async",
        duration_ms=end - 2,
        items_in=items,
        items_out=items,
        dropped=0,
        failed=0,
        wait={"downstream": 0.25, "upstream": 0.01},
    )
    run.add(
        "stage.completed",
        end + 2,
        "parse",
        None,
        1,
        "process",
        duration_ms=end - 2,
        items_in=items,
        items_out=out,
        dropped=dropped_total,
        failed=failed_total,
        wait={"slot": 0.3, "upstream": 0.05},
    )
    run.add(
        "stage.completed",
        end + 3,
        "store",
        None,
        1,
        "thread",
        duration_ms=end - 2,
        items_in=out,
        items_out=out,
        dropped=0,
        failed=0,
        wait={"upstream": 0.4},
    )
    run.add("stage.skipped", end + 4, EVIL, None, 1, "thread", reason="route: other")
    run.add("stage.started", end + 5, "summary", None, 1, "async")
    run.add(
        "stage.attempt",
        end + 9,
        "summary",
        None,
        1,
        "async",
        status="retry",
        final=False,
        seconds=0.004,
        error="not yet",
        error_type="builtins.RuntimeError",
    )
    run.add(
        "stage.retrying",
        end + 9,
        "summary",
        None,
        1,
        "async",
        delay_ms=10.0,
        error="not yet",
        error_type="builtins.RuntimeError",
    )
    run.add(
        "stage.attempt",
        end + 25,
        "summary",
        None,
        2,
        "async",
        status="ok",
        final=True,
        seconds=0.006,
        bytes_in=100,
        bytes_out=50,
        started=50.0 + (end + 19) / 1000,
    )
    run.add(
        "stage.completed",
        end + 25,
        "summary",
        None,
        2,
        "async",
        duration_ms=20.0,
        seconds=0.006,
        bytes_in=100,
        bytes_out=50,
        data_keys=["b", "a"],
        started=50.0 + (end + 19) / 1000,
    )
    run.add("run.completed", end + 30, status="completed", duration_ms=end + 30)
    return run.events


@pytest.fixture
def docs_run() -> list[Event]:
    return make_run()


@pytest.fixture
def make_events() -> Callable[..., list[Event]]:
    return make_run


def endless(count: int) -> Iterator[Event]:
    """`count` events of one run that does not end: blocks, failures, retries, samples, progress, spans, user events."""
    yield make_run()[0]
    for n in range(1, count):
        when = START + n * MS
        which = n % 8
        if which < 4:
            data: dict[str, Any] = {
                "lo": n,
                "hi": n + 2,
                "ok": 1,
                "dropped": 0,
                "failed": 1,
                "seconds": 0.001 * (n % 97),
                "worker_pid": n % 1000,
                "started": n / 1000.0,
            }
            yield Event("stage.items", when, n, "run-1", "parse", None, None, "process", data)
        elif which == 4:
            yield Event(
                "stage.failed",
                when,
                n,
                "run-1",
                "parse",
                (n,),
                1,
                "process",
                {"error": f"bad {n}", "error_type": "ValueError", "traceback": "x" * 99},
            )
        elif which == 5:
            yield Event("stage.retrying", when, n, "run-1", "fetch", (n,), 1, "async", {"delay_ms": 1.0, "error": "e"})
        elif which == 6:
            yield Event(
                "engine.sample",
                when,
                n,
                "run-1",
                None,
                None,
                None,
                None,
                {"rss_bytes": n, "live_bytes": n, "queued": {"parse": n % 10}, "workers": {n % 1000: n}},
            )
        else:
            yield Event("stage.progress", when, n, "run-1", "parse", (n,), 1, "process", {"done": n, "total": count})


@pytest.fixture
def endless_events() -> Callable[[int], Iterator[Event]]:
    return endless
