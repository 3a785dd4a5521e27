"""Keeps what is needed to take actions back, for a while, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stageflow.core.errors import DefinitionError
from stageflow.tools.definitions import UndoMetadata

__all__ = ["UndoEntry", "UndoStore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoEntry:
    """One action that can be taken back until `expires_at` (seconds of the store's clock), by `handler` if given."""

    metadata: UndoMetadata
    expires_at: float
    handler: Callable[[UndoMetadata], Any] | None = None


class UndoStore:
    """Undo metadata by action id, for `ttl` seconds of a clock that never jumps. Thread-safe; lost with the process."""

    def __init__(self, ttl: float = 3600.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        if ttl <= 0:
            raise DefinitionError(f"ttl is above 0 seconds, not {ttl}", ttl=ttl)
        self.ttl = ttl
        self._clock = clock
        self._entries: dict[str, UndoEntry] = {}
        self._lock = threading.Lock()

    def store(self, metadata: UndoMetadata, handler: Callable[[UndoMetadata], Any] | None = None) -> None:
        """Keep it from now on, replacing what the same action had."""
        self.put_back(UndoEntry(metadata=metadata, expires_at=self._clock() + self.ttl, handler=handler))

    def get(self, action_id: str) -> UndoMetadata | None:
        """What was kept for the action; None once expired."""
        with self._lock:
            entry = self._alive(action_id)
            return None if entry is None else entry.metadata

    def take(self, action_id: str) -> UndoEntry | None:
        """Remove and return it in one step: of two callers who undo the same action, one gets it."""
        with self._lock:
            entry = self._alive(action_id)
            if entry is not None:
                del self._entries[action_id]
            return entry

    def put_back(self, entry: UndoEntry) -> None:
        """Return what `take` gave, with the expiry it had."""
        with self._lock:
            now = self._clock()
            while self._entries and next(iter(self._entries.values())).expires_at <= now:
                del self._entries[next(iter(self._entries))]  # oldest first: storing stays cheap
            self._entries[entry.metadata.action_id] = entry

    def remove(self, action_id: str) -> bool:
        """Forget one; False where there was none, or only an expired one."""
        return self.take(action_id) is not None

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        """How many can still be taken back."""
        with self._lock:
            now = self._clock()
            return sum(entry.expires_at > now for entry in self._entries.values())

    def cleanup_expired(self) -> int:
        """Free what has expired; how many."""
        with self._lock:
            return self._drop_expired()

    def _alive(self, action_id: str) -> UndoEntry | None:
        entry = self._entries.get(action_id)
        if entry is not None and entry.expires_at <= self._clock():
            del self._entries[action_id]
            return None
        return entry

    def _drop_expired(self) -> int:
        now = self._clock()
        dead = [action_id for action_id, entry in self._entries.items() if entry.expires_at <= now]
        for action_id in dead:
            del self._entries[action_id]
        return len(dead)
