"""The file: several processes at once, death at any instant, other people's hands, and versions."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stageflow.store.idempotency import Busy, CachedResult, Claim, Held, Hit, IdempotencyGuard
from stageflow.store.owner import Owner
from stageflow.store.schema import (
    APPLICATION_ID,
    MIGRATIONS,
    StoreError,
    StoreUnsafeError,
    connect,
    default_folder,
    migrate,
    transaction,
)
from stageflow.store.sqlite import SqliteIdempotencyStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "i.db"


async def test_results_survive_the_process_and_pickle_exactly(path):
    async with SqliteIdempotencyStore(path) as store:
        await store.set("k", CachedResult({"t": (1, {2}), 3: b"x"}))
        assert await store.count() == 1
    async with SqliteIdempotencyStore(path) as store:
        assert (await store.get("k")).output == {"t": (1, {2}), 3: b"x"}  # type: ignore[union-attr]


async def test_a_closed_store_says_so(path):
    store = SqliteIdempotencyStore(path)
    await store.get("k")
    await store.aclose()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.get("k")


async def test_a_result_that_cannot_be_read_any_more_is_ignored(path, caplog):
    async with SqliteIdempotencyStore(path) as store:
        await store.set("k", CachedResult(1))
        await store._call(lambda db: db.execute("UPDATE idempotency SET output = x'00'"))
        assert await store.get("k") is None
        assert "cannot be read" in caplog.text
        assert isinstance(await store.claim("k"), Claim)


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# ---------------------------------------------------------------- whose file it is


def test_the_folder_and_file_are_private(path):
    connect(path).close()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_is_refused(path, what):
    connect(path).close()
    target = path if what == "file" else path.parent
    target.chmod(0o722 if what == "folder" else 0o620)
    with pytest.raises(StoreUnsafeError, match="written by others") as caught:
        connect(path)
    assert caught.value.path == str(target)


def test_a_link_is_refused(path, tmp_path):
    path.parent.mkdir(mode=0o700)
    path.symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(StoreUnsafeError, match="symbolic link"):
        connect(path)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_somebody_elses_file_is_refused(path):
    connect(path).close()
    os.chown(path, 12345, -1)
    with pytest.raises(StoreUnsafeError, match="belongs to user 12345"):
        connect(path)


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEFLOW_HOME", str(tmp_path / "a"))
    assert default_folder() == tmp_path / "a"
    monkeypatch.delenv("STAGEFLOW_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "b"))
    assert default_folder() == tmp_path / "b" / "stageflow"


# ---------------------------------------------------------------- versions


def test_a_new_database_has_the_newest_version_and_opening_again_changes_nothing(path):
    database = connect(path)
    assert database.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert migrate(database, path) == len(MIGRATIONS)
    database.close()


def test_an_older_database_is_brought_forward_with_its_data(path):
    steps = (("CREATE TABLE t (a)",), ("ALTER TABLE t ADD b", "UPDATE t SET b = a + 1"))
    path.parent.mkdir(mode=0o700)
    database = sqlite3.connect(path, isolation_level=None)
    assert migrate(database, path, steps[:1]) == 0
    database.execute("INSERT INTO t VALUES (1)")
    assert migrate(database, path, steps) == 1
    assert database.execute("SELECT a, b FROM t").fetchall() == [(1, 2)]
    database.close()


def test_a_failing_migration_changes_nothing(path):
    path.parent.mkdir(mode=0o700)
    database = sqlite3.connect(path, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        migrate(database, path, (("CREATE TABLE t (a)", "NONSENSE"),))
    assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    assert database.execute("PRAGMA user_version").fetchone() == (0,)
    database.close()


def test_a_newer_version_and_a_strangers_file_are_refused(path, tmp_path):
    database = connect(path)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(StoreError, match="knows versions up to"):
        connect(path)
    other = path.parent / "other.db"
    stranger = sqlite3.connect(other)
    stranger.execute("CREATE TABLE mine (a)")
    stranger.close()
    other.chmod(0o600)
    with pytest.raises(StoreError, match="another program"):
        connect(other)
    text = path.parent / "text.db"
    text.write_text("not a database, just some text that is long enough" * 50)
    text.chmod(0o600)
    with pytest.raises(StoreError, match="not a usable store"):
        connect(text)


def test_a_transaction_is_all_or_nothing(path):
    database = connect(path)

    def fails() -> None:
        with transaction(database):
            database.execute("CREATE TABLE t (a)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert database.execute("SELECT count(*) FROM sqlite_master WHERE name = 't'").fetchone() == (0,)
    assert not database.in_transaction
    database.close()


# ---------------------------------------------------------------- several processes

WRITER = """
import asyncio, sys
from stageflow.store.idempotency import CachedResult
from stageflow.store.sqlite import SqliteIdempotencyStore

async def main(path, name):
    store = SqliteIdempotencyStore(path)
    await store.claim("contested", lease_seconds=3600)
    n = 0
    while True:
        claim = await store.claim(f"{name}-{n}", lease_seconds=3600)
        print("claimed", n, flush=True)
        await store.release(claim, CachedResult({"n": n, "blob": b"x" * (n % 5000)}))
        print("kept", n, flush=True)
        n += 1

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


