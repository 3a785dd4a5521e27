"""Remembers what was said in a session and hands the newest of it to a model within a token budget.

Stores are synchronous and safe from several threads; the stages run on the thread lane. Times are seconds since 1970;
tokens are estimated as characters // 4. What is kept in process memory is seen by this process only: stages that fetch
or write must run on its thread or async lane, or use the SQLite store.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import StageKind
from stageflow.core.output import StageOutput

if TYPE_CHECKING:
    from stageflow.context.stage_context import StageContext

__all__ = [
    "InMemoryStore",
    "MemoryConfig",
    "MemoryEntry",
    "MemoryFetchStage",
    "MemoryStore",
    "MemoryWriteStage",
    "SQLiteMemoryStore",
    "estimate_tokens",
    "select_entries",
]


def estimate_tokens(text: str) -> int:
    """Characters // 4."""
    return len(text) // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEntry:
    """One remembered message."""

    id: str
    session_id: str
    role: str
    content: str
    timestamp: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Estimated size of its content."""
        return estimate_tokens(self.content)

    def to_dict(self) -> dict[str, Any]:
        """All fields; `metadata` where not empty."""
        shown: dict[str, Any] = {
            "id": self.id,
            "session_id": self.session_id,
            "role": self.role,
            "content": self.content,
            "timestamp": self.timestamp,
        }
        if self.metadata:
            shown["metadata"] = dict(self.metadata)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What a fetch may bring back."""

    max_entries: int = 20
    max_tokens: int = 4000
    include_system: bool = True
    recency_window_seconds: float = 0.0  # 0 = however old

    def __post_init__(self) -> None:
        if self.max_entries < 0 or self.max_tokens < 0 or self.recency_window_seconds < 0:
            raise DefinitionError("memory limits cannot be negative", max_entries=self.max_entries)


def select_entries(entries: Iterable[MemoryEntry], config: MemoryConfig, now: float) -> list[MemoryEntry]:
    """Apply the limits in their order: recency, system filter, last `max_entries`, then the token budget newest first.

    `entries` come oldest first, and so does the answer. The budget ends at the first entry that does not fit: what is
    older than a gap would read as if nothing was left out.
    """
    kept = list(entries)
    if config.recency_window_seconds > 0:
        kept = [entry for entry in kept if now - entry.timestamp <= config.recency_window_seconds]
    if not config.include_system:
        kept = [entry for entry in kept if entry.role != "system"]
    kept = kept[max(0, len(kept) - config.max_entries) :]
    budget = config.max_tokens
    first = len(kept)
    while first > 0 and kept[first - 1].tokens <= budget:
        first -= 1
        budget -= kept[first].tokens
    return kept[first:]


class MemoryStore(Protocol):
    """Keeps entries by session, in the order they were stored."""

    def store(self, entry: MemoryEntry) -> None:
        """Keep an entry; one with the same session and id is replaced where it stands, so a retry writes once."""

    def fetch(self, session_id: str, config: MemoryConfig | None = None) -> list[MemoryEntry]:
        """The session's newest entries within the limits, oldest first."""

    def clear(self, session_id: str) -> int:
        """Forget a session; how many entries went."""


