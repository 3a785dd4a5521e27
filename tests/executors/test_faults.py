"""What must hold when things break: every fault with real processes."""

import asyncio
import ctypes
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stageflow.core.errors import NotShippableError, SharedMemoryFullError, WorkerDiedError, WorkerStartError
from stageflow.core.executor import Call, Outcome, OutcomeKind, Reply, Shipped
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply
from tests.executors.leaks import PARENT, PARENT_IN, Holdings, Signs, alive, gone, lane, shm_entries, tagged


def identity(value: Any) -> Any:
    return value


def whoami() -> int:
    return os.getpid()


def segfault() -> None:
    ctypes.string_at(0)


def write_and_abort() -> None:
    os.write(2, b"about to abort\n")
    os.abort()


def spin(seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


class Hostile(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("hostile")

    def __reduce__(self) -> Any:
        raise RuntimeError("no")

    def __str__(self) -> str:
        raise RuntimeError("no text either")


class NoReturn(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


def raise_it(error: type[BaseException], *args: Any) -> None:
    raise error(*args)


def close_everything() -> None:
    os.closerange(3, 65536)


def block_signals() -> str:
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, signal.NSIG))
    return "blocked"


def change_process(folder: str) -> None:
    os.chdir(folder)
    os.umask(0o777)
    sys.stdout = None  # type: ignore[assignment]


def process_state() -> tuple[str, int]:
    mask = os.umask(0)
    os.umask(mask)
    return os.getcwd(), mask


def leak_threads() -> int:
    for _ in range(5):
        threading.Thread(target=time.sleep, args=(100,), daemon=False).start()
    return threading.active_count()


def flood(lines: int) -> None:
    for number in range(lines):
        print("x" * 200, number)
    os.write(1, b"y" * 300_000)


def start_children() -> list[int]:
    first = subprocess.Popen(["sleep", "60"])
    second = subprocess.Popen(["sleep", "60"], start_new_session=True)
    return [first.pid, second.pid]


def start_children_and_hang(port: Any) -> None:
    port.note("here", [os.getpid(), *start_children()])
    while True:
        time.sleep(1)


def fork_and_return() -> int:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return os.getpid()


@pytest.fixture(params=["forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------ deaths


@pytest.mark.parametrize(
    ("function", "args", "number", "code"),
    [
        (os._exit, (3,), None, 3),
        (segfault, (), signal.SIGSEGV, None),
        (write_and_abort, (), signal.SIGABRT, None),
        (signal.raise_signal, (signal.SIGKILL,), signal.SIGKILL, None),
        (signal.raise_signal, (signal.SIGTERM,), signal.SIGTERM, None),
    ],
)
async def test_a_death_costs_one_call(function: Any, args: Any, number: int | None, code: int | None) -> None:
    async with lane() as executor:
        others = [executor.submit(identity, n) for n in range(20)]
        with pytest.raises(WorkerDiedError) as caught:
            await executor.submit(function, *args)
        assert (caught.value.signal, caught.value.exit_code) == (number, code)
        assert not caught.value.oom_killed
        assert caught.value.rss_bytes > 1_000_000
        assert await asyncio.gather(*others) == list(range(20))
        assert await executor.submit(identity, "on") == "on"


async def test_a_death_tells_the_cause_under_spawn_too() -> None:
    async with lane(start_method="spawn") as executor:
        assert await executor.submit(identity, 1) == 1
        with pytest.raises(WorkerDiedError) as caught:
            await executor.submit(write_and_abort)
        assert caught.value.signal == signal.SIGABRT
        assert "about to abort" in caught.value.stderr_tail
        assert "Fatal Python error: Aborted" in caught.value.stderr_tail
        with pytest.raises(WorkerDiedError) as caught:
            await executor.submit(os._exit, 7)
        assert caught.value.exit_code == 7
        assert await executor.submit(identity, 1) == 1


async def test_the_tail_of_stderr_comes_with_the_error() -> None:
    async with lane() as executor:
        with pytest.raises(WorkerDiedError, match="about to abort") as caught:
            await executor.submit(write_and_abort)
        assert "write_and_abort" in caught.value.stderr_tail  # faulthandler's dump


async def test_the_running_call_alone_is_blamed() -> None:
    """Short calls wait behind one that kills: only that one is lost."""
    outcomes: list[Outcome] = []
    done = asyncio.Event()
    async with lane(max_workers=1) as executor:
        run = Shipped(lambda port, n: os.kill(os.getpid(), 9) if n == 3 else n)

        def deliver(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) == 10:
                done.set()

        for n in range(10):
            executor.start(Call(n + 1, run, (n,), short=True), deliver)
        await done.wait()
        assert sorted(o.call_id for o in outcomes) == list(range(1, 11))
        assert [o.call_id for o in outcomes if o.kind is not OutcomeKind.OK] == [4]
        lost = next(o for o in outcomes if o.call_id == 4)
        assert lost.kind is OutcomeKind.LOST
        assert lost.suspect
        assert lost.error is not None
        assert lost.error.signal == 9


async def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    async with lane(max_workers=1) as executor:
        for _ in range(5):
            pid = await executor.submit(whoami)
            os.kill(pid, signal.SIGKILL)
            # The next call may be sent before the death is seen: then it was not begun, and goes elsewhere.
            assert await executor.submit(whoami) != pid


async def test_closing_all_descriptors_ends_one_worker() -> None:
    async with lane(max_workers=1) as executor:
        with pytest.raises(WorkerDiedError):
            await executor.submit(close_everything)
        assert await executor.submit(identity, 1) == 1


async def test_a_killed_fork_server_is_replaced() -> None:
    async with lane() as executor:
        await executor.submit(identity, 1)
        signs = Signs(executor)
        running: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        executor.start(Call(1, Shipped(lambda port: (port.note("here", None), spin(60)))), running.set_result)
        await signs.of(1)
        assert executor.supply.server is not None
        executor.supply.server.kill()
        assert (await running).kind is OutcomeKind.LOST
        assert await executor.submit(identity, 2) == 2


# ------------------------------------------------------------ things that are not deaths


async def test_values_that_cannot_cross_are_named() -> None:
    async with lane(max_workers=1) as executor:
        with pytest.raises(NotShippableError, match=r"argument 0\['a'\]\[1\]"):
            await executor.submit(identity, {"a": [1, threading.Lock()]})
        with pytest.raises(NotShippableError, match=r"value\['k'\]") as caught:
            await executor.submit(lambda: {"k": threading.Lock()})
        assert any("result" in note for note in caught.value.__notes__)
        lock = threading.Lock()
        with pytest.raises(NotShippableError, match="closure lock"):
            await executor.submit(lambda: lock)
        assert await executor.submit(identity, 1) == 1


@pytest.mark.parametrize(
    ("error", "args", "seen"),
    [
        (ValueError, ("x",), ValueError),
        (NoReturn, (1, 2), Exception),
        (Hostile, (1, 2), Exception),
        (SystemExit, (3,), SystemExit),
        (KeyboardInterrupt, (), KeyboardInterrupt),
        (GeneratorExit, (), GeneratorExit),
        (StopIteration, (5,), RuntimeError),
    ],
)
async def test_any_exception_is_that_calls_error(error: Any, args: Any, seen: Any) -> None:
    async with lane(max_workers=1) as executor:
        pid = await executor.submit(whoami)
        outcome = asyncio.get_running_loop().create_future()
        executor.start(Call(1, Shipped(lambda port: raise_it(error, *args))), outcome.set_result)
        end: Outcome = await outcome
        assert end.kind is OutcomeKind.ERROR
        assert end.error is not None
        assert end.error.type.endswith(error.__name__)
        assert "raise_it" in end.error.traceback
        if issubclass(seen, Exception):  # the others would end the loop
            with pytest.raises(seen):
                await executor.submit(raise_it, error, *args)
        assert await executor.submit(whoami) == pid, "the worker must live on"


async def test_what_a_call_does_to_the_process_is_undone(tmp_path: Path) -> None:
    async with lane(max_workers=1) as executor:
        before = await executor.submit(process_state)
        await executor.submit(change_process, str(tmp_path))
        assert await executor.submit(process_state) == before
        assert await executor.submit(block_signals) == "blocked"
        assert await executor.submit(leak_threads) > 5
        assert await executor.submit(identity, 1) == 1
        assert await executor.submit(fork_and_return) == await executor.submit(whoami)


async def test_a_worker_has_no_standard_input() -> None:
    async with lane(max_workers=1) as executor:
        with pytest.raises(EOFError):
            await executor.submit(input)


async def test_output_comes_back_tagged_and_bounded() -> None:
    notes: list[tuple[int, str, Any]] = []

    def talk(port: Any) -> None:
        print("one\ntwo")
        print("to stderr", file=sys.stderr)
        logging.getLogger("mine").warning("logged %d", 1)
        warnings.warn("warned", stacklevel=1)
        sys.stdout.write("unfinished")

    async with lane(max_workers=1) as executor:
        executor.on_note = lambda call_id, kind, data: notes.append((call_id, kind, data))
        ended = asyncio.get_running_loop().create_future()
        executor.start(Call(77, Shipped(talk)), ended.set_result)
        await ended
        assert {call_id for call_id, _, _ in notes} == {77}
        texts = [data["text"] if kind == "print" else data["message"] for _, kind, data in notes]
        assert texts[:4] == ["one\n", "two\n", "to stderr\n", "logged 1"]
        assert "warned" in texts[4]
        assert texts[5:] == ["unfinished"]
        notes.clear()
        await executor.submit(flood, 20_000)
        assert 0 < sum(len(data.get("text", "")) for _, _, data in notes) < 600_000
        assert "dropped" in notes[-1][2]["message"]
        assert await executor.submit(identity, 1) == 1


# ------------------------------------------------------------ cancel


async def test_cancel_queued_running_and_forced() -> None:
    ends: dict[int, asyncio.Future[Outcome]] = {n: asyncio.get_running_loop().create_future() for n in range(1, 5)}

    def deliver(outcome: Outcome) -> None:
        ends[outcome.call_id].set_result(outcome)  # refuses a second one

    async def until(call_id: int) -> Outcome:
        return await ends[call_id]

    def cooperative(port: Any) -> str:
        port.note("here", None)
        while not port.cancelled():
            time.sleep(0.001)
        return str(port.cancel_reason())

    def watched(port: Any) -> bool:
        told = threading.Event()
        port.on_cancel(told.set)
        port.note("here", None)
        return told.wait(20)

    async with lane(max_workers=1) as executor:
        signs = Signs(executor)
        executor.start(Call(1, Shipped(cooperative)), deliver)
        executor.start(Call(2, Shipped(lambda port: 2)), deliver)
        await signs.of(1)
        assert executor.running_since(1) is not None
        executor.cancel(2, reason="not needed")
        assert (await until(2)).kind is OutcomeKind.CANCELLED
        executor.cancel(1, reason="enough, thanks")
        assert (await until(1)).value.load() == "enough, thanks"
        executor.start(Call(3, Shipped(watched)), deliver)
        await signs.of(3)
        assert executor.running_since(3) is not None
        executor.cancel(3, reason="x")
        assert (await until(3)).value.load() is True
        executor.start(Call(4, Shipped(start_children_and_hang)), deliver)
        pids = await signs.of(4)
        assert all(map(alive, pids))
        executor.cancel(4, reason="stop", force=True)
        assert (await until(4)).kind is OutcomeKind.CANCELLED
        assert await gone(pids), "what a stage started must not outlive it"
        executor.cancel(4, reason="again", force=True)
        executor.on_note = None
        assert await executor.submit(identity, 1) == 1


async def test_a_cancelled_future_frees_its_worker() -> None:
    async with lane(max_workers=1, grace=0.1) as executor:
        future = executor.submit(spin, 60)
        while executor.running_since(next(iter(executor._tasks))) is None:
            await asyncio.sleep(0.005)
        future.cancel()
        assert await asyncio.wait_for(executor.submit(identity, 1), 30) == 1


# ------------------------------------------------------------ start-up


async def test_a_pool_that_cannot_start_says_why(start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    supply = WorkerSupply(2, start_method=start_method)
    settings = supply._settings
    for module in ("launch", "link"):
        monkeypatch.setattr(f"stageflow_executors.processes.{module}.OWN_MODULES", ("missing",))
    monkeypatch.setattr(supply, "_settings", lambda: {**settings(), "sys_path": []})
    executor = ProcessExecutor(supply=supply)
    await executor.open()
    try:
        with pytest.raises(WorkerStartError, match="No module named"):
            await executor.submit(identity, 1)
        with pytest.raises(WorkerStartError):
            await executor.submit(identity, 1)
    finally:
        await executor.aclose()
        supply.close()


async def test_an_initializer_that_raises_is_a_start_failure() -> None:
    import pickle

    supply = WorkerSupply(1, initializer=pickle.dumps((os.stat, ("/does/not/exist",))))
    executor = ProcessExecutor(supply=supply)
    await executor.open()
    try:
        with pytest.raises(WorkerStartError, match="/does/not/exist"):
            await executor.submit(identity, 1)
    finally:
        await executor.aclose()
        supply.close()


# ------------------------------------------------------------ memory


async def test_no_room_for_shared_memory_is_an_error_not_a_crash() -> None:
    async with lane(max_workers=1, memory_limit=8 << 20) as executor:
        with pytest.raises(SharedMemoryFullError):
            await executor.submit(len, bytes(9 << 20))
        with pytest.raises(SharedMemoryFullError):
            await executor.submit(bytes, 9 << 20)
        assert await executor.submit(len, bytes(2 << 20)) == 2 << 20
        assert len(await executor.submit(bytes, 2 << 20)) == 2 << 20


# ------------------------------------------------------------ many kills


async def chaos(calls: int, every: float) -> None:
    """Calls while a random worker dies again and again: each ends exactly once."""
    ends: dict[int, Outcome] = {}
    attempts: dict[int, int] = {}
    finished = asyncio.Event()
    async with lane(max_workers=2, poison_limit=1000) as executor:
        work = Shipped(lambda port, n, data: (spin(0.001), n, data)[1:])
        ids = iter(range(1, 10**9))
        books: dict[int, int] = {}

        def start(n: int) -> None:
            call_id = next(ids)
            books[call_id] = n
            attempts[n] = attempts.get(n, 0) + 1
            executor.start(Call(call_id, work, (n, b"z" * (100_000 if n % 10 == 0 else 10)), short=True), deliver)

        def deliver(outcome: Outcome) -> None:
            n = books.pop(outcome.call_id)
            assert n not in ends
            if outcome.kind is OutcomeKind.LOST:
                start(n)
                return
            assert outcome.kind is OutcomeKind.OK, outcome.error
            found = outcome.value.load()
            assert found[0] == n
            ends[n] = outcome
            outcome.value = None
            if len(ends) == calls:
                finished.set()

        for n in range(calls):
            start(n)
        kills = 0
        dice = random.Random(1)
        while not finished.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(finished.wait(), every)
                break
            with suppress(IndexError, ProcessLookupError):  # none is up, or it is dead and nobody knows yet
                up = [worker.pidfd for worker in executor.supply.workers.values() if worker.ready and worker.pidfd >= 0]
                signal.pidfd_send_signal(dice.choice(up), signal.SIGKILL)
                kills += 1
        assert sorted(ends) == list(range(calls))
        assert kills > 3
        assert not books


async def test_a_payload_held_at_the_close_is_readable_until_it_is_dropped() -> None:
    gc.collect()
    before = Holdings()
    executor = ProcessExecutor(1)
    async with executor:
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        executor.start(Call(1, Shipped(lambda port: bytes(3 << 20))), done.set_result)
        from_worker = (await done).value
        from_here = executor.encode(bytes(5 << 20))
    kept = Counter(Holdings().descriptors) - Counter(before.descriptors)
    # CPython's own mapping object keeps one each, before 3.13.
    assert kept == ({} if sys.version_info >= (3, 13) else {"/memfd:stageflow": 2})
    assert executor.supply.books.live() == 2
    assert len(from_worker.load()) == 3 << 20
    assert len(from_here.load()) == 5 << 20
    from_worker.release()
    del from_here
    assert executor.supply.books.live() == 0
    del executor, done, from_worker
    gc.collect()
    assert not Holdings().beyond(before).keys() & {"shared", "descriptors"}


async def test_two_thousand_calls_while_workers_are_killed() -> None:
    await chaos(2000, 0.05)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_twenty_thousand_calls_while_workers_are_killed() -> None:
    await chaos(20_000, 0.05)


# ------------------------------------------------------------ the parent dies


@pytest.mark.parametrize("user_fork", ["", "fork"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_parent(number: int, user_fork: str, start_method: str, tmp_path: Path) -> None:
    tag = f"STAGEFLOW_TEST_TAG={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = tag.partition("=")
    script, sign = tmp_path / "parent.py", tmp_path / "sign"
    script.write_text(PARENT)
    sign.touch()
    before = shm_entries(), set(os.listdir(tmp_path))
    sign.unlink()
    parent = subprocess.Popen(
        [sys.executable, str(script), start_method, user_fork, str(sign)],
        stdout=subprocess.PIPE,
        env={**os.environ, name: value, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    assert len(tagged(tag)) >= 4
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    limit = 1 if user_fork else 0  # the user's own process lives on
    while len(tagged(tag)) > limit and time.monotonic() < end:
        time.sleep(0.01)
    left = tagged(tag)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(left) <= limit
    assert (shm_entries(), set(os.listdir(tmp_path))) == before


@pytest.mark.parametrize("state", ["starting", "idle", "retiring"])
def test_nothing_outlives_a_parent_killed_in_any_state(state: str, start_method: str, tmp_path: Path) -> None:
    tag = f"STAGEFLOW_TEST_TAG={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = tag.partition("=")
    temporary, sign = tmp_path / "tmp", tmp_path / "sign"
    temporary.mkdir()
    (tmp_path / "sf_slow.py").write_text(f"import pathlib, time\npathlib.Path({str(sign)!r}).touch()\ntime.sleep(60)")
    before = shm_entries()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_IN, start_method, state, str(sign)],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, name: value, "TMPDIR": str(temporary)},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    assert len(tagged(tag)) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert asyncio.run(gone(tagged(tag)))
    assert not tagged(tag), "something was started behind its death"
    assert (shm_entries(), list(temporary.iterdir())) == (before, [])


# ------------------------------------------------------------ parts


async def test_a_generator_sends_its_parts_in_order() -> None:
    def parts(port: Any) -> Any:
        for n in range(5):
            yield Reply(n, meta={"n": n})
        return Reply("end")

    outcomes: list[Outcome] = []
    done = asyncio.Event()

    def deliver(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.final:
            done.set()

    async with lane(max_workers=1) as executor:
        executor.start(Call(1, Shipped(parts)), deliver)
        await done.wait()
        assert [o.final for o in outcomes] == [False] * 5 + [True]
        assert [o.value.load() for o in outcomes] == [0, 1, 2, 3, 4, "end"]
        assert [o.meta for o in outcomes[:5]] == [{"n": n} for n in range(5)]
