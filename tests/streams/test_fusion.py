"""Neighbouring process maps run back to back in one worker: same results, each stage's own counts and failures."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from stageflow import DROP, Engine, PipelineBuilder, RetryConfig, StageContext
from stageflow.context.attempt import CallPlan, Header
from stageflow.context.items import ItemProgram
from stageflow.context.pieces import Piece
from stageflow.context.region import RegionProgram


def numbers(n: int):
    yield from range(n)


def first(x: int):
    return DROP if x % 7 == 0 else x + 1


def second(y: int):
    if y == 13:
        raise ValueError("unlucky")
    return DROP if y % 5 == 0 else 2 * y


def third(z: int) -> int:
    return z - 1


def each_third(zs: list[int]) -> list[int]:
    return [z - 1 for z in zs]


def chain(fuse=None, *, keep=None):
    more = {} if fuse is None else {"fuse": fuse}
    kept = {} if keep is None else {"keep": keep}
    return (
        PipelineBuilder("chain")
        .stage("numbers", numbers)
        .map("first", first, "numbers", **more)
        .map("second", second, "first", **more, **kept)
        .map("third", third, "second", **more)
        .build()
    )


def regions(engine, graph):
    return list(engine.code(graph).layout.regions.values())


@pytest.mark.parametrize("mode", ["continue_on_failure", "fail_fast"])
def test_fused_or_not_the_results_counts_and_failures_are_the_same(engine, mode):
    seen = {}
    for fuse in (None, False):
        graph = chain(fuse)
        assert regions(engine, graph) == ([(1, 2, 3)] if fuse is None else [])
        result = engine.run(graph, {"n": 1000}, failure_mode=mode)
        failed = [(one.stage, one.item, one.error_type) for one in result.failures.failures]
        stats = {name: result.stats[name] for name in ("first", "second", "third")}
        counts = {name: (one.items_in, one.items_out, one.dropped, one.failed) for name, one in stats.items()}
        seen[fuse] = (result.status, failed, counts if mode != "fail_fast" else None, list(result.data("third") or ()))
        assert failed == [("second", (12,), "ValueError")]
        if mode != "fail_fast":
            assert all(one.busy_seconds > 0 for one in stats.values())
    if mode != "fail_fast":
        assert seen[None] == seen[False]
        assert len(seen[None][3]) == len([x for x in range(1000) if x % 7 and (x + 1) % 5 and x != 12])


def test_what_lies_between_is_never_encoded(engine):
    def opened(x: int):
        return threading.Lock(), x  # cannot be pickled

    def closed(pair) -> int:
        return pair[1]

    def built(**more):
        return (
            PipelineBuilder("p")
            .stage("numbers", numbers)
            .map("opened", opened, "numbers", executor="process", **more)
            .map("closed", closed, "opened", executor="process")
            .build()
        )

    assert list(engine.run(built(), {"n": 100}).data("closed")) == list(range(100))
    assert not engine.run(built(fuse=False), {"n": 100}).success


def test_a_stage_that_somebody_else_needs_is_not_fused_away(engine):
    assert regions(engine, chain(keep=True)) == [(1, 2)]
    two_readers = (
        PipelineBuilder("t")
        .stage("numbers", numbers)
        .map("first", first, "numbers")
        .map("third", third, "first")
        .map("other", third, "first")
        .build()
    )
    assert regions(engine, two_readers) == []


@pytest.mark.parametrize(
    "policies",
    [{"total_timeout": 5.0}, {"concurrency": 1}, {"kind": "work"}, {"executor": "thread"}, {"rate": "1000/s"},
     {"batch": 4}],
)  # fmt: skip
def test_whatever_acts_around_an_attempt_keeps_a_stage_by_itself(engine, policies):
    graph = (
        PipelineBuilder("t")
        .stage("numbers", numbers)
        .map("first", first, "numbers")
        .map("third", each_third if "batch" in policies else third, "first", **policies)
        .build()
    )
    assert regions(engine, graph) == []
    assert engine.run(graph, {"n": 30}).success


@pytest.mark.parametrize("policies", [{"retry": RetryConfig()}, {"timeout": 5.0}])
def test_retry_and_timeout_end_a_region(engine, policies):
    graph = (
        PipelineBuilder("t")
        .stage("numbers", numbers)
        .map("first", first, "numbers")
        .map("third", third, "first", **policies)
        .map("after", third, "third")
        .map("last", third, "after")
        .build()
    )
    assert regions(engine, graph) == [(1, 2), (3, 4)]
    assert list(engine.run(graph, {"n": 30}).data("last")) == [x - 2 for x in range(30) if x % 7]


# ---------------------------------------------------------------- a first stage that takes batches


def grouped(xs: list) -> list:
    """Tells who came together."""
    if 52 in xs and len(xs) > 1:
        raise ValueError("all of them")
    return [DROP if x % 7 == 0 else 1 / 0 if x == 52 else (x, tuple(xs)) for x in xs]


def unpacked(pair, ctx: StageContext):
    x, group = pair
    if x == 33:
        raise ValueError("unlucky")
    return DROP if x % 5 == 0 else (x, ctx.item, group)


@pytest.mark.parametrize("batch", [1, 4, 64, 1000])
def test_a_region_that_begins_with_a_batch_gives_what_its_stages_give_one_by_one(engine, batch):
    seen = []
    for fuse in (None, False):
        more = {} if fuse is None else {"fuse": fuse}
        graph = (
            PipelineBuilder("b")
            .stage("numbers", numbers)
            .map("kept", first, "numbers", executor="thread")
            .map("grouped", grouped, "kept", batch=batch, executor="process", **more)
            .map("unpacked", unpacked, "grouped", **more)
            .map("named", str, "unpacked", retry=RetryConfig(), **more)
            .build()
        )
        assert regions(engine, graph) == ([(2, 3, 4)] if fuse is None else [])
        result = engine.run(graph, {"n": 300}, failure_mode="continue_on_failure")
        failed = sorted((one.stage, one.item, one.error_type) for one in result.failures.failures)
        stats = [result.stats[name] for name in ("grouped", "unpacked", "named")]
        counts = [(one.items_in, one.items_out, one.dropped, one.failed) for one in stats]
        assert all(one.busy_seconds > 0 for one in stats)
        seen.append((list(result.data("named")), failed, counts))
    assert seen[0] == seen[1]
    assert [one[:2] for one in seen[0][1]] == [("grouped", (51,)), ("unpacked", (32,))]


def test_what_there_is_no_time_for_behind_a_batch_goes_to_its_stage_by_itself(engine):
    def slow(x: int) -> tuple[int, int]:
        time.sleep(0.012)
        return x, os.getpid()

    graph = (
        PipelineBuilder("s")
        .stage("numbers", numbers)
        .map("tripled", lambda xs: [3 * x for x in xs], "numbers", batch=40, executor="process")
        .map("slow", slow, "tripled", executor="process")
        .build()
    )
    assert regions(engine, graph) == [(1, 2)]
    result = engine.run(graph, {"n": 40})
    found = list(result.data("slow"))
    assert [x for x, _ in found] == [3 * x for x in range(40)]
    assert len({pid for _, pid in found}) == 2, "one batch, and yet both workers had something to do"
    assert (result.stats["tripled"].items_out, result.stats["slow"].items_in) == (40, 40)


# ---------------------------------------------------------------- a last stage with attempts of its own


def noted(path: str, word: object) -> None:
    with open(path, "a") as file:
        file.write(f"{word}\n")


def test_a_last_stage_is_tried_again_with_what_it_was_given(engine, tmp_path):
    calls = str(tmp_path / "calls")

    def opened(x: int) -> list[int]:
        noted(calls, x)
        return [x] if x % 7 else DROP

    def touchy(xs: list[int], ctx: StageContext) -> tuple[int, int]:
        if xs[0] % 10 == 3 and ctx.attempt < 3:
            raise ValueError("not yet")
        if xs[0] == 44:
            raise KeyError("never")
        return xs[0], ctx.attempt

    seen = []
    for fuse in (None, False):
        more = {} if fuse is None else {"fuse": fuse}
        graph = (
            PipelineBuilder("r")
            .stage("numbers", numbers)
            .map("opened", opened, "numbers", executor="process", **more)
            .map("touchy", touchy, "opened", executor="process",
                 retry=RetryConfig(max_attempts=3, base_delay_ms=1, retry_on=(ValueError,)), **more)
            .sink("out", lambda touchy: None, "touchy", executor="thread")
            .map("kept", lambda touchy: touchy, "touchy", executor="thread")
            .build()
        )  # fmt: skip
        assert regions(engine, graph) == ([(1, 2)] if fuse is None else [])
        result = engine.run(graph, {"n": 100}, failure_mode="continue_on_failure")
        failed = [(one.stage, one.item, one.error_type, one.attempts) for one in result.failures.failures]
        stats = [result.stats[name] for name in ("opened", "touchy", "out")]
        counts = [(one.items_in, one.items_out, one.dropped, one.failed, one.retried) for one in stats]
        seen.append((list(result.data("kept")), failed, counts))
    assert seen[0] == seen[1]
    assert seen[0][0] == [(x, 3 if x % 10 == 3 else 1) for x in range(100) if x % 7 and x != 44]
    assert [one[:3] for one in seen[0][1]] == [("touchy", (44,), "KeyError")]
    with open(calls) as file:
        assert sorted(map(int, file)) == sorted(2 * list(range(100))), "no attempt was made of the stage before it"


def test_what_cannot_leave_the_worker_is_not_tried_again(engine):
    def opened(x: int):
        return threading.Lock(), x

    def touchy(pair, ctx: StageContext) -> int:
        if pair[1] == 3:
            raise ValueError("not yet")
        return pair[1]

    graph = (
        PipelineBuilder("r")
        .stage("numbers", numbers)
        .map("opened", opened, "numbers", executor="process")
        .map("touchy", touchy, "opened", executor="process", retry=RetryConfig(max_attempts=3, base_delay_ms=1))
        .build()
    )
    result = engine.run(graph, {"n": 8}, failure_mode="continue_on_failure")
    assert list(result.data("touchy")) == [0, 1, 2, 4, 5, 6, 7]
    assert [(one.stage, one.item) for one in result.failures.failures] == [("touchy", (3,))]


@pytest.mark.parametrize("heeds", [True, False])
def test_the_time_of_a_last_stage_is_its_own_and_its_attempts_are_counted(heeds, tmp_path):
    calls = str(tmp_path / "calls")

    def opened(x: int) -> int:
        noted(calls, x)
        if x == 5:
            time.sleep(0.6)  # longer than the other may take
        return x

    def hangs(x: int, ctx: StageContext) -> tuple[int, int]:
        if (x == 3 and ctx.attempt == 1) or x == 7:
            while not (heeds and ctx.token.cancelled):
                time.sleep(0.005)
            ctx.raise_if_cancelled()
        return x, ctx.attempt

    def built(**more):
        return (
            PipelineBuilder("t")
            .stage("numbers", numbers)
            .map("opened", opened, "numbers", executor="process", **more)
            .map("hangs", hangs, "opened", executor="process", timeout=0.3,
                 retry=RetryConfig(max_attempts=2, base_delay_ms=1), **more)
            .build()
        )  # fmt: skip

    seen = []
    with Engine(processes=2, grace=0.1) as engine:
        for graph in (built(), built(fuse=False))[: 1 + (not heeds)]:
            result = engine.run(graph, {"n": 10}, failure_mode="continue_on_failure")
            failed = [(one.stage, one.item, one.error_type, one.attempts) for one in result.failures.failures]
            stats = [result.stats[name] for name in ("opened", "hangs")]
            counts = [(one.items_in, one.items_out, one.failed, one.retried) for one in stats]
            seen.append((list(result.data("hangs")), failed, counts))
        assert regions(engine, built()) == [(1, 2)]
    assert seen[0] == seen[-1]
    assert seen[0][0] == [(x, 2 if x == 3 else 1) for x in range(10) if x != 7]
    assert [one[:2] for one in seen[0][1]] == [("hangs", (7,))]
    assert "StageTimeoutError" in seen[0][1][0][2]


def test_a_result_that_cannot_be_sent_is_the_failure_of_the_stage_that_made_it(engine):
    graph = (
        PipelineBuilder("u")
        .stage("numbers", numbers)
        .map("third", third, "numbers")
        .map("locked", lambda x: threading.Lock(), "third", executor="process")
        .build()
    )
    assert regions(engine, graph) == [(1, 2)]
    result = engine.run(graph, {"n": 1}, failure_mode="continue_on_failure")
    assert [(one.stage, one.item) for one in result.failures.failures] == [("locked", (0,))]


def test_contexts_and_paths_are_each_stages_own(engine):
    def twice(x: int):
        yield x
        yield x

    def where(x, ctx: StageContext):
        return [(ctx.stage_name, ctx.item)]

    def there(seen, ctx: StageContext):
        return [*seen, (ctx.stage_name, ctx.item)]

    graph = (
        PipelineBuilder("c")
        .stage("numbers", numbers)
        .map("twice", twice, "numbers")
        .map("where", where, "twice")
        .map("there", there, "where")
        .build()
    )
    assert regions(engine, graph) == [(2, 3)]
    assert list(engine.run(graph, {"n": 20}).data("there")) == [
        [("where", (x, k)), ("there", (x, k))] for x in range(20) for k in range(2)
    ]


def test_a_lost_worker_is_found_out_stage_by_stage(engine, tmp_path):
    marker = str(tmp_path / "killed")

    def deadly(y):
        if y == 40 and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return y

    graph = (
        PipelineBuilder("k")
        .stage("numbers", numbers)
        .map("third", third, "numbers")
        .map("deadly", deadly, "third")
        .build()
    )
    assert regions(engine, graph) == [(1, 2)]
    result = engine.run(graph, {"n": 300})
    assert result.success, result.error
    assert list(result.data("deadly")) == [x - 1 for x in range(300)]
    assert os.path.exists(marker)


def test_an_item_that_kills_every_worker_is_lost_alone_and_by_its_own_stage(engine):
    def deadly(y):
        if y == 40:
            os._exit(3)
        return y

    graph = (
        PipelineBuilder("k")
        .stage("numbers", numbers)
        .map("third", third, "numbers")
        .map("deadly", deadly, "third")
        .build()
    )
    result = engine.run(graph, {"n": 100}, failure_mode="continue_on_failure")
    assert list(result.data("deadly")) == [x - 1 for x in range(100) if x != 41]
    assert [(one.stage, one.item) for one in result.failures.failures] == [("deadly", (41,))]


def test_the_plan_shows_what_is_fused():
    text = chain().plan().to_text()
    assert "first -> second -> third" in text
    assert "back to back" not in chain(False).plan().to_text()
    batched = (
        PipelineBuilder("b")
        .stage("numbers", numbers)
        .map("grouped", each_third, "numbers", batch=64)
        .map("last", third, "grouped")
        .build()
    )
    assert "grouped -> last (batches of 64; fuse=False forbids it)" in batched.plan().to_text()
    assert "grouped+" in batched.draw("text")


class Port:
    """As much of a worker's port as a block of plain calls uses."""

    lane = "process"
    worker_pid = progress = note = buffer = None

    def items(self, current):
        pass

    def cancelled(self):
        return False


