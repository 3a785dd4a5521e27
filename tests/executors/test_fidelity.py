"""A value is the same whatever it crossed: its type, those of its parts, their order, every bit of a float."""

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import os
import pathlib
import struct
import subprocess
import sys
import uuid
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stageflow.core.errors import StageflowError
from stageflow_executors.processes.payload import ParentMemory, encode
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply
from stageflow_executors.shm import codec, fidelity


class Colour(enum.Enum):
    RED = "r"
    BLUE = (1, 2)


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 2


class Leaf(msgspec.Struct):
    name: str
    size: int | None = None
    weight: float = 0.0
    raw: bytes = b""


class Branch(msgspec.Struct, frozen=True):
    leaf: Leaf
    flag: bool


class Loose(msgspec.Struct):
    anything: Any
    when: datetime.datetime | None = None


class Parent(msgspec.Struct):
    x: int


class Child(Parent):
    y: float


@dataclasses.dataclass
class Record:
    a: Any
    b: Any


Pair = collections.namedtuple("Pair", "left right")


class Name(str):
    __slots__ = ()


class Tagged(np.ndarray):
    """A subclass with something of its own."""

    tag: Any = None

    def __reduce__(self) -> Any:
        made, args, state = super().__reduce__()
        return made, args, (*state, self.tag)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[:-1])
        self.tag = state[-1]


