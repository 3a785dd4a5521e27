"""A child program: what it is given, how it ends, and that it is what `subprocess` would have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from stageflow_executors.processes import program
from stageflow_executors.processes.supply import WorkerSupply

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")

SAYS = """
import os, sys
passed = int(sys.argv[1])
os.write(passed, b"passed")
told = [os.read(0, 1), os.getsid(0) == os.getpid(), os.environ.get("ONLY"), "PATH" in os.environ]
os.write(2, repr(told).encode())
"""


@pytest.fixture(params=["spawn", "subprocess"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to start one."""
    if request.param == "subprocess":
        monkeypatch.setattr(program, "_passes_descriptors", lambda: False)


def isolated(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text]


def test_it_has_what_it_was_given(way: None) -> None:
    read, write = os.pipe()
    said, says = os.pipe()
    started = program.start([*isolated(SAYS), str(write)], {"ONLY": "this"}, says, [write])
    os.close(write)
    os.close(says)
    assert started.wait() == 0
    assert os.read(read, 100) == b"passed"
    assert os.read(said, 1000) == b"[b'', True, 'this', False]"
    os.close(read)
    os.close(said)


def test_a_signal_that_python_ignores_is_not_ignored_there(way: None) -> None:
    assert program.start(["/bin/sh", "-c", "kill -PIPE $$; exit 3"], {}, 2, []).wait() == -signal.SIGPIPE


def test_a_program_that_is_not_there_is_an_error(way: None) -> None:
    with pytest.raises(FileNotFoundError):
        program.start(["/no/such/program"], {}, 2, [])


@pytest.mark.parametrize("pidfd", [True, False])
def test_waiting_ends_by_itself_or_with_the_program(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    started = program.start(isolated("import time; time.sleep(60)"), {}, 2, [])
    assert started.wait(0.01) is None
    started.kill()
    assert started.wait(30) == -signal.SIGKILL
    started.kill()  # nothing any more
    assert started.wait() == -signal.SIGKILL


def test_somebody_else_may_have_waited_for_it() -> None:
    started = program.start(isolated("pass"), {}, 2, [])
    os.waitpid(started.pid, 0)
    assert started.wait() == 0


@pytest.mark.parametrize("flags", [[], ["-O"], ["-B"], ["-I"], ["-E", "-s"], ["-W", "error"], ["-X", "dev"], ["-P"]])
def test_its_interpreter_has_our_flags(flags: list[str]) -> None:
    text = (
        "import subprocess; from stageflow_executors.processes.program import interpreter_flags as ours;"
        "assert ours() == subprocess._args_from_interpreter_flags(), ours()"
    )
    done = subprocess.run([sys.executable, *flags, "-c", text], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_fork_server_keeps_no_descriptor_that_was_not_meant_for_it() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    supply = WorkerSupply(1)
    try:
        supply.prestart()
        os.close(write)
        assert os.read(read, 1) == b""  # it would wait for ever
    finally:
        supply.close()
        os.close(read)
