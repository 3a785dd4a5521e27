"""Every policy x every lane x every way an attempt can end: outcome, attempts, events and cleanup, from tables.

Read `ENDS` as: a stage that does the thing on the left ends with that status, the run with that status, after so many
attempts without a retry policy and so many with `RetryConfig(max_attempts=3)`; its last event is that. Read `POLICIES`
as: with these policies a stage that does that ends with that status, after so many entries of its function, with that
error. Nothing sleeps: the engine has a clock that stands still while an attempt is at work, and an attempt that hangs
says so, whereupon the test lets its time pass.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from stageflow import (
    BaseInterceptor,
    CircuitBreaker,
    ConcurrencyLimit,
    Engine,
    GuardRetryPolicy,
    IdempotencyConfig,
    LoggingInterceptor,
    MetricsInterceptor,
    PipelineBuilder,
    RateLimit,
    Resources,
    RetryConfig,
    StageOutput,
    TimeoutInterceptor,
)
from stageflow.testing import RecordingSink, VirtualClock

HOUR = 3600.0
LIMIT = 5.0
RETRY = RetryConfig(max_attempts=3, base_delay_ms=3_600_000, max_delay_ms=3_600_000, jitter="none")

#: what the stage does -> (stage's status, run's status, attempts alone, attempts with RETRY, its last event)
ENDS = {
    "success":        ("ok",     "completed", 1, 1, "stage.completed"),
    "exception":      ("fail",   "failed",    1, 3, "stage.failed"),
    "FAIL":           ("fail",   "failed",    1, 1, "stage.failed"),
    "FAIL retryable": ("fail",   "failed",    1, 3, "stage.failed"),
    "RETRY":          ("fail",   "failed",    1, 3, "stage.failed"),
    "SKIP":           ("skip",   "completed", 1, 1, "stage.skipped"),
    "CANCEL":         ("cancel", "cancelled", 1, 1, "stage.cancelled"),
    "timeout":        ("fail",   "failed",    1, 3, "stage.failed"),
    "killed":         ("fail",   "failed",    3, 3, "stage.failed"),  # deaths spend no attempts; the third is final
}  # fmt: skip

#: what a first attempt does before a second one succeeds -> whether RETRY is needed for that
RECOVERS = {"exception": True, "FAIL retryable": True, "RETRY": True, "timeout": True, "killed": False}

#: policies that change nothing about how an attempt ends
NEUTRAL = {
    "no policy": {},
    "concurrency": {"concurrency": 1},
    "priority": {"priority": 5},
    "rate": {"rate": "1000/s"},
    "resources": {"resources": Resources(tokens={"gpu": 1})},
    "total_timeout": {"total_timeout": 60},
    "conditional": {"conditional": True},
    "idempotency": {"idempotency": IdempotencyConfig(ttl_seconds=60)},
    "interceptors": {"interceptors": [LoggingInterceptor(), MetricsInterceptor(), ConcurrencyLimit(limit=1)]},
    "in the worker": {"interceptors": [MetricsInterceptor(in_worker=True)]},
}

LANES = ("inline", "async", "thread", "process")
KIND = {"inline": "enrich", "async": "enrich", "thread": "enrich", "process": "transform"}


class Acts:
    """A stage that does `what` in its first `times` attempts, and leaves a file for each entry and each cleanup."""

    def __init__(self, what, folder, times=99):
        self.what = what
        self.folder = folder
        self.times = times

    def note(self, what):
        for number in range(100):
            try:
                os.close(os.open(os.path.join(self.folder, f"{what}-{number}"), os.O_CREAT | os.O_EXCL))
                return number + 1
            except FileExistsError:
                continue
        raise AssertionError("too many")

    def act(self, ctx):
        """What to answer; None: wait for the end of the time."""
        number = self.note("entered")
        ctx.defer(self.note, "cleaned")
        ctx.defer(self.note, "survived", survive=True)
        if number > self.times:
            return "recovered"
        match self.what:
            case "exception":
                raise ValueError("on purpose")
            case "FAIL":
                return StageOutput.fail("on purpose")
            case "FAIL retryable":
                return StageOutput.fail("on purpose", retryable=True)
            case "RETRY":
                return StageOutput.retry("on purpose")
            case "SKIP":
                return StageOutput.skip("on purpose")
            case "CANCEL":
                return StageOutput.cancel("on purpose")
            case "timeout" | "hang":
                ctx.emit("hangs", {})
                return None
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return "value"

    async def execute(self, ctx):
        answer = self.act(ctx)
        if answer is None:
            await asyncio.Event().wait()
        return answer


class ActsSync(Acts):
    """The same as a synchronous stage that heeds its flag."""

    def execute(self, ctx):
        answer = self.act(ctx)
        while answer is None:
            until_asked(ctx)
        return answer


def until_asked(ctx):
    """Block until the attempt is asked to stop, and heed it."""
    while True:
        ctx.raise_if_cancelled()


class Watching(RecordingSink):
    """When an attempt says that it hangs, does what the test wants: lets time pass, or stops something."""

    def __init__(self, react):
        super().__init__()
        self.react = react
        self.handle = None

    def emit(self, event):
        super().emit(event)
        if event.type == "hangs":
            self.react(self.handle)


@pytest.fixture(scope="module")
def clock():
    return VirtualClock()


@pytest.fixture(scope="module")
def engine(clock):
    with Engine(processes=2, threads=4, grace=30.0, tokens={"gpu": 2}, clock=clock) as made:
        yield made


def seen(folder, what):
    return sum(1 for file in Path(folder).iterdir() if file.name.startswith(what))


def start(engine, graph, sink, inputs=None, **options):
    """Run a graph with its handle in the hands of the sink."""

    async def to_the_end():
        sink.handle = await engine.start(graph, inputs or {}, event_sinks=[sink], **options)
        return await sink.handle

    return engine._on_own_loop(to_the_end())


def run(engine, what, lane, folder, *, stage=Acts, times=99, policies=None, mode="fail_fast", react=None, inputs=None):
    """One stage that acts, one that depends on it, one beside them."""
    policies = dict(policies or {})
    if what == "timeout":
        policies.setdefault("timeout", LIMIT)
    acts = stage(what, str(folder), times)
    graph = (
        PipelineBuilder("matrix")
        .stage("acts", acts, executor=lane, kind=KIND[lane], **policies)
        .stage("behind", lambda: "ran", ["acts"], executor="async")
        .stage("beside", lambda: "ran", executor="async")
        .build()
    )
    sink = Watching(react or (lambda handle: engine.clock.advance(LIMIT)))
    return start(engine, graph, sink, inputs, failure_mode=mode), sink


def cells():
    for lane in LANES:
        for what in ENDS:
            if what == "killed" and lane != "process":
                continue  # only a process can be killed
            for stage in (Acts, ActsSync):
                if stage is ActsSync and (lane == "async" or (lane == "inline" and what == "timeout")):
                    continue  # a synchronous stage there holds the loop: nothing can interrupt it
                yield pytest.param(lane, what, stage, id=f"{lane}-{what}-{stage.__name__}")


@pytest.mark.parametrize(("lane", "what", "stage"), list(cells()))
@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
def test_how_attempts_end(engine, clock, tmp_path, lane, what, stage, retry):
    status, run_status, alone, retried, last = ENDS[what]
    wanted = retried if retry else alone
    began = clock.now
    result, sink = run(engine, what, lane, tmp_path, stage=stage, policies={"retry": RETRY} if retry else {})
    output = result.outputs["acts"]
    assert (str(output.status), result.status) == (status, run_status), result.error
    assert seen(tmp_path, "entered") == wanted
    assert sink.types("acts")[-1] == last
    assert len(sink.of("stage.started", "acts")) == wanted
    assert len(sink.of("stage.retrying", "acts")) == wanted - 1
    # cleanup: where the attempt ran; of a lost worker only what was to survive it
    assert seen(tmp_path, "cleaned") == (0 if what == "killed" else wanted)
    assert seen(tmp_path, "survived") == wanted
    # time: that of the attempts that were stopped for it, and an hour between two
    passed = (LIMIT * wanted if what == "timeout" else 0.0) + (HOUR * (wanted - 1) if what != "killed" else 0.0)
    assert clock.now - began == pytest.approx(passed)
    if what == "timeout":
        assert output.error_info.type.endswith("StageTimeoutError")
        assert output.error_info.limit == LIMIT
        assert output.error_info.elapsed >= LIMIT
    if what == "exception":
        assert output.error_info.type.endswith("ValueError")
        assert "execute" in output.error_info.traceback
        assert output.error_info.attempt == wanted
    if what == "killed":
        assert output.error_info.signal == signal.SIGKILL
        assert {event.data["why"] for event in sink.of("stage.retrying")} == {"infrastructure"}
    if status == "fail":
        assert [record.stage for record in result.failures.failures] == ["acts"]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("what", RECOVERS)
def test_a_later_attempt_may_succeed(engine, tmp_path, lane, what):
    if what == "killed" and lane != "process":
        return
    policies = {"retry": RETRY} if RECOVERS[what] else {}
    result, sink = run(engine, what, lane, tmp_path, times=1, policies=policies)
    assert result.status == "completed", result.error
    assert result.data("acts") == "recovered"
    assert seen(tmp_path, "entered") == 2
    assert result.failures.failures == ()
    sink.assert_order("stage.started", "stage.retrying", "stage.started", "stage.completed", stage="acts")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("what", ["success", "exception", "SKIP", "CANCEL", "timeout"])
@pytest.mark.parametrize("policy", NEUTRAL)
def test_other_policies_change_nothing_about_it(engine, tmp_path, lane, what, policy):
    status, run_status, attempts, _, last = ENDS[what]
    policies = dict(NEUTRAL[policy])
    if policy == "idempotency":
        policies["idempotency"] = IdempotencyConfig(key=f"{tmp_path}", ttl_seconds=60)
    result, sink = run(engine, what, lane, tmp_path, policies=policies)
    assert (str(result.outputs["acts"].status), result.status) == (status, run_status)
    assert seen(tmp_path, "entered") == attempts
    assert seen(tmp_path, "cleaned") == attempts
    assert sink.types("acts")[-1] == last


# ---------------------------------------------------------------- policies that do change it


class Answers(BaseInterceptor, frozen=True, kw_only=True):
    """Answers in one of its hooks."""

    hook: str

    def before(self, ctx):
        return StageOutput.ok("before") if self.hook == "before" else None

    def after(self, ctx, output):
        if self.hook == "raises":
            raise KeyError("hook")
        return StageOutput.ok("after") if self.hook == "after" else output

    def on_error(self, ctx, error):
        return StageOutput.ok("on_error") if self.hook == "on_error" else None


class Guards(Acts):
    """A guard that lets pass what was tried twice."""

    def act(self, ctx):
        super().act(ctx)
        tries = (ctx.feedback or {}).get("attempt", 0)
        return "passed" if tries == self.times else StageOutput.fail(f"not after {tries}")


def hooks(hook):
    return {"interceptors": [Answers(hook=hook)]}, {"interceptors": [Answers(hook=hook, in_worker=True)]}


def breaker():
    """A circuit of its own: it outlives the run."""
    return {"interceptors": [CircuitBreaker(threshold=2, cooldown=3 * HOUR)], "retry": RETRY}


#: (policies, what the stage does, its status, entries of its function, code or type of its error, hours that pass)
POLICIES = {
    "contract kept":           ({"contract": str},                  "success",   "ok",   1, None, 0),
    "contract broken":         ({"contract": int},                  "success",   "fail", 1, "CONTRACT-002-SCHEMA", 0),
    "contract broken, retried": ({"contract": int, "retry": RETRY},  "success",   "fail", 3, "CONTRACT-002-SCHEMA", 2),
    "before answers":          (hooks("before")[0],                 "exception", "ok",   0, None, 0),
    "before answers inside":   (hooks("before")[1],                 "exception", "ok",   0, None, 0),
    "after answers":           (hooks("after")[0],                  "success",   "ok",   1, None, 0),
    "after answers inside":    (hooks("after")[1],                  "success",   "ok",   1, None, 0),
    "on_error recovers":       (hooks("on_error")[0],               "exception", "ok",   1, None, 0),
    "on_error recovers inside": (hooks("on_error")[1],               "exception", "ok",   1, None, 0),
    "a hook raises":           (hooks("raises")[0],                 "success",   "fail", 1, "KeyError", 0),
    "a hook raises inside":    (hooks("raises")[1],                 "success",   "fail", 1, "KeyError", 0),
    "timeout interceptor":     ({"interceptors": [TimeoutInterceptor(seconds=LIMIT)]},
                                                                   "hang",      "fail", 1, "SF-TIMEOUT", 0),
    "circuit breaker":         (breaker,                            "exception", "fail", 2, "SF-CIRCUIT-OPEN", 2),
    "rate limit":              ({"interceptors": [RateLimit(rate=1 / (4 * HOUR))], "retry": RETRY},
                                                                   "exception", "fail", 3, "ValueError", 8),
    "rate":                    ({"rate": f"{1 / (4 * HOUR):.12f}/s", "retry": RETRY},
                                                                   "exception", "fail", 3, "ValueError", 8),
    "total deadline, at work": ({"total_timeout": LIMIT, "retry": RETRY},
                                                                   "hang",      "fail", 1, "SF-TIMEOUT", 0),
    "total deadline, waiting": ({"total_timeout": 1.5 * HOUR, "retry": RETRY},
                                                                   "exception", "fail", 2, "ValueError", 1),
}  # fmt: skip


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", POLICIES)
def test_what_a_policy_makes_of_it(engine, clock, tmp_path, lane, case):
    policies, what, status, entries, error, hours = POLICIES[case]
    policies = policies() if callable(policies) else policies
    began = clock.now
    result, sink = run(engine, what, lane, tmp_path, policies=policies)
    output = result.outputs["acts"]
    assert str(output.status) == status, output.error
    assert seen(tmp_path, "entered") == entries
    assert seen(tmp_path, "cleaned") == entries
    if error is not None:
        assert error in (output.error_info.code, output.error_info.type), output.error_info
    assert clock.now - began == pytest.approx(hours * HOUR + (LIMIT if what == "hang" else 0.0))
    assert sink.types("acts")[-1] == ("stage.completed" if status == "ok" else "stage.failed")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("what", "entries"), [("success", 1), ("exception", 2), ("SKIP", 2)])
def test_a_key_keeps_successes_only(engine, tmp_path, lane, what, entries):
    policies = {"idempotency": IdempotencyConfig(key=str(tmp_path), ttl_seconds=HOUR)}
    first, _ = run(engine, what, lane, tmp_path, policies=policies)
    second, sink = run(engine, what, lane, tmp_path, policies=policies)
    assert str(first.outputs["acts"].status) == str(second.outputs["acts"].status) == ENDS[what][0]
    assert seen(tmp_path, "entered") == entries
    assert len(sink.of("stage.idempotency_hit")) == 2 - entries


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("passes_after", "attempts", "status"), [(0, 3, "ok"), (2, 3, "ok"), (9, 3, "fail")])
def test_guards(engine, tmp_path, lane, passes_after, attempts, status):
    policy = GuardRetryPolicy("work", max_attempts=attempts, stagnation_limit=9)
    graph = (
        PipelineBuilder("matrix")
        .stage("work", Acts("success", str(tmp_path)), executor=lane)
        .stage("acts", Guards("guard", str(tmp_path), passes_after), ["work"], executor=lane, kind="guard",
               guard_retry=policy)
        .build()
    )  # fmt: skip
    sink = Watching(None)
    result = start(engine, graph, sink)
    assert str(result.outputs["acts"].status) == status
    failed = min(passes_after, attempts)
    assert len(sink.of("guard_retry.attempt")) == failed
    assert len(sink.of("guard_retry.scheduled")) == min(failed, attempts - 1)
    assert len(sink.of("guard_retry.recovered")) == (status == "ok" and failed > 0)
    assert len(sink.of("guard_retry.exhausted")) == (status == "fail")
    assert len(sink.of("stage.started", "work")) == min(failed, attempts - 1) + 1


# ---------------------------------------------------------------- stopped from outside

#: what is stopped while the stage hangs -> (stage's status, run's status, the stage behind)
STOPS = {
    "stage": (lambda handle: handle.cancel("enough", stage="acts"), "fail", "failed", "skip"),
    "run":   (lambda handle: handle.cancel("enough"), "cancel", "cancelled", "cancel"),
}  # fmt: skip


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
def test_what_is_stopped_is_not_retried_and_cleaned_up(engine, tmp_path, lane, stop, retry):
    react, status, run_status, behind = STOPS[stop]
    policies = {"retry": RETRY} if retry else {}
    result, sink = run(engine, "hang", lane, tmp_path, policies=policies, mode="continue_on_failure", react=react)
    assert (str(result.outputs["acts"].status), result.status) == (status, run_status)
    assert str(result.outputs["behind"].status) == behind
    assert (seen(tmp_path, "entered"), seen(tmp_path, "cleaned")) == (1, 1)
    assert not sink.of("stage.retrying")
    assert result.abandoned == ()
    if stop == "stage":
        assert result.outputs["acts"].error_info.code == "SF-CANCELLED"
    else:
        assert result.cancel_reason == "enough"


#: what is stopped while the child of a stage hangs -> (stage's status, run's status)
PARENTS = {
    "stage": (lambda handle: handle.cancel("enough", stage="parent"), "fail", "failed"),
    "run":   (lambda handle: handle.cancel("enough"), "cancel", "cancelled"),
}  # fmt: skip


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stop", PARENTS)
@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
def test_a_child_is_stopped_and_cleaned_up_with_its_parent(engine, tmp_path, lane, stop, retry):
    react, status, run_status = PARENTS[stop]
    child = PipelineBuilder("child").stage("acts", Acts("hang", str(tmp_path)), executor=lane, kind=KIND[lane]).build()
    graph = (
        PipelineBuilder("matrix")
        .subpipeline("parent", child, **({"retry": RETRY} if retry else {}))
        .stage("beside", lambda: "ran", executor="async")
        .build()
    )
    sink = Watching(react)
    result = start(engine, graph, sink, failure_mode="continue_on_failure")
    assert (str(result.outputs["parent"].status), result.status) == (status, run_status)
    assert (seen(tmp_path, "entered"), seen(tmp_path, "cleaned")) == (1, 1)
    assert not sink.of("stage.retrying")
    (spawned,) = sink.of("pipeline.spawned_child")
    (ended,) = sink.of("pipeline.child_cancelled")
    assert (ended.stage, ended.data["child_run_id"]) == ("parent", spawned.data["child_run_id"])
    assert ended.data["reason"] == "enough"
    over = [event.run_id for event in sink.of("run.cancelled") if event.run_id != result.run_id]
    assert over == [spawned.data["child_run_id"]]
    assert result.abandoned == ()


#: (mode, what) -> status of the stage behind, of the one beside, of the run
MODES = {
    ("continue_on_failure", "exception"): ("skip", "ok", "failed"),
    ("continue_on_failure", "timeout"): ("skip", "ok", "failed"),
    ("continue_on_failure", "SKIP"): ("skip", "ok", "completed"),
    ("best_effort", "exception"): ("ok", "ok", "failed"),
    ("best_effort", "timeout"): ("ok", "ok", "failed"),
    ("best_effort", "SKIP"): ("skip", "ok", "completed"),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("mode", "what"), MODES)
@pytest.mark.parametrize("own", [False, True], ids=["of the run", "of the stage"])
def test_failure_modes(engine, tmp_path, lane, mode, what, own):
    behind, beside, run_status = MODES[mode, what]
    policies = {"on_failure": mode} if own else {}
    result, _ = run(engine, what, lane, tmp_path, policies=policies, mode="fail_fast" if own else mode)
    assert str(result.outputs["behind"].status) == behind
    assert str(result.outputs["beside"].status) == beside
    assert result.status == run_status
    if behind == "skip" and what != "SKIP":
        assert result.outputs["behind"].skip_reason == "upstream_failed: acts"


# ---------------------------------------------------------------- items of a map


def item(x, ctx, folder, what, times):
    number = sum(1 for file in os.listdir(folder) if file.startswith(f"{x}-")) + 1
    Path(folder, f"{x}-{number}").touch()
    if x == 3 and number <= times:
        match what:
            case "exception":
                raise ValueError("three")
            case "FAIL":
                return StageOutput.fail("three")
            case "RETRY":
                return StageOutput.retry("three")
            case "SKIP":
                return StageOutput.skip("three")
            case "CANCEL":
                return StageOutput.cancel("three")
            case "timeout" | "stopped":
                ctx.emit("hangs", {})
                until_asked(ctx)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "contract":
                return "three"
    return x * 10


async def item_async(x, ctx, folder, what, times):
    number = sum(1 for file in os.listdir(folder) if file.startswith(f"{x}-"))
    if x == 3 and number < times and what in ("timeout", "stopped"):
        os.close(os.open(os.path.join(folder, f"{x}-{number + 1}"), os.O_CREAT))
        ctx.emit("hangs", {})
        await asyncio.Event().wait()
    return item(x, ctx, folder, what, times)


#: what item 3 does -> (failed items, calls of item 3 alone, with RETRY, run's status)
ITEMS = {
    "success":   (0, 1, 1, "completed"),
    "exception": (1, 1, 3, "failed"),
    "FAIL":      (1, 1, 1, "failed"),
    "RETRY":     (1, 1, 3, "failed"),
    "SKIP":      (0, 1, 1, "completed"),
    "CANCEL":    (0, 1, 1, "cancelled"),
    "timeout":   (1, 1, 3, "failed"),
    "killed":    (1, 3, 3, "failed"),
    "contract":  (1, 1, 3, "failed"),
    "stopped":   (0, 1, 1, "failed"),  # by hand: it ends CANCELLED, and is not retried
}  # fmt: skip


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("what", ITEMS)
@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
@pytest.mark.parametrize("kind", ["transform", "enrich"])
def test_items_of_a_map(engine, tmp_path, lane, what, retry, kind):
    if what == "killed" and lane != "process":
        return
    failed, alone, retried, status = ITEMS[what]
    policies = {"retry": RETRY} if retry else {}
    if what == "timeout":
        policies.update(timeout=LIMIT, concurrency=1)  # the time of the others would pass as well
    if what == "contract":
        policies["contract"] = int
    function = item_async if lane in ("inline", "async") else item
    graph = PipelineBuilder("items").map("m", function, "xs", executor=lane, kind=kind, **policies).build()
    inputs = {"xs": list(range(6)), "folder": str(tmp_path), "what": what, "times": 99}
    if what == "stopped":
        sink = Watching(lambda handle: handle.cancel("enough", stage="m", item=3))
    else:
        sink = Watching(lambda handle: engine.clock.advance(LIMIT))
    result = start(engine, graph, sink, inputs, failure_mode="continue_on_failure")
    assert result.status == status, result.error
    if status == "cancelled":
        return
    calls = sum(1 for file in tmp_path.iterdir() if file.name.startswith("3-"))
    assert calls == (retried if retry else alone)
    wanted = [x * 10 for x in range(6) if x != 3 or what == "success"]
    assert list(result.data("m")) == wanted
    assert result.failures.failed_items == failed
    assert result.failures.cancelled_items == (what == "stopped")
    assert [record.item for record in result.failures.failures] == [(3,)] * (failed + (what == "stopped"))


#: (failing items of 20, budget) -> status of the map
BUDGETS = {(2, 2): "ok", (3, 2): "fail", (2, 0.1): "ok", (3, 0.1): "fail", (1, 0): "fail", (0, 0): "ok"}


def fails_below(x, bad):
    if x < bad:
        raise ValueError(x)
    return x


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("bad", "budget"), BUDGETS)
def test_error_budgets(engine, lane, bad, budget):
    graph = (
        PipelineBuilder("budget")
        .map("m", fails_below, "xs", executor=lane, kind="transform", max_failed_items=budget)
        .stage("behind", lambda m: len(m), executor="inline")
        .build()
    )
    result = start(
        engine, graph, Watching(None), {"xs": list(range(20)), "bad": bad}, failure_mode="continue_on_failure"
    )
    assert str(result.outputs["m"].status) == BUDGETS[bad, budget]
    if BUDGETS[bad, budget] == "ok":
        assert result.data("behind") == 20 - bad
        assert result.failures.failed_items == bad
    else:
        assert result.outputs["behind"].skip_reason == "upstream_failed: m"
