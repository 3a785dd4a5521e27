"""The undo store forgets in time, and only in time."""

from __future__ import annotations

from typing import Any

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.tools.definitions import UndoMetadata
from stageflow.tools.undo import UndoStore


def metadata(action_id: str) -> UndoMetadata:
    return UndoMetadata(action_id=action_id, tool_name="t")


def test_entries_live_for_the_ttl(manual_time: Any) -> None:
    store = UndoStore(10, clock=manual_time)
    store.store(metadata("a"))
    manual_time.now += 5
    store.store(metadata("b"))
    manual_time.now += 4.9
    kept = store.get("a")
    assert kept is not None
    assert (kept.action_id, kept.tool_name) == ("a", "t")
    assert len(store) == 2
    manual_time.now += 0.1
    assert store.get("a") is None
    assert len(store) == 1
    assert store.remove("b") is True
    assert store.remove("b") is False
    with pytest.raises(DefinitionError):
        UndoStore(0)


def test_length_counts_what_can_still_be_undone_and_cleanup_frees(manual_time: Any) -> None:
    store = UndoStore(10, clock=manual_time)
    for name in "abc":
        store.store(metadata(name))
    manual_time.now += 10
    assert len(store) == 0
    assert store.cleanup_expired() == 3
    assert store.cleanup_expired() == 0
    store.store(metadata("d"))
    store.clear()
    assert store.get("d") is None


def test_taking_is_exclusive_and_keeps_the_expiry(manual_time: Any) -> None:
    store = UndoStore(10, clock=manual_time)
    store.store(metadata("a"), print)
    manual_time.now += 9
    entry = store.take("a")
    assert entry is not None
    assert entry.handler is print
    assert store.take("a") is None
    store.put_back(entry)
    manual_time.now += 1
    assert store.get("a") is None
