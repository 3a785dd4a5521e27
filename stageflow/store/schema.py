"""The database: where it lies, who may touch it, and the versions of its tables.

One file per store, in a folder of its own that only its owner can enter. WAL, one writer at a time, every write in one
IMMEDIATE transaction: a process killed at any instant leaves either all of a transaction or nothing of it.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

from stageflow.core.errors import DefinitionError, ResourceError

#: "SFLO": tells our files from any other SQLite database
APPLICATION_ID: Final = 0x53464C4F
BUSY_SECONDS: Final = 30.0  # how long a write waits for other processes

#: Migration n brings a database from version n to n + 1. Never edit one that was released: append.
MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        """CREATE TABLE idempotency (
            key TEXT PRIMARY KEY,
            params_hash TEXT,
            output BLOB NOT NULL,
            created_at REAL NOT NULL,
            expires_at REAL
        ) WITHOUT ROWID""",
        "CREATE INDEX idempotency_expiry ON idempotency (expires_at) WHERE expires_at IS NOT NULL",
        """CREATE TABLE idempotency_claim (
            key TEXT PRIMARY KEY,
            token TEXT NOT NULL,
            owner_pid INTEGER NOT NULL,
            owner_started TEXT NOT NULL,
            owner_boot TEXT NOT NULL,
            owner_space TEXT NOT NULL,
            created_at REAL NOT NULL,
            expires_at REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
)


class StoreError(ResourceError):
    """The store cannot be used (field `path`)."""

    code: ClassVar[str] = "SF-STORE"


class StoreUnsafeError(DefinitionError):
    """The store's file or folder belongs to somebody else, or others can write it (field `path`).

    Values in a store are pickles: who can write the file can run code here.
    """

    code: ClassVar[str] = "SF-STORE-UNSAFE"


def default_folder() -> Path:
    """`$STAGEFLOW_HOME`, else `stageflow` in `$XDG_STATE_HOME`, else `~/.local/state/stageflow`."""
    given = os.environ.get("STAGEFLOW_HOME")
    if given:
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "stageflow"


def secure(path: Path) -> None:
    """Make the folder (0700) and the file (0600) if they are missing; refuse them if others could have written them.

    Raises:
        StoreUnsafeError: the folder or file is not ours, is a link, or is writable by others.
        StoreError: they cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        os.close(os.open(path, flags, 0o600))
    except OSError as error:
        if path.is_symlink():
            raise StoreUnsafeError(f"the store {path} is a symbolic link", path=str(path)) from error
        raise StoreError(f"the store {path} cannot be opened: {error}", path=str(path)) from error
    if not hasattr(os, "getuid"):
        return  # Windows: the folder's access list comes from the user's profile
    for each in (path.parent, path):
        found = os.stat(each)
        if found.st_uid != os.getuid():
            raise StoreUnsafeError(
                f"{each} belongs to user {found.st_uid}, not to this process ({os.getuid()})",
                hint="use a folder of your own for the store",
                path=str(each),
            )
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise StoreUnsafeError(
                f"{each} can be written by others (mode {stat.S_IMODE(found.st_mode):o})",
                hint=f"chmod go-w {each}",
                path=str(each),
            )


def connect(path: Path, *, busy_seconds: float = BUSY_SECONDS, synchronous: str = "NORMAL") -> sqlite3.Connection:
    """Open the database for the calling thread, at the newest version.

    `synchronous="NORMAL"` survives the death of any process; "FULL" the loss of power too, at an fsync per transaction.

    Raises:
        StoreUnsafeError, StoreError: see `secure`; also for a file that is no store, or one of a newer Stageflow.
    """
    secure(path)
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, cached_statements=64)
    try:
        _configure(connection, busy_seconds, synchronous)
        migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreError(
            f"{path} is not a usable store: {error}", hint="move the file away to start a new one", path=str(path)
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _configure(connection: sqlite3.Connection, busy_seconds: float, synchronous: str) -> None:
    if synchronous not in ("NORMAL", "FULL", "EXTRA"):
        raise DefinitionError(f"synchronous must be NORMAL, FULL or EXTRA, not {synchronous!r}")
    # SQLite does not wait for others while the journal mode changes, whatever the busy timeout says.
    give_up = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= give_up:
                raise
            time.sleep(0.005)
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA journal_size_limit = 16777216")


def migrate(connection: sqlite3.Connection, path: Path, migrations: tuple[tuple[str, ...], ...] = MIGRATIONS) -> int:
    """Bring the tables to the newest version, all in one transaction; the version they had."""
    with transaction(connection):
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        application = int(connection.execute("PRAGMA application_id").fetchone()[0])
        tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        if application != APPLICATION_ID and (application or version or tables):
            raise StoreError(f"{path} is a database of another program", path=str(path))
        if version > len(migrations):
            raise StoreError(
                f"{path} has version {version}; this Stageflow knows versions up to {len(migrations)}",
                hint="use the newer Stageflow, or another folder",
                path=str(path),
            )
        for statements in migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        if version != len(migrations):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(migrations)}")
        return version


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One IMMEDIATE transaction: committed at the end of the block, rolled back if it raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def rows(connection: sqlite3.Connection, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """Every row of a query."""
    return connection.execute(statement, values).fetchall()