class InMemoryStore:
    """Keeps entries in this process; nothing survives it. `clock` gives seconds since 1970."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sessions: dict[str, dict[str, MemoryEntry]] = {}
        self._lock = threading.Lock()

    def store(self, entry: MemoryEntry) -> None:
        """Keep it, replacing the entry of the same session and id."""
        with self._lock:
            self._sessions.setdefault(entry.session_id, {})[entry.id] = entry

    def fetch(self, session_id: str, config: MemoryConfig | None = None) -> list[MemoryEntry]:
        """The newest within the limits, oldest first."""
        with self._lock:
            entries = list(self._sessions.get(session_id, {}).values())
        return select_entries(entries, config or MemoryConfig(), self._clock())

    def clear(self, session_id: str) -> int:
        """Forget a session; how many entries went."""
        with self._lock:
            return len(self._sessions.pop(session_id, {}))


TABLE = """
CREATE TABLE IF NOT EXISTS memory (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id TEXT NOT NULL,
    id TEXT NOT NULL,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    timestamp REAL NOT NULL,
    metadata TEXT NOT NULL,
    UNIQUE (session_id, id)
)
"""


class SQLiteMemoryStore:
    """Keeps entries in a file that several processes may share. Metadata must be JSON.

    Opens the file for every call, so an instance may be used from any thread and carried into a worker.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(TABLE)

    def store(self, entry: MemoryEntry) -> None:
        """Keep it, replacing the entry of the same session and id; on disk when this returns."""
        row = (
            entry.session_id,
            entry.id,
            entry.role,
            entry.content,
            entry.timestamp,
            json.dumps(dict(entry.metadata)),
        )
        with closing(self._open()) as database:
            database.execute(
                "INSERT INTO memory (session_id, id, role, content, timestamp, metadata) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (session_id, id) DO UPDATE SET role = excluded.role, content = excluded.content,"
                " timestamp = excluded.timestamp, metadata = excluded.metadata",
                row,
            )

    def fetch(self, session_id: str, config: MemoryConfig | None = None) -> list[MemoryEntry]:
        """The newest within the limits, oldest first."""
        limits = config or MemoryConfig()
        now = self._clock()
        oldest = now - limits.recency_window_seconds if limits.recency_window_seconds > 0 else float("-inf")
        with closing(self._open()) as database:
            rows = database.execute(
                "SELECT id, session_id, role, content, timestamp, metadata FROM memory"
                " WHERE session_id = ? AND timestamp >= ? AND (? OR role <> 'system') ORDER BY place DESC LIMIT ?",
                (session_id, oldest, limits.include_system, limits.max_entries),
            ).fetchall()
        entries = [
            MemoryEntry(
                id=row[0], session_id=row[1], role=row[2], content=row[3], timestamp=row[4], metadata=json.loads(row[5])
            )
            for row in reversed(rows)
        ]
        return select_entries(entries, limits, now)

    def clear(self, session_id: str) -> int:
        """Forget a session; how many entries went."""
        with closing(self._open()) as database:
            return database.execute("DELETE FROM memory WHERE session_id = ?", (session_id,)).rowcount

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30, isolation_level=None)


class MemoryFetchStage:
    """An ENRICH stage: the session's newest entries as `memory_entries`, with `memory_count` and `memory_tokens`.

    Skips where the run has no session id.
    """

    kind = StageKind.ENRICH

    def __init__(self, store: MemoryStore, config: MemoryConfig | None = None) -> None:
        self.store = store
        self.config = config or MemoryConfig()

    def execute(self, ctx: StageContext) -> StageOutput:
        """Fetch for the snapshot's session."""
        session_id = ctx.snapshot.session_id
        if not session_id:
            return StageOutput.skip("no session id")
        entries = self.store.fetch(session_id, self.config)
        return StageOutput.ok(
            memory_entries=[entry.to_dict() for entry in entries],
            memory_count=len(entries),
            memory_tokens=sum(entry.tokens for entry in entries),
        )


class MemoryWriteStage:
    """A WORK stage: remembers the user's text and the answer as `<interaction>_user` and `<interaction>_assistant`.

    The user's text is the snapshot's `input_text`; the answer is the text of (`response_stage`, `response_key`), of the
    stage's whole value where `response_key` is None. Missing ones are left out. Gives `entries_written` and
    `session_id`; skips without a session id. Writing again for the same interaction replaces, so that retries and
    re-runs are harmless. Without an interaction id the run id serves.
    """

    kind = StageKind.WORK

    def __init__(
        self,
        store: MemoryStore,
        response_stage: str | None = None,
        response_key: str | None = "response",
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.response_stage = response_stage
        self.response_key = response_key
        self._clock = clock

    def execute(self, ctx: StageContext) -> StageOutput:
        """Store what is there."""
        session_id = ctx.snapshot.session_id
        if not session_id:
            return StageOutput.skip("no session id")
        interaction = ctx.snapshot.run_id.interaction_id or ctx.run_id
        now = self._clock()
        said = {"user": ctx.snapshot.input_text, "assistant": self._response(ctx)}
        written = 0
        for role, content in said.items():
            if not content:
                continue
            self.store.store(
                MemoryEntry(
                    id=f"{interaction}_{role}", session_id=session_id, role=role, content=content, timestamp=now
                )
            )
            written += 1
        return StageOutput.ok(entries_written=written, session_id=session_id)

    def _response(self, ctx: StageContext) -> str | None:
        if self.response_stage is None:
            return None
        value = (
            ctx.inputs.get(self.response_stage)
            if self.response_key is None
            else ctx.inputs.value(self.response_stage, self.response_key)
        )
        return None if value is None else str(value)
