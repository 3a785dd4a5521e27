"""Calls on their way to workers: encoded, put into frames, sent when the socket has room, taken back when unread.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from stageflow.core.errors import StageflowError
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes.handle import WorkerHandle
from stageflow_executors.processes.lookout import SHORT_NS
from stageflow_executors.processes.payload import InlinePayload, ProcessPayload, encode_value
from stageflow_executors.processes.port import Plain
from stageflow_executors.processes.state import LaneState, Lent, Task
from stageflow_executors.shm import codec

BATCH_NS: Final = 1_000_000  #: work per frame of short calls
FEW: Final = 64  #: so few calls are one frame for each worker: a frame more costs both sides what a brief call takes
MAX_BATCH: Final = 64
_WORDS: Final = frozenset((type(None), bool, float))
_I64: Final = 1 << 63


class Sending(LaneState):
    """Encodes and sends. Every method runs on the lane's loop."""

    if TYPE_CHECKING:

        def _look_for(self) -> None: ...

    def _prepare(self, task: Task) -> None:
        call = task.call
        if call.shipped.key not in self.supply.shipping.known:
            self.supply.shipping.data(call.shipped)
            self.supply.want_modules(call.shipped)
        encoded: list[Any] = []
        bytes_in = 0
        for value in call.args:
            kind = type(value)
            if kind is InlinePayload:
                bytes_in += value.nbytes
                encoded.append(value.encoded)
            elif (
                kind in _WORDS
                or (kind is int and -_I64 <= value < _I64)
                or (kind is bytes and len(value) < 1024)
                or (kind is str and len(value) < 1024 and value.isascii())
            ):
                bytes_in += 8
                encoded.append(value)
            else:
                try:
                    data, nbytes = self._encoded(task, value)
                except StageflowError as error:
                    _name_argument(error, len(encoded), plain=type(call.shipped.function) is Plain)
                    raise
                bytes_in += nbytes
                encoded.append(data)
        task.bytes_in = bytes_in
        if call.lazy:
            encoded[call.lazy :] = [[codec.LAZY, one] for one in encoded[call.lazy :]]
        message = [ch.TASK, call.id, call.shipped.key, call.writable, encoded]
        data = ch.encode_message(message)
        if len(data) > ch.MAX_MESSAGE:
            data = self._big(task, data)
        task.data = data

    def _encoded(self, task: Task, value: Any) -> tuple[Any, int]:
        """An argument in its wire form, and its bytes; what it occupies of shared memory is held by `task`."""
        if type(value) is ProcessPayload:
            data, nbytes, inline, blocks = value.encoded, value.nbytes, value.inline, value.blocks
            if blocks:
                self.supply.books.lease(blocks)
        else:
            data, nbytes, inline, blocks = encode_value(self.supply, self._memory, value)
        if blocks:
            task.payloads.append(ProcessPayload(self.supply.books, data, nbytes, blocks, inline))
        return data, nbytes

    def _big(self, task: Task, data: bytes) -> bytes:
        """A message too long for a frame, laid in shared memory."""
        block = self._memory.allocate(len(data))
        block.view[:] = data
        task.payloads.append(ProcessPayload(self.supply.books, None, len(data), (block.key,), 32))
        return ch.encode_message([ch.BIG, [*block.key, block.off, len(data)]])

    def _batch(self, first: Task, lent: Lent) -> list[Task]:
        """Calls for one frame: one, or as many short ones as make about a millisecond, fewer towards the end of the
        queue.
        """
        queue = self._queue
        queue.popleft()
        batch = [first]
        if not first.short or not queue:
            return batch
        ewma = self._ewma_ns.get(first.call.shipped.key, 0.0)
        limit = 1
        if ewma > 0:
            left = len(queue)
            if left < FEW:  # as many for each worker, with what they have
                held = sum([len(other.tasks) for other in self._lent.values()])
                share = (left + held) // self._slots + 1 - len(lent.tasks)
            else:
                share = left // (2 * self._slots) + 1
            limit = min(MAX_BATCH, share, int(BATCH_NS / ewma))
        size = len(first.data)
        while len(batch) < limit and queue and queue[0].short:
            size += len(queue[0].data)
            if size > ch.MAX_MESSAGE:
                break
            batch.append(queue.popleft())
        return batch

    def _send_at_once(self, task: Task) -> bool:
        """The most frequent case by the shortest way: a worker that knows the function idles, or has just told its last
        outcome (which is why `task` comes), and nothing goes along."""
        hearing, supply = self._hearing, self.supply
        if hearing is not None and not (hearing.tasks or supply.waiting or self._watchful):
            lent = hearing
        elif self._idle:
            lent = self._idle[-1]
        else:
            return False
        handle, books = lent.handle, supply.books
        if (
            lent.tasks
            or lent.outbox
            or task.payloads
            or books.dropped
            or handle.retiring
            or lent.death is not None
            or task.call.shipped.key not in handle.functions
            or handle.main_version != supply.shipping.version
            or books.any_to_tell
            or self._lent.get(handle.number) is not lent
        ):
            return False
        if lent is not hearing:
            del self._idle[-1]
        task.worker = lent
        task.frame = lent.next_frame
        lent.tasks[task.call.id] = task
        lent.next_frame += 1
        lent.frames += 1
        try:
            if handle.channel.send(b"\x91" + task.data):
                if len(self._tasks) == 1 and len(self._lent) < self._cores:
                    self._look_out(lent, task)
                return True
        except ch.Closed:
            pass
        self._send(lent, [task.data], [])
        return True

    def _look_out(self, lent: Lent, task: Task) -> None:
        """`task` is the only one: if it is short, look for its answer in the next turns of the loop."""
        if (
            self._ewma_ns.get(task.call.shipped.key, SHORT_NS) < SHORT_NS
            and self._looked_for is None
            and self._lookout.worth()
            and self._loop is not None
        ):
            self._looked_for = lent
            self._lookout.begin()
            self._loop.call_soon(self._look_for)

    def _send_tasks(self, lent: Lent, batch: list[Task]) -> None:
        handle = lent.handle
        messages, fds = self._controls(lent)
        if self.supply.idle:
            self.supply.tell_idle()
        shipping = self.supply.shipping
        for task in batch:
            shipped = task.call.shipped
            if handle.main_version != shipping.version:
                handle.main_version = shipping.version
                messages.append(self._fit(handle, messages, fds, [ch.MAIN, shipping.bundle_data]))
            if shipped.key not in handle.functions:
                handle.functions.add(shipped.key)
                messages.append(self._fit(handle, messages, fds, [ch.SHIP, shipped.key, shipping.data(shipped)]))
            for payload in task.payloads:
                for key in payload.blocks:
                    handle.leases[key] += 1
                    if key[0] not in handle.segments:
                        self._announce(handle, messages, fds, key[0])
                self.supply.books.lease(payload.blocks)
            task.worker = lent
            task.frame = lent.next_frame
            lent.tasks[task.call.id] = task
            messages.append(task.data)
        lent.next_frame += 1
        lent.frames += 1
        self._send(lent, messages, fds)

    def _fit(self, handle: WorkerHandle, messages: list[bytes], fds: list[int], message: list[Any]) -> bytes:
        """`message` encoded; laid in shared memory if it is long."""
        data = ch.encode_message(message)
        if len(data) <= 16384:
            return data
        block = self._memory.allocate(len(data))
        block.view[:] = data
        handle.leases[block.key] += 1  # the lease that the block was born with; the worker ends it
        if block.key[0] not in handle.segments:
            self._announce(handle, messages, fds, block.key[0])
        return ch.encode_message([ch.BIG, [*block.key, block.off, len(data)]])

    def _announce(self, handle: WorkerHandle, messages: list[bytes], fds: list[int], sid: int) -> None:
        mapping = self.supply.books.mappings[sid]
        handle.segments.add(sid)
        messages.append(ch.encode_message([ch.SEGMENTS, [[sid, mapping.size]]]))
        fds.append(mapping.fd)

    def _send(self, lent: Lent, messages: list[bytes], fds: list[int]) -> None:
        frames: list[tuple[bytes, list[int]]] = []
        if sum(map(len, messages)) > ch.MAX_FRAME - 64:
            for message in messages:
                frames.append((ch.join([message]), fds))
                fds = []
        else:
            frames.append((ch.join(messages), fds))
        for frame, fds in frames:
            if lent.outbox:
                lent.outbox.append((frame, fds))
                continue
            try:
                if lent.handle.channel.send(frame, fds):
                    continue
            except ch.Closed:
                pass  # it is dying; its death requeues what it has
            lent.outbox.append((frame, fds))
            if not lent.writing and self._loop is not None:
                lent.writing = True
                self._loop.add_writer(lent.handle.channel.fileno(), self._writable, lent)

    def _writable(self, lent: Lent) -> None:
        try:
            while lent.outbox and lent.handle.channel.send(*lent.outbox[0]):
                lent.outbox.popleft()
        except ch.Closed:
            lent.outbox.clear()
        if not lent.outbox and lent.writing and self._loop is not None:
            lent.writing = False
            self._loop.remove_writer(lent.handle.channel.fileno())

    def _take_back(self, lent: Lent) -> None:
        """Read the frames the worker has not read; put their calls in front of the queue, and keep what else they
        held."""
        peer = lent.handle.peer
        if peer is None:
            return
        taken: list[Task] = []
        for frame, _ in lent.outbox:
            self._taken_frame(lent, frame, taken)
        lent.outbox.clear()
        again: list[bytes] = []
        while True:
            try:
                data, ancillary, _, _ = peer.recvmsg(
                    ch.MAX_FRAME + 4096, ch.ROOM, ch.MSG_DONTWAIT | ch.MSG_CMSG_CLOEXEC
                )
            except OSError:
                break
            if not data:
                break
            for fd in ch.unpack_fds(ancillary):
                os.close(fd)
            again.extend(self._taken_frame(lent, data, taken))
        taken.sort(key=lambda task: task.frame)
        for task in reversed(taken):
            self._queue.appendleft(task)
        if again and lent.death is None:
            self._send(lent, again, [])

    def _taken_frame(self, lent: Lent, frame: Any, taken: list[Task]) -> list[bytes]:
        """Undo what sending `frame` did to the books. Returns messages that the worker still needs."""
        handle = lent.handle
        again: list[bytes] = []
        for message in ch.decode_frame(frame):
            operation = message[0]
            if operation == ch.TASK:
                self._untake(lent, lent.tasks.get(message[1]), taken)
            elif operation == ch.SEGMENTS:
                handle.segments.difference_update(sid for sid, _ in message[1])
            elif operation == ch.SHIP:
                handle.functions.discard(message[1])
            elif operation == ch.MAIN:
                handle.main_version = -1
            elif operation == ch.BIG:
                inner = self._read_big(handle, message[1])
                self._untake_message(lent, inner, (message[1][0], message[1][1]), taken)
            else:
                again.append(ch.encode_message(message))
        return again

    def _untake_message(self, lent: Lent, inner: list[Any], key: codec.Key, taken: list[Task]) -> None:
        """Undo what sending a long message did to the books."""
        handle = lent.handle
        if inner[0] == ch.TASK:
            self._untake(lent, lent.tasks.get(inner[1]), taken)
            return
        self._released(handle, [list(key)])
        if inner[0] == ch.SHIP:
            handle.functions.discard(inner[1])
        else:
            handle.main_version = -1

    def _untake(self, lent: Lent, task: Task | None, taken: list[Task]) -> None:
        if task is None:
            return
        handle = lent.handle
        for payload in task.payloads:
            for key in payload.blocks:
                self._released(handle, [list(key)])
        self._leave(lent, task)
        handle.calls -= 1
        taken.append(task)


def _name_argument(error: StageflowError, index: int, *, plain: bool) -> None:
    """Say which argument the path inside the value belongs to."""
    path = getattr(error, "path", None)
    if path is None:
        return
    inside = path.removeprefix("value")
    if plain and index == 0:
        named = f"keyword argument {inside}"
    else:
        named = f"argument {index - plain}{inside}"
    error.message = error.message.replace(path, named, 1)
    error.args = (error.message,)
    error.__dict__["path"] = named
