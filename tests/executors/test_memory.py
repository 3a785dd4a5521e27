"""Shared memory: values are the same whatever they crossed, bytes are copied once, and a lease ends when it should."""

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import gc
import mmap
import os
import pickle
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest

from stageflow.core.executor import Call, Outcome, OutcomeKind, Shipped
from stageflow_executors.processes import status
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import TELL_IDLE_EVERY, WorkerSupply
from stageflow_executors.shm import closed
from stageflow_executors.shm.arena import Arena, create_anonymous, size_class
from stageflow_executors.shm.lease import PARENT, Books, export


class Colour(enum.IntEnum):
    RED = 1


class Closed(msgspec.Struct):
    name: str
    size: int | None = None
    weight: float = 0.0


class Nested(msgspec.Struct, frozen=True):
    inner: Closed
    flag: bool


class Open(msgspec.Struct):
    anything: Any
    many: list[int]


class Positive(msgspec.Struct):
    n: Annotated[int, msgspec.Meta(gt=0)]


class Base(msgspec.Struct):
    x: int


class Derived(Base):
    y: int


@dataclasses.dataclass
class Counting:
    n: int

    def __post_init__(self) -> None:
        self.n += 1


Point = collections.namedtuple("Point", "x y")


class Name(str):
    __slots__ = ()


SHARED = [1]
VALUES: list[Any] = [
    None, True, 0, -(2**63), 2**63 - 1, 2**63, -(2**63) - 1, 2**70, 1.5, float("inf"), -0.0, "", "text",
    "ünï", "a\udce9",
    b"", b"bytes", bytearray(b"array"), bytearray(5000), 1j, Name("sub"), Colour.RED, [], [1, "a"], (1, 2), {1: (2,)},
    {"k": [None]}, {1, 2}, frozenset({1}), Point(1, 2), [SHARED, SHARED], Counting(1), collections.Counter("aab"),
    collections.defaultdict(list, {1: [2]}), collections.OrderedDict(a=1), datetime.datetime.now(datetime.UTC),
    decimal.Decimal("1.10"), range(3), Closed("a"), Closed("a", 2, 1.5), [Closed("a"), Closed("b", 1)],
    Nested(Closed("x"), True), Open((1, 2), [3]), Open({1: 2}, []), Derived(1, 2), Base(1), [Base(1), Derived(1, 2)],
    Closed("wrong", "str"), Closed("a", True), Closed(Name("n")), Closed("a", 1, 2), Closed("a", Colour.RED),
    [Closed("a"), Closed("b", 1, 2)], [Closed("a"), Base(1)], Nested(Closed("x", 1, 3), True),
    Positive(3), Positive(-3),
    "x" * 300_000, "ü" * 300_000, b"y" * 300_000,
    bytearray(b"z" * 300_000), ["w" * 300_000, b"v" * 300_000], {"deep": [b"u" * 100_000]}, list(range(100_000)),
]  # fmt: skip
ARRAYS: list[Any] = [
    np.arange(5), np.arange(100_000.0), np.arange(12).reshape(3, 4),
    np.asfortranarray(np.arange(200_000.0).reshape(400, 500)),
    np.arange(400_000)[::2], np.arange(20)[::-1], np.array(3.5), np.empty((0, 3)), np.array(["a", "bb"]),
    np.array([True]),
    np.array([("a", 1)], dtype=[("n", "U5"), ("v", "i4")]), np.array([None, {}], dtype=object),
    np.array(["2020"], "M8[D]"),
    np.arange(5, dtype=">i4"), np.float32(2.5), np.ma.array([1, 2], mask=[0, 1]), np.zeros((3, 0, 2)),
    np.arange(6, dtype=np.float16),
]  # fmt: skip


def identity(value: Any) -> Any:
    return value


def double(value: Any) -> Any:
    return value * 2


def writable(value: Any) -> bool:
    return bool(value.flags.writeable)


KEPT: list[Any] = []


def keep(value: Any) -> float:
    KEPT.append(value[10:20])
    return float(value[0])


def kept_values() -> list[float]:
    return [float(v[0]) for v in KEPT]


def scribble(port: Any, value: Any) -> float:
    value[:] = 7
    return float(value.sum())


def born_shared(port: Any, n: int) -> Any:
    array = np.frombuffer(port.buffer(n * 8), np.float64)
    array[:] = np.arange(n)
    return array


@pytest.fixture(scope="module")
def supply() -> Any:
    found = WorkerSupply(2)
    yield found
    found.close()