def member(name: str, function) -> ItemProgram:
    plan = CallPlan((), (("element", 0),), (), False)
    return ItemProgram(name=name, kind="transform", runner=function, form="function", is_async=False, plan=plan)


def test_many_small_pieces_are_reported_together_and_counted_stage_by_stage():
    region = RegionProgram([member("first", first), member("second", second)])
    pieces = tuple(Piece(lo, lo + 2, -1, ((number, 0),)) for number, lo in enumerate(range(0, 40, 2)))
    steps = region(Port(), Header("run"), None, pieces, *([lo, lo + 1] for lo in range(0, 40, 2)))
    parts = []
    while True:
        try:
            parts.append(next(steps))
        except StopIteration as end:
            parts.append(end.value)
            break
    assert len(parts) <= 3, "a message for each piece would be twenty"
    # what the item was given that failed lies behind the results, and the item in none of the ranges
    los = [lo for part in parts for lo, _, _ in part.meta.ranges]
    assert los == [13 if lo == 12 else lo for lo in range(0, 40, 2)]
    assert [one for part in parts for one in part.meta.handed] == [(12, 13, -1, 1)]
    there = [x for x in range(40) if x % 7]
    left = [2 * (x + 1) for x in there if (x + 1) % 5 and x != 12]
    values = [value for part in parts for value in part.value[: len(part.value) - len(part.meta.handed)]]
    assert values == left
    assert [part.value[-1] for part in parts if part.meta.handed] == [13]
    assert [(one.index, one.member) for part in parts for one in part.meta.failures] == [(12, 1)]
    counts = [tuple(map(sum, zip(*(part.meta.inner[number][:3] for part in parts), strict=True))) for number in (0, 1)]
    assert counts == [(len(there), 40 - len(there), 0), (len(left), len(there) - len(left) - 1, 1)]
