"""`ServerLink`: the supply's end of the fork server: started when needed, configured, listened to, replaced.

May import `stageflow.core`, this package and the standard library; no asyncio.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from stageflow.core.errors import WorkerStartError
from stageflow.core.executor import Shipped
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes.handle import WorkerHandle
from stageflow_executors.processes.launch import OWN_MODULES, environment_for, launch, take
from stageflow_executors.processes.program import Program
from stageflow_executors.processes.shipping import Shipping

_CONTROL_ROOM: Final = socket.CMSG_SPACE(4 * 4)


class ServerLink:
    """One fork server at a time. Thread-safe by the supply's lock."""

    auto_preload: bool
    closed: bool
    hard_limit: int | None
    inline_threshold: int
    lock: Any
    max_workers: int
    memfd: bool | None
    pid: int
    preload: list[str]
    shipping: Shipping
    start_method: str
    workers: dict[int, WorkerHandle]

    if TYPE_CHECKING:

        def remove(self, worker: WorkerHandle) -> None: ...
        def _break(self, reason: str) -> None: ...

    def __init__(self) -> None:
        self.server: Program | None = None
        self.control: socket.socket | None = None
        self.problems: list[str] = []  #: what the fork server could not preload
        self._command: list[str] = []
        self._server_end = ""  #: how the last one ended
        self._words = -1  #: where the fork server's last words can be read
        self._configured = False
        self._preload_later: list[str] = []
        self._wanted: set[str] = set()

    def prestart(self) -> None:
        """Start the fork server's interpreter now; it comes up beside the caller's imports. Cheap if it runs. Never
        raises: where it cannot start, the first call is told why."""
        with self.lock:
            if self.start_method == "forkserver" and self.server is None and not self.closed:
                try:
                    self._start_server()
                except (WorkerStartError, OSError):
                    return

    def has_server(self) -> bool:
        """Is there a fork server to listen to?"""
        return self.control is not None

    def _start_server(self) -> None:
        """Take the one that was begun for us, or start one. Raises WorkerStartError."""
        environment = environment_for(self.max_workers)
        launched = take(environment)
        if launched is None:
            try:
                launched = launch(environment)
            except OSError as error:
                raise WorkerStartError(f"the fork server could not be started: {error}", reason=str(error)) from error
        self.server, self._words, self._command = launched.process, launched.words, launched.command
        self.control = socket.socket(fileno=launched.control.detach())
        self._configured = False

    def _settings(self) -> dict[str, Any]:
        import logging

        return {
            "sys_path": list(sys.path),
            "cwd": _cwd(),
            "engine_pid": self.pid,
            "own_modules": list(OWN_MODULES),
            "preload": self.preload,
            "command": self._command,
            "inline_threshold": self.inline_threshold,
            "log_level": logging.getLogger().getEffectiveLevel(),
            "memfd": self.memfd,
            "no_pidfd": not hasattr(os, "pidfd_open"),
            "hard_limit": self.hard_limit,
            "argv": list(sys.argv),
        }

    def want_modules(self, shipped: Shipped) -> None:
        """See that workers forked from now on have the modules of `shipped` already."""
        self.want([*shipped.modules, *self.shipping.modules])

    def want(self, modules: Iterable[str]) -> None:
        """The same for modules by name."""
        fresh = [name for name in modules if name not in self._wanted] if self.auto_preload else []
        if fresh:
            with self.lock:
                self._wanted.update(fresh)
                found = [name for name in fresh if self.shipping.importable(name)]
                (self._preload_later if self._configured else self.preload).extend(found)

    def _configure(self) -> None:
        assert self.control is not None
        self.preload = [name for name in dict.fromkeys(self.preload) if self.shipping.importable(name)]
        self.control.sendall(marshal.dumps(("configure", self._settings())))
        self._configured = True

    def pump(self) -> None:
        """Read the fork server's reports, without waiting; tells the lanes concerned."""
        reported: list[WorkerHandle] = []
        with self.lock:
            while self.control is not None:
                try:
                    data, ancillary, _, _ = self.control.recvmsg(
                        65536, _CONTROL_ROOM, ch.MSG_CMSG_CLOEXEC | ch.MSG_DONTWAIT
                    )
                except BlockingIOError:
                    break
                except OSError:
                    data, ancillary = b"", []
                if not data:
                    reported.extend(self._server_lost())
                    break
                worker = self._report(marshal.loads(data), ch.unpack_fds(ancillary))
                if worker is not None:
                    reported.append(worker)
            for worker in reported:
                if worker.lane is None and (worker.ended is not None or worker.failed is not None):
                    self.remove(worker)
        for worker in reported:
            if worker.lane is not None:
                worker.lane.reported(worker)

    def _report(self, report: Sequence[Any], fds: list[int]) -> WorkerHandle | None:
        kind = report[0]
        if kind == "preload":
            self.problems.extend(f"{name}: {why}" for name, why in report[1])
        elif kind == "threads":
            self.problems.append(f"{report[1]}: importing it starts threads, so it is not preloaded")
        elif kind == "broken":
            self._break(report[1])
        worker = self.workers.get(report[1]) if kind in ("started", "ended", "failed") else None
        if worker is None:
            for fd in fds:
                os.close(fd)
            return None
        if kind == "started":
            worker.pid = report[2]
            worker.pidfd = fds[0] if fds else -1
        elif kind == "ended":
            worker.ended = (report[2], report[3])
        else:
            worker.failed = report[2]
        return worker

    def _server_lost(self) -> list[WorkerHandle]:
        """The fork server is gone, and by PDEATHSIG every worker with it."""
        reason = self._server_end = f"the fork server {_how(self._end_server(5))}"
        lost = [w for w in self.workers.values() if w.ended is None and w.failed is None]
        for worker in lost:
            if worker.pid:
                worker.ended = (signal.SIGKILL, 0)
            else:
                worker.failed = reason
        return lost

    def _end_server(self, timeout: float) -> tuple[int | None, str]:
        """Let go of the fork server, which ends at that if it lives. Its exit code and its last words."""
        if self.control is not None:
            try:
                self.control.shutdown(socket.SHUT_RDWR)  # end of file, also where a lane has a descriptor of its own
            except OSError:
                pass
            self.control.close()
            self.control = None
        server, self.server = self.server, None
        code = None
        if server is not None:
            code = server.wait(timeout)
            if code is None:
                server.kill()
                code = server.wait()
        said = self._last_words()
        if self._words >= 0:
            os.close(self._words)
            self._words = -1
        return code, said

    def _last_words(self) -> str:
        """What the fork server said of itself since it was last asked, or before it could speak properly."""
        if self._words < 0:
            return ""
        try:
            return os.read(self._words, 65536).rpartition(b"\0")[2].decode("utf-8", "replace").strip()[-2000:]
        except OSError:
            return ""

    def not_started(self, worker: WorkerHandle, seconds: float) -> None:
        """`worker` did not come up in so many seconds. A fork server that hangs and has nobody else goes as well."""
        with self.lock:
            said = self._last_words() if not worker.pid else ""
            worker.failed = f"the worker did not come up within {seconds:g} s" + (f", {said}" if said else "")
            worker.kill()
            if self.server is not None and not any(other.pid for other in self.workers.values()):
                self.server.kill()
                self.server.wait()
                self.pump()


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"


def _how(end: tuple[int | None, str]) -> str:
    """In words, how the fork server ended."""
    code, said = end
    if code is not None and code < 0:
        try:
            how = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was killed by signal {-code}"
    else:
        how = f"ended with status {code}"
    return f"{how}: {said}" if said and "\n" not in said else f"{how}; its last words:\n{said}" if said else how
