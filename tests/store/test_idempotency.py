"""Both stores, one behaviour: single flight, successes only, leases, mismatches, expiry."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stageflow.core.errors import IdempotencyMismatchError, NotShippableError
from stageflow.core.output import StageOutput
from stageflow.store.idempotency import (
    Busy,
    CachedResult,
    Claim,
    Held,
    Hit,
    IdempotencyGuard,
    IdempotencyOutcome,
    IdempotencyStore,
    InMemoryIdempotencyStore,
    check_idempotency,
)
from stageflow.store.keys import hash_parameters
from stageflow.store.sqlite import SqliteIdempotencyStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path, clock) -> Iterator[Any]:
    if request.param == "memory":
        yield InMemoryIdempotencyStore(clock=clock)
        return
    with SqliteIdempotencyStore(tmp_path / "s" / "i.db", clock=clock) as opened:
        yield opened


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_it_is_a_store(store):
    assert isinstance(store, IdempotencyStore)
    assert await store.get("k") is None
    await store.set("k", CachedResult({"a": (1, 2)}, "h", created_at=5.0))
    entry = await store.get("k")
    assert (entry.output, entry.params_hash, entry.expires_at, entry.created_at) == ({"a": (1, 2)}, "h", None, 5.0)
    await store.set("k", CachedResult("other"))
    assert (await store.get("k")).output == "other"
    assert (await store.delete("k"), await store.delete("k"), await store.get("k")) == (True, False, None)


async def test_entries_expire_at_the_very_second(store, clock):
    await store.set("k", CachedResult(1), ttl_seconds=10)
    clock.now = 1009.9
    assert await store.get("k") is not None
    clock.now = 1010.0
    assert await store.get("k") is None
    assert isinstance(await store.claim("k"), Claim)
    entry = CachedResult(1, created_at=100.0).with_ttl_seconds(5)
    assert (entry.expires_at, entry.is_expired(104.9), entry.is_expired(105.0)) == (105.0, False, True)
    assert entry.with_ttl_seconds(None).expires_at is None


async def test_expired_entries_are_swept(store, clock):
    for number in range(511):
        await store.set(f"old{number}", CachedResult(1), ttl_seconds=1)
    clock.now += 5
    await store.set("new", CachedResult(1))
    if isinstance(store, InMemoryIdempotencyStore):
        assert len(store) == 1
    else:
        assert await store._call(lambda db: db.execute("SELECT count(*) FROM idempotency").fetchone()[0]) == 1


async def test_one_claim_at_a_time_and_a_release_keeps_the_result(store):
    claim = await store.claim("k", lease_seconds=10)
    assert isinstance(claim, Claim)
    busy = await store.claim("k")
    assert isinstance(busy, Busy)
    assert busy.local
    assert isinstance(await store.claim("other"), Claim)
    assert await store.release(claim, CachedResult("done")) is True
    kept = await store.claim("k")
    assert isinstance(kept, CachedResult)
    assert kept.output == "done"
    assert await store.release(claim) is False


async def test_a_release_without_result_frees_the_key(store):
    first = await store.claim("k")
    await store.release(first)
    second = await store.claim("k")
    assert isinstance(second, Claim)
    assert second.token != first.token


async def test_a_lease_runs_out_unless_renewed(store, clock):
    first = await store.claim("k", lease_seconds=10)
    clock.now += 9
    assert await store.renew(first, 10) is True
    clock.now += 9
    assert isinstance(await store.claim("k"), Busy)
    clock.now += 1
    second = await store.claim("k", lease_seconds=10)
    assert isinstance(second, Claim)
    assert await store.renew(first, 10) is False
    # The loser's result is better than none, but never replaces the winner's.
    assert await store.release(second, CachedResult("second")) is True
    assert await store.release(first, CachedResult("first")) is False
    assert (await store.get("k")).output == "second"


async def test_clear_forgets_all(store):
    await store.claim("a")
    await store.set("b", CachedResult(1))
    await store.clear()
    assert await store.get("b") is None
    assert isinstance(await store.claim("a"), Claim)


async def test_checking_has_three_answers(store):
    check = await check_idempotency(store, "k", {"a": 1})
    assert (check.outcome, check.entry) == (IdempotencyOutcome.NOT_FOUND, None)
    await store.set("k", CachedResult("v", hash_parameters({"a": 1, "b": 1}, ["a"])))
    found = await check_idempotency(store, "k", {"a": 1, "b": 2}, fields=["a"])
    assert found.outcome is IdempotencyOutcome.FOUND
    assert found.entry is not None
    assert found.entry.output == "v"
    other = await check_idempotency(store, "k", {"a": 2}, fields=["a"])
    assert (other.outcome, other.entry) == (IdempotencyOutcome.PARAM_MISMATCH, None)
    assert other.expected != other.actual
    unforced = await check_idempotency(store, "k", {"a": 2}, enforce_params_match=False)
    assert unforced.outcome is IdempotencyOutcome.FOUND
    await store.set("k", CachedResult("v"))
    assert (await check_idempotency(store, "k", {"a": 2})).outcome is IdempotencyOutcome.FOUND


# ---------------------------------------------------------------- the guard


async def test_work_is_done_once_and_its_output_comes_back_as_it_was(store, clock):
    guard = IdempotencyGuard(store, clock=clock)
    held = await guard.begin("k", "h", 60)
    assert isinstance(held, Held)
    output = StageOutput.ok({"rows": (1, 2)}).add_metadata("n", 1)
    assert await guard.finish(held, output) is True
    hit = await guard.begin("k", "h", 60)
    assert isinstance(hit, Hit)
    assert hit.output == output
    assert (hit.waited, hit.entry.expires_at) == (False, 1060.0)
    clock.now = 1060.0
    again = await guard.begin("k", "h", 60)
    assert isinstance(again, Held)
    await guard.finish(again)


async def test_duplicates_wait_for_the_first_and_get_its_result(store, clock):
    guard = IdempotencyGuard(store, clock=clock)
    held = await guard.begin("k")
    waiters = [asyncio.create_task(guard.begin("k")) for _ in range(5)]
    await until(lambda: len(store.waiters._waiting.get("k", ())) == 5)
    assert not any(task.done() for task in waiters)
    await guard.finish(held, "result")
    hits = await asyncio.gather(*waiters)
    assert [(hit.output, hit.waited) for hit in hits] == [("result", True)] * 5
    assert store.waiters._waiting == {}


async def test_after_a_failure_the_next_in_line_works(store, clock):
    guard = IdempotencyGuard(store, clock=clock)
    held = await guard.begin("k")
    waiters = [asyncio.create_task(guard.begin("k")) for _ in range(3)]
    await until(lambda: len(store.waiters._waiting.get("k", ())) == 3)
    assert await guard.finish(held, None) is False
    done, pending = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(pending)) == (1, 2)
    second = done.pop().result()
    assert isinstance(second, Held)
    await guard.finish(second, "second")
    assert {(await task).output for task in pending} == {"second"}


async def test_cancelling_a_waiter_or_a_begin_leaves_nothing_behind(store, clock):
    guard = IdempotencyGuard(store, clock=clock)
    held = await guard.begin("k")
    waiter = asyncio.create_task(guard.begin("k"))
    await until(lambda: bool(store.waiters._waiting))
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert store.waiters._waiting == {}
    await guard.finish(held, "x")

    for turns in range(6):
        starting = asyncio.create_task(guard.begin("fresh"))
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        try:
            begun = await starting
        except asyncio.CancelledError:
            pass
        else:
            await guard.finish(begun)
        free = await guard.begin("fresh")
        assert isinstance(free, Held)
        await guard.finish(free)


async def test_other_parameters_are_a_mismatch(store, clock):
    guard = IdempotencyGuard(store, clock=clock)
    held = await guard.begin("k", "one")
    waiter = asyncio.create_task(guard.begin("k", "two"))
    await until(lambda: bool(store.waiters._waiting))
    await guard.finish(held, "x")
    with pytest.raises(IdempotencyMismatchError) as caught:
        await waiter
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("k", "one", "two")
    assert isinstance(await guard.begin("k", "two", enforce=False), Hit)
    assert isinstance(await guard.begin("k"), Hit)


async def test_none_is_kept_only_when_said_to_be_a_success(store, clock):
    guard = IdempotencyGuard(store, clock=clock)
    held = await guard.begin("k")
    assert await guard.finish(held, None, success=True) is True
    hit = await guard.begin("k")
    assert isinstance(hit, Hit)
    assert hit.output is None
    held = await guard.begin("other")
    assert await guard.finish(held, "kept?", success=False) is False
    assert await store.get("other") is None


async def test_a_waiter_takes_over_when_the_lease_has_run_out(store, clock):
    abandoned = await store.claim("k", lease_seconds=5)
    clock.now += 5
    taken = await IdempotencyGuard(store, clock=clock).begin("k")
    assert isinstance(taken, Held)
    assert taken.claim.token != abandoned.token


async def test_many_loops_in_threads_share_one_flight(store, clock):
    worked: list[int] = []
    outputs: list[Any] = []
    barrier = threading.Barrier(4)

    def body(number: int) -> None:
        async def run() -> None:
            guard = IdempotencyGuard(store, clock=clock)
            barrier.wait()
            begun = await guard.begin("k")
            if isinstance(begun, Held):
                worked.append(number)
                await asyncio.sleep(0)
                await guard.finish(begun, number)
                outputs.append(number)
            else:
                outputs.append(begun.output)

        asyncio.run(run())

    threads = [threading.Thread(target=body, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.get_running_loop().run_in_executor(None, lambda: [thread.join() for thread in threads])
    assert len(worked) == 1
    assert outputs == worked * 4


async def test_what_does_not_pickle_is_not_kept_but_frees_the_key(tmp_path, clock, caplog):
    async with SqliteIdempotencyStore(tmp_path / "s" / "i.db", clock=clock) as store:
        guard = IdempotencyGuard(store, clock=clock)
        held = await guard.begin("k")
        assert await guard.finish(held, lambda: 1) is False
        assert "cannot be kept" in caplog.text
        again = await guard.begin("k")
        assert isinstance(again, Held)
        await guard.finish(again, 1)
        with pytest.raises(NotShippableError):
            await store.set("x", CachedResult(lambda: 1))


async def test_a_lease_is_renewed_while_work_goes_on_and_its_loss_is_noticed(tmp_path, clock, caplog):
    renewed = asyncio.Event()

    class Watched(SqliteIdempotencyStore):
        async def renew(self, claim: Claim, lease_seconds: float = 30.0) -> bool:
            kept = await super().renew(claim, lease_seconds)
            renewed.set()
            return kept

    async with Watched(tmp_path / "s" / "i.db", clock=clock) as store:
        guard = IdempotencyGuard(store, lease_seconds=0.03, clock=clock)
        held = await guard.begin("k")
        assert isinstance(held, Held)
        clock.now += 0.02
        await renewed.wait()
        assert (await store.claim("k")).expires_at == pytest.approx(clock.now + 0.03)  # type: ignore[union-attr]
        await store.clear()
        await until(lambda: held.lost)
        assert held.renewal is not None
        await held.renewal
        assert "was lost" in caplog.text
        assert await guard.finish(held, "late") is True
        assert (await store.get("k")).output == "late"  # type: ignore[union-attr]


async def test_in_memory_claims_need_no_timer(clock):
    guard = IdempotencyGuard(InMemoryIdempotencyStore(clock=clock), clock=clock)
    held = await guard.begin("k")
    assert isinstance(held, Held)
    assert (held.renewal, held.claim.expires_at) == (None, math.inf)
    await guard.finish(held)
