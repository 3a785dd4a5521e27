"""Workers and fork servers that do not come up: counted, named with the real reason, never waited for without end."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from stageflow.core.errors import WorkerStartError
from stageflow_executors.futures import ProcessPoolExecutor
from stageflow_executors.processes import lending
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply

Broken = Callable[[str], str]


@pytest.fixture
def broken_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Sets `sys.executable` to a program with these lines; gives back the real one."""

    def replace(lines: str) -> str:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        real = sys.executable
        monkeypatch.setattr(sys, "executable", str(program))
        return real

    return replace


async def refused(executor: ProcessExecutor, calls: int = 5) -> str:
    """The one text with which every call fails."""
    ends = await asyncio.gather(*[executor.submit(abs, -n) for n in range(calls)], return_exceptions=True)
    assert all(isinstance(end, WorkerStartError) for end in ends), ends
    texts = {str(end) for end in ends}
    assert len(texts) == 1
    return texts.pop()


async def test_a_fork_server_that_always_dies_fails_the_calls_and_is_tried_again_later(
    broken_interpreter: Broken, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    real = broken_interpreter(f"echo >> {starts}; echo libpython: cannot open shared object >&2; exit 127")
    async with ProcessExecutor(2) as executor:
        text = await refused(executor)
        assert "the fork server ended with status 127: libpython: cannot open shared object" in text
        monkeypatch.setattr("stageflow_executors.processes.supply.RETRY_STARTS_AFTER", 600.0)
        tried = starts.stat().st_size
        assert tried > 0
        assert "status 127" in await refused(executor)
        assert starts.stat().st_size == tried, "it was tried again at once"
        monkeypatch.setattr(sys, "executable", real)
        monkeypatch.setattr("stageflow_executors.processes.supply.RETRY_STARTS_AFTER", 0.0)
        assert await executor.submit(abs, -3) == 3


@pytest.mark.parametrize(("lines", "said"), [("kill -9 $$", "SIGKILL"), ("exec 1>&- 2>&-; exit 0", "status 0")])
async def test_a_fork_server_that_dies_without_a_word_is_named_too(
    broken_interpreter: Broken, lines: str, said: str
) -> None:
    broken_interpreter(lines)
    async with ProcessExecutor(1) as executor:
        assert said in await refused(executor)


async def test_two_lanes_hear_of_the_same_dead_servers(broken_interpreter: Broken) -> None:
    broken_interpreter("exit 3")
    supply = WorkerSupply(1)
    async with ProcessExecutor(supply=supply) as first, ProcessExecutor(supply=supply) as second:
        for text in await asyncio.gather(refused(first), refused(second)):
            assert "status 3" in text
    supply.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os; os._exit(9)", "the fork server ended with status 9: while it imported sf_fatal"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV: while it imported sf_fatal"),
    ],
)
async def test_an_import_that_kills_the_server_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    (tmp_path / "sf_fatal.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    async with ProcessExecutor(2, preload=["sf_fatal"]) as executor:
        assert said in await refused(executor)


async def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = tmp_path / "sign"
    (tmp_path / "sf_hangs.py").write_text(f"import time; open({str(sign)!r}, 'w').close(); time.sleep(600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("stageflow_executors.processes.supply.MAX_FAILED_STARTS", 1)
    async with ProcessExecutor(1, preload=["sf_hangs"]) as executor:
        waiting = asyncio.create_task(refused(executor))
        while not sign.exists():
            await asyncio.sleep(0.005)
        (lent,) = executor._lent.values()
        assert lent.start_timer is not None
        assert 0 < lent.start_timer.when() - asyncio.get_running_loop().time() <= lending.START_WITHIN
        lent.start_timer._run()  # as if the minute were over
        text = await waiting
        assert "did not come up within 60 s" in text
        assert "while it imported sf_hangs" in text


async def test_an_interpreter_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    for start_method in ("forkserver", "spawn"):
        async with ProcessExecutor(1, start_method=start_method) as executor:
            assert "No such file" in await refused(executor)


@pytest.mark.parametrize("lines", ["exit 7", None])
def test_futures_of_a_pool_that_cannot_start_end(
    broken_interpreter: Broken, monkeypatch: pytest.MonkeyPatch, lines: str | None
) -> None:
    if lines is None:
        monkeypatch.setattr(sys, "executable", "/does/not/exist")
    else:
        broken_interpreter(lines)
    with ProcessPoolExecutor(2) as pool:
        for future in [pool.submit(abs, -n) for n in range(50)]:
            with pytest.raises(BrokenProcessPool, match="status 7" if lines else "No such file"):
                future.result(30)


def test_futures_end_when_their_loop_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: ProcessExecutor) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ProcessExecutor, "open", refuse)
    with ProcessPoolExecutor(1) as pool:
        for _ in range(3):
            with pytest.raises(BrokenProcessPool, match="Too many open files"):
                pool.submit(abs, -1).result(20)


