"""The fork server: a bare process that forks workers, buries them, and leaves nothing behind when the engine dies.

Started by exec, alone and with one thread and no loop, so that it forks cheaply and cleanly (`launch.py`):

    python -c 'find this file and call main()' FOLDER CONTROL_FD ENGINE_PIDFD STDERR_FD [MODULE_NOT_TO_PRELOAD ...]

Until its first line runs, descriptor 2 is a pipe of the engine's, so that an interpreter that cannot even start has
its last words heard; STDERR_FD is the real one. The pipe goes on saying what is being imported.

It reads marshalled requests from its control socket: a configuration first, then fork requests with the worker's
descriptors. It answers `started` with a pidfd, `ended` with the wait status and peak memory (only the parent of a
process can learn those), `failed`, and `preload` with what could not be imported. Answers are queued: it never
blocks on a parent that does not read.

When the engine ends, by whatever signal (its pidfd, or end of file), it kills and reaps every descendant and exits.
Imports are interrupted for that by a timer.

May import the standard library only, and none of the package, before the first request: it is imported by path.
"""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
import marshal
import os
import resource  # noqa: F401  (os.wait4 imports it, and must not fail for want of a path)
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
LOOK_EVERY: Final = 0.25
SCM_ROOM: Final = socket.CMSG_SPACE(16 * 4)
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Linux prctl(2) with one argument."""
    if _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), "prctl")


def children() -> set[int]:
    """Pids of this single-threaded process's children: forked, adopted, and dead but not yet reaped."""
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as listed:
            return {int(pid) for pid in listed.read().split()}
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        found = set()
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/stat", "rb") as stat:
                        if int(stat.read().rpartition(b")")[2].split()[1]) == me:
                            found.add(int(name))
                except (OSError, IndexError, ValueError):
                    pass
        return found


def kill(pid: int) -> None:
    """SIGKILL a child. Its number cannot be a stranger's: nobody but us reaps it."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_group(pid: int) -> None:
    """SIGKILL the process group that a worker leads."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it had not come to its setsid yet; the sweep finds it by pid


def sweep_all() -> None:
    """Kill and reap until no child is left.

    Kills all, then reaps ONE, in turn: a child's death makes its own children ours, and those are alive.
    """
    while True:
        for pid in children():
            kill(pid)
        try:
            os.wait()
        except ChildProcessError:
            return


def thread_count() -> int:
    """Threads of this process, those of C libraries included."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def described(error: BaseException) -> str:
    """The traceback as text. Formatting one imports modules, which can fail where imports fail: then only what was
    raised."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception:
        return f"{type(error).__name__}: {error}"