async def call(executor: ProcessExecutor, function: Any, *args: Any, **options: Any) -> Outcome:
    ended = asyncio.get_running_loop().create_future()
    call.ids += 1  # type: ignore[attr-defined]
    executor.start(Call(call.ids, Shipped(function), args, **options), lambda o: o.final and ended.set_result(o))  # type: ignore[attr-defined]
    return await ended


call.ids = 0  # type: ignore[attr-defined]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        contiguous = a.flags.c_contiguous or a.flags.f_contiguous
        if contiguous and a.flags.f_contiguous != b.flags.f_contiguous:
            return False
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


async def test_every_value_comes_back_the_same(supply: WorkerSupply) -> None:
    async with ProcessExecutor(supply=supply) as executor:
        for value in VALUES + ARRAYS:
            back = await executor.submit(identity, value)
            assert same(value, back), (value, back)
            assert pickle.dumps(value) == pickle.dumps(back) or isinstance(
                value, np.ndarray | set | frozenset | list | dict
            )
        shared = await executor.submit(identity, [SHARED, SHARED])
        assert shared[0] is shared[1]
    assert supply.books.live() == 0


async def test_memoryviews_come_back_as_read_only_views(supply: WorkerSupply) -> None:
    async with ProcessExecutor(supply=supply) as executor:
        for raw in (b"abc", b"x" * 200_000, b""):
            back = await executor.submit(identity, memoryview(raw))
            assert (type(back), back.readonly, bytes(back)) == (memoryview, True, raw)
        shaped = memoryview(np.arange(60_000, dtype=np.int32).reshape(300, 200))
        back = await executor.submit(identity, shaped)
        assert back == shaped
        assert (back.format, back.shape, back.readonly) == (shaped.format, shaped.shape, True)
        del back


async def test_arrays_are_read_only_views_and_results_outlive_the_pool() -> None:
    async with ProcessExecutor(1) as executor:
        result = await executor.submit(double, np.arange(100_000.0))
        payload = (await call(executor, born_shared, 50_000)).value
        assert not result.flags.writeable
        assert await executor.submit(writable, np.arange(100_000.0)) is False
        with pytest.raises(ValueError, match="read-only"):
            result[0] = 1
    assert result[99_999] == 199_998.0
    assert payload.load()[49_999] == 49_999.0
    payload.release()
    payload.release()
    with pytest.raises(Exception, match="released"):
        payload.load()


async def test_a_kept_input_keeps_its_bytes(supply: WorkerSupply) -> None:
    """The case that corrupts silently: a slice of an input outlives the call; its block must not be given to the
    next value.
    """
    executor = ProcessExecutor(1, supply=supply)
    async with executor:
        for n in range(20):
            array = np.full(100_000, float(n))
            assert await executor.submit(keep, array) == n
        assert await executor.submit(kept_values) == [float(n) for n in range(20)]
        assert supply.books.live() == 20
        await executor.submit(
            exec, "import gc, sys; sys.modules['tests.executors.test_memory'].KEPT.clear(); gc.collect()"
        )
        await executor.submit(identity, 1)
        assert supply.books.live() == 0


async def test_views_in_the_parent_keep_their_blocks(supply: WorkerSupply) -> None:
    async with ProcessExecutor(1, supply=supply) as executor:
        slices = [(await executor.submit(double, np.full(50_000, float(n))))[100:200] for n in range(10)]
        for _ in range(20):
            await executor.submit(double, np.zeros(50_000))
        assert [s[0] for s in slices] == [2.0 * n for n in range(10)]
        del slices
        await asyncio.sleep(0)  # the loop's own handle holds the last result until its next turn
        gc.collect()
        assert supply.books.live() == 0


async def test_a_chain_passes_bytes_without_the_parent(supply: WorkerSupply) -> None:
    async with ProcessExecutor(2, supply=supply) as executor:
        first = (await call(executor, born_shared, 1_000_000)).value
        assert first.blocks
        reserved = supply.arena.reserved
        outcome = await call(executor, lambda port, a: a * 2, first)
        second = outcome.value
        last = await call(executor, lambda port, a: float(a[-1]), second)
        assert last.value.load() == 999_999 * 2.0
        assert supply.arena.reserved == reserved, "the parent laid something down"
        fan = await asyncio.gather(*[call(executor, lambda port, a, n: float(a[n]), second, n) for n in range(16)])
        assert [o.value.load() for o in fan] == [n * 2.0 for n in range(16)]
        first.release()
        second.release()
    assert supply.books.live() == 0


async def test_encode_is_shared_by_many_calls(supply: WorkerSupply) -> None:
    async with ProcessExecutor(2, supply=supply) as executor:
        payload = await asyncio.to_thread(executor.encode, np.arange(200_000.0))
        outcomes = await asyncio.gather(
            *[call(executor, lambda port, a, n: float(a[n]), payload, n) for n in range(20)]
        )
        assert [o.value.load() for o in outcomes] == list(map(float, range(20)))
        assert payload.load()[5] == 5.0
        assert supply.books.live() == 1
        del payload
        assert supply.books.live() == 0


