"""Interceptors that ask to be called where the attempt runs, in every lane."""

import os

import pytest

from stageflow import BaseInterceptor, DefinitionError, ImmutabilityCheck, PipelineBuilder, RetryConfig, StageOutput
from stageflow.pipeline.interceptors import RateLimit, TimeoutInterceptor


class Witness(BaseInterceptor, frozen=True, kw_only=True):
    """Says where it was called."""

    in_worker: bool = True
    label: str = "inner"

    def before(self, ctx):
        ctx.emit("seen", {"who": self.label, "what": "before", "pid": os.getpid(), "item": ctx.item})

    async def after(self, ctx, output):
        ctx.emit("seen", {"who": self.label, "what": "after", "pid": os.getpid(), "status": str(output.status)})
        return output

    def leave(self, ctx):
        count = ctx.state(self, list)
        count.append(1)
        ctx.emit("seen", {"who": self.label, "what": "leave", "pid": os.getpid()})


class Doubles(BaseInterceptor, frozen=True, kw_only=True):
    in_worker: bool = True

    def after(self, ctx, output):
        return StageOutput.ok(output.data * 2) if output.status == "ok" else output


class Recovers(BaseInterceptor, frozen=True, kw_only=True):
    in_worker: bool = True

    async def on_error(self, ctx, error):
        return StageOutput.ok(f"{error.type}: {error.message}")


class Cached(BaseInterceptor, frozen=True, kw_only=True):
    in_worker: bool = True

    def before(self, ctx):
        return StageOutput.ok("from before")


class Breaks(BaseInterceptor, frozen=True, kw_only=True):
    in_worker: bool = True

    def after(self, ctx, output):
        raise KeyError("hook")


def pid():
    return os.getpid()


def number():
    return 21


def fails(ctx):
    raise ValueError(f"attempt {ctx.attempt}")


def changes(ctx, rows):
    rows.append(1)
    return len(rows)


def told(sink, what):
    return [event.data for event in sink if event.type == "seen" and event.data["what"] == what]


def test_one_that_asks_runs_beside_the_function_and_one_that_does_not_in_the_parent(one, lane, sink):
    inner, outer = Witness(), Witness(in_worker=False, label="outer")
    result = one(pid, lane, interceptors=[outer, inner], run={"event_sinks": [sink]})
    by_name = {data["who"]: data["pid"] for data in told(sink, "before")}
    assert by_name == {"inner": result.data("s"), "outer": os.getpid()}
    order = [(event.data["who"], event.data["what"]) for event in sink if event.type == "seen"]
    assert order[0] == ("outer", "before")
    assert order.index(("inner", "leave")) < order.index(("outer", "after"))


def test_it_changes_what_leaves_the_attempt(one, lane):
    assert one(number, lane, interceptors=[Doubles()]).data("s") == 42
    assert one(fails, lane, interceptors=[Recovers()]).data("s") == "ValueError: attempt 1"
    assert one(fails, lane, interceptors=[Cached()]).data("s") == "from before"


def test_a_failure_that_nobody_recovers_stays_the_stages_own(one, lane, sink):
    retry = RetryConfig(max_attempts=2, base_delay_ms=0)
    result = one(fails, lane, interceptors=[Witness()], retry=retry, run={"event_sinks": [sink]})
    info = result.outputs["s"].error_info
    assert (info.type, info.message) == ("ValueError", "attempt 2")
    assert "in fails" in info.traceback
    assert [data["status"] for data in told(sink, "after")] == ["fail", "fail"]
    assert len(told(sink, "leave")) == 2


def test_what_a_hook_raises_fails_the_attempt(one, lane):
    assert one(number, lane, interceptors=[Breaks()]).outputs["s"].error_info.type == "KeyError"


def twice(x):
    return x * 2


@pytest.mark.parametrize("kind", ["enrich", "transform"])
def test_items_of_a_block_are_intercepted_one_by_one(engine, lane, kind, sink):
    graph = PipelineBuilder("p").map("m", twice, over="xs", executor=lane, kind=kind, interceptors=[Witness()]).build()
    result = engine.run(graph, {"xs": list(range(40))}, event_sinks=[sink])
    assert list(result.data("m")) == [x * 2 for x in range(40)]
    assert sorted(tuple(data["item"]) for data in told(sink, "before")) == [(x,) for x in range(40)]


async def later(x):
    return x + 1


def test_a_coroutine_is_awaited_between_the_hooks(one, lane):
    assert one(later, lane, {"x": 20}, interceptors=[Doubles(), Witness()]).data("s") == 42


def test_a_changed_input_is_found_in_the_copy_of_a_worker_too(engine, lane):
    graph = (
        PipelineBuilder("p")
        .stage("rows", lambda: [3], executor="inline")
        .stage("s", changes, executor=lane, interceptors=[ImmutabilityCheck(in_worker=True)])
        .build()
    )
    output = engine.run(graph).outputs["s"]
    assert output.error_info.code == "SF-INPUTS-CHANGED"


def test_what_decides_for_all_attempts_cannot_be_split_over_workers():
    for made in (lambda: RateLimit(rate=1, in_worker=True), lambda: TimeoutInterceptor(seconds=1, in_worker=True)):
        with pytest.raises(DefinitionError, match="cannot be split"):
            made()
