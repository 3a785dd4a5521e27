"""Stores and the two stages: limits in their order, nothing twice, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow.context.identity import RunIdentity
from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import StageKind, StageStatus
from stageflow.helpers.memory import (
    InMemoryStore,
    MemoryConfig,
    MemoryEntry,
    MemoryFetchStage,
    MemoryStore,
    MemoryWriteStage,
    SQLiteMemoryStore,
    select_entries,
)

NOW = 10_000.0


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore:
    if request.param == "memory":
        return InMemoryStore(clock=lambda: NOW)
    return SQLiteMemoryStore(tmp_path / "deep" / "memory.sqlite", clock=lambda: NOW)


def entry(name: str, *, role: str = "user", size: int = 4, age: float = 0.0, session: str = "s") -> MemoryEntry:
    return MemoryEntry(id=name, session_id=session, role=role, content="x" * size, timestamp=NOW - age)


def ids(entries: list[MemoryEntry]) -> list[str]:
    return [kept.id for kept in entries]


def test_newest_entries_oldest_first(store: MemoryStore) -> None:
    for n in range(5):
        store.store(entry(str(n)))
    store.store(entry("other", session="t"))
    assert ids(store.fetch("s", MemoryConfig(max_entries=3))) == ["2", "3", "4"]
    assert ids(store.fetch("s", MemoryConfig(max_entries=0))) == []
    assert ids(store.fetch("t")) == ["other"]
    assert store.fetch("unknown") == []
    assert store.clear("s") == 5
    assert store.clear("s") == 0


def test_recency_and_system_filter_come_before_the_count(store: MemoryStore) -> None:
    store.store(entry("old", age=100))
    store.store(entry("kept", age=60))
    store.store(entry("sys1", role="system", age=50))
    store.store(entry("sys2", role="system", age=40))
    store.store(entry("new", age=0))
    config = MemoryConfig(max_entries=2, include_system=False, recency_window_seconds=60)
    assert ids(store.fetch("s", config)) == ["kept", "new"]
    assert ids(store.fetch("s", MemoryConfig(max_entries=2))) == ["sys2", "new"]


def test_token_budget_is_spent_newest_first(store: MemoryStore) -> None:
    for name, size in (("a", 40), ("b", 400), ("c", 40), ("d", 43)):
        store.store(entry(name, size=size))
    assert ids(store.fetch("s", MemoryConfig(max_tokens=20))) == ["c", "d"]
    assert ids(store.fetch("s", MemoryConfig(max_tokens=119))) == ["c", "d"]
    assert ids(store.fetch("s", MemoryConfig(max_tokens=130))) == ["a", "b", "c", "d"]
    assert ids(store.fetch("s", MemoryConfig(max_tokens=9))) == []


def test_storing_again_replaces_in_place(store: MemoryStore) -> None:
    store.store(entry("a"))
    store.store(entry("b"))
    store.store(MemoryEntry(id="a", session_id="s", role="user", content="new", timestamp=NOW, metadata={"k": [1]}))
    first, second = store.fetch("s")
    assert (first.id, first.content, first.metadata) == ("a", "new", {"k": [1]})
    assert second.id == "b"


def test_sqlite_survives_its_object(tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    SQLiteMemoryStore(path).store(entry("a", age=0))
    assert ids(SQLiteMemoryStore(path).fetch("s")) == ["a"]


@settings(deadline=None)  # a loaded machine is no failure
@given(
    st.lists(st.tuples(st.sampled_from(["user", "system"]), st.integers(0, 80), st.integers(0, 30)), max_size=30),
    st.builds(
        MemoryConfig,
        max_entries=st.integers(0, 10),
        max_tokens=st.integers(0, 60),
        include_system=st.booleans(),
        recency_window_seconds=st.integers(0, 30).map(float),
    ),
)
def test_limits_always_hold(rows: list[tuple[str, int, int]], config: MemoryConfig) -> None:
    entries = [entry(str(n), role=role, size=size, age=age) for n, (role, size, age) in enumerate(rows)]
    kept = select_entries(entries, config, NOW)
    assert len(kept) <= config.max_entries
    assert sum(one.tokens for one in kept) <= config.max_tokens
    assert config.include_system or all(one.role != "system" for one in kept)
    places = [entries.index(one) for one in kept]
    assert places == sorted(places)


def test_entries_as_dict_and_impossible_limits() -> None:
    plain = entry("a")
    assert plain.to_dict() == {"id": "a", "session_id": "s", "role": "user", "content": "xxxx", "timestamp": NOW}
    assert MemoryEntry(id="a", session_id="s", role="u", content="", metadata={"k": 1}).to_dict()["metadata"] == {
        "k": 1
    }
    with pytest.raises(DefinitionError):
        MemoryConfig(max_entries=-1)


def snapshot(text: str | None = "hello", session: str | None = "s", interaction: str | None = "i7") -> ContextSnapshot:
    identity = RunIdentity(pipeline_run_id="r", session_id=session, interaction_id=interaction)
    return ContextSnapshot(run_id=identity, input_text=text)


def test_fetch_stage(bare_context: Callable[..., Any], store: MemoryStore) -> None:
    store.store(entry("a", size=8))
    store.store(entry("b", size=6))
    stage = MemoryFetchStage(store, MemoryConfig(max_entries=5))
    assert stage.kind is StageKind.ENRICH
    output = stage.execute(bare_context(snapshot=snapshot()))
    assert output.data["memory_count"] == 2
    assert output.data["memory_tokens"] == 3
    assert [one["id"] for one in output.data["memory_entries"]] == ["a", "b"]
    assert stage.execute(bare_context(snapshot=snapshot(session=None))).status is StageStatus.SKIP


def test_write_stage_stores_both_sides_once(bare_context: Callable[..., Any], store: MemoryStore) -> None:
    stage = MemoryWriteStage(store, "model", clock=lambda: NOW)
    assert stage.kind is StageKind.WORK
    for _ in range(2):
        output = stage.execute(bare_context({"model": {"response": 42}}, snapshot=snapshot()))
        assert output.data == {"entries_written": 2, "session_id": "s"}
    kept = store.fetch("s")
    assert [(one.id, one.role, one.content) for one in kept] == [
        ("i7_user", "user", "hello"),
        ("i7_assistant", "assistant", "42"),
    ]


def test_write_stage_leaves_out_what_is_missing(bare_context: Callable[..., Any], store: MemoryStore) -> None:
    whole = MemoryWriteStage(store, "model", None, clock=lambda: NOW)
    output = whole.execute(bare_context({"model": "yes"}, snapshot=snapshot(text=None, interaction=None)))
    assert output.data["entries_written"] == 1
    assert ids(store.fetch("s")) == ["r_assistant"]
    alone = MemoryWriteStage(store, clock=lambda: NOW)
    assert alone.execute(bare_context(snapshot=snapshot())).data["entries_written"] == 1
    assert whole.execute(bare_context({"model": "x"}, snapshot=snapshot(session=None))).status is StageStatus.SKIP
