"""What happens around an attempt in the parent, whatever its lane: idempotency outside, interceptors inside.

A hit of the store or an interceptor's `before` takes the attempt's place: nothing runs. A lost worker or a cancelled
attempt passes
through both untouched, since infrastructure is the scheduler's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.attempt import ABSENT
from stageflow.context.interception import Gate, InterceptorContext
from stageflow.context.pieces import Done, ItemFailure
from stageflow.core.executor import Call, Outcome, OutcomeKind
from stageflow.core.failure import capture
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.pipeline.interceptors import InterceptorChain
from stageflow.pipeline.policies import asks_for_worker
from stageflow.pipeline.spec import StageSpec
from stageflow.runtime.inputs import stage_inputs
from stageflow.runtime.interceptors import InterceptorServices, InterceptorStates, LazyOutput, run_intercepted
from stageflow.scheduler import actions as act

# The store is imported by the first stage with an idempotency policy: psutil, which says who owns a claim, takes 7 ms.
if TYPE_CHECKING:
    from stageflow.runtime.config import EngineConfig
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.running import Running
    from stageflow.store.idempotency import Held, IdempotencyGuard

_DROPPED: Final = "the element was dropped"


class _Infrastructure(BaseException):
    """Carries an outcome that is nobody's failure past the interceptors."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class _Handle:
    """Lets the driver cancel what happens before and after the attempt itself, and know when that only waits."""

    __slots__ = ("_driver", "inside", "task", "waits")

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.inside = False  # the lane has the attempt: cancelling is its business
        self.waits = False  # an interceptor lets it wait
        self.task: asyncio.Task[None] | None = None

    async def wait(self, what: Awaitable[None]) -> None:
        """Wait for the clock or for another attempt."""
        self.waits = True
        self._driver.settled()
        try:
            await what
        finally:
            self.waits = False

    async def sleep(self, seconds: float) -> None:
        """Wait on the driver's clock."""
        await self.wait(self._driver.sleep(seconds))

    def later(self, seconds: float, callback: Callable[[], Any]) -> Any:
        """Call back by the driver's clock."""
        driver = self._driver
        return driver.clock.call_at(driver.loop, driver.clock.monotonic() + seconds, callback)

    def gate(self) -> Gate:
        """A future of the running loop, waited for as such."""
        return _Gate(self, self._driver.loop.create_future())

    def cancel(self) -> None:
        """Stop waiting for a claim or an interceptor."""
        if not self.inside and self.task is not None:
            self.task.cancel()


class _Gate:
    """What one attempt awaits and another opens."""

    __slots__ = ("_future", "_handle")

    def __init__(self, handle: _Handle, future: asyncio.Future[None]) -> None:
        self._handle = handle
        self._future = future

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._handle.wait(self._future).__await__()

    def done(self) -> bool:
        """True once opened, or once its waiter has gone."""
        return self._future.done()

    def set_result(self, result: None, /) -> None:
        """Open it."""
        self._future.set_result(result)


