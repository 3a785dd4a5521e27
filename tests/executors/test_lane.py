"""The process lane as its users meet it: what a worker holds, who may share it, how it grows and shrinks."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stageflow.core.errors import DefinitionError, LaneClosedError
from stageflow.core.executor import Call, Outcome, Shipped
from stageflow_executors.processes import status
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply

FORBIDDEN = {
    *(
        "numpy",
        "rich",
        "click",
        "opentelemetry",
        "uvloop",
        "asyncio",
        "multiprocessing",
        "psutil",
        "tenacity",
        "pyarrow",
    ),
    *(f"stageflow.{room}" for room in ("scheduler", "runtime", "cli", "report", "pipeline", "store", "observability")),
}


def whoami() -> int:
    return os.getpid()


def spin(seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return os.getpid()


def run_script(tmp_path: Path, text: str, *arguments: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(text)
    found = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_fresh_worker_is_bare(tmp_path: Path, start_method: str) -> None:
    modules = run_script(
        tmp_path,
        """
import asyncio, sys
from stageflow_executors.processes.pool import ProcessExecutor
async def main():
    async with ProcessExecutor(1, start_method=sys.argv[1]) as executor:
        print(*sorted(await executor.submit(eval, "list(__import__('sys').modules)")))
asyncio.run(main())
""",
        start_method,
    ).split()
    assert "stageflow.core.executor" in modules
    assert not FORBIDDEN & set(modules)


def echo(port: Any, number: int) -> int:
    return number


async def test_short_calls_of_one_turn_share_frames_when_every_worker_has_something_to_do() -> None:
    async with ProcessExecutor(1) as lane:
        loop, shipped = asyncio.get_running_loop(), Shipped(echo)

        async def several(first: int, count: int) -> list[int]:
            ended: list[asyncio.Future[Outcome]] = [loop.create_future() for _ in range(count)]
            for number, future in enumerate(ended, first):
                lane.start(Call(number, shipped, (number,), short=True), future.set_result)
            return [(await future).value.load() for future in ended]

        assert await several(1, 1) == [1]
        (lent,) = lane._lent.values()
        before = lent.next_frame
        lane._ewma_ns[shipped.key] = 1000.0  # whatever this machine made of it
        assert await several(10, 12) == list(range(10, 22))
        assert lent.next_frame - before <= 4  # the first at once, the others in what was left to share


async def test_few_brief_calls_are_shared_out_evenly_and_in_as_few_frames_as_there_are_workers() -> None:
    async with ProcessExecutor(2) as lane:
        loop, shipped = asyncio.get_running_loop(), Shipped(echo)

        def start(first: int, count: int) -> list[asyncio.Future[Outcome]]:
            ended: list[asyncio.Future[Outcome]] = [loop.create_future() for _ in range(count)]
            for number, future in enumerate(ended, first):
                lane.start(Call(number, shipped, (number,), short=True), future.set_result)
            return ended

        ended = start(1, 2)
        one, two = lane._lent.values()
        assert (len(one.tasks), len(two.tasks)) == (1, 1)
        lane._ewma_ns[shipped.key] = 1000.0
        ended += start(3, 5)
        lane._look()  # as at the end of the turn, before anything is heard
        assert sorted((len(one.tasks), len(two.tasks))) == [3, 4]
        assert (one.next_frame, two.next_frame) == (2, 2)
        assert [(await future).value.load() for future in ended] == list(range(1, 8))


def says_much(port: Any, times: int) -> int:
    for number in range(times):
        port.note("said", number)
    return times


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
async def test_frames_that_arrive_together_are_all_heard(start_method: str) -> None:
    async with ProcessExecutor(1, start_method=start_method) as lane:
        assert await lane.submit(abs, -1) == 1  # it is up
        said: list[int] = []
        lane.on_note = lambda _call, _kind, number: said.append(number)
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        lane.start(Call(7, Shipped(says_much), (50,)), ended.set_result)
        (worker,) = lane.supply.workers.values()
        deadline = time.monotonic() + 30
        # The loop does not turn before the worker has said everything and waits for more.
        while worker.page.words[status.LAST_DONE] != 7 or psutil.Process(worker.pid).status() != "sleeping":
            assert time.monotonic() < deadline
        outcome = await asyncio.wait_for(ended, 10)
        assert outcome.value.load() == 50
        assert said == list(range(50))


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    modules = run_script(
        tmp_path, "import stageflow_executors, stageflow_executors.futures, sys; print(*sys.modules)"
    ).split()
    heavy = {"numpy", "pyarrow", "rich", "click", "opentelemetry", "multiprocessing.shared_memory", "cloudpickle"}
    assert not heavy & set(modules)
    assert not {name for name in modules if name.startswith("stageflow.") and not name.startswith("stageflow.core")}


@pytest.mark.parametrize("guard", ["", "if __name__ == '__main__':"])
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_what_main_defines_crosses_both_ways(tmp_path: Path, start_method: str, guard: str) -> None:
    text = f"""
