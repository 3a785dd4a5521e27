"""What workers say, and how they end: outcomes, notes, released memory, deaths and their causes.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Final

import msgspec

from stageflow.core.executor import Outcome, OutcomeKind
from stageflow.core.output import ErrorInfo
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes.death import describe
from stageflow_executors.processes.handle import WorkerHandle
from stageflow_executors.processes.lending import Lending
from stageflow_executors.processes.payload import InlinePayload
from stageflow_executors.processes.state import Lent, Task

CAUSE_WITHIN: Final = 1.0  #: seconds to wait for the fork server's word on why a worker died
_OK: Final = OutcomeKind.OK
_decode_error = msgspec.msgpack.Decoder(ErrorInfo).decode


class Hearing(Lending):
    """Reads frames and deaths. Every method runs on the lane's loop."""

    def _look_for(self) -> None:
        """Is the answer there that the loop would sleep for? Else look again in its next turn, for a while."""
        lent, loop = self._looked_for, self._loop
        self._looked_for = None
        if lent is None or loop is None or not lent.tasks or len(self._tasks) > 1 or lent.death is not None:
            return
        if self._readable(lent):
            self._lookout.found()
        elif self._lookout.again():
            self._looked_for = lent
            loop.call_soon(self._look_for)

    def _readable(self, lent: Lent) -> bool:
        """Hear what is there; False if nothing was."""
        channel = lent.handle.channel
        turns = 16
        try:
            if (received := channel.receive()) is None:
                return False
            while received is not None:
                sent = lent.next_frame
                self._hearing = lent
                self._frame(lent, *received)
                turns -= 1
                due = lent.tasks and next(iter(lent.tasks.values())).frame < sent
                if channel.tells_of_all and not (due and turns):
                    break  # what comes, or is there, wakes us again
                received = channel.receive()
        except ch.Closed:
            if self._loop is not None and channel.fileno() >= 0:
                self._loop.remove_reader(channel.fileno())
            self._died(lent)
            return True
        finally:
            self._hearing = None
        if lent.handle.number in self._lent and lent.death is None:
            self._feed(lent)
        return True

    def hear(self, lent: Lent, frame: memoryview, fds: list[int]) -> None:
        """A frame that was received elsewhere."""
        if self._lent.get(lent.handle.number) is lent:
            self._frame(lent, frame, fds)

    def _feed(self, lent: Lent) -> None:
        if not lent.tasks and not lent.handle.retiring:
            if self.supply.waiting and self.supply.should_give_back(self):
                self._release_worker(lent)
                if self._queue:
                    self._dispatch()
                return
            supply = self.supply
            if (supply.max_tasks_per_child is not None or supply.worker_memory_limit is not None) and self._recycle(
                lent
            ):
                return
            self._idle.append(lent)
        if self._queue:
            self._dispatch()
        elif not lent.tasks and len(self._lent) > 1:
            self._steal(lent)
        if not lent.tasks and lent.handle.number in self._lent:
            self._became_idle(lent)

    def _steal(self, idle: Lent) -> None:
        """Nothing is queued and a worker idles: take back what another has not read yet."""
        for other in self._lent.values():
            if other is not idle and other.frames > 1 and other.handle.channel.can_take_back:
                self._take_back(other)
                if self._queue:
                    self._dispatch()
                    return

    def _frame(self, lent: Lent, frame: memoryview, fds: list[int]) -> None:
        messages = ch.decode_frame(frame)
        handle = lent.handle
        for message in messages:
            operation = message[0]
            if operation == ch.BIG:
                message = self._read_big(handle, message[1])
                operation = message[0]
            if operation == ch.DONE:
                self._done(lent, message)
            elif operation == ch.NOTE:
                if self.on_note is not None:
                    self.on_note(message[1], message[2], message[3])
            elif operation == ch.RELEASED:
                self._released(handle, message[1])
            elif operation == ch.PART:
                self._part(lent, message)
            elif operation == ch.FAILED:
                self._failed(lent, message)
            elif operation == ch.RETURNED:
                self._returned(lent, message)
            elif operation == ch.SEGMENTS:
                for sid, size in message[1]:
                    self.supply.books.add_segment(sid, size, fds.pop(0))
            elif operation == ch.READY:
                self._came_up(lent)
            elif operation == ch.FORGET:
                self.supply.books.forget(message[1])
            elif operation == ch.BYE:
                handle.said_bye = handle.retiring = True

    def _returned(self, lent: Lent, message: list[Any]) -> None:
        """The worker read a frame of which we had taken back the one before: send it again with what it lacked."""
        _, call_id, key, sids, ref = message
        handle = lent.handle
        handle.functions.discard(key)
        handle.segments.difference_update(sids)
        taken: list[Task] = []
        if ref is None:
            self._untake(lent, lent.tasks.get(call_id), taken)
        else:
            self._untake_message(lent, self._read_big(handle, ref), (ref[0], ref[1]), taken)
        for task in taken:
            self._queue.appendleft(task)
        self._dispatch()

    def _came_up(self, lent: Lent) -> None:
        if lent.start_timer is not None:
            lent.start_timer.cancel()
            lent.start_timer = None
        self.supply.came_up(lent.handle)
        self._event("worker.started", pid=lent.handle.pid, number=lent.handle.number)

    def _done(self, lent: Lent, message: list[Any]) -> None:
        _, call_id, encoded, meta, has_value, nbytes, started, took, cpu = message
        task = lent.tasks.get(call_id)
        if task is None:
            return
        value = None
        if has_value:
            value = InlinePayload(encoded, nbytes) if type(encoded) is not list else self._value(encoded, nbytes)
        self._leave(lent, task)
        key = task.call.shipped.key
        known = self._ewma_ns.get(key)
        self._ewma_ns[key] = took if known is None else known + (took - known) * 0.2
        if meta is not None:
            meta = self._meta(meta)
        # By position: with names it costs twice as much, and this is made once per call.
        self._finish(
            task,
            Outcome(
                call_id,
                _OK,
                value,
                meta,
                True,
                None,
                None,
                False,
                lent.handle.pid,
                started / 1e9,
                took / 1e9,
                cpu / 1e9,
                task.bytes_in,
                nbytes,
            ),
        )

    def _part(self, lent: Lent, message: list[Any]) -> None:
        _, call_id, encoded, meta, has_value, nbytes = message
        task = lent.tasks.get(call_id)
        if task is not None:
            value = self._value(encoded, nbytes) if has_value else None
            running, _, started = lent.handle.page.running()
            task.deliver(
                Outcome(
                    call_id,
                    OutcomeKind.OK,
                    value,
                    self._meta(meta),
                    final=False,
                    worker_pid=lent.handle.pid,
                    started=started / 1e9 if running == call_id else 0.0,
                    bytes_out=nbytes,
                )
            )

    def _failed(self, lent: Lent, message: list[Any]) -> None:
        _, call_id, kind, error, started, took, cpu = message
        task = lent.tasks.get(call_id)
        if task is None:
            return
        self._leave(lent, task)
        self._finish(
            task,
            Outcome(
                call_id,
                OutcomeKind(kind),
                error=_decode_error(error) if error is not None else None,
                worker_pid=lent.handle.pid,
                started=started / 1e9,
                seconds=took / 1e9,
                cpu_seconds=cpu / 1e9,
                bytes_in=task.bytes_in,
            ),
        )

    def _died(self, lent: Lent) -> None:
        """The worker is gone. Hear its last words, send on what it had not begun, and learn why."""
        handle, loop = lent.handle, self._loop
        if lent.apart is not None:
            lent.apart()
        if self._lent.get(handle.number) is not lent or lent.death is not None or loop is None:
            if lent.death is not None and self.supply.poll_ended(handle):
                lent.death.cancel()
                self._bury(lent)
            return
        with contextlib.suppress(ch.Closed):
            while (received := handle.channel.receive()) is not None:
                self._frame(lent, *received)
        lent.death = loop.call_later(CAUSE_WITHIN, self._bury, lent)
        if handle.pidfd >= 0:
            loop.remove_reader(handle.pidfd)
        loop.remove_reader(handle.channel.fileno())
        loop.remove_reader(handle.output)  # at its end it would always be readable; what is left is read at the burial
        self._take_back(lent)
        if self.supply.poll_ended(handle):
            if lent.death is not None:
                lent.death.cancel()
            self._bury(lent)
        elif self._queue:
            self._dispatch()
        if handle.process is not None and handle.number in self._lent:
            if lent.poll_timer is not None:
                lent.poll_timer.cancel()
            lent.poll_timer = loop.call_later(0.01, self._died, lent)

    def _bury(self, lent: Lent) -> None:
        """The cause is known, or will not be."""
        handle = lent.handle
        if self._lent.get(handle.number) is not lent:
            return
        if handle.process is not None and not self.supply.poll_ended(handle):
            handle.kill()
        running, _, started = handle.page.running()
        error = describe(handle, self.supply.oom_before)
        if not running and error.exit_code == ch.MUTE:
            running = handle.page.last_done()  # it could not tell of the call: whatever that did would happen again
        blamed = lent.tasks.get(running)
        came_up = handle.ready
        lent.death = None
        self._detach(lent)
        if not came_up and (handle.failed is not None or not handle.killed):
            self.supply.start_failed(handle.failed or error.message)
        if not handle.said_bye and came_up:
            self._event(
                "worker.lost",
                pid=handle.pid,
                signal=error.signal,
                exit_code=error.exit_code,
                oom_killed=error.oom_killed,
            )
        tail = handle.pid
        self.supply.remove(handle)
        again = []
        for task in list(lent.tasks.values()):
            task.worker = None
            if task is blamed:
                self._finish(task, self._lost(task, error, handle, started, suspect=True))
                continue
            task.boarded += not handle.said_bye and not handle.killed and came_up
            if task.forced or task.cancelled is not None:
                self._finish(task, Outcome(task.call.id, OutcomeKind.CANCELLED, worker_pid=tail))
            elif task.boarded >= self.poison_limit:
                self._finish(task, self._lost(task, error, handle, started, suspect=True))
            else:
                again.append(task)
        lent.tasks.clear()
        for task in reversed(again):
            self._queue.appendleft(task)
        self._watch_control()
        if self._queue:
            self._dispatch()

    def _lost(self, task: Task, error: ErrorInfo, handle: WorkerHandle, started: int, *, suspect: bool) -> Outcome:
        kind = OutcomeKind.CANCELLED if task.forced else OutcomeKind.LOST
        return Outcome(
            task.call.id,
            kind,
            meta={"progress": handle.page.progress()} if suspect else None,
            error=error,
            suspect=suspect and kind is OutcomeKind.LOST,
            worker_pid=handle.pid,
            started=started / 1e9,
            seconds=max(0.0, time.monotonic() - started / 1e9),
            bytes_in=task.bytes_in,
            rss_bytes=error.rss_bytes or 0,
        )
