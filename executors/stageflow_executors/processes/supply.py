"""The supply: the fork server, the workers and the parent's shared memory of an engine. Bound to no loop, thread-safe.

Lanes borrow workers from it and give them back; one lock is taken per borrowing, never per call. Reports of the fork
server are read by whichever lane is open (`pump`).

May import `stageflow.core`, this package and the standard library; no asyncio, so that a supply can be warmed up
before a loop.
"""

from __future__ import annotations

import array
import contextlib
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from stageflow.core.errors import DefinitionError, WorkerStartError
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status
from stageflow_executors.processes.handle import Borrower, WorkerHandle, kill_group
from stageflow_executors.processes.launch import environment_for
from stageflow_executors.processes.link import ServerLink
from stageflow_executors.processes.machine import oom_kills, usable_cores, usable_memory
from stageflow_executors.processes.program import interpreter_flags
from stageflow_executors.processes.shipping import Shipping
from stageflow_executors.processes.status import StatusPage
from stageflow_executors.shm.arena import Arena, Segment, allocate, create_anonymous
from stageflow_executors.shm.lease import PARENT, Books

MAX_FAILED_STARTS: Final = 3
RETRY_STARTS_AFTER: Final = 1.0
STANDS_IN: Final = 5.0  #: seconds for which a worker that stood in is kept: calls that stand still do so in turns
TELL_IDLE_EVERY: Final = 0.05  #: seconds between two words to idle workers, of what they need not keep
FAREWELL: Final = 1.0  #: seconds that idle workers have to leave in order; the others are killed