def identical(a: Any, b: Any) -> bool:
    """Strictly: `==` calls 1 and True and 1.0 the same, and NaN different from itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    if isinstance(a, np.ndarray):
        return identical_arrays(a, b)
    if isinstance(a, np.generic):
        return bool(a.dtype == b.dtype) and a.tobytes() == b.tobytes()
    if isinstance(a, memoryview):
        return (a.format, a.shape, a.tobytes()) == (b.format, b.shape, b.tobytes())
    if isinstance(a, dict):
        return identical(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, set | frozenset):
        return a == b and sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, msgspec.Struct):
        return all(identical(getattr(a, name), getattr(b, name)) for name in a.__struct_fields__)
    if isinstance(a, Record):
        return identical((a.a, a.b), (b.a, b.b))
    if isinstance(a, datetime.datetime | datetime.time):
        return a == b and a.fold == b.fold and type(a.tzinfo) is type(b.tzinfo) and str(a.tzinfo) == str(b.tzinfo)
    if isinstance(a, decimal.Decimal):
        return a.as_tuple() == b.as_tuple()
    return bool(a == b)


def identical_arrays(a: Any, b: Any) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or a.dtype.isnative != b.dtype.isnative:
        return False
    for order in ("c_contiguous", "f_contiguous"):
        if getattr(a.flags, order) and not getattr(b.flags, order):
            return False
    if isinstance(a, np.ma.MaskedArray):
        return identical_arrays(a.data, b.data) and np.array_equal(np.ma.getmaskarray(a), np.ma.getmaskarray(b))
    if isinstance(a, Tagged) and not identical(a.tag, b.tag):
        return False
    if a.dtype.hasobject:
        return identical(a.tolist(), b.tolist())
    return bool(a.tobytes() == b.tobytes())


# ------------------------------------------------------------ values

TEXT = st.text(st.characters(), max_size=40)  # lone surrogates too
INTS = st.integers() | st.integers(-(2**70), 2**70) | st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1])
ZONES = st.sampled_from([None, datetime.UTC, datetime.timezone(datetime.timedelta(hours=-3, minutes=-30))])
TIMES = st.datetimes(timezones=ZONES) | st.datetimes().map(
    lambda when: when.replace(tzinfo=zoneinfo.ZoneInfo("UTC"), fold=1)
)
FLOATS = st.floats() | st.just(-0.0)
HASHABLE = (
    st.none() | st.booleans() | INTS | TEXT | st.binary(max_size=20) | st.tuples(st.integers(), TEXT)
    | st.sampled_from(Colour) | st.just(Level.LOW | Level.HIGH) | st.builds(Name, TEXT)
)  # fmt: skip
LEAVES = st.builds(Leaf, TEXT, st.none() | st.integers(-(2**63), 2**63 - 1), FLOATS, st.binary(max_size=200))
SIMPLE = (
    HASHABLE | FLOATS | st.complex_numbers() | st.binary(max_size=3000) | st.builds(bytearray, st.binary(max_size=3000))
    | TIMES | st.times() | st.dates() | st.timedeltas() | st.decimals() | st.fractions() | st.uuids()
    | st.just(range(1, 9, 3)) | st.just(Ellipsis) | st.sampled_from([int, Leaf, np.float32, len])
    | LEAVES | st.builds(Branch, LEAVES, st.booleans()) | st.builds(Child, st.integers(), FLOATS)
    | st.builds(Leaf, st.builds(Name, TEXT)) | st.builds(Leaf, TEXT, INTS, st.integers() | st.booleans())
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    SIMPLE,
    lambda part: (
        st.lists(part, max_size=4) | st.lists(part, max_size=4).map(tuple) | st.dictionaries(HASHABLE, part, max_size=4)
        | st.sets(HASHABLE, max_size=4) | st.frozensets(HASHABLE, max_size=4) | st.builds(Pair, part, part)
        | st.builds(Record, part, part) | st.builds(Loose, part, st.none() | TIMES)
        | st.lists(part, max_size=3).map(collections.deque) | st.lists(LEAVES, max_size=30)
        | st.dictionaries(TEXT, part, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=5,
)  # fmt: skip
DTYPES = hnp.scalar_dtypes() | hnp.unicode_string_dtypes(max_len=5) | hnp.byte_string_dtypes(max_len=5)
STRUCTURED = hnp.array_dtypes(DTYPES, min_size=1, max_size=3)


def filled(dtype: Any, shape: tuple[int, ...], seed: int) -> Any:
    """An array that hypothesis need not draw element by element."""
    if dtype.names is not None:
        array = np.zeros(shape, dtype)
        for name in dtype.names:
            array[name] = filled(dtype[name], shape, seed + 1).reshape(array[name].shape)
        return array
    if dtype.subdtype is not None:
        inner, extra = dtype.subdtype
        return filled(inner, (*shape, *extra), seed)
    numbers = np.random.default_rng(seed).integers(-99, 99, shape)
    if dtype.kind in "fc":
        numbers = np.where(numbers > 90, np.nan, numbers / 3)
    with np.errstate(invalid="ignore"):
        return np.asarray(numbers).astype(dtype)


PLAIN = st.builds(
    filled,
    DTYPES | STRUCTURED,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    st.integers(0, 10_000),
)


def _frozen(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


WAYS: list[Callable[[Any], Any]] = [
    lambda a: a,
    np.asfortranarray,
    lambda a: a.T,
    lambda a: a[::2] if a.ndim else a,
    lambda a: a[::-1] if a.ndim else a,
    lambda a: a[..., 1:] if a.ndim else a,
    lambda a: np.broadcast_to(a, (3, *a.shape)),
    _frozen,
    lambda a: a.astype(object),
    lambda a: np.ma.array(a, mask=np.zeros(a.shape, bool)) if a.dtype.names is None and a.dtype.isnative else a,
    lambda a: a.reshape(-1)[:1].reshape(()) if a.size else a,
    lambda a: np.repeat(a.reshape(-1), 50),
]
ARRAYS = st.builds(lambda array, way: way(array), PLAIN, st.sampled_from(WAYS))


# ------------------------------------------------------------ ways across


def identity(value: Any) -> Any:
    return value


Cross = Callable[[Any], Any]


@pytest.fixture(scope="module", params=[16, 65536], ids=["shared", "inline"])
def here(request: pytest.FixtureRequest) -> Iterator[Cross]:
    """Encoded and decoded in this process."""
    supply = WorkerSupply(1, inline_threshold=request.param)
    memory = ParentMemory(supply)
    yield lambda value: encode(supply, memory, value).load()
    supply.close()


@pytest.fixture(scope="module")
def there() -> Iterator[Cross]:
    """To a worker and back."""
    with asyncio.Runner() as runner:
        executor = ProcessExecutor(1, inline_threshold=256)
        runner.run(executor.open())

        async def cross(value: Any) -> Any:
            return await executor.submit(identity, value)

        yield lambda value: runner.run(cross(value))
        runner.run(executor.aclose())


many = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
few = settings(many, max_examples=25)


@many
@given(value=VALUES)
def test_values_are_the_same_when_decoded(here: Cross, value: Any) -> None:
    assert identical(value, here(value))


@many
@given(value=ARRAYS)
def test_arrays_are_the_same_when_decoded(here: Cross, value: Any) -> None:
    assert identical(value, here(value))
    if value.dtype.isnative:  # numpy's own pickle turns the others' bytes round
        assert identical([value, {"a": value}], here([value, {"a": value}]))


@few
@given(value=VALUES | ARRAYS)
def test_values_are_the_same_behind_a_worker(there: Cross, value: Any) -> None:
    assert identical(value, there(value))


def tagged(tag: Any) -> Any:
    array = np.arange(2000.0).view(Tagged)
    array.tag = tag
    return array


@pytest.mark.parametrize(
    "value",
    [
        tagged({"of": [1]}),
        np.ma.array(np.arange(2000.0), mask=np.arange(2000) % 2 == 0),
        np.rec.array([(1, 2.0, "x")], dtype=[("a", int), ("b", float), ("c", "U3")]),
        np.array(["NaT", "2020-01-01"], "M8[ns]"),
        np.array([1, None, "x", (2,)], dtype=object),
        np.zeros((0, 3), "M8[us]"),
        np.zeros(4, dtype={"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [0, 16], "itemsize": 32}),
        np.arange(4000, dtype=">f4").reshape(40, 100)[::3, ::-7],
        memoryview(np.arange(6000, dtype="i4").reshape(60, 100)),
        memoryview(b"x" * 9000)[::3],
        pathlib.PurePosixPath("a/b"),
        fractions.Fraction(1, 3),
        uuid.UUID(int=5),
        zoneinfo.ZoneInfo("UTC"),
        decimal.Decimal("1.100"),
        decimal.Decimal("sNaN"),
        struct.unpack("d", b"\x01\x00\x00\x00\x00\x00\xf8\xff")[0],
        [1, True, 1.0, "1", b"1", bytearray(b"1"), (1,), [1], {1: 1}, {"1": 1}, {1.0: 1}],
        {True: "bool", 2: "int", "2": "str", (2,): "tuple", b"2": "bytes", None: "none", 2.5: "float"},
        "\ud800",
        ["\udfff" * 5000],
        {"\ud800": Leaf("\udc00")},
    ],
    ids=lambda value: type(value).__name__,
)
def test_chosen_values_are_the_same(here: Cross, there: Cross, value: Any) -> None:
    assert identical(value, here(value))
    assert identical(value, there(value))


# ------------------------------------------------------------ Arrow


def arrow_values() -> list[Any]:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    numbers = pa.array(range(50_000))
    table = pa.table(
        {
            "n": pa.chunked_array([[1, None, 3], [], [4]]),
            "f": [1.5, float("nan"), -0.0, None],
            "s": ["a", None, "ü", ""],
            "d": pa.array(["x", "y", "x", None]).dictionary_encode(),
            "l": [[1], None, [], [2, 3]],
            "r": [{"a": 1}, None, {"a": None}, {"a": 2}],
            "t": pa.array([0, 1, None, 2], pa.timestamp("us", tz="Europe/Berlin")),
        }
    ).replace_schema_metadata({"made": "here"})
    return [
        table, table.slice(1, 2), table.slice(0, 0), table.schema.empty_table(), table.schema,
        table.to_batches()[0], table["d"], table["n"], pa.chunked_array([], type=pa.int8()),
        pa.table({"n": numbers, "m": numbers.cast(pa.float64())}), numbers, numbers.slice(10, 20_000),
        pa.nulls(5), pa.array([], pa.string()), pa.array([b"abc", None], pa.binary(3)),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())), pa.scalar(5), pa.int32(), pa.py_buffer(b"raw"),
        pa.array([True, None] * 40_000), pa.array([decimal.Decimal("1.10")]), [numbers, {"t": table}],
        pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]),
        pa.array([uuid.UUID(int=7).bytes], pa.uuid()),
    ]  # fmt: skip


def same_arrow(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | dict):
        values = (a.values(), b.values()) if isinstance(a, dict) else (a, b)
        return all(map(same_arrow, *values))
    for kind in ("schema", "type"):
        if hasattr(a, kind) and not getattr(a, kind).equals(getattr(b, kind)):
            return False
    if hasattr(a, "schema") and (a.schema.metadata != b.schema.metadata or a.num_rows != b.num_rows):
        return False
    if hasattr(a, "to_pylist"):
        if hasattr(b, "validate"):
            b.validate(full=True)
        return identical(a.to_pylist(), b.to_pylist())
    return bool(a.equals(b))


def test_arrow_values_are_the_same(here: Cross, there: Cross) -> None:
    for value in arrow_values():
        assert same_arrow(value, here(value)), value
        assert same_arrow(value, there(value)), value


def test_arrow_tables_are_read_where_they_lie() -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    supply = WorkerSupply(1)
    whole = pa.table({"n": pa.array(range(1_000_000))})
    payload = encode(supply, ParentMemory(supply), whole.slice(0, 100_000))
    assert payload.encoded[0] == codec.ARROW
    assert 800_000 <= payload.nbytes < 900_000, "a slice took along what it does not show"
    before = pa.total_allocated_bytes()
    table = payload.load()
    assert pa.total_allocated_bytes() - before < 10_000, "the bytes were copied"
    column = table["n"].chunk(0)
    with pytest.raises(ValueError, match="read-only"):
        column.to_numpy()[0] = 1
    payload.release()
    del table, payload
    assert supply.books.live() == 1, "the column no longer keeps its block"
    assert column[99_999].as_py() == 99_999
    del column
    assert supply.books.live() == 0
    supply.close()


def test_pyarrow_is_not_imported_for_other_values() -> None:
    script = """