async def test_the_server_speaks_on_the_real_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only until it runs are its words kept back."""
    (tmp_path / "sf_says.py").write_text("import sys; print('said at import', file=sys.stderr)")
    monkeypatch.syspath_prepend(str(tmp_path))
    real, log = os.dup(2), tmp_path / "stderr"
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            async with ProcessExecutor(1, preload=["sf_says"]) as executor:
                assert await executor.submit(abs, -1) == 1
        finally:
            os.dup2(real, 2)
            os.close(real)
    assert log.read_text() == "said at import\n"


FIRST_RUN = """
import subprocess
import sys
import threading

from stageflow import DefinitionError, PipelineBuilder, StageKind
from stageflow_executors.processes import launch

found = []
real = launch.launch


def noticed(environment, modules=()):
    found.append("asyncio" in sys.modules)
    return real(environment, modules)


launch.launch = noticed


def double(number):
    return 2 * number


def children():
    with open("/proc/self/task/%d/children" % threading.get_native_id()) as listed:
        return len(listed.read().split())


if __name__ == "__main__":
    lock = threading.Lock()
    graph = PipelineBuilder("first").stage("double", double, kind=StageKind.TRANSFORM).build()
    held = PipelineBuilder("held").stage("stuck", lambda number: (lock, number)[1], kind=StageKind.TRANSFORM).build()
    try:
        graph.run({}, processes=1)
    except DefinitionError:
        print(found, children())
    print(graph.run({"number": 21}, processes=1).data("double"), found, children())
    print(held.run({"number": 21}, processes=1).data("stuck"), children())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux's")
def test_the_first_fork_server_is_on_its_way_before_asyncio_is_imported_and_never_left_over(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(FIRST_RUN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    # before asyncio the first time; one for nothing where the input is missing, taken over where it is needed, and
    # ended where the stage turns out to be one that cannot be sent
    assert done.stdout.splitlines() == ["[False] 0", "42 [False, True] 0", "21 0"], done.stderr


def _pid_and_module(name: str) -> tuple[int, bool]:
    return os.getpid(), name in sys.modules


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux's")
async def test_a_worker_started_ahead_is_the_one_that_is_borrowed_and_has_its_modules() -> None:
    supply = WorkerSupply(2)
    supply.start_ahead(["colorsys"])
    supply.start_ahead(["wave"])  # there is one already
    (ahead,) = supply.workers.values()
    async with ProcessExecutor(supply=supply) as lane:
        pid, there = await lane.submit(_pid_and_module, "colorsys")
        assert (pid, there) == (ahead.pid, True)
        assert list(supply.workers.values()) == [ahead]
    supply.close()
    assert not supply.workers


def test_a_worker_that_cannot_be_started_ahead_is_no_error_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    supply = WorkerSupply(1)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    supply.start_ahead([])
    assert not supply.workers
    assert supply.may_start()
    supply.close()