import asyncio, dataclasses, sys
from stageflow_executors.processes.pool import ProcessExecutor
print("imported")
@dataclasses.dataclass
class Doc:
    text: str
class Special(Doc):
    def loud(self): return helper(self.text)
def helper(text): return text.upper()
def make(text): return Special(text)
def use(doc): return doc.loud(), isinstance(doc, Doc)
async def main():
    async with ProcessExecutor(2, start_method=sys.argv[1]) as executor:
        doc = await executor.submit(make, "a")
        assert type(doc) is Special
        print(await executor.submit(use, doc), await executor.submit(lambda d: d.loud(), [Special("b")][0]))
        global Late
        class Late: pass
        Late.__qualname__ = "Late"
        print(type(await executor.submit(lambda v: v, Late())) is Late)
{guard or "if True:"}
    asyncio.run(main())
"""
    assert run_script(tmp_path, text, start_method).splitlines() == ["imported", "('A', True) B", "True"]


def test_structs_of_main_cross_both_ways(tmp_path: Path) -> None:
    text = """
import asyncio, msgspec
from stageflow_executors.processes.pool import ProcessExecutor
class Part(msgspec.Struct, frozen=True, rename="camel"):
    part_name: str
    tags: list[str] = []
class Doc(msgspec.Struct, tag="doc"):
    name: str
    part: Part | None = None
    seen: dict = msgspec.field(default_factory=dict)
    @property
    def loud(self): return self.name.upper()
    def again(self): return Doc(self.name * 2, self.part)
def use(docs):
    return [d.again() for d in docs], docs[0].loud, msgspec.json.encode(docs[0]), Doc("x") == Doc("x")
async def main():
    async with ProcessExecutor(2) as executor:
        docs = [Doc("a", Part("p")), Doc("b")]
        back, loud, text, equal = await executor.submit(use, docs)
        same = back == [d.again() for d in docs]
        print(same, type(back[0]) is Doc, loud, text == msgspec.json.encode(docs[0]), equal)
        print(await executor.submit(lambda: Part("q")) == Part("q"), await executor.submit(list, docs) == docs)