import asyncio, sys
from stageflow_executors.processes.pool import ProcessExecutor
async def main():
    async with ProcessExecutor(1) as executor:
        for value in (1, "a", [1], {"a": object}, bytearray(9000)):
            await executor.submit(type, value)
        print("pyarrow" in sys.modules, await executor.submit(eval, "'pyarrow' in __import__('sys').modules"))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("False False\n", 0), done.stderr


# ------------------------------------------------------------ STAGEFLOW_CHECK_FIDELITY


@dataclasses.dataclass
class Counting:
    """Is another one whenever it was pickled."""

    n: int

    def __reduce__(self) -> Any:
        return Counting, (self.n + 1,)


CHECKED = """
import asyncio, sys
import numpy as np
from stageflow.core.errors import StageflowError
from stageflow_executors.processes.pool import ProcessExecutor
class Counting:
    def __init__(self, n): self.n = n
    def __eq__(self, other): return self.n == other.n
    def __reduce__(self): return Counting, (self.n + 1,)
def make(): return Counting(5)
def give(value): return value
async def refused(awaitable):
    try: await awaitable
    except StageflowError as error: return "changed on its way" in str(error)
    return False
async def main():
    async with ProcessExecutor(1) as executor:
        print(await refused(executor.submit(give, Counting(5))), await refused(executor.submit(make)))
        nan = np.full(20_000, np.nan)[::2]
        for value in (nan, [float("nan")], {1, 2}, np.arange(90_000), {"a": np.ones(9000)}, memoryview(b"x" * 99_999)):
            await executor.submit(give, value)
        before = await executor.submit(eval, "len(__import__('os').listdir('/proc/self/fd'))")
        for n in range(50):
            await executor.submit(np.ones, 20_000)
        print(await executor.submit(eval, "len(__import__('os').listdir('/proc/self/fd'))") - before)
        print(executor.supply.books.live())
asyncio.run(main())
"""


def test_the_check_finds_what_changes_and_nothing_else(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHECKED)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100,
        env={**os.environ, "STAGEFLOW_CHECK_FIDELITY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True", "0", "0"]


@few
@given(value=VALUES)
def test_the_check_agrees_about_values_that_equal_themselves(here: Cross, value: Any) -> None:
    back = here(value)
    assert fidelity.same(value, back) or value != back  # a NaN beside a set, whose order a pickle may change


@few
@given(value=ARRAYS)
def test_the_check_agrees_about_arrays(here: Cross, value: Any) -> None:
    if not isinstance(value, np.ma.MaskedArray):  # their fill value is numpy's own pickle's to change
        assert fidelity.same(value, here(value))


def test_the_check_tells_types_apart() -> None:
    for a, b in [(1, True), ([1], (1,)), (np.arange(3), np.arange(3.0)), (np.arange(4), np.arange(4).reshape(2, 2))]:
        assert not fidelity.same(a, b)
    with pytest.raises(StageflowError, match="Counting changed"):
        fidelity.check(Counting(1), codec.encode(Counting(1), None, 65536).encoded, None)  # type: ignore[arg-type]
