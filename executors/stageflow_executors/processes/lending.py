"""Workers on loan: borrowed from the supply when calls wait, given back when idle or when other lanes wait, recycled.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from stageflow.core.errors import WorkerStartError
from stageflow.core.executor import Outcome, OutcomeKind
from stageflow.core.failure import capture
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status
from stageflow_executors.processes.handle import WorkerHandle
from stageflow_executors.processes.sending import Sending
from stageflow_executors.processes.state import Lent, Task

GIVE_BACK_AFTER: Final = 0.05
START_WITHIN: Final = 60.0


class Lending(Sending):
    """Assigns calls to workers. `granted` and `reported` may be called from any thread, the rest runs on the lane's
    loop.
    """

    if TYPE_CHECKING:

        def _readable(self, lent: Lent) -> bool: ...
        def _feed(self, lent: Lent) -> None: ...
        def _died(self, lent: Lent) -> None: ...

    def _dispatch(self) -> None:
        queue = self._queue
        while queue:
            task = queue[0]
            lent = self._worker_for(task)
            if lent is None:
                return
            self._send_tasks(lent, self._batch(task, lent))

    def _worker_for(self, task: Task) -> Lent | None:
        while self._idle:
            lent = self._idle.pop()
            if lent.handle.number in self._lent and not lent.tasks and not lent.handle.retiring and lent.death is None:
                return lent
        if len(self._lent) < self._slots + self._standing and not self._asked:
            try:
                handle = self.supply.borrow(self)
            except (WorkerStartError, OSError) as error:
                if not self._lent:
                    self._fail_all(error)
                return None
            if handle is not None:
                return self._take(handle)
            self._asked = True
        if task.short:
            best = None
            for lent in self._lent.values():
                if lent.frames < 2 and not lent.handle.retiring and lent.death is None and not lent.outbox:
                    if all(t.short for t in lent.tasks.values()) and (
                        best is None or len(lent.tasks) < len(best.tasks)
                    ):
                        best = lent
            if best is not None and best.handle.channel.can_take_back and not self.supply.waiting:
                return best
        return None

    def granted(self, worker: WorkerHandle) -> None:
        """The supply lends a worker that this lane had asked for. Any thread."""
        self._call_soon(self._granted, worker)

    def reported(self, worker: WorkerHandle) -> None:
        """Something was heard of `worker`, or room for a new one was made. Any thread."""
        self._call_soon(self._reported, worker)

    def held(self) -> int:
        """Workers this lane has now."""
        return len(self._lent)

    def _call_soon(self, function: Callable[..., None], worker: WorkerHandle) -> None:
        loop = self._loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(function, worker)
                return
        except RuntimeError:
            pass  # its loop was closed without aclose
        if worker.lane is self:
            self.supply.give_back(worker)

    def _granted(self, handle: WorkerHandle) -> None:
        self._asked = False
        if self._closed or self._loop is None:
            self.supply.give_back(handle)
            return
        self._idle.append(self._take(handle))
        self._dispatch()
        if not self._lent[handle.number].tasks:
            self._became_idle(self._lent[handle.number])

    def _take(self, handle: WorkerHandle) -> Lent:
        loop = self._loop
        assert loop is not None
        self._watch_control()  # a new fork server may have been needed
        lent = self._lent[handle.number] = Lent(handle)
        self._share_cores()
        loop.add_reader(handle.channel.fileno(), self._readable, lent)
        loop.add_reader(handle.output, handle.read_output)
        if handle.pidfd >= 0:
            loop.add_reader(handle.pidfd, self._died, lent)
        if not handle.ready:
            lent.start_timer = loop.call_later(START_WITHIN, self._not_started, lent)
            if handle.process is not None and handle.pidfd < 0:
                lent.poll_timer = loop.call_later(0.05, self._poll_process, lent)
        return lent

    def part_with(self, key: int) -> Lent | None:
        """An idle worker that knows the function of that key, if the lane has nothing to do. Until `take_in` somebody
        else listens to it; its death is still heard here."""
        loop = self._loop
        if self._tasks or self._queue or self._watchful or not self._idle or loop is None or self._closed:
            return None
        lent = self._idle[-1]
        handle = lent.handle
        if (
            self._lent.get(handle.number) is not lent
            or lent.death is not None
            or lent.outbox
            or handle.retiring
            or not handle.channel.can_take_back
            or key not in handle.functions
        ):
            return None
        del self._idle[-1]
        loop.remove_reader(handle.channel.fileno())
        return lent

    def take_over(self, lent: Lent, task: Task) -> None:
        """`task` was sent to it meanwhile."""
        self._tasks[task.call.id] = task
        task.worker = lent
        task.frame = lent.next_frame
        lent.tasks[task.call.id] = task
        lent.next_frame += 1
        lent.frames += 1

    def take_in(self, lent: Lent) -> None:
        """Listen to it here again."""
        if self._loop is not None and self._lent.get(lent.handle.number) is lent and lent.death is None:
            self._loop.add_reader(lent.handle.channel.fileno(), self._readable, lent)
            self._feed(lent)

    def _share_cores(self) -> None:
        """Tell workers whether there are cores for all of them and for this loop."""
        spare = len(self._lent) < self._cores
        for lent in self._lent.values():
            lent.handle.page.words[status.SPARE] = spare

    def _reported(self, handle: WorkerHandle) -> None:
        lent = self._lent.get(handle.number)
        if lent is None or lent.handle is not handle:
            self._asked = False  # room for a new worker
            if not self._closed:
                self._dispatch()
            return
        if handle.ended is not None or handle.failed is not None:
            self._died(lent)
        elif handle.pidfd >= 0 and self._loop is not None:
            self._loop.add_reader(handle.pidfd, self._died, lent)

    def _poll_process(self, lent: Lent) -> None:
        """Where there are no pidfds: ask."""
        if self._lent.get(lent.handle.number) is lent and self._loop is not None:
            if self.supply.poll_ended(lent.handle):
                self._died(lent)
            else:
                lent.poll_timer = self._loop.call_later(0.05, self._poll_process, lent)

    def _not_started(self, lent: Lent) -> None:
        if not lent.handle.ready:
            self.supply.not_started(lent.handle, START_WITHIN)
            self._died(lent)

    def _became_idle(self, lent: Lent) -> None:
        if lent.handle.retiring or self._loop is None:
            return
        if lent.handle.number in self._lent and lent not in self._idle:
            self._idle.append(lent)
        surplus = len(self._lent) > self._slots + self._standing
        if surplus or (self.supply.waiting and self.supply.should_give_back(self)):
            self._release_worker(lent)
            return
        lent.handle.idle_since = time.monotonic()
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_later(GIVE_BACK_AFTER, self._give_back_idle)

    def _give_back_idle(self) -> None:
        """One timer for the lane: a timer per call would cost more than the call's decoding."""
        self._idle_timer = None
        now = time.monotonic()
        for lent in list(self._idle):
            if self._lent.get(lent.handle.number) is lent and not lent.tasks and not lent.outbox:
                if now - lent.handle.idle_since >= GIVE_BACK_AFTER * 0.9:
                    self._release_worker(lent)
                elif self._idle_timer is None and self._loop is not None:
                    self._idle_timer = self._loop.call_later(GIVE_BACK_AFTER, self._give_back_idle)

    def rest(self) -> None:
        """Give back at once whatever is idle: the lane's loop is about to stand still, and could not do it when others
        wait."""
        if not self._queue:
            self.supply.withdraw(self)
            self._asked = False
        for lent in list(self._idle):
            if self._lent.get(lent.handle.number) is lent and not lent.tasks and not lent.outbox:
                self._release_worker(lent)

    def _release_worker(self, lent: Lent) -> None:
        """Take the readers off and hand it back to the supply."""
        self._detach(lent)
        if lent.handle.ended is not None:
            self.supply.remove(lent.handle)
        else:
            freed, fds = self._controls(lent)
            if freed:
                with contextlib.suppress(ch.Closed):
                    lent.handle.channel.send(ch.join(freed), fds)
            self.supply.give_back(lent.handle)

    def _detach(self, lent: Lent) -> None:
        handle, loop = lent.handle, self._loop
        self._lent.pop(handle.number, None)
        self._share_cores()
        if lent in self._idle:
            self._idle.remove(lent)
        for timer in (lent.start_timer, lent.poll_timer, lent.death):
            if timer is not None:
                timer.cancel()
        if loop is not None and not loop.is_closed():
            if lent.writing:
                loop.remove_writer(handle.channel.fileno())
            for fd in (handle.channel.fileno(), handle.output, handle.pidfd):
                if fd >= 0:
                    loop.remove_reader(fd)

    def _watch_control(self) -> None:
        """Listen to the fork server there is now, by a descriptor of our own: the supply may close its own in any
        thread, and a loop that watches a closed number is deaf, or hears somebody else."""
        control = self.supply.control
        if control is self._watched or self._loop is None:
            return
        self._unwatch_control()
        if control is not None:
            try:
                self._watching = os.dup(control.fileno())
            except OSError:  # it is being closed at this moment, or descriptors have run out
                return
            self._watched = control
            self._loop.add_reader(self._watching, self._pump)

    def _unwatch_control(self) -> None:
        if self._watching >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._watching)
            os.close(self._watching)
        self._watching = -1
        self._watched = None

    def _pump(self) -> None:
        if self.supply.has_server():
            self.supply.pump()
        self._watch_control()

    def _recycle(self, lent: Lent) -> bool:
        """Let an idle worker go that has done its number of calls or grown too much; the replacement comes first."""
        handle, supply = lent.handle, self.supply
        reason = None
        if supply.max_tasks_per_child is not None and handle.calls >= supply.max_tasks_per_child:
            reason = f"did {handle.calls} calls"
        elif supply.worker_memory_limit is not None:
            now = time.monotonic()
            if now - handle.checked_at > 0.1:
                handle.checked_at = now
                _, anonymous = handle.memory()
                handle.base_anon = handle.base_anon or anonymous
                if (
                    anonymous - handle.base_anon > supply.worker_memory_limit
                    or anonymous > 4 * supply.worker_memory_limit
                ):
                    reason = f"grew to {anonymous:,} bytes of its own"
        if reason is None:
            return False
        self._event("worker.recycled", pid=handle.pid, reason=reason)
        handle.retiring = True
        with supply.lock:
            supply.workers.pop(handle.number, None)  # it no longer counts: its replacement may start now
            if not supply.closed and self._queue and supply.may_start():
                with contextlib.suppress(WorkerStartError, OSError):
                    self._idle.append(self._take(supply.start_worker(self)))
            supply.workers[handle.number] = handle
        supply.dismiss(handle)
        if self._queue:
            self._dispatch()
        return True

    def _fail_all(self, error: BaseException) -> None:
        """No worker can be started: every waiting call is told so."""
        info = capture(error, lane=self.lane)
        queue, self._queue = self._queue, deque()
        if self._loop is not None:
            for task in queue:
                self._loop.call_soon(self._finish, task, Outcome(task.call.id, OutcomeKind.ERROR, error=info))
