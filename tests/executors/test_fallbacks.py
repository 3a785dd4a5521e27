"""Where the system lacks something: no pidfds, no anonymous memory, hardly any memory at all."""

import asyncio
import atexit
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow.core.errors import WorkerDiedError
from stageflow.core.executor import Call, Outcome, OutcomeKind, Shipped
from stageflow_executors.processes import death, machine
from stageflow_executors.processes.supply import WorkerSupply
from tests.executors.leaks import PARENT, Signs, alive, gone, lane, shm_entries, tagged


@pytest.fixture(params=["forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------ no pidfds


@pytest.fixture
def no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an old kernel or in a sandbox. The fork server is told; a spawned worker falls back by itself."""
    monkeypatch.delattr(os, "pidfd_open")


def leave_at_exit(path: str) -> None:
    atexit.register(Path(path).write_text, "left in order")


@pytest.mark.usefixtures("no_pidfd")
async def test_deaths_are_heard_without_pidfds(start_method: str, tmp_path: Path) -> None:
    async with lane(start_method=start_method) as executor:
        assert await executor.submit(abs, -1) == 1
        assert all(worker.pidfd < 0 for worker in executor.supply.workers.values())
        with pytest.raises(WorkerDiedError) as caught:
            await executor.submit(signal.raise_signal, signal.SIGSEGV)
        assert caught.value.signal == signal.SIGSEGV
        with pytest.raises(WorkerDiedError) as caught:
            await executor.submit(os._exit, 5)
        assert caught.value.exit_code == 5
        pid = await executor.submit(os.getpid)
        os.kill(pid, signal.SIGKILL)  # an idle one
        assert await executor.submit(os.getpid) != pid
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        signs = Signs(executor)
        executor.start(Call(9, Shipped(lambda port: (port.note("here", None), time.sleep(60)))), done.set_result)
        await signs.of(9)
        executor.cancel(9, reason="enough", force=True)
        assert (await done).kind is OutcomeKind.CANCELLED
        assert await executor.submit(abs, -2) == 2


@pytest.mark.usefixtures("no_pidfd")
async def test_idle_workers_leave_in_order_without_pidfds(start_method: str, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    supply = WorkerSupply(1, start_method=start_method)
    async with lane(supply=supply) as executor:
        await executor.submit(leave_at_exit, str(sign))
        executor._release_worker(next(iter(executor._lent.values())))
        await asyncio.to_thread(supply.close)
    assert sign.read_text() == "left in order"


WITHOUT_PIDFD = "import os\ndel os.pidfd_open\n" + PARENT


def test_nothing_outlives_the_parent_without_pidfds(start_method: str, tmp_path: Path) -> None:
    tag = uuid.uuid4().hex
    script = tmp_path / "parent.py"
    script.write_text(WITHOUT_PIDFD)
    parent = subprocess.Popen(
        [sys.executable, str(script), start_method, "", str(tmp_path / "sign")],
        stdout=subprocess.PIPE,
        env={**os.environ, "SF_TAG": tag},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    assert len(tagged(f"SF_TAG={tag}")) >= 4
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert asyncio.run(gone(tagged(f"SF_TAG={tag}")))


# ------------------------------------------------------------ /dev/shm of one megabyte


SMALL_SHM = """
import asyncio, os, sys
from stageflow.core.errors import SharedMemoryFullError
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply
def make(n): return bytes(n)
async def refused(executor, *call):
    try: await executor.submit(*call)
    except SharedMemoryFullError: return True
    return False
async def main():
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 1 << 20
    memfd = False if sys.argv[1] == "named" else None
    supply = WorkerSupply(2, memfd=memfd)
    async with ProcessExecutor(supply=supply) as executor:
        print(await executor.submit(len, bytes(200_000)), len(await executor.submit(make, 200_000)))
        print(await refused(executor, len, bytes(5 << 20)), await refused(executor, make, 5 << 20))
        print([await executor.submit(len, bytes(150_000)) for _ in range(20)] == [150_000] * 20)
    supply.close()
    print(os.listdir("/dev/shm"), flush=True)
    if sys.argv[2:]:
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""


@pytest.fixture
def in_small_shm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script where /dev/shm holds one megabyte: in a mount namespace of its own."""
    inside = 'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 99; "$@"; code=$?; ls -A /dev/shm; exit $code'
    for flags in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        command = ["unshare", *flags, "sh", "-c", inside, "sh"]
        try:
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                break
        except FileNotFoundError:
            continue
    else:
        pytest.skip("mount namespaces are not allowed here, so /dev/shm cannot be made small")

    def run(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(text)
        return subprocess.run(
            [*command, sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=100
        )

    return run


def test_a_small_shm_is_an_error_for_what_does_not_fit(in_small_shm: Any) -> None:
    done = in_small_shm(SMALL_SHM, "named")
    assert done.stdout.splitlines() == ["200000 200000", "True True", "True", "[]"], done.stderr
    assert done.returncode == 0


def test_a_small_shm_does_not_bind_anonymous_memory(in_small_shm: Any) -> None:
    done = in_small_shm(SMALL_SHM, "anonymous")
    assert done.stdout.splitlines() == ["200000 200000", "False False", "True", "[]"], done.stderr


def test_a_killed_parent_leaves_a_small_shm_empty(in_small_shm: Any, tmp_path: Path) -> None:
    text = PARENT.replace("ProcessExecutor(2, start_method=sys.argv[1])", "ProcessExecutor(supply=supply)")
    text = text.replace("bytes(1 << 20)", "bytes(1 << 17)")
    text = text.replace('print("ready", flush=True)', "os.kill(os.getpid(), 9)")
    text = text.replace("async def main():", "async def main():\n    supply = WorkerSupply(2, memfd=False)")
    done = in_small_shm(
        "from stageflow_executors.processes.supply import WorkerSupply\n" + text, "forkserver", "", tmp_path / "sign"
    )
    assert (done.stdout, done.returncode) == ("", 128 + 9), done.stderr


def test_a_full_system_refuses_a_worker_and_says_so(in_small_shm: Any) -> None:
    """Not even a status page has room: an error now, no SIGBUS later."""
    text = """
import asyncio
from stageflow.core.errors import WorkerStartError
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply
async def main():
    filler = __import__("os").open("/dev/shm/filler", 65)
    try:
        while __import__("os").write(filler, b"x" * 4096): pass
    except OSError: pass
    supply = WorkerSupply(1, memfd=False)
    async with ProcessExecutor(supply=supply) as executor:
        try: await executor.submit(abs, -1)
        except WorkerStartError as error: print(error.message)
        __import__("os").unlink("/dev/shm/filler")
        __import__("os").close(filler)
        print(await executor.submit(abs, -1))
    supply.close()
asyncio.run(main())
"""
    done = in_small_shm(text)
    assert done.stdout.splitlines() == [
        "no worker process can be started: [Errno 28] No space left on device",
        "1",
    ], done.stderr


# ------------------------------------------------------------ out of memory


HOARD = """
import asyncio, ctypes, os, signal
from stageflow.core.errors import WorkerDiedError
from stageflow_executors.processes.pool import ProcessExecutor
def hoard(): return len(b"x" * (600 << 20))
async def death(executor, *call):
    try: await executor.submit(*call)
    except WorkerDiedError as error: return error.signal, error.oom_killed
async def main():
    async with ProcessExecutor(1) as executor:
        print(await death(executor, ctypes.string_at, 0))
        print(await death(executor, signal.raise_signal, 9))
        print(await death(executor, hoard))
        print(await death(executor, ctypes.string_at, 0))
        print(await executor.submit(abs, -1))
asyncio.run(main())
"""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup that allows 300 MB, or a skip that says why there is none."""
    made: list[Path] = []
    for folder in [*machine._memory_folders(), *machine._cgroup_folders()]:
        path = Path(folder) / f"stageflow-test-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir()
            made.append(path)
            limit = "memory.limit_in_bytes" if "/cgroup/memory" in folder else "memory.max"
            (path / limit).write_text(str(300 << 20))
            break
        except OSError:
            continue
    else:
        for path in made:
            path.rmdir()
        pytest.skip("no cgroup with a memory limit can be made here")
    yield made[-1]
    for path in made:
        end = time.monotonic() + 10
        while (path / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.01)  # what was killed there is still being buried
        path.rmdir()


def test_a_kill_for_want_of_memory_is_told_from_others(small_cgroup: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(HOARD)
    enter = f'echo $$ > {small_cgroup}/cgroup.procs && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, str(script)], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines() == [
        "(11, False)", "(9, False)", "(9, True)", "(11, False)", "1",
    ], done.stderr  # fmt: skip


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.events": "oom 3\noom_kill 2\n"}, 2),
        (
            {
                "/proc/self/cgroup": "4:memory:/x/y\n0::/\n",
                "/sys/fs/cgroup/memory/x/y/memory.oom_control": "under_oom 0\noom_kill 7\n",
                "/sys/fs/cgroup/memory/memory.oom_control": "oom_kill 1\n",
                "/proc/vmstat": "oom_kill 9\n",
            },
            7,
        ),
        (
            {
                "/proc/self/cgroup": "9:cpu,memory:/docker/of/the/host\n",
                "/sys/fs/cgroup/memory/memory.oom_control": "oom_kill 4\n",
            },
            4,
        ),
        ({"/proc/self/cgroup": "", "/proc/vmstat": "nr_free_pages 1\noom_kill 5\n"}, 5),
        ({}, 0),
    ],
)
def test_the_kernels_counter_is_found(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.oom_kills() == expected


async def test_a_refused_allocation_is_the_calls_error_and_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_AS makes the allocator fail instead of the kernel kill: an error of the call, and a counter moved by
    somebody else blames nobody."""
    monkeypatch.setattr(death, "oom_kills", lambda: 10**9)
    async with lane(max_workers=1) as executor:
        pid = await executor.submit(os.getpid)
        limit = "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (1 << 30, 1 << 30))"
        await executor.submit(eval, limit)
        with pytest.raises(MemoryError):
            await executor.submit(eval, "b'x' * (2 << 30)")
        assert await executor.submit(os.getpid) == pid
        with pytest.raises(WorkerDiedError) as caught:
            await executor.submit(signal.raise_signal, signal.SIGSEGV)
        assert not caught.value.oom_killed


def test_what_these_tests_started_is_gone() -> None:
    assert not any(name.startswith("sf-") for name in shm_entries())
    assert alive(os.getpid())