class Server:
    """The one loop."""

    def __init__(self, control: socket.socket, engine: int, stderr: int, words: int, excluded: list[str]) -> None:
        self.control = control
        self.engine = engine
        self.stderr = stderr
        self.words = words  # the engine reads it when this process is dead
        self.excluded = excluded
        self.parent = os.getppid()
        self.workers: dict[int, int] = {}  # pid -> the parent's number of the worker
        self.answers: list[tuple[bytes, int]] = []  # (message, descriptor to pass and close, or -1)
        self.configured = False
        self.warm = bool(excluded)  # the first request is "warm up", which a fresh image after a re-exec has behind it
        self.settings: dict[str, Any] = {}
        self.bell, self.ringer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ------------------------------------------------------------ answers

    def answer(self, *message: Any, fd: int = -1) -> None:
        self.answers.append((marshal.dumps(message), fd))
        self.flush()

    def flush(self) -> None:
        while self.answers:
            data, fd = self.answers[0]
            extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
            try:
                self.control.sendmsg([data], extra, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                self.answers.clear()  # the engine is gone; its pidfd or end of file says so in the next turn
                return
            del self.answers[0]
            if fd >= 0:
                os.close(fd)

    def say(self, text: str) -> None:
        """Last words, in case what comes now is the end; each begins with NUL, and the last one counts."""
        try:
            os.write(self.words, f"\0{text}".encode("utf-8", "replace")[-4000:])
        except OSError:
            pass  # full, or nobody listens

    # ------------------------------------------------------------ configuration and preload

    def look_after(self, watching: bool) -> None:
        """While modules are imported, which may take long, look now and then whether the engine lives."""
        signal.signal(signal.SIGALRM, self.look if watching else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY if watching else 0, LOOK_EVERY)

    def look(self, *_: Any) -> None:
        if self.is_alone():
            self.end()

    def is_alone(self) -> bool:
        """Is the engine gone, or has it let go of us?"""
        if os.getppid() != self.settings.get("engine_pid", self.parent):
            return True
        if self.engine >= 0:
            poll = select.poll()
            poll.register(self.engine, select.POLLIN)
            if poll.poll(0):
                return True
        try:
            return not self.control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def end(self) -> None:
        """Leave nothing behind."""
        for pid in self.workers:
            kill_group(pid)
        sweep_all()
        os._exit(0)

    def warm_up(self, path: list[str], names: list[str]) -> None:
        """Import what every worker needs while the engine is still at its own imports. Failures are told by
        `configure`, which tries again.
        """
        sys.path[:] = path
        self.look_after(True)
        for name in names:
            try:
                importlib.import_module(name)
            except BaseException:
                break
        self.look_after(False)

    def configure(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        sys.path[:] = settings["sys_path"]
        try:
            os.chdir(settings["cwd"])
        except OSError:
            pass
        self.preload([*settings["own_modules"], *settings["preload"]])

    def preload(self, names: list[str]) -> None:
        """Import modules once for all workers forked from now on."""
        problems = []
        self.look_after(True)
        for name in names:
            if name in self.excluded or name in sys.modules:
                continue
            before = thread_count()
            self.say(f"while it imported {name}")
            try:
                importlib.import_module(name)
            except BaseException as error:
                if name in self.settings["own_modules"]:
                    self.answer("broken", f"cannot import {name}: {described(error)}")
                problems.append((name, f"{type(error).__name__}: {error}"))
            if thread_count() > before:
                # A fork would copy locks those threads hold.
                self.answer("threads", name)
                if not self.configured:
                    # Nothing was forked yet and the configuration is only peeked at, so a fresh image of this very
                    # process starts over, without the module.
                    self.look_after(False)  # a timer outlives an exec, its handler does not
                    os.dup2(self.words, 2)
                    os.execv(sys.executable, [*self.settings["command"], *self.excluded, name])
        self.look_after(False)
        self.say("")
        if problems:
            self.answer("preload", problems)
        gc.freeze()  # uncollected: the few unreachable objects that imports leave are shared by all workers

    # ------------------------------------------------------------ life and death of workers

    def bury(self) -> Iterator[tuple[int, int, int]]:
        """Reap what died; yield (number, wait status, peak KiB) of workers, whose group and orphans go with them."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid in self.workers:
                kill_group(dead.si_pid)  # before it is reaped: until then the number cannot be given to another
            pid, status, usage = os.wait4(dead.si_pid, 0)
            for orphan in children() - self.workers.keys():
                kill(orphan)
            number = self.workers.pop(pid, None)
            if number is not None:
                yield number, status, usage.ru_maxrss

    def fork(self, number: int, extra: dict[str, Any], fds: list[int]) -> None:
        try:
            pid = self._fork(number, extra, fds)
        except OSError as error:
            self.answer("failed", number, f"fork: {error}")
            return
        finally:
            for fd in fds:
                os.close(fd)
        self.workers[pid] = number
        pidfd = -1
        if hasattr(os, "pidfd_open") and not self.settings.get("no_pidfd"):
            try:
                pidfd = os.pidfd_open(pid)  # made here, where the pid cannot be reused
            except OSError:
                pass
        self.answer("started", number, pid, fd=pidfd)

    def _fork(self, number: int, extra: dict[str, Any], fds: list[int]) -> int:
        server = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # bound to this server's only thread
            if os.getppid() != server:
                os._exit(1)
            gc.enable()
            os.setsid()
            prctl(PR_SET_CHILD_SUBREAPER, 1)  # a stage's daemons stay below this worker while it lives
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            for fd in {
                self.engine,
                self.stderr,
                self.words,
                self.bell,
                self.ringer,
                *(fd for _, fd in self.answers),
            } - {-1}:
                os.close(fd)
            from stageflow_executors.processes import worker_main

            worker_main.main(number, {**self.settings, **extra}, fds)
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))  # sys.stderr may be a call's own
        finally:
            os._exit(1)

    # ------------------------------------------------------------ loop

    def request(self) -> bool:
        """Handle one request; False at end of file."""
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        if not self.configured and self.warm:
            flags |= socket.MSG_PEEK
        try:
            data, ancillary, _, _ = self.control.recvmsg(1 << 18, SCM_ROOM, flags)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        fds: list[int] = []
        for _, _, packed in ancillary:
            fds.extend(memoryview(packed).cast("i"))
        request = marshal.loads(data)
        if request[0] == "warm up":
            self.warm = True
            self.warm_up(request[1], request[2])
        elif request[0] == "configure":
            self.configure(request[1])
            if not self.configured:
                self.control.recv(1 << 18)  # only now: a re-exec reads it again
                self.configured = True
        elif request[0] == "preload":
            self.preload(request[1])
        elif request[0] == "fork":
            self.fork(request[1], request[2], fds)
        return True

    def serve(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's business
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        # No PDEATHSIG for the server itself: it would strike when the engine's *thread* that started it ends.
        signal.set_wakeup_fd(self.ringer)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self.bell, select.POLLIN)
        if self.engine >= 0:
            poll.register(self.engine, select.POLLIN)
        control = self.control.fileno()
        while True:
            poll.register(control, select.POLLIN | select.POLLOUT if self.answers else select.POLLIN)
            # Without a pidfd of the engine a changed parent pid tells its death, also when a user's fork keeps our
            # socket open.
            ready = dict(poll.poll(None if self.engine >= 0 else 200))
            if self.engine in ready or os.getppid() != self.settings.get("engine_pid", os.getppid()):
                break
            if self.bell in ready:
                os.read(self.bell, 4096)
                for number, status, peak in self.bury():
                    self.answer("ended", number, status, peak)
            if ready.get(control, 0) & select.POLLOUT:
                self.flush()
            if ready.get(control, 0) & ~select.POLLOUT and not self.request():
                break
        self.end()


def close_others(kept: set[int]) -> None:
    """Close what the engine's process had opened for its children, and not for us: a pipe whose end we held would never
    end."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                pass  # the folder itself


def main() -> None:
    """Serve until the engine ends."""
    sys.modules.pop("forkserver")  # found by path: the name may be a user's
    gc.disable()  # nothing but imports happens here, and the collector would walk through all of them several times
    control, engine, stderr, *_ = map(int, sys.argv[1:4])
    close_others({control, engine, stderr})
    words = os.dup(
        2
    )  # not inherited by what is exec'ed, but for a fresh image of this process, which gets it as 2 again
    os.dup2(stderr, 2)
    server = Server(socket.socket(fileno=control), engine, stderr, words, sys.argv[4:])
    try:
        server.serve()
    except BaseException as error:
        server.say(described(error))
        raise
