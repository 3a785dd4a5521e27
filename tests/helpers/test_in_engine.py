"""The ready-made stages inside the real engine, in every lane they may run in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow import (
    ContextSnapshot,
    Engine,
    GuardRetryPolicy,
    PipelineBuilder,
    RunIdentity,
    RunResult,
    StageContext,
    StageStatus,
)
from stageflow.helpers import (
    AnalyticsEvent,
    AnalyticsSink,
    ContentFilter,
    GuardrailStage,
    InMemoryStore,
    MemoryConfig,
    MemoryFetchStage,
    MemoryStore,
    MemoryWriteStage,
    PIIDetector,
    SQLiteMemoryStore,
)


class Heard:
    """An exporter that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[AnalyticsEvent] = []

    def export(self, event: AnalyticsEvent) -> None:
        self.events.append(event)

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(processes=1) as made:
        yield made


@pytest.mark.parametrize("lane", ["thread", "process", "inline"])
def test_a_guard_says_the_same_in_every_lane(engine: Engine, lane: str) -> None:
    guard = GuardrailStage([PIIDetector(redact=True), ContentFilter()])
    graph = PipelineBuilder("guarded").stage("guard", guard, executor=lane).build()
    for text, passed in (("hello", True), ("damn a@b.org", False)):
        result = engine.run(graph, snapshot=ContextSnapshot(input_text=text))
        output = result.outputs["guard"]
        assert output.data["guardrail_passed"] is passed
        assert output.status is (StageStatus.OK if passed else StageStatus.FAIL)
    assert output.data["transformed_content"] == "damn *******"


def stubborn(ctx: StageContext) -> dict[str, Any]:
    return {"answer": "damn", "run": 0}


def run_guarded(engine: Engine, policy: GuardRetryPolicy) -> tuple[RunResult, list[AnalyticsEvent]]:
    graph = (
        PipelineBuilder("stubborn")
        .stage("model", stubborn)
        .stage("guard", GuardrailStage([ContentFilter()], content_key="answer"), ["model"], guard_retry=policy)
        .build()
    )
    heard = Heard()
    sink = AnalyticsSink(heard)
    result = engine.run(graph, event_sinks=[sink])
    sink.close()
    return result, heard.events


def test_failing_output_carries_data_so_stagnation_is_seen(engine: Engine) -> None:
    result, events = run_guarded(engine, GuardRetryPolicy("model", max_attempts=50, stagnation_limit=2))
    assert not result.success
    (exhausted,) = [event for event in events if event.event_type == "guard_retry.exhausted"]
    assert exhausted.data["reason"] == "stagnation"
    detected = [event for event in events if event.event_type == "guardrail.violations_detected"]
    assert len(detected) == 3, "three identical failures are two repeats"
    assert {event.stage_name for event in detected} == {"guard"}
    assert result.outputs["guard"].data["violations"][0]["metadata"] == {"word": "damn"}


def test_attempts_are_bounded_too(engine: Engine) -> None:
    _, events = run_guarded(engine, GuardRetryPolicy("model", max_attempts=2, stagnation_limit=9))
    (exhausted,) = [event for event in events if event.event_type == "guard_retry.exhausted"]
    assert (exhausted.data["reason"], exhausted.data["attempts"]) == ("max_attempts", 2)


def reply(recall: dict[str, Any]) -> dict[str, str]:
    said = [entry["content"] for entry in recall["memory_entries"]]
    return {"response": f"I remember {len(said)}: {' / '.join(said)}"}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_conversation_remembers(engine: Engine, kind: str, tmp_path: Path) -> None:
    store: MemoryStore = InMemoryStore() if kind == "memory" else SQLiteMemoryStore(tmp_path / "m.sqlite")
    lane = "thread" if kind == "memory" else "process"
    graph = (
        PipelineBuilder("talk")
        .stage("recall", MemoryFetchStage(store, MemoryConfig(max_entries=3)), executor=lane)
        .stage("model", reply, executor="thread")
        .stage("remember", MemoryWriteStage(store, "model"), ["model"], executor=lane)
        .build()
    )
    answers = []
    for turn, text in enumerate(("hi", "and now", "again")):
        identity = RunIdentity(session_id="s", interaction_id=f"i{turn}")
        result = engine.run(graph, snapshot=ContextSnapshot(run_id=identity, input_text=text))
        assert result.data("remember") == {"entries_written": 2, "session_id": "s"}
        answers.append(result.data("model")["response"])
    assert answers[0] == "I remember 0: "
    assert answers[1] == "I remember 2: hi / I remember 0: "
    assert answers[2].startswith("I remember 3: I remember 0:  / and now / I remember 2")
    assert [entry.id for entry in store.fetch("s")][-2:] == ["i2_user", "i2_assistant"]


def test_without_a_session_the_stages_skip(engine: Engine) -> None:
    store = InMemoryStore()
    graph = (
        PipelineBuilder("talk")
        .stage("recall", MemoryFetchStage(store))
        .stage("remember", MemoryWriteStage(store), ["recall"])
        .build()
    )
    result = engine.run(graph, snapshot=ContextSnapshot(input_text="x"))
    assert {output.status for output in result.outputs.values()} == {StageStatus.SKIP}
