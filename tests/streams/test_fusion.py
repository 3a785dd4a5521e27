"""Neighbouring process maps run back to back in one worker: same results, each stage's own counts and failures."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from stageflow import DROP, PipelineBuilder, StageContext
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
    "policies", [{"timeout": 5.0}, {"concurrency": 1}, {"kind": "work"}, {"executor": "thread"}, {"rate": "1000/s"}]
)
def test_whatever_acts_around_an_attempt_keeps_a_stage_by_itself(engine, policies):
    graph = (
        PipelineBuilder("t")
        .stage("numbers", numbers)
        .map("first", first, "numbers")
        .map("third", third, "first", **policies)
        .build()
    )
    assert regions(engine, graph) == []
    assert engine.run(graph, {"n": 30}).success


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
    assert [lo for part in parts for lo, _, _ in part.meta.ranges] == list(range(0, 40, 2))
    there = [x for x in range(40) if x % 7]
    left = [2 * (x + 1) for x in there if (x + 1) % 5 and x != 12]
    assert [value for part in parts for value in part.value or ()] == left
    assert [(one.index, one.member) for part in parts for one in part.meta.failures] == [(12, 1)]
    counts = [tuple(map(sum, zip(*(part.meta.inner[number][:3] for part in parts), strict=True))) for number in (0, 1)]
    assert counts == [(len(there), 40 - len(there), 0), (len(left), len(there) - len(left) - 1, 1)]
