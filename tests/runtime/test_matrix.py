"""Every policy x every lane x every way an attempt can end: outcome, attempts, events and cleanup, from one table.

Read `ENDS` as: a stage that does the thing on the left ends with that status, the run with that status, after so many
attempts without a retry policy and so many with `RetryConfig(max_attempts=3)`; its last event is that.
"""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from stageflow import Engine, IdempotencyConfig, PipelineBuilder, Resources, RetryConfig, StageOutput
from stageflow.testing import RecordingSink

RETRY = RetryConfig(max_attempts=3, base_delay_ms=1, max_delay_ms=2)

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
            case "timeout":
                return None
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return "value"

    async def execute(self, ctx):
        answer = self.act(ctx)
        if answer is None:
            await asyncio.sleep(60)
        return answer


class ActsSync(Acts):
    """The same as a synchronous stage that heeds its flag."""

    def execute(self, ctx):
        answer = self.act(ctx)
        while answer is None:
            ctx.raise_if_cancelled()
            time.sleep(0.002)
        return answer


@pytest.fixture(scope="module")
def engine():
    with Engine(processes=2, threads=4, grace=1.0, tokens={"gpu": 2}) as made:
        yield made


def seen(folder, what):
    return sum(1 for file in Path(folder).iterdir() if file.name.startswith(what))


def run(engine, what, lane, folder, *, stage=Acts, times=99, policies=None, mode="fail_fast"):
    """One stage that acts, one that depends on it, one beside them."""
    policies = dict(policies or {})
    if what == "timeout":
        policies["timeout"] = 0.04
    acts = stage(what, str(folder), times)
    graph = (
        PipelineBuilder("matrix")
        .stage("acts", acts, executor=lane, kind=KIND[lane], **policies)
        .stage("behind", lambda: "ran", ["acts"], executor="async")
        .stage("beside", lambda: "ran", executor="async")
        .build()
    )
    sink = RecordingSink()
    result = engine.run(graph, event_sinks=[sink], failure_mode=mode)
    return result, sink


def cells():
    for lane in LANES:
        for what in ENDS:
            if what == "killed" and lane != "process":
                continue  # only a process can be killed
            for stage in (Acts, ActsSync):
                if stage is ActsSync and (lane == "async" or (lane == "inline" and what == "timeout")):
                    continue  # a synchronous stage there holds the loop: nothing can interrupt it
                yield pytest.param(lane, what, stage, id=f"{lane}-{what}-{stage.__name__}")


@pytest.mark.parametrize(("lane", "what", "stage"), cells())
@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
def test_how_attempts_end(engine, tmp_path, lane, what, stage, retry):
    status, run_status, alone, retried, last = ENDS[what]
    wanted = retried if retry else alone
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
    if what == "timeout":
        assert output.error_info.type.endswith("StageTimeoutError")
        assert output.error_info.limit == 0.04
        assert output.error_info.elapsed >= 0.04
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
            case "timeout":
                while True:
                    ctx.raise_if_cancelled()
                    time.sleep(0.002)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
    return x * 10


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
}  # fmt: skip


@pytest.mark.parametrize("lane", ["inline", "thread", "process"])
@pytest.mark.parametrize("what", ITEMS)
@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
@pytest.mark.parametrize("kind", ["transform", "enrich"])
def test_items_of_a_map(engine, tmp_path, lane, what, retry, kind):
    if (what == "killed" and lane != "process") or (what == "timeout" and lane == "inline"):
        return
    failed, alone, retried, status = ITEMS[what]
    policies = {"retry": RETRY} if retry else {}
    if what == "timeout":
        policies["timeout"] = 0.04
    graph = PipelineBuilder("items").map("m", item, "xs", executor=lane, kind=kind, **policies).build()
    inputs = {"xs": list(range(6)), "folder": str(tmp_path), "what": what, "times": 99}
    result = engine.run(graph, inputs, failure_mode="continue_on_failure")
    assert result.status == status, result.error
    if status == "cancelled":
        return
    calls = sum(1 for file in tmp_path.iterdir() if file.name.startswith("3-"))
    assert calls == (retried if retry else alone)
    wanted = [x * 10 for x in range(6) if x != 3 or what == "success"]
    assert list(result.data("m")) == wanted
    assert result.failures.failed_items == failed
    assert [record.item for record in result.failures.failures] == [(3,)] * failed