async def test_a_writer_may_be_killed_at_any_instant(path):
    rng = random.Random(7)
    kept: dict[str, int] = {}
    for turn in range(6):
        writer = start(WRITER, str(path), f"w{turn}")
        assert writer.stdout is not None
        assert writer.stdin is not None
        stop_after = rng.randrange(1, 400)
        lines = [writer.stdout.readline() for _ in range(stop_after)]
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        writer.stdin.close()
        writer.wait()
        complete = [line.split() for line in lines if len(line.split()) == 2]
        claimed = max(int(n) for word, n in complete if word == "claimed")
        for word, n in complete:
            if word == "kept":
                kept[f"w{turn}-{n}"] = int(n)

        async with SqliteIdempotencyStore(path) as store:
            assert await store._call(lambda db: db.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
            for key, number in kept.items():
                entry = await store.get(key)
                assert entry is not None, f"{key} was acknowledged and is lost"
                assert entry.output["n"] == number
            # Whatever the dead writer held can be taken at once, though its lease has an hour to go.
            found = await store.claim(f"w{turn}-{claimed}")
            assert isinstance(found, Claim | CachedResult)
            contested = await store.claim("contested")
            assert isinstance(contested, Claim)
            await store.release(contested)
    assert len(kept) > 10


RACER = """
import asyncio, sys
from stageflow.store.idempotency import Held, IdempotencyGuard
from stageflow.store.sqlite import SqliteIdempotencyStore

async def main(path, name):
    async with SqliteIdempotencyStore(path) as store:
        guard = IdempotencyGuard(store)
        print("ready", flush=True)
        sys.stdin.readline()
        for n in range(20):
            begun = await guard.begin(f"key{n}", "h", 60)
            if isinstance(begun, Held):
                await guard.finish(begun, name)
                print("worked", n, name, flush=True)
            else:
                print("hit", n, begun.output, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def test_processes_that_race_do_each_key_once(path):
    racers = [start(RACER, str(path), f"r{n}") for n in range(3)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    told = [racer.communicate("go\n", timeout=100)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    said = [line.split() for text in told for line in text.splitlines()]
    workers = {int(n): name for word, n, name in said if word == "worked"}
    assert sum(word == "worked" for word, _, _ in said) == len(workers) == 20
    assert len(said) == 60
    assert all(workers[int(n)] == name for _, n, name in said)


HOLDER = """
import asyncio, sys
from stageflow.store.sqlite import SqliteIdempotencyStore
async def main():
    store = SqliteIdempotencyStore(sys.argv[1])
    await store.claim("k", lease_seconds=3600)
    print("held", flush=True)
    sys.stdin.readline()
asyncio.run(main())
"""


async def test_a_waiter_takes_over_from_a_killed_process(path):
    holder = start(HOLDER, str(path))
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    async with SqliteIdempotencyStore(path) as store:
        busy = await store.claim("k")
        assert isinstance(busy, Busy)
        assert (busy.local, busy.owner.pid) == (False, holder.pid)
        waiting = asyncio.create_task(IdempotencyGuard(store).begin("k"))
        while not store.waiters._waiting:
            await asyncio.sleep(0)
        assert not waiting.done()
        holder.kill()
        holder.wait()
        begun = await waiting
        assert isinstance(begun, Held)
        await IdempotencyGuard(store).finish(begun, "done")
        assert isinstance(await IdempotencyGuard(store).begin("k"), Hit)
    holder.stdin.close()
    holder.stdout.close()


async def test_a_forked_child_opens_the_file_for_itself(path):
    async with SqliteIdempotencyStore(path) as store:
        await store.set("parent", CachedResult(1))
        code = (
            "import asyncio, os, sys\n"
            "from stageflow.store.idempotency import CachedResult\n"
            "from stageflow.store.sqlite import SqliteIdempotencyStore\n"
            "store = SqliteIdempotencyStore(sys.argv[1])\n"
            "asyncio.run(store.get('parent'))\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    asyncio.run(store.set('child', CachedResult(2)))\n"
            "    os._exit(0)\n"
            "status = os.waitpid(pid, 0)[1]\n"
            "asyncio.run(store.set('after', CachedResult(3)))\n"
            "store.close()\n"
            "sys.exit(status)\n"
        )
        child = start(code, str(path))
        child.communicate()
        assert child.returncode == 0
        found = [(await store.get(key)).output for key in ("parent", "child", "after")]  # type: ignore[union-attr]
        assert found == [1, 2, 3]


async def test_purge_removes_what_is_of_no_use(path):
    now = [1000.0]
    async with SqliteIdempotencyStore(path, clock=lambda: now[0]) as store:
        await store.set("old", CachedResult(1), ttl_seconds=1)
        await store.set("new", CachedResult(1))
        await store.claim("live", lease_seconds=50)
        await store.claim("over", lease_seconds=1)
        dead = Owner(2**22 + 1, "0", Owner.me().boot, Owner.me().space)
        await store._call(
            lambda db: db.execute(
                "INSERT INTO idempotency_claim VALUES ('dead', 't', ?, ?, ?, ?, 0, 9e9)",
                (dead.pid, dead.started, dead.boot, dead.space),
            )
        )
        now[0] += 5
        assert await store.purge() == 1
        left = await store._call(lambda db: db.execute("SELECT key FROM idempotency_claim").fetchall())
        assert left == [("live",)]


def test_owners_are_told_apart():
    me = Owner.me()
    assert not me.is_dead
    assert Owner(me.pid, "another start", me.boot, me.space).is_dead
    assert Owner(me.pid, me.started, "another boot", me.space).is_dead
    assert not Owner(2**22 + 1, "0", me.boot, "another container").is_dead
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    from stageflow.store.owner import _started

    owner = Owner(child.pid, _started(child.pid) or "", me.boot, me.space)
    assert not owner.is_dead
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_dead  # a zombie
    child.communicate()
    assert owner.is_dead
