"""The worker: reads calls from its private channel, runs them one after the other in its main thread, reports each.

One thread unless a call needs more. Results of short calls may wait for each other, never longer than a millisecond.

May import the standard library, msgspec, `stageflow.core` and `stageflow_executors.shm` only: every worker pays for it.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from stageflow.core.errors import NotShippableError, SharedMemoryFullError, StageflowError
from stageflow.core.executor import OutcomeKind, Reply
from stageflow.core.failure import capture
from stageflow.core.worker import UnderWay
from stageflow_executors.processes import capture as capturing
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status
from stageflow_executors.processes.lookout import SHORT_NS, Lookout
from stageflow_executors.processes.port import Plain, ProcessPort
from stageflow_executors.processes.status import StatusPage
from stageflow_executors.shm import codec, fidelity
from stageflow_executors.shm.arena import Arena, Segment
from stageflow_executors.shm.lease import Mapping, Undecoded, ValueReader, address_of, export

_FLUSH_AFTER_NS: Final = 1_000_000
_QUICK_NS: Final = 50_000  #: a function that took less is not worth the system calls that the clock of CPU time costs
_LOOK_EVERY: Final = 63  #: after how many (a mask) of those the clock is read all the same, so that it is never far off
_LOOK_EVERY_MS: Final = 20  #: between two looks of a call that stands still, at whether it is to stop
_MADV_WIPEONFORK: Final = 18
_WORDS: Final = frozenset((type(None), bool, float))
_I64: Final = 1 << 63
_encode_error = msgspec.msgpack.Encoder().encode


class LocalMemory:
    """The worker's arena as the codec sees it, and the blocks it lent to the running code."""

    def __init__(self, worker: Worker, number: int, page: StatusPage, memfd: bool | None, hard: int | None) -> None:
        words = page.words

        def budget() -> int:
            return words[status.LIMIT]

        self.fresh: list[Segment] = []
        self.arena = Arena(number, budget=budget, on_segment=self.fresh.append, memfd=memfd, hard=hard)
        self._worker = worker
        self._page = page
        # Blocks handed out as buffers: address -> (block, bytes). Remote leases and the local exporter both keep a
        # block.
        self._lent: dict[int, tuple[Any, int]] = {}
        self._local: set[codec.Key] = set()
        self._remote: set[codec.Key] = set()
        self._freed: deque[tuple[codec.Key, bool, int]] = deque()

    def allocate(self, nbytes: int) -> Any:
        """A block whose one lease goes to the parent with the value."""
        self.settle()
        block = self.arena.allocate(nbytes)
        self._remote.add(block.key)
        self._page.words[status.RESERVED] = self.arena.reserved
        return block

    def copy(self, into: memoryview, data: Any) -> None:
        """By this thread alone: the other cores may have workers of their own."""
        into[:] = data

    def lend(self, nbytes: int) -> memoryview:
        """Writable memory for the running code."""
        self.settle()
        block = self.arena.allocate(max(nbytes, 1))
        self._page.words[status.RESERVED] = self.arena.reserved
        base = address_of(block.segment.memory)
        address = base + block.off
        self._local.add(block.key)
        self._lent[address] = (block, nbytes)
        view = export(block.segment.memory, base, block.off, max(nbytes, 1), self._ended_locally, block.key, address)
        return view[:nbytes]

    def _ended_locally(self, key: codec.Key, address: int) -> None:
        self._freed.append((key, True, address))  # a finalizer: no locks here

    def freed_by_parent(self, keys: list[list[int]]) -> None:
        """Nobody outside reads these any more."""
        for sid, off in keys:
            self._freed.append(((sid, off), False, 0))
        self.settle()
        self.arena.fit()
        self._page.words[status.RESERVED] = self.arena.reserved

    def settle(self) -> None:
        """Give blocks back to the arena that neither side uses."""
        while self._freed:
            key, local, address = self._freed.popleft()
            if local:
                self._local.discard(key)
                self._lent.pop(address, None)
            else:
                self._remote.discard(key)
            if key not in self._local and key not in self._remote:
                self.arena.free(key)
        self._page.words[status.RESERVED] = self.arena.reserved

    def find(self, buffer: memoryview) -> tuple[codec.Key, int] | None:
        """The lent block in which `buffer` lies."""
        if not self._lent or not buffer.nbytes:
            return None
        at = address_of(buffer)
        for address, (block, nbytes) in self._lent.items():
            if address <= at and at + buffer.nbytes <= address + nbytes:
                self._remote.add(block.key)
                return block.key, block.off + at - address
        return None


