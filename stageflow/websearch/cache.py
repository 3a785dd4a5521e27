"""Responses kept on disk to be revalidated: ETag and Last-Modified, never served without asking.

One SQLite file, safe to share between processes. Standard library only.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    url TEXT PRIMARY KEY, status INTEGER NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL,
    size INTEGER NOT NULL, used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON responses (used_at);
"""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One kept response; `headers` in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def validators(self) -> dict[str, str]:
        """The request headers that ask: has it changed?"""
        asked: dict[str, str] = {}
        if etag := self.headers.get("etag"):
            asked["if-none-match"] = etag
        if modified := self.headers.get("last-modified"):
            asked["if-modified-since"] = modified
        return asked


def may_store(status: int, headers: dict[str, str]) -> bool:
    """Whether a response may be kept for everybody: a 200 with a validator that is not private to someone."""
    control = {part.strip().partition("=")[0].lower() for part in headers.get("cache-control", "").split(",")}
    if status != 200 or control & {"no-store", "private"}:
        return False
    varies = {part.strip().lower() for part in headers.get("vary", "").split(",") if part.strip()}
    if varies - {"accept-encoding", "user-agent", "origin"}:
        return False
    return "etag" in headers or "last-modified" in headers


class DiskCache:
    """A bounded store of responses by URL; the least recently used go first. Thread-safe; calls block for one disk
    access."""

    def __init__(self, path: str | Path, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            self._size = int(self._db.execute("SELECT coalesce(sum(size), 0) FROM responses").fetchone()[0])
        except BaseException:
            self._db.close()
            raise

    def get(self, url: str) -> StoredResponse | None:
        """What is kept for `url`."""
        with self._lock:
            row = self._db.execute("SELECT status, headers, body FROM responses WHERE url = ?", (url,)).fetchone()
            if row is not None:
                self._db.execute("UPDATE responses SET used_at = ? WHERE url = ?", (time.time(), url))
        if row is None:
            return None
        try:
            headers = msgspec.json.decode(row[1], type=dict[str, str])
        except msgspec.DecodeError:
            return None  # written by something else: as good as absent
        return StoredResponse(int(row[0]), headers, bytes(row[2]))

    def put(self, url: str, response: StoredResponse) -> None:
        """Keep `response`; one larger than the whole cache is not kept."""
        headers = msgspec.json.encode(response.headers)
        size = len(response.body) + len(headers) + len(url)
        if size > self._max_bytes:
            return
        with self._lock:
            old = self._db.execute("SELECT size FROM responses WHERE url = ?", (url,)).fetchone()
            self._db.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
                (url, response.status, headers, response.body, size, time.time()),
            )
            self._size += size - (int(old[0]) if old else 0)
            while self._size > self._max_bytes:
                oldest = self._db.execute("SELECT url, size FROM responses ORDER BY used_at LIMIT 1").fetchone()
                if oldest is None:
                    self._size = 0
                    break
                self._db.execute("DELETE FROM responses WHERE url = ?", (oldest[0],))
                self._size -= int(oldest[1])

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with self._lock:
            self._db.close()
