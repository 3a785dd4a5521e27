"""What a process may forget to give back, counted; and a parent for others to kill."""

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stageflow_executors.processes.pool import ProcessExecutor


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def gone(pids: list[int], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        await asyncio.sleep(0.01)
    return False


def shm_entries() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("sf-")}


def my_children() -> set[int]:
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # a thread that has just ended
            found |= {int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
    return found


def descriptors() -> dict[str, int]:
    """What is open, by kind: sockets and pipes without their numbers."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            found[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0].removesuffix(" (deleted)")] += 1
    return found


def shared_memory() -> tuple[int, int]:
    """Mappings of our segments and pages, and the bytes of shared memory this process has in use."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    status = Path("/proc/self/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))
    return sum("memfd:stageflow" in line or "/sf-" in line for line in maps), kib * 1024


@dataclass
class Holdings:
    """All that a process may forget to give back."""

    children: set[int] = field(default_factory=my_children)
    descriptors: dict[str, int] = field(default_factory=descriptors)
    threads: set[str] = field(default_factory=lambda: {thread.name for thread in threading.enumerate()})
    shared: tuple[int, int] = field(default_factory=shared_memory)
    named: set[str] = field(default_factory=shm_entries)

    def beyond(self, before: "Holdings") -> dict[str, Any]:
        """What there is more of than before. What others left behind may go at any time."""
        more = {
            "children": self.children - before.children,
            "descriptors": Counter(self.descriptors) - Counter(before.descriptors),
            "threads": self.threads - before.threads,
            "shared": [now for now, then in zip(self.shared, before.shared, strict=True) if now > then],
            "named": self.named - before.named,
        }
        return {kind: what for kind, what in more.items() if what}


@asynccontextmanager
async def lane(**options: Any) -> AsyncIterator[ProcessExecutor]:
    """A lane that leaves nothing behind: children, descriptors, threads, mappings, bytes of shared memory."""
    options.setdefault("max_workers", 2)
    await asyncio.to_thread(int)  # asyncio's own thread pool closes the supply
    gc.collect()
    before = Holdings()
    executor = ProcessExecutor(**options)
    await executor.open()
    try:
        yield executor
    finally:
        await executor.aclose(grace=1.0)
    assert executor.supply.books.live() == 0
    assert not executor._tasks
    del executor
    gc.collect()
    assert Holdings().beyond(before) == {}


PARENT = """
import asyncio, os, subprocess, sys, time
from stageflow_executors.processes.pool import ProcessExecutor

def busy(data, sign):
    subprocess.Popen(["sleep", "60"]); subprocess.Popen(["sleep", "60"], start_new_session=True)
    open(sign, "w").close()
    while True: pass

async def main():
    async with ProcessExecutor(2, start_method=sys.argv[1]) as executor:
        await executor.submit(len, b"warm")
        executor.submit(busy, bytes(1 << 20), sys.argv[3])
        while not os.path.exists(sys.argv[3]):
            await asyncio.sleep(0.01)
        if sys.argv[2] == "fork" and not os.fork():
            time.sleep(60)
            os._exit(0)
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def tagged(tag: str) -> list[int]:
    """Pids of living processes whose environment has the tag."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if tag.encode() in Path(f"/proc/{name}/environ").read_bytes() and alive(int(name)):
                    found.append(int(name))
            except OSError:
                continue
    return found


class Signs:
    """Calls of a lane say when they have come to a point; who waits for it need not look again and again."""

    def __init__(self, executor: ProcessExecutor) -> None:
        self._said: dict[int, asyncio.Future[Any]] = {}
        executor.on_note = self._heard

    def _of(self, call_id: int) -> asyncio.Future[Any]:
        return self._said.setdefault(call_id, asyncio.get_running_loop().create_future())

    def _heard(self, call_id: int, kind: str, data: Any) -> None:
        if kind == "here" and not self._of(call_id).done():
            self._of(call_id).set_result(data)

    async def of(self, call_id: int) -> Any:
        """What the call gave with `port.note("here", ...)`."""
        return await self._of(call_id)


#: the same, killed by itself in a state named by its second argument
PARENT_IN = """
import asyncio, atexit, os, sys, time
from pathlib import Path
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply

def linger(sign):
    atexit.register(lambda: (Path(sign).touch(), time.sleep(60)))
    return bytes(1 << 20)

async def main():
    method, state, sign = sys.argv[1:]
    supply = WorkerSupply(2, start_method=method, preload=["sf_slow"] if state == "starting" else [])
    async with ProcessExecutor(supply=supply) as executor:
        call = executor.submit(linger, sign)
        await asyncio.sleep(0)
        if state == "starting":  # the fork server imports for long; a spawned worker is at its own imports
            while method == "forkserver" and not Path(sign).exists():
                await asyncio.sleep(0.01)
        else:
            kept = await call
            (lent,) = executor._lent.values()
            executor._release_worker(lent)
            if state == "retiring":
                supply.dismiss(supply.idle[0])
                while not Path(sign).exists():
                    await asyncio.sleep(0.01)
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""