async def test_writable_gives_private_pages(supply: WorkerSupply) -> None:
    async with ProcessExecutor(1, supply=supply) as executor:
        payload = executor.encode(np.arange(100_000.0))
        for value in (payload, np.arange(3.0), {"a": np.arange(50_000.0), "b": np.arange(70_000.0)}):
            function = (
                scribble if not isinstance(value, dict) else lambda port, d: sum(scribble(port, v) for v in d.values())
            )
            outcome = await call(executor, function, value, writable=True)
            assert outcome.kind is OutcomeKind.OK, outcome.error
        assert payload.load()[99_999] == 99_999.0, "the shared bytes were changed"
        payload.release()
        for n in range(5):  # reused blocks must not show old private pages
            outcome = await call(
                executor, lambda port, a: (float(a[0]), a.fill(-1))[0], np.full(100_000, float(n)), writable=True
            )
            assert outcome.value.load() == n
    assert supply.books.live() == 0


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
async def test_without_memfd(start_method: str) -> None:
    supply = WorkerSupply(2, start_method=start_method, memfd=False)
    async with ProcessExecutor(supply=supply) as executor:
        for size in (10, 100_000, 5_000_000):
            back = await executor.submit(double, np.arange(float(size)))
            assert back[-1] == 2.0 * (size - 1)
        del back
        await asyncio.sleep(0)  # the loop's own handle holds the last result until its next turn
    supply.close()
    assert supply.books.live() == 0


# ------------------------------------------------------------ the arena by itself


def test_size_classes_waste_little() -> None:
    for n in range(1, 3_000_000, 977):
        assert n <= size_class(n) <= max(4096, n * 1.26 + 4096)


def test_blocks_are_reused_warm_and_given_back() -> None:
    segments: list[Any] = []
    arena = Arena(0, budget=lambda: 256 << 20, on_segment=segments.append)
    blocks = [arena.allocate(100_000) for _ in range(100)]
    assert len({b.key for b in blocks}) == 100
    assert len(segments) == 1
    reserved = arena.reserved
    for block in blocks:
        arena.free(block.key)
    again = [arena.allocate(100_000) for _ in range(100)]
    assert {b.key for b in again} == {b.key for b in blocks}
    assert arena.reserved == reserved
    big = arena.allocate(20 << 20)
    assert big.segment.own
    for block in [*again, big]:
        arena.free(block.key)
    assert arena.allocate(20 << 20).key == big.key
    arena.trim()
    assert arena.stats()["segments"] == 1
    arena.close()


@pytest.mark.parametrize("memfd", [True, False])
def test_readers_cannot_write_or_resize(memfd: bool) -> None:
    import mmap
    import os

    fd, read_fd = create_anonymous(8192, memfd=memfd)
    with pytest.raises(OSError, match="Permission denied"):
        mmap.mmap(read_fd, 8192)
    if memfd:
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(fd, 0)
    os.close(fd)
    os.close(read_fd)