class WorkerSupply(ServerLink):
    """Owns processes and shared memory. Close it explicitly; an interpreter exit closes what was forgotten."""

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        min_workers: int = 0,
        start_method: str | None = None,
        preload: Sequence[str] = (),
        idle_timeout: float | None = 60.0,
        inline_threshold: int = 65536,
        memory_limit: int | None = None,
        hard_limit: int | None = None,
        worker_memory_limit: int | None = None,
        max_tasks_per_child: int | None = None,
        initializer: bytes | None = None,
        memfd: bool | None = None,
        auto_preload: bool = True,
    ) -> None:
        """`preload` names modules to import before the first fork; `auto_preload` adds those of every shipped
        callable."""
        super().__init__()
        self.auto_preload = auto_preload
        self.max_workers = max_workers if max_workers is not None else usable_cores()
        if self.max_workers < 1:
            raise DefinitionError(f"max_workers must be at least 1, not {self.max_workers}")
        self.min_workers = min_workers
        default = "forkserver" if sys.platform == "linux" else "spawn"
        self.start_method = start_method or os.environ.get("STAGEFLOW_START_METHOD") or default
        if self.start_method not in ("forkserver", "spawn"):
            raise DefinitionError(
                f"start_method {self.start_method!r} is not known", hint="use 'forkserver' (own fork server) or 'spawn'"
            )
        self.preload = list(preload)
        self.idle_timeout = idle_timeout
        self.inline_threshold = min(inline_threshold, ch.MAX_MESSAGE * 2 // 3)
        self.memory_limit = memory_limit if memory_limit is not None else int(usable_memory() * 0.6)
        #: shared memory one process may have in all; None = `memory_limit`, above which nothing is kept warm
        self.hard_limit = hard_limit
        self.worker_memory_limit = worker_memory_limit
        self.max_tasks_per_child = max_tasks_per_child
        self.initializer = initializer
        self.memfd = memfd
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.shipping = Shipping()
        self.books = Books()
        self.arena = Arena(PARENT, budget=self._budget, on_segment=self._own_segment, memfd=memfd, hard=hard_limit)
        self.workers: dict[int, WorkerHandle] = {}
        self.idle: list[WorkerHandle] = []
        self.waiting: deque[Borrower] = deque()
        self.standing = 0  # calls that stand still: for each there may be a worker more
        self._stood_at = 0.0  # when that last changed
        self._told_idle_at = 0.0
        self.lanes: list[Borrower] = []
        self.closed = False
        self.broken: str | None = None
        self._broken_at = 0.0
        self._failed_starts = 0
        self._numbers = 0
        self.oom_before = oom_kills()
        _all_supplies.add(self)

    # ------------------------------------------------------------ shared memory

    @property
    def _shared_limit(self) -> int:
        """What all arenas may reserve. Where a larger hard limit is set, this is only how much is kept warm: less than
        all of it, since values also live in heaps."""
        return self.memory_limit if self.hard_limit is None else self.memory_limit * 3 // 4

    def _budget(self) -> int:
        return self._shared_limit - sum(w.page.words[status.RESERVED] for w in list(self.workers.values()))

    def _own_segment(self, segment: Segment) -> None:
        self.books.add_segment(segment.sid, segment.size, os.dup(segment.read_fd))

    def collect(self) -> None:
        """Give the parent's own blocks that nobody reads any more back to its arena."""
        for key in self.books.take_freed(PARENT):
            self.arena.free(key)
        if self.arena.closed:
            closed, self.arena.closed = self.arena.closed, []
            self.books.forget(closed)

    def set_limit(self, worker: WorkerHandle) -> None:
        """Tell `worker` how much shared memory it may hold, as far as the others leave it."""
        others = self.arena.reserved + sum(
            w.page.words[status.RESERVED] for w in list(self.workers.values()) if w is not worker
        )
        worker.page.words[status.LIMIT] = max(0, self._shared_limit - others)

    def tell_idle(self) -> None:
        """Tell workers that nobody has borrowed which of their blocks are free, and how much they may still keep: else
        one that is idle for long keeps what others need."""
        now = time.monotonic()
        if now - self._told_idle_at < TELL_IDLE_EVERY:
            return
        self._told_idle_at = now
        with self.lock:
            for worker in self.idle:
                freed = self.books.take_freed(worker.number)
                self.set_limit(worker)
                words = worker.page.words
                if freed or words[status.RESERVED] > words[status.LIMIT]:
                    with contextlib.suppress(ch.Closed):
                        worker.channel.send(ch.join([ch.encode_message([ch.FREE, freed])]))

    # ------------------------------------------------------------ workers

    def start_worker(self, lane: Borrower | None) -> WorkerHandle:
        """A new worker; usable at once (what is sent waits for it). The lock is held."""
        self._numbers += 1
        number = self._numbers
        kind = socket.SOCK_SEQPACKET if self.start_method == "forkserver" else socket.SOCK_STREAM
        page_fd = self._page()
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        output, output_theirs = os.pipe2(os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
        os.set_blocking(output, False)
        page = StatusPage(page_fd)
        channel: ch.Channel = ch.SeqChannel(ours) if kind == socket.SOCK_SEQPACKET else ch.StreamChannel(ours)
        peer = None
        try:
            if kind == socket.SOCK_SEQPACKET:
                peer = theirs.dup()
            worker = WorkerHandle(number, channel, peer, page, output)
            worker.lane = lane
            fds = [theirs.fileno(), page_fd, output_theirs]
            self._launch(worker, fds)
        except BaseException:
            channel.close()
            os.close(output)
            if peer is not None:
                peer.close()
            raise
        finally:
            theirs.close()
            os.close(page_fd)
            os.close(output_theirs)
        self.workers[number] = worker
        self.set_limit(worker)
        return worker

    def start_ahead(self, modules: Iterable[str]) -> None:
        """A worker with these modules before anybody borrows it, if there is none yet. Never raises: where none can be
        started, the first call is told why."""
        with self.lock:
            if self.closed or self.workers or self.start_method != "forkserver":
                return
            self.want(modules)
            try:
                self.idle.append(self.start_worker(None))
            except (WorkerStartError, OSError):
                return

    def _page(self) -> int:
        """Memory for a status page. Raises OSError where there is no room for it."""
        fd, read_fd = create_anonymous(status.PAGE, memfd=self.memfd)
        os.close(read_fd)
        try:
            allocate(fd, 0, status.PAGE)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _launch(self, worker: WorkerHandle, fds: list[int]) -> None:
        extra = {
            "idle_timeout": None if worker.number <= self.min_workers else self.idle_timeout,
            "initializer": self.initializer,
        }
        if self.start_method == "spawn":
            self._spawn(worker, {**self._settings(), **extra}, fds)
            return
        reason = ""
        for _ in range(2):
            if self.server is None:
                self._start_server()
            assert self.control is not None
            try:
                if not self._configured:
                    self._configure()
                elif self._preload_later:
                    self.control.sendall(marshal.dumps(("preload", self._preload_later)))
                    self.preload += self._preload_later
                    self._preload_later = []
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                self.control.sendmsg([marshal.dumps(("fork", worker.number, extra))], rights)
                return
            except OSError as error:
                reason = f"the fork server does not answer: {error}"
                self.pump()  # if it is gone: take note, and try once with a new one
                if not self.has_server():
                    reason = self._server_end
        self.start_failed(reason)
        raise _cannot_start(reason)

    def _spawn(self, worker: WorkerHandle, settings: dict[str, Any], fds: list[int]) -> None:
        from stageflow_executors.processes import spawned

        read, write = os.pipe()
        try:
            worker.process = subprocess.Popen(
                [sys.executable, *interpreter_flags(), spawned.__file__, str(worker.number), *map(str, (read, *fds))],
                stdin=subprocess.DEVNULL,
                pass_fds=(read, *fds),
                start_new_session=True,
                env=environment_for(self.max_workers),
            )
        except OSError as error:
            os.close(write)
            raise WorkerStartError(f"a worker could not be started: {error}", reason=str(error)) from error
        finally:
            os.close(read)
        with open(write, "wb") as settings_pipe:
            try:
                settings_pipe.write(marshal.dumps(settings))
            except BrokenPipeError:
                pass  # it is dead already, and its death says why
        worker.pid = worker.process.pid
        try:
            worker.pidfd = os.pidfd_open(worker.pid)
        except (AttributeError, OSError):
            pass

    def poll_ended(self, worker: WorkerHandle) -> bool:
        """Is the cause of death known? Reads it if it has arrived."""
        if worker.ended is None and worker.process is not None:
            code = worker.process.poll()
            if code is not None:
                worker.ended = (-code if code < 0 else code << 8, 0)
                if worker.pid:
                    kill_group(worker.pid)
        elif worker.ended is None:
            self.pump()
        return worker.ended is not None or worker.failed is not None

    def came_up(self, worker: WorkerHandle) -> None:
        """Its first word arrived."""
        worker.ready = True
        self._failed_starts = 0
        self.broken = None

    def start_failed(self, reason: str) -> None:
        """A worker did not come up. After three in a row the supply is broken for a while."""
        with self.lock:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._break(self.broken or reason)

    def _break(self, reason: str) -> None:
        self._failed_starts = MAX_FAILED_STARTS
        self.broken = reason
        self._broken_at = time.monotonic()

    def may_start(self) -> bool:
        """May another worker be tried? Not right after three failures in a row."""
        return self.broken is None or time.monotonic() - self._broken_at > RETRY_STARTS_AFTER

    # ------------------------------------------------------------ lending

    def borrow(self, lane: Borrower) -> WorkerHandle | None:
        """An idle worker, or a new one; None if all are lent (`lane.granted` is called later). Raises
        WorkerStartError."""
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.removed or worker.ended is not None:
                    continue
                worker.lane = lane
                return worker
            if len(self.workers) < self.max_workers + self.standing:
                if not self.may_start():
                    raise _cannot_start(self.broken or "")
                try:
                    return self.start_worker(lane)
                except OSError as error:  # no descriptors, or no memory
                    raise _cannot_start(str(error)) from error
            if lane not in self.waiting:
                self.waiting.append(lane)
            return None

    def withdraw(self, lane: Borrower) -> None:
        """`lane` needs no more workers."""
        with self.lock:
            if lane in self.waiting:
                self.waiting.remove(lane)

    def stands(self, more: int) -> None:
        """So many calls more (or less) stand still in their workers, which others may stand in for."""
        with self.lock:
            self.standing += more
            self._stood_at = time.monotonic()

    def should_give_back(self, lane: Borrower) -> bool:
        """Do other lanes wait that have fewer workers than `lane`, or none? Cheap when nobody waits."""
        if not self.waiting:
            return False
        with self.lock:
            held = lane.held()
            return any(other is not lane and (other.held() == 0 or other.held() + 1 < held) for other in self.waiting)

    def give_back(self, worker: WorkerHandle) -> None:
        """`worker` is idle and its lane has taken its readers off."""
        granted: Borrower | None = None
        with self.lock:
            worker.lane = None
            if worker.removed:
                return
            worker.idle_since = time.monotonic()
            surplus = len(self.workers) > self.max_workers + self.standing
            if surplus and worker.idle_since - self._stood_at > STANDS_IN:
                self.dismiss(worker)  # it stood in for a call that went on
            elif self.waiting:
                granted = self.waiting.popleft()
                worker.lane = granted
            else:
                self.idle.append(worker)
        if granted is not None:
            granted.granted(worker)

    def remove(self, worker: WorkerHandle) -> None:
        """It has ended. Its leases end; what it wrote lives as long as somebody reads it."""
        replacement: Borrower | None = None
        with self.lock:
            if worker.removed:
                return
            worker.removed = True
            self.workers.pop(worker.number, None)
            if worker in self.idle:
                self.idle.remove(worker)
            for key, count in worker.leases.items():
                self.books.dropped.extend([key] * count)
            worker.leases.clear()
            self.books.retire(worker.number)
            worker.close()
            if worker.process is not None:
                worker.process.wait()
            if self.waiting and not self.closed:
                replacement = self.waiting.popleft()
        if replacement is not None:
            replacement.reported(worker)

    def is_busy(self) -> bool:
        """Is any worker at a call? By what the pages say: a glance, nothing to rely on. Any thread."""
        return any(w.page.words[status.PHASE] for w in list(self.workers.values()))

    def idle_pids(self) -> list[int]:
        """Pids of all workers that are up."""
        with self.lock:
            return [w.pid for w in self.workers.values() if w.pid]

    def trim(self) -> None:
        """Return warm shared memory of the parent, and let idle workers go: the machine is short of memory."""
        self.collect()
        self.arena.trim()
        self.collect()
        with self.lock:
            for worker in self.idle[self.min_workers :]:
                self.dismiss(worker)

    def shed(self, pid: int) -> None:
        """End a worker because memory is about to run out. The attempt it runs is told so."""
        for worker in list(self.workers.values()):
            if worker.pid == pid:
                worker.shed = True
                with contextlib.suppress(OSError):  # it has just ended by itself
                    os.kill(pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    def dismiss(self, worker: WorkerHandle) -> None:
        """Say goodbye; it ends when it has done what was sent before."""
        worker.retiring = True
        if worker in self.idle:
            self.idle.remove(worker)
        try:
            worker.channel.send(ch.join([ch.encode_message([ch.BYE])]))
        except ch.Closed:
            pass

    # ------------------------------------------------------------ end

    def close(self, timeout: float = 5.0) -> None:
        """End every process and give everything back; results handed out stay valid. Idempotent, any thread."""
        if os.getpid() != self.pid:
            return
        with self.lock:
            if self.closed:
                return
            self.closed = True
            workers = list(self.workers.values())
            self._say_goodbye(min(timeout, FAREWELL))
            if self.start_method == "spawn":
                self._end_spawned(workers, timeout)
            else:
                # End of file is the goodbye: the server kills and reaps every descendant, then ends.
                self._end_server(timeout)
            for worker in workers:
                worker.ended = worker.ended or (signal.SIGKILL, 0)
                self.remove(worker)
            self.idle.clear()
            self.waiting.clear()
            self.collect()
            # Blocks that are still read stay mapped: the books let go of each segment with its last lease.
            self.books.retire(PARENT)
            self.books.detach()
            self.arena.close()
        _all_supplies.discard(self)

    def __del__(self) -> None:
        """Dropped without `close`: its processes end all the same, and are waited for, a moment as a rule."""
        if not getattr(self, "closed", True) and not sys.is_finalizing():
            self.close(timeout=1.0)

    def _say_goodbye(self, timeout: float) -> None:
        """Let idle workers leave in order: what stages opened there is closed, what they buffered is written."""
        leaving = list(self.idle)
        for worker in leaving:
            self.dismiss(worker)
        ends = select.poll()
        for worker in leaving:
            if worker.pidfd >= 0:
                ends.register(worker.pidfd, select.POLLIN)
        unseen = [worker for worker in leaving if worker.pidfd < 0]  # their ends are reported, or asked for
        if unseen and self.control is not None:
            ends.register(self.control, select.POLLIN)
        seen = {worker.pidfd for worker in leaving if worker.pidfd >= 0}
        deadline = time.monotonic() + timeout
        while (seen or unseen) and (left := deadline - time.monotonic()) > 0:
            for pidfd, _ in ends.poll(left * 1000.0 if not unseen or self.control is not None else 5.0):
                if pidfd in seen:
                    ends.unregister(pidfd)
                    seen.discard(pidfd)
            unseen = [worker for worker in unseen if not self.poll_ended(worker)]

    def _end_spawned(self, workers: Iterable[WorkerHandle], timeout: float) -> None:
        for worker in workers:
            worker.kill()
            if worker.pid:
                kill_group(worker.pid)
        for worker in workers:
            if worker.process is not None:
                try:
                    worker.process.wait(timeout)
                except subprocess.TimeoutExpired:
                    continue

    def after_fork(self) -> None:
        """In a child of the user's making: drop what belongs to the parent, without a goodbye."""
        self.lock = threading.RLock()
        self.closed = True
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        self.idle.clear()
        self.waiting.clear()
        if self.control is not None:
            self.control.close()
            self.control = None
        if self._words >= 0:
            os.close(self._words)
            self._words = -1
        self.server = None
        self.books.after_fork()


def _cannot_start(reason: str) -> WorkerStartError:
    return WorkerStartError(
        f"no worker process can be started: {reason}",
        hint="the text above is what the worker or the fork server said",
        reason=reason,
    )


_all_supplies: weakref.WeakSet[WorkerSupply] = weakref.WeakSet()


def _close_all() -> None:
    for supply in list(_all_supplies):
        supply.close(timeout=2.0)


def _forget_all() -> None:
    for supply in list(_all_supplies):
        supply.after_fork()
    _all_supplies.clear()


_register: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if _register is not None:
    _register(after_in_child=_forget_all)

import atexit  # noqa: E402  (registered last, so that it runs before the handlers of what was imported above)

atexit.register(_close_all)