class Around:
    """Idempotency and interceptors of one engine. Each attempt is a task on the loop of its run."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._states = InterceptorStates()
        self._runs: dict[str, InterceptorStates] = {}
        self._chains: dict[int, tuple[Any, InterceptorChain]] = {}
        self._versions: dict[int, tuple[Any, str]] = {}
        self._store: Any = None
        self._guard: IdempotencyGuard | None = None
        self._owns_store = False

    def around(self, driver: Driver, running: Running, call: Call, spec: StageSpec) -> None:
        """Run the attempt with everything around it; its outcome goes to the driver as any other."""
        handle = _Handle(driver)
        running.claim = handle
        handle.task = driver.loop.create_task(self._run(driver, running, call, spec, handle))

    def forget(self, run_id: str) -> None:
        """The run is over: what its interceptors kept goes."""
        self._runs.pop(run_id, None)

    def close(self) -> None:
        """Close a store that this engine opened."""
        if self._owns_store and self._store is not None:
            self._store.close()
        self._store = self._guard = None

    # ------------------------------------------------------------ one attempt

    async def _run(self, driver: Driver, running: Running, call: Call, spec: StageSpec, handle: _Handle) -> None:
        started = driver.clock.monotonic()
        try:
            outcome = await self._outcome(driver, running, call, spec, handle)
        except _Infrastructure as passed:
            outcome = passed.outcome
        except asyncio.CancelledError:
            outcome = Outcome(call.id, OutcomeKind.CANCELLED)
        except Exception as error:
            outcome = Outcome(
                call.id, OutcomeKind.ERROR, error=capture(error, lane=running.action.lane), exception=error
            )
        if not outcome.started:
            outcome.started = started
        driver.outcome(outcome)

    async def _outcome(self, driver: Driver, running: Running, call: Call, spec: StageSpec, handle: _Handle) -> Outcome:
        config = spec.policies.idempotency
        if config is None:
            return await self._intercepted(driver, running, call, spec, handle)
        from stageflow.store.idempotency import Hit

        guard = self._idempotency()
        key, params = self._key(driver, running, call, spec)
        begun = await guard.begin(key, params, config.ttl_seconds, config.enforce_params_match)
        if isinstance(begun, Hit):
            name = spec.name
            driver.event("stage.idempotency_hit", running, {"stage": name, "key": key, "waited": begun.waited})
            return self._as_outcome(running, begun.output)
        kept: StageOutput | None = None
        try:
            outcome = await self._intercepted(driver, running, call, spec, handle)
            output = self._as_output(driver, running, outcome)
            if output is not None and output.status is StageStatus.OK:
                kept = msgspec.structs.replace(_plain(output), data=output.data)
            return outcome
        finally:
            await _finish(guard, begun, kept)

    async def _intercepted(
        self, driver: Driver, running: Running, call: Call, spec: StageSpec, handle: _Handle
    ) -> Outcome:
        interceptors = spec.policies.interceptors
        if not interceptors:
            return await self._raw(driver, running, call, handle)
        chain = self._chain(interceptors)
        seen: dict[int, Outcome] = {}

        async def attempt() -> Any:
            outcome = await self._raw(driver, running, call, handle)
            output = self._as_output(driver, running, outcome)
            if output is None:
                raise _Infrastructure(outcome)
            seen[id(output)] = outcome
            return output

        ctx = self._context(driver, running, call, spec)
        final = await run_intercepted(chain, ctx, attempt)
        same = seen.get(id(final))
        return same if same is not None else self._as_outcome(running, final)

    async def _raw(self, driver: Driver, running: Running, call: Call, handle: _Handle) -> Outcome:
        """The attempt itself, in its lane. Cancelling it asks the lane and waits for the lane's word."""
        done: asyncio.Future[Outcome] = driver.loop.create_future()
        last: list[Outcome] = []

        def deliver(outcome: Outcome) -> None:
            if not outcome.final:
                last.append(outcome)
            elif not done.done():
                if last and outcome.meta is None:
                    outcome.meta, outcome.value = last[-1].meta, last[-1].value
                done.set_result(outcome)

        running.since = driver.clock.monotonic()
        handle.inside = True
        try:
            running.executor.start(call, deliver)
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not done.done():
                await self._last_word(driver, running, call, done)
            raise
        finally:
            handle.inside = False

    async def _last_word(self, driver: Driver, running: Running, call: Call, done: asyncio.Future[Outcome]) -> None:
        """Ask the lane to stop the attempt and wait for its word; by force after the grace."""
        running.executor.cancel(call.id, reason="stopped by an interceptor")
        grace = asyncio.ensure_future(driver.sleep(driver.machine.grace))
        both: list[asyncio.Future[Any]] = [done, grace]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        grace.cancel()
        if not done.done():
            running.executor.cancel(call.id, reason="stopped by an interceptor", force=True)
            await asyncio.wait([done])

    # ------------------------------------------------------------ outcomes as outputs and back

    def _as_output(self, driver: Driver, running: Running, outcome: Outcome) -> Any:
        """The outcome as interceptors see it; None for what is nobody's failure."""
        kind = outcome.kind
        if kind in (OutcomeKind.LOST, OutcomeKind.CANCELLED):
            return None
        if kind != OutcomeKind.OK:
            info = outcome.error or ErrorInfo(type="Exception", message="the attempt failed")
            return StageOutput(StageStatus.FAIL, error=info.message, error_info=info, retryable=info.retryable)
        if type(running.action) is act.StartBlock:
            return self._item_output(driver, outcome)
        meta = outcome.meta if isinstance(outcome.meta, StageOutput) else StageOutput()
        value = outcome.value
        if driver.is_payload(value):
            return LazyOutput(meta, value.load)
        return msgspec.structs.replace(meta, data=value)

    def _item_output(self, driver: Driver, outcome: Outcome) -> Any:
        done = outcome.meta if isinstance(outcome.meta, Done) else Done(*outcome.meta)
        if done.failures:
            first: Any = done.failures[0]
            failure = first if isinstance(first, ItemFailure) else ItemFailure(*first)
            info = failure.info
            return StageOutput(
                StageStatus(failure.status), error=info.message, error_info=info, retryable=info.retryable
            )
        if outcome.value is None:
            return StageOutput.skip(_DROPPED) if done.ranges and done.ranges[0][2] == 0 else StageOutput()
        value = outcome.value
        if driver.is_payload(value):
            return LazyOutput(StageOutput(), lambda: value.load()[0])
        return StageOutput(StageStatus.OK, value[0])

    def _as_outcome(self, running: Running, output: Any) -> Outcome:
        """An output that did not come from the attempt, as the driver takes it."""
        action = running.action
        if isinstance(output, LazyOutput):
            output = output.materialise()
        outcome = Outcome(action.task)
        if type(action) is not act.StartBlock:
            outcome.value = output.data
            outcome.meta = msgspec.structs.replace(output, data=None)
            return outcome
        lo, hi = action.segments[0][0], action.segments[-1][1]
        if output.status is StageStatus.OK:
            outcome.value, outcome.meta = [output.data], Done(((lo, hi, -1),))
        elif output.status is StageStatus.SKIP:
            outcome.meta = Done(((lo, hi, 0),))
        else:
            info = output.error_info or ErrorInfo(
                type="stageflow.StageOutput",
                message=output.error or output.cancel_reason or str(output.status),
                retryable=output.retryable,
            )
            failure = ItemFailure(lo, str(output.status), info, (lo,))
            outcome.meta = Done(((lo, hi, 0),), (failure,))
        return outcome

    # ------------------------------------------------------------ idempotency

    def _idempotency(self) -> IdempotencyGuard:
        if self._guard is None:
            from stageflow.store.idempotency import IdempotencyGuard, InMemoryIdempotencyStore

            store = self._config.store
            if store is None:
                store = InMemoryIdempotencyStore()
            elif isinstance(store, str) or hasattr(store, "__fspath__"):
                from stageflow.store.sqlite import SqliteIdempotencyStore

                store = SqliteIdempotencyStore(store)
                self._owns_store = True
            self._store = store
            self._guard = IdempotencyGuard(store)
        return self._guard

    def _key(self, driver: Driver, running: Running, call: Call, spec: StageSpec) -> tuple[str, str]:
        """The key of the work and the hash of its parameters."""
        from stageflow.store.keys import default_key, digest, hash_parameters, idempotency_key

        config = spec.policies.idempotency
        assert config is not None
        params = self._params(driver, running, call, spec)
        params_hash = hash_parameters(params, config.fields)
        key = config.key
        if callable(key):
            made: Any = key(params)
            return (made if isinstance(made, str) else idempotency_key([made])), params_hash
        pipeline = running.job.graph.name
        if key is not None:
            item = running.action.segments[0][0] if type(running.action) is act.StartBlock else None
            parts = [pipeline, spec.name, key] if item is None else [pipeline, spec.name, key, str(item)]
            return idempotency_key(parts), params_hash
        return default_key(pipeline, spec.name, self._version(spec), digest(params)), params_hash

    def _version(self, spec: StageSpec) -> str:
        known = self._versions.get(id(spec.runner))
        if known is None:
            from stageflow.store.fingerprint import code_fingerprint

            known = self._versions[id(spec.runner)] = (spec.runner, code_fingerprint(spec.runner))
        return known[1]

    def _params(self, driver: Driver, running: Running, call: Call, spec: StageSpec) -> dict[str, Any]:
        """The values that the attempt gets, by parameter or stage name."""
        code = running.job.code.stage(running.action.stage)
        block = type(running.action) is act.StartBlock
        first = 3 if block else 2
        params: dict[str, Any] = {}
        for slot, value in zip(code.program.plan.slots, call.args[first:], strict=False):
            if value is not ABSENT:
                params[slot.param or slot.name] = value.load() if driver.is_payload(value) else value
        if block:
            pieces = call.args[2]
            lists = tuple(value.load() if driver.is_payload(value) else value for value in call.args[first:])
            for number in range(len(pieces[0].columns)):
                values = [value for piece in pieces for value in piece.column(number, lists)]
                params[f"element{number or ''}"] = values if spec.policies.batch else values[0]
        return params

    # ------------------------------------------------------------ interceptors

    def _chain(self, interceptors: tuple[Any, ...]) -> InterceptorChain:
        known = self._chains.get(id(interceptors))
        if known is None:
            known = self._chains[id(interceptors)] = (
                interceptors,
                InterceptorChain(one for one in interceptors if not asks_for_worker(one)),
            )
        return known[1]

    def _context(self, driver: Driver, running: Running, call: Call, spec: StageSpec) -> InterceptorContext:
        job, action = running.job, running.action
        states = self._runs.get(job.run_id)
        if states is None:
            states = self._runs[job.run_id] = InterceptorStates(self._states)
        handle: _Handle = running.claim
        services = InterceptorServices(states, sleep=handle.sleep, gate=handle.gate, later=handle.later)
        item: tuple[int, ...] | None = None
        inputs: Any
        if type(action) is act.StartBlock:
            item = (action.segments[0][0],)
            inputs = self._params(driver, running, call, spec)
        else:
            inputs = stage_inputs(job, action.stage)

        def emit(type: str, data: Mapping[str, Any]) -> None:
            driver.event(type, running, dict(data), item)

        return InterceptorContext(
            stage=spec.name,
            run_id=job.run_id,
            services=services,
            emit=emit,
            now=driver.clock.monotonic,
            attempt=action.attempt,
            item=item,
            lane=action.lane,
            kind=str(spec.kind),
            inputs=inputs,
            snapshot=job.snapshot,
        )


async def _finish(guard: IdempotencyGuard, held: Held, kept: StageOutput | None) -> None:
    """Give the claim back, also when the attempt was cancelled."""
    task = asyncio.ensure_future(guard.finish(held, kept, success=kept is not None))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _plain(output: Any) -> StageOutput:
    found: StageOutput = output.output if isinstance(output, LazyOutput) else output
    return found