@pytest.mark.parametrize("use_numpy", [True, False])
def test_a_lease_ends_with_the_last_view(use_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap
    import sys

    from stageflow_executors.shm.lease import address_of

    memory = mmap.mmap(-1, 65536)
    if not use_numpy:
        monkeypatch.setitem(sys.modules, "numpy", None)
    derivations: list[Any] = [
        lambda v: np.frombuffer(v, np.uint8),
        lambda v: np.frombuffer(v, np.uint8)[5:9],
        lambda v: np.ndarray((8,), np.float64, v)[2:4],
        lambda v: v[3:4],
        lambda v: np.asarray(memoryview(np.frombuffer(v, np.float64).reshape(-1, 8)))[3:, ::2].T,
    ]
    for derive in derivations:
        ended: list[int] = []
        view = export(memory, address_of(memory), 0, 65536, ended.append, 1)
        derived = derive(view)
        del view
        gc.collect()
        assert not ended
        del derived
        gc.collect()
        assert ended == [1]


def test_only_blocks_of_workers_have_to_be_told_of() -> None:
    books = Books()
    mine, theirs = (PARENT << 24 | 1, 0), (7 << 24 | 1, 0)
    books.lease([mine, theirs])
    books.dropped.append(mine)
    books.settle()
    assert not books.any_to_tell, "the parent asks when it needs room; until then calls would take the long way"
    books.dropped.append(theirs)
    books.settle()
    assert books.any_to_tell
    assert books.take_freed(7) == [theirs]
    assert not books.any_to_tell
    assert books.take_freed(PARENT) == [mine]


def test_books_tell_the_owner_and_close_segments_of_the_dead() -> None:
    books = Books()
    fd, read_fd = create_anonymous(8192)
    import os

    os.close(fd)
    sid = 5 << 24 | 1
    books.add_segment(sid, 8192, read_fd)
    books.lease([(sid, 0)])
    books.lease([(sid, 0)])
    books.dropped.append((sid, 0))
    assert books.take_freed(5) == []
    books.dropped.append((sid, 0))
    assert books.take_freed(5) == [(sid, 0)]
    books.lease([(sid, 4096)])
    books.retire(5)
    assert sid in books.mappings
    books.dropped.append((sid, 4096))
    assert books.live() == 0
    assert sid not in books.mappings


def test_closed_types_are_recognised() -> None:
    assert closed.is_closed(Closed)
    assert closed.is_closed(Nested)
    assert not closed.is_closed(Open)
    assert not closed.is_closed(Base)  # has a subclass


def held(segments) -> int:
    """Bytes that the system has laid down for them."""
    return sum(os.fstat(segment.fd).st_blocks * 512 for segment in segments if segment.fd >= 0)


@pytest.mark.skipif(not hasattr(mmap, "MADV_REMOVE"), reason="pages of a part can be given back on Linux only")
def test_free_blocks_lie_cold_above_the_budget_and_are_used_again():
    segments = []
    room = [64 << 20]
    arena = Arena(0, budget=lambda: room[0], on_segment=segments.append, hard=64 << 20)
    blocks = [arena.allocate(1 << 20) for _ in range(20)]
    for block in blocks:
        block.view[:] = b"x" * (1 << 20)
    room[0] = 4 << 20  # others have taken the rest
    for block in blocks[1:]:
        arena.free(block.key)
    assert arena.reserved == 4 << 20
    assert held(segments) <= 5 << 20
    assert bytes(blocks[0].view[:4]) == b"xxxx"
    again = [arena.allocate(1 << 20) for _ in range(19)]
    assert {block.key for block in again} == {block.key for block in blocks[1:]}
    assert arena.reserved == 20 << 20
    for block in again:
        block.view[:] = b"y" * (1 << 20)
    assert bytes(blocks[0].view[-4:]) == b"xxxx"
    arena.close()
    assert arena.reserved == 0


def test_a_new_segment_is_not_given_up_to_make_room_for_itself():
    room = [64 << 20]
    arena = Arena(0, budget=lambda: room[0], on_segment=lambda segment: None, hard=256 << 20)
    small = arena.allocate(1 << 20)
    room[0] = 1 << 20
    large = arena.allocate(20 << 20)  # above the budget, which is only for what is kept warm
    large.view[:4] = b"abcd"
    arena.free(small.key)
    assert arena.reserved == 20 << 20
    arena.close()


def together(folder: str, number: int, nbytes: int) -> Any:
    """Returns when the other one runs as well, so in a process of its own."""
    with open(f"{folder}/{number}", "w"):
        pass
    while len(os.listdir(folder)) < 2:
        pass
    return np.full(nbytes, number, np.uint8)


def full(nbytes: int) -> Any:
    return np.full(nbytes, 1, np.uint8)


async def test_a_worker_that_nobody_borrows_keeps_nothing_that_others_need(tmp_path):
    supply = WorkerSupply(2, memory_limit=64 << 20, hard_limit=1 << 30)  # as an engine's: 48 MiB are kept warm
    async with ProcessExecutor(supply=supply) as executor:

        def reserved() -> list[int]:
            return sorted(worker.page.words[status.RESERVED] for worker in supply.workers.values())

        async def until_idle() -> None:
            while len(supply.idle) < 2:
                await asyncio.sleep(0.01)

        calls = [executor.submit(together, str(tmp_path), number, 10 << 20) for number in range(2)]
        for _ in range(2):  # one of them has something else as well
            calls.append(executor.submit(full, 10 << 20))
        held = await asyncio.gather(*calls)
        await until_idle()
        assert sum(reserved()) > 36 << 20
        held.clear()
        calls.clear()
        gc.collect()  # all of it is free: their owners, which are idle, do not know
        kept = []
        async with asyncio.timeout(20):
            for _ in range(4):  # by one of them, alone: it has room if the other gives back
                kept.append(await executor.submit(full, 10 << 20))
                while sum(reserved()) > 48 << 20:
                    await asyncio.sleep(TELL_IDLE_EVERY)
                    assert await executor.submit(len, bytes(1 << 17)) == 1 << 17
        assert reserved()[1] >= 4 * 10 << 20
    supply.close()
