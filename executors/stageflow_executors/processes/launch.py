"""Execs a fork server, also before anything knows what it will be for.

An interpreter and its imports take longer than anything else before the first result, so the fork server should come up
beside the engine's own imports. `begin` starts one that nobody owns yet; the first supply that would start one like it
takes it over; `discard` ends one that nobody took.

May import the standard library only, without asyncio, socket and subprocess: what this module imports, the first result
waits for.
"""

from __future__ import annotations

import _socket
import marshal
import os
import sys
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

from stageflow_executors.processes.machine import THREAD_VARIABLES, usable_cores
from stageflow_executors.processes.program import Program, interpreter_flags, start

#: what every worker imports, however it is started
OWN_MODULES: Final = ("stageflow.core.lean", "stageflow_executors.processes.worker_main")

#: imported, not run as a script, which would be compiled anew at each start; found first, wherever we work. Nothing but
#: imports happens there, and the collector would walk through all of them several times
_ENTRY: Final = (
    "import sys, gc; gc.disable(); sys.path[:] = sys.argv.pop(1), *filter(None, sys.path); "
    "import forkserver; forkserver.main()"
)

_lock = threading.Lock()
_spare: Launched | None = None  # begun, and not taken yet


class Launched(NamedTuple):
    """A fork server that was exec'ed and told what to import."""

    process: Program
    control: _socket.socket
    words: int  #: where its last words can be read
    command: list[str]
    environment: dict[str, str]
    engine: int  #: pid of the process that it looks after


def environment_for(workers: int) -> dict[str, str]:
    """The environment of `workers` workers: numeric libraries share the cores among them."""
    environment = dict(os.environ)
    threads = str(max(1, usable_cores() // workers))
    for name in THREAD_VARIABLES:
        environment.setdefault(name, threads)
    environment["STAGEFLOW_IN_WORKER"] = "1"
    return environment


def begin(workers: int | None = None, modules: Sequence[str] = ()) -> None:
    """Start a fork server for up to `workers` workers (None: one per usable core), for whoever wants one first; it
    imports `modules` besides its own. Nothing happens where one waits already, or where none can be started."""
    global _spare
    with _lock:
        if _spare is None or _spare.engine != os.getpid():
            try:
                _spare = launch(environment_for(workers or usable_cores()), modules)
            except OSError:
                _spare = None  # the supply tries again, and tells


def take(environment: dict[str, str]) -> Launched | None:
    """The fork server that was begun, if it is one that `launch(environment)` would start now."""
    global _spare
    with _lock:
        spare = _spare
        if spare is None or spare.engine != os.getpid() or spare.environment != environment:
            return None
        _spare = None
        return spare


def discard() -> None:
    """End the fork server that was begun, if nobody has taken it. It has no children yet."""
    global _spare
    with _lock:
        spare, _spare = _spare, None
    if spare is not None and spare.engine == os.getpid():
        spare.control.close()
        os.close(spare.words)
        spare.process.kill()
        spare.process.wait()


def launch(environment: dict[str, str], modules: Sequence[str] = ()) -> Launched:
    """Exec a fork server and tell it what to import meanwhile. Raises OSError."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    me = -1
    try:
        me = os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        pass  # an old kernel or a sandbox: the server watches end of file and its parent's pid
    words, words_theirs = os.pipe()
    os.set_blocking(words, False)
    os.set_blocking(words_theirs, False)
    stderr = _stderr()
    passed = [fd for fd in (theirs.fileno(), me, stderr) if fd >= 0]
    arguments = [os.path.dirname(__file__), *map(str, (theirs.fileno(), me, stderr))]
    command = [sys.executable, *interpreter_flags(), "-c", _ENTRY, *arguments]
    try:
        process = start(command, environment, words_theirs, passed)
    except OSError:
        ours.close()
        os.close(words)
        raise
    finally:
        theirs.close()
        for fd in (me, stderr, words_theirs):
            if fd >= 0:
                os.close(fd)
    try:
        ours.sendall(marshal.dumps(("warm up", list(sys.path), [*OWN_MODULES, *modules])))
    except OSError:
        pass  # it ended at once: the first request finds out and says so
    return Launched(process, ours, words, command, environment, os.getpid())


def _stderr() -> int:
    """A descriptor of its own for standard error; -1 where there is none."""
    try:
        return os.dup(2)
    except OSError:
        return -1