def _own_mark() -> mmap.mmap:
    """A page whose first byte is 1 here and 0 in every process forked from here; looking costs no system call."""
    mark = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mark[0] = 1
    try:
        if sys.platform != "linux":
            raise OSError
        mark.madvise(_MADV_WIPEONFORK)
    except OSError:
        os.register_at_fork(after_in_child=lambda: mark.__setitem__(0, 0))
    return mark


class Worker:
    """Everything one worker process has."""

    def __init__(self, number: int, channel: ch.Channel, page: StatusPage, settings: dict[str, Any]) -> None:
        self.number = number
        self.pid = os.getpid()
        self.own = _own_mark()
        self.channel = channel
        self.page = page
        self.threshold: int = settings["inline_threshold"]
        self.idle_timeout: float | None = settings.get("idle_timeout")
        self.memory = LocalMemory(self, number, page, settings.get("memfd"), settings.get("hard_limit"))
        self.mappings: dict[int, Mapping] = {}
        self.released: deque[codec.Key] = deque()
        self._more: tuple[int, int] | None = None  # what the last go-ahead allowed
        self.functions: dict[int, Callable[..., Any] | BaseException] = {}
        self.lock = threading.RLock()
        self.out: list[bytes] = []
        self.out_size = 0
        self.out_since = 0
        self._flusher: threading.Thread | None = None
        self._flush_wanted = threading.Event()
        self.call_id = 0  # of the call that runs
        self._messages: deque[list[Any]] = deque()  # read and not yet handled
        self._fds: list[int] = []  # that came with them
        self._handlers: dict[int, Callable[[list[Any]], None]] = {
            ch.SHIP: self._ship,
            ch.MAIN: self._main,
            ch.SEGMENTS: self._segments,
            ch.FREE: lambda message: self.memory.freed_by_parent(message[1]),
            ch.FORGET: self._forget,
            ch.GO_ON: self._allowed,
        }
        self.item: Callable[[], UnderWay] | None = None  # says where in it the call is
        self._words = page.words
        self._plain: dict[int, Callable[..., Any]] = {}  # of `functions`, those that ask nothing of the port
        self._cancels = 0  # requests seen, and whom the latest ones name
        self._unwanted: frozenset[int] = frozenset()
        self._quick: set[int] = set()  # functions that took next to no time when last called
        self._calls = 0
        self._took = SHORT_NS  # by the last call
        self._lookout = Lookout()
        self._cpu_seen = 0  # this thread's CPU time when last looked at

    # ------------------------------------------------------------ sending

    def post(self, message: Sequence[Any], *, now: bool = True) -> None:
        """Put a message in order behind the others; `now` sends everything at once. Any thread."""
        if now and not (self.out or self.released or self.memory.fresh or self.memory.arena.closed):
            frame = ch.encode_message((message,))
            if len(frame) <= ch.MAX_MESSAGE:
                with self.lock:
                    if not self.out:
                        self._send(frame, ())
                        return
        data = ch.encode_message(message)
        if len(data) > ch.MAX_MESSAGE:
            block = self.memory.allocate(len(data))
            block.view[:] = data
            data = ch.encode_message([ch.BIG, [*block.key, block.off, len(data)]])
        with self.lock:
            if self.out_size + len(data) > ch.MAX_FRAME - 1024 or len(self.out) >= 4096:
                self.flush()
            if not self.out:
                self.out_since = time.monotonic_ns()
            self.out.append(data)
            self.out_size += len(data)
            if now or time.monotonic_ns() - self.out_since > _FLUSH_AFTER_NS:
                self.flush()

    def flush_soon(self) -> None:
        """Send within about a millisecond, from a helper thread, unless something else sends before."""
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._flush_loop, name="stageflow-flush", daemon=True)
            self._flusher.start()
        self._flush_wanted.set()

    def _flush_loop(self) -> None:
        while True:
            self._flush_wanted.wait()
            self._flush_wanted.clear()
            time.sleep(0.001)
            with self.lock:
                self.flush()

    def flush(self) -> None:
        """Send what is waiting. A parent that is gone ends the process."""
        if not self.own[0]:
            return  # a process the stage forked: the channel, and what is to be told, are not its own
        with self.lock:
            out, self.out = self.out, []
            self.out_size = 0
            fds: list[int] = []
            if self.memory.fresh:
                announced, self.memory.fresh[:] = list(self.memory.fresh), []
                fds = [segment.read_fd for segment in announced]
                out.insert(0, ch.encode_message([ch.SEGMENTS, [[s.sid, s.size] for s in announced]]))
            if self.released:
                keys = []
                while self.released:
                    keys.append(self.released.popleft())
                out.append(ch.encode_message([ch.RELEASED, keys]))
            if self.memory.arena.closed:
                closed, self.memory.arena.closed = self.memory.arena.closed, []
                out.append(ch.encode_message([ch.FORGET, closed]))
            if out:
                self._send(ch.join(out), fds)

    def _send(self, frame: bytes, fds: Sequence[int]) -> None:
        if not self.own[0]:
            return  # a process the stage forked: the channel is not its own
        try:
            self.channel.send(frame, fds, wait=True)
        except ch.Closed as error:
            words = f"worker {self.pid} lost its channel: {error}; a stage must not close descriptors it did not open\n"
            with suppress(OSError):
                os.write(2, words.encode())
            os._exit(ch.MUTE)

    # ------------------------------------------------------------ loop

    def run(self) -> None:
        """Serve until the goodbye."""
        self.post([ch.READY])
        if self.idle_timeout is not None:
            seconds = max(self.idle_timeout, 0.001)
            timeout = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            self.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        messages, handlers = self._messages, self._handlers
        while True:
            if self.released:
                self.flush()
            try:
                received = None
                if self._took < SHORT_NS and self._words[status.SPARE] and self._lookout.worth():
                    received = self._lookout.look(self.channel.receive)
                if received is None:
                    received = self.channel.receive(wait=True)
            except ch.Closed:
                return
            if received is None:  # idle for so long that the socket's own timeout struck
                self.post([ch.BYE])
                return
            frame, self._fds = received
            found = ch.decode_frame(frame)
            if len(found) == 1 and found[0][0] == ch.TASK:
                self._run_call(found.pop(), last=True)
                if not messages:
                    continue
            messages.extend(found)
            while messages:
                message = messages.popleft()
                operation = message[0]
                if operation == ch.TASK:
                    self._run_call(message, last=not messages)
                elif operation == ch.BIG:
                    inner = self._big(message[1])
                    if inner is not None:
                        messages.appendleft(inner)
                elif operation == ch.BYE:
                    self.post([ch.BYE])
                    return
                else:
                    handlers[operation](message)
            if self.out:
                self.flush()

    def _allowed(self, message: list[Any]) -> None:
        """A call may go on, unless it has ended meanwhile."""
        self._more = message[2]

    def stand(self, call_id: int, stopped: Callable[[], bool]) -> tuple[int, int] | None:
        """Wait until the parent lets the running call go on, or `stopped()`. What was sent to be run after it is given
        back at once: this call may wait for just that. What is told meanwhile, as of memory that is free, is heeded."""
        if not self.own[0]:
            return None  # a process the stage forked: nobody talks to it
        self.flush()
        self._heed(self._messages, call_id)
        ready = select.poll()
        ready.register(self.channel.fileno(), select.POLLIN)
        while not stopped():
            try:
                received = self.channel.receive()
            except ch.Closed:
                os._exit(70)
            if received is None:
                ready.poll(_LOOK_EVERY_MS)
                continue
            frame, self._fds = received
            if self._heed(deque(ch.decode_frame(frame)), call_id):
                return self._more
        return None

    def _heed(self, found: deque[list[Any]], call_id: int) -> bool:
        """Handle messages that were read while a call runs; calls among them, and what lies in shared memory unopened,
        go back as if they had not been. True if the running call may go on."""
        told = False
        later: list[list[Any]] = []
        while found:
            message = found.popleft()
            if message[0] == ch.TASK:
                self.post([ch.RETURNED, message[1], 0, [], None])
            elif message[0] == ch.BIG:
                self.post([ch.RETURNED, 0, 0, [], message[1]])
            elif message[0] == ch.BYE:
                later.append(message)
            else:
                told = told or (message[0] == ch.GO_ON and message[1] == call_id)
                self._handlers[message[0]](message)
        self._messages.extend(later)
        return told

    def _segments(self, message: list[Any]) -> None:
        for sid, size in message[1]:
            self.mappings[sid] = Mapping(sid, size, self._fds.pop(0))

    def _lacks(self, call_id: int, key: int, encoded: list[Any]) -> bool:
        """Give a call back unread whose function or memory has not arrived.

        The parent took back the frame that carried it while this worker was reading the next one: two readers share
        one queue of frames, so no order between their frames can be relied on.
        """
        missing = [
            sid
            for value in encoded
            if type(value) is list
            for sid, _ in codec.blocks_of(value)
            if sid not in self.mappings
        ]
        if key in self.functions and not missing:
            return False
        self.post([ch.RETURNED, call_id, key if key not in self.functions else 0, missing, None])
        return True

    def _big(self, ref: codec.Ref) -> list[Any] | None:
        if ref[0] not in self.mappings:
            self.post([ch.RETURNED, 0, 0, [ref[0]], ref])
            return None
        reader = ValueReader(self.mappings, self.released.append)
        message = ch.decode_message(reader.peek(ref))
        reader.finish([(ref[0], ref[1])])
        return message

    def _forget(self, message: list[Any]) -> None:
        for sid in message[1]:
            mapping = self.mappings.pop(sid, None)
            if mapping is not None:
                mapping.close()

    def _main(self, message: list[Any]) -> None:
        try:
            found = pickle.loads(message[1])
        except BaseException as error:
            self.functions[0] = error
            return
        for (module, name), value in found.items():
            if module not in sys.modules:
                sys.modules[module] = types.ModuleType(module)
            setattr(sys.modules[module], name, value)

    def _ship(self, message: list[Any]) -> None:
        _, key, data = message
        try:
            function = self.functions[key] = pickle.loads(data)
        except BaseException as error:
            self.functions[key] = error
            return
        if type(function) is Plain:
            self._plain[key] = function.function

    # ------------------------------------------------------------ one call

    def _decode_args(self, encoded: list[Any], writable: int) -> Sequence[Any]:
        """Values of which some refer to shared memory. Their leases end with what is made from them."""
        args = []
        readers: list[tuple[ValueReader, tuple[codec.Key, ...]]] = []
        taken = 0
        try:
            for value in encoded:
                taken += 1
                own, writable = writable & 1, writable >> 1
                if type(value) is not list:
                    args.append(value)
                    continue
                if value[0] == codec.LAZY:
                    args.append(Undecoded(value[1], self.mappings, self.released.append, bool(own)))
                    continue
                reader = ValueReader(self.mappings, self.released.append)
                readers.append((reader, codec.blocks_of(value)))
                args.append(codec.decode(value, reader, bool(own)))
        finally:
            for value in encoded[taken:]:
                self.released.extend(codec.blocks_of(value))
            for reader, keys in readers:
                reader.finish(keys)
        return args

    def _run_call(self, message: list[Any], *, last: bool) -> None:
        _, call_id, key, flags, encoded = message
        coded = list in map(type, encoded)  # else all are exact scalars
        shared = coded and codec.any_shared(encoded)
        if (shared or key not in self.functions) and self._lacks(call_id, key, encoded):
            return
        words = self._words
        words[status.TASK] = call_id
        words[status.PHASE] = status.DECODE
        self.call_id = call_id
        started = now = time.monotonic_ns()
        clocked = key not in self._quick
        port = None
        cpu = 0
        end: list[Any] | tuple[Any, ...]
        try:
            if words[status.CANCEL_SEQ] != self._cancels:
                self._look_for_cancels()
            function: Any = self._plain.get(key)
            if function is None or call_id in self._unwanted:
                function = self._wanted(call_id, key, encoded)
                port = ProcessPort(self, call_id)
            if shared:
                args = self._decode_args(encoded, flags)
            elif coded:
                args = [
                    value if type(value) is not list else codec.decode(value, None, bool(flags >> number & 1))
                    for number, value in enumerate(encoded)
                ]
            else:
                args = encoded
            del message, encoded  # what is decoded is not held beside what it was made from
            if clocked:
                self._cpu_seen = time.thread_time_ns()
            words[status.STARTED_NS] = started = now = time.monotonic_ns()
            words[status.PHASE] = status.RUN
            try:
                if port is not None:
                    value = function(port, *args)
                else:
                    value = function(*args[1:], **args[0]) if args[0] else function(*args[1:])
                if type(value) is types.GeneratorType:
                    value = self._drive(value, call_id)
            finally:
                now = time.monotonic_ns()
                cpu = self._cpu_time(key, now - started, clocked)
                args = ()
            kind = type(value)
            if kind in _WORDS or (kind is int and -_I64 <= value < _I64):
                end = (ch.DONE, call_id, value, None, True, 8, started, now - started, cpu)
            else:
                words[status.PHASE] = status.ENCODE
                end = [*self._result(ch.DONE, call_id, value), started, now - started, cpu]
            value = None
        except BaseException as error:
            end = [*self._failure(call_id, error), started, now - started, cpu]
        self._report(call_id, port, end, last)

    def _look_for_cancels(self) -> None:
        words = self._words
        self._cancels = words[status.CANCEL_SEQ]
        self._unwanted = frozenset(words[status.CANCEL_SLOTS : status.CANCEL_SLOTS + status.SLOTS])

    def _wanted(self, call_id: int, key: int, encoded: list[Any]) -> Callable[..., Any]:
        """The function of a call that is to run; else what it refers to is released, and why it does not is raised."""
        function = self.functions.get(key)
        problem: BaseException | None = None
        if call_id in self._unwanted:
            problem = _Cancelled()
        elif function is None:
            problem = StageflowError("the function did not arrive in the worker")
        elif isinstance(function, BaseException):
            problem = function
        else:
            return function
        for value in encoded:
            self.released.extend(codec.blocks_of(value))
        raise problem

    def _report(self, call_id: int, port: ProcessPort | None, end: Sequence[Any], last: bool) -> None:
        """Tell how the call ended, and leave the process as it was before."""
        if not self.own[0]:
            os._exit(0)  # a process the stage forked came back from its function: it is not a worker
        capturing.flush_streams()
        self.call_id = 0
        words = self._words
        words[status.LAST_DONE] = call_id
        words[status.PHASE] = status.IDLE
        if port is not None:
            port.close()
            self.item = None
            doubles = self.page.doubles
            doubles[status.DONE] = doubles[status.TOTAL] = 0.0
        try:
            self.post(end, now=last)
        except (TypeError, ValueError, OverflowError, SharedMemoryFullError) as error:
            self.post([*self._failure(call_id, error, OutcomeKind.REFUSED), *end[-3:]], now=last)
        capturing.restore_process()  # behind the report: the next call is read after it

    def _cpu_time(self, key: int, took: int, clocked: bool) -> int:
        """CPU nanoseconds of a call that `took` so many of the wall clock, for which the clock was set or not."""
        self._calls += 1
        self._took = took
        if not clocked and took < _QUICK_NS:
            if not self._calls & _LOOK_EVERY:
                self._cpu_seen = time.thread_time_ns()
            return took
        before, self._cpu_seen = self._cpu_seen, time.thread_time_ns()
        if took < _QUICK_NS:
            self._quick.add(key)
        else:
            self._quick.discard(key)
        return min(took, self._cpu_seen - before)

    def _drive(self, parts: types.GeneratorType[Any, Any, Any], call_id: int) -> Any:
        """Send each yielded part; the generator's own value ends the call."""
        words = self.page.words
        try:
            while True:
                try:
                    part = next(parts)
                except StopIteration as stop:
                    return stop.value if stop.value is not None else Reply(has_value=False)
                words[status.PHASE] = status.ENCODE
                message = self._result(ch.PART, call_id, part)
                part = None
                words[status.PHASE] = status.RUN
                self.post(message, now=False)
                message = []
                self.flush_soon()
        finally:
            parts.close()

    def _result(self, operation: int, call_id: int, value: Any) -> list[Any]:
        meta = None
        try:
            if type(value) is Reply:
                if value.meta is not None:
                    meta = codec.encode(value.meta, self.memory, self.threshold).encoded
                if not value.has_value:
                    return [operation, call_id, None, meta, False, 0]
                value = value.value
            result = codec.encode(value, self.memory, self.threshold)
        except (NotShippableError, SharedMemoryFullError) as error:
            error.add_note("this is the result of the call; it had run to its end")
            raise _Refused(error) from error
        if fidelity.CHECK:
            self._check(value, result)
        return [operation, call_id, result.encoded, meta, True, result.nbytes]

    def _check(self, value: Any, result: codec.Result) -> None:
        own = [Mapping(s.sid, s.size, os.dup(s.read_fd)) for s in self.memory.arena.segments.values()]
        try:
            reader = ValueReader(self.mappings | {mapping.sid: mapping for mapping in own}, lambda key: None)
            fidelity.check(value, result.encoded, reader)
        finally:
            for mapping in own:
                mapping.close()

    def _failure(self, call_id: int, error: BaseException, kind: OutcomeKind = OutcomeKind.ERROR) -> list[Any]:
        if isinstance(error, _Cancelled):
            return [ch.FAILED, call_id, int(OutcomeKind.CANCELLED), None]
        if isinstance(error, _Refused):
            kind, error = OutcomeKind.REFUSED, error.why
        try:
            info = capture(error, lane="process", worker_pid=self.pid, skip_frames=1)
            data = _encode_error(info)
        except BaseException as broken:
            data = _encode_error(
                capture(StageflowError(f"{type(error).__name__}; describing it raised {type(broken).__name__}"))
            )
        finally:
            error.__traceback__ = None
        return [ch.FAILED, call_id, int(kind), data]


