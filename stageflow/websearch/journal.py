"""What a crawl has found and finished, on disk, so that a restart neither loses nor repeats a finished page.

One SQLite file (WAL), safe for several threads and processes, and after SIGKILL. Standard library only.
"""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from stageflow.websearch import urls

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pages (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, url TEXT NOT NULL, depth INTEGER NOT NULL,
    done INTEGER NOT NULL DEFAULT 0, error TEXT
);
"""


class CrawlJournal:
    """Pages by URL: found, then finished. "Finished" is what the caller says after the page is safe where it belongs.

    Thread-safe; picklable: a copy in another process opens the same file. Calls block for one disk access.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30.0)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.executescript(_SCHEMA)
            except BaseException:
                db.close()
                raise
            self._db = db
            # stages hold journals and nobody closes a stage: the file is closed with the last reference
            weakref.finalize(self, db.close)
        return self._db

    def __reduce__(self) -> tuple[type[CrawlJournal], tuple[str]]:
        return type(self), (self.path,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the journal opens it again when used again."""
        with self._lock:
            db, self._db = self._db, None
            if db is not None:
                db.close()

    @staticmethod
    def _key(url: str) -> str:
        return urls.crawl_key(url) or url

    def add(self, found: Iterable[tuple[str, int]]) -> None:
        """Note pages (URL, depth) that were found; those known already are left as they are. One transaction."""
        rows = [(self._key(url), url, depth) for url, depth in found]
        with self._lock:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            try:
                db.executemany("INSERT OR IGNORE INTO pages (key, url, depth) VALUES (?, ?, ?)", rows)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    def finish(self, url: str, *, error: str | None = None) -> bool:
        """Note that the page is done with (or failed for good with `error`); False when it already was."""
        with self._lock:
            db = self._open()
            cursor = db.execute(
                "INSERT INTO pages (key, url, depth, done, error) VALUES (?, ?, 0, 1, ?) "
                "ON CONFLICT (key) DO UPDATE SET done = 1, error = excluded.error WHERE done = 0",
                (self._key(url), url, error),
            )
            return cursor.rowcount > 0

    def is_finished(self, url: str) -> bool:
        """Whether `finish` was called for the page."""
        with self._lock:
            row = self._open().execute("SELECT done FROM pages WHERE key = ?", (self._key(url),)).fetchone()
        return bool(row and row[0])

    def unfinished(self, wanted: Iterable[str]) -> list[str]:
        """Those of `wanted` that are still to do, in their order."""
        return [url for url in wanted if not self.is_finished(url)]

    def entries(self) -> list[tuple[str, int, bool]]:
        """(URL, depth, finished) of every page in the order found."""
        with self._lock:
            rows = self._open().execute("SELECT url, depth, done FROM pages ORDER BY id").fetchall()
        return [(str(url), int(depth), bool(done)) for url, depth, done in rows]

    def counts(self) -> dict[str, int]:
        """How many pages are known, finished, and failed."""
        with self._lock:
            row = self._open().execute("SELECT count(*), coalesce(sum(done), 0), count(error) FROM pages").fetchone()
        return {"known": int(row[0]), "finished": int(row[1]), "failed": int(row[2])}