asyncio.run(main())
"""
    assert run_script(tmp_path, text).splitlines() == ["True True A True True", "True True"]


async def test_calls_outside_the_open_lane_are_refused() -> None:
    executor = ProcessExecutor(1)
    with pytest.raises(LaneClosedError):
        executor.submit(whoami)
    async with executor:
        assert await executor.submit(whoami) != os.getpid()
    with pytest.raises(LaneClosedError):
        executor.submit(whoami)
    await executor.aclose()
    with pytest.raises(DefinitionError):
        ProcessExecutor(0)
    with pytest.raises(DefinitionError):
        ProcessExecutor(1, start_method="fork")


def test_one_supply_serves_loops_one_after_the_other_and_side_by_side() -> None:
    supply = WorkerSupply(2)
    pids: set[int] = set()

    async def use(n: int) -> None:
        async with ProcessExecutor(supply=supply) as executor:
            for _ in range(n):
                pids.update(await asyncio.gather(*[executor.submit(spin, 0.002) for _ in range(8)]))

    for _ in range(3):
        asyncio.run(use(3))
    assert len(pids) <= 2, "workers must stay warm between loops"
    threads = [threading.Thread(target=lambda: asyncio.run(use(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive(), "a lane starves"
    assert len(pids) <= 2
    supply.close()
    assert supply.books.live() == 0


@pytest.mark.uvloop
async def test_two_lanes_on_one_worker_take_turns() -> None:
    supply = WorkerSupply(1)
    async with ProcessExecutor(supply=supply) as first, ProcessExecutor(supply=supply) as second:
        order: list[str] = []

        async def use(executor: ProcessExecutor, name: str) -> None:
            async def one() -> None:
                await executor.submit(spin, 0.01)
                order.append(name)

            await asyncio.gather(*[one() for _ in range(20)])

        await asyncio.gather(use(first, "a"), use(second, "b"))
        assert set(order[:12]) == {"a", "b"}, "one lane had to wait for the whole of the other"
    supply.close()


async def test_idle_workers_retire_by_themselves() -> None:
    async with ProcessExecutor(2, idle_timeout=0.2) as executor:
        first = set(await asyncio.gather(*[executor.submit(spin, 0.02) for _ in range(6)]))
        while executor.supply.workers:
            await asyncio.sleep(0.02)
            executor.supply.pump()
        second = set(await asyncio.gather(*[executor.submit(spin, 0.02) for _ in range(6)]))
        assert not first & second


async def test_recycling_by_growth_and_by_count() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    async with ProcessExecutor(1, worker_memory_limit=50 << 20) as executor:
        executor.on_worker_event = lambda name, fields: events.append((name, fields))
        pid = await executor.submit(whoami)
        await executor.submit(exec, "import sys; sys.hoard = bytearray(b'x' * (120 << 20))")
        while await executor.submit(whoami) == pid:  # the reading is at most every tenth of a second
            await asyncio.sleep(0.05)
        assert any(name == "worker.recycled" and "grew" in fields["reason"] for name, fields in events)
        assert not any(name == "worker.lost" for name, _ in events)
    async with ProcessExecutor(1, max_tasks_per_child=3) as executor:
        assert len({await executor.submit(whoami) for _ in range(9)}) == 3


async def test_a_preload_that_fails_or_starts_threads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sf_bad_import.py").write_text("raise RuntimeError('broken on purpose')")
    (tmp_path / "sf_starts_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(30,), daemon=True).start()"
    )
    (tmp_path / "sf_good.py").write_text("import os\nIMPORTED_BY = os.getpid()")
    monkeypatch.syspath_prepend(str(tmp_path))
    async with ProcessExecutor(1, preload=["sf_bad_import", "sf_starts_thread", "sf_good"]) as executor:
        server_side, worker = await executor.submit(
            eval, "(__import__('sf_good').IMPORTED_BY, __import__('os').getpid())"
        )
        assert server_side != worker, "sf_good was not imported in the fork server"
        text = "\n".join(executor.supply.problems)
        assert "sf_bad_import: RuntimeError: broken on purpose" in text
        assert "sf_starts_thread: importing it starts threads" in text
        assert await executor.submit(eval, "__import__('threading').active_count()") == 1


async def test_a_users_fork_does_not_disturb_the_pool() -> None:
    async with ProcessExecutor(1) as executor:
        pid = await executor.submit(whoami)
        child = os.fork()
        if not child:
            os._exit(0 if executor.supply.closed and not executor.supply.workers else 1)
        assert os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, child, 0))[1]) == 0
        assert await executor.submit(whoami) == pid


async def test_nested_use_and_multiprocessing_in_a_worker() -> None:
    def nested() -> tuple[str, int, int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(1) as pool:
            mapped = pool.apply(abs, (-3,))

        async def inner() -> int:
            async with ProcessExecutor(1) as executor:
                return int(await executor.submit(abs, -4))

        return os.environ["STAGEFLOW_IN_WORKER"], mapped, asyncio.run(inner())

    async with ProcessExecutor(1) as executor:
        assert await executor.submit(nested) == ("1", 3, 4)


async def test_short_calls_behind_a_long_one_go_elsewhere(tmp_path: Path) -> None:
    """A call sent ahead of need is taken back when the worker it waits for does not come to it."""
    from stageflow.core.executor import Call, Outcome, Shipped

    ends: list[int] = []
    done = asyncio.Event()
    others = asyncio.Event()

    def deliver(outcome: Outcome) -> None:
        ends.append(outcome.call_id)
        if len(ends) == 8:
            others.set()
        if len(ends) == 9:
            done.set()

    def long(port: Any, gate: str) -> None:
        while not os.path.exists(gate):
            time.sleep(0.002)

    run = Shipped(lambda port, seconds: spin(seconds))
    async with ProcessExecutor(2) as executor:
        await asyncio.gather(executor.submit(spin, 0.05), executor.submit(spin, 0.05))
        executor.start(Call(1, Shipped(long), (str(tmp_path / "gate"),), short=True), deliver)
        for n in range(2, 10):
            executor.start(Call(n, run, (0.001,), short=True), deliver)
        await others.wait()
        assert 1 not in ends
        (tmp_path / "gate").touch()
        await done.wait()