class _Cancelled(Exception):
    """The call was cancelled before it began."""


class _Refused(Exception):
    def __init__(self, why: BaseException) -> None:
        super().__init__(why)
        self.why = why


def main(number: int, settings: dict[str, Any], fds: list[int]) -> None:
    """Become a worker. `fds`: channel, status page, raw output."""
    channel_fd, page_fd, output_fd = fds
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number_, stream in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output_fd), (2, output_fd)):
        os.dup2(stream, number_)
    os.close(output_fd)
    sock = socket.socket(fileno=channel_fd)
    channel: ch.Channel = ch.SeqChannel(sock) if sock.type == socket.SOCK_SEQPACKET else ch.StreamChannel(sock)
    page = StatusPage(page_fd)
    os.close(page_fd)
    os.environ["STAGEFLOW_IN_WORKER"] = "1"
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv[:] = settings.get("argv") or [""]
    faulthandler.enable(file=2)
    worker = Worker(number, channel, page, settings)
    capturing.install(worker, settings)
    os.register_at_fork(after_in_child=channel.close)
    initializer = settings.get("initializer")
    if initializer is not None:
        function, args = pickle.loads(initializer)
        function(*args)
    worker.run()
    threads_flush()


def threads_flush() -> None:
    """Leave without waiting for threads a stage leaked; exit handlers that flush files do run."""
    import atexit

    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        pass
    os._exit(0)
