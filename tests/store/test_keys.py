"""Keys and hashes: different things differ, equal things agree, in every process."""

import collections
import dataclasses
import datetime
import decimal
import enum
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow.core.errors import NotShippableError
from stageflow.store.keys import default_key, digest, hash_parameters, idempotency_key


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Doc(msgspec.Struct):
    a: int
    b: str = ""


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


def test_keys_do_not_collide_where_joined_text_would():
    assert idempotency_key(["a:b", "c"]) != idempotency_key(["a", "b:c"])
    assert idempotency_key(["ab"]) != idempotency_key(["a", "b"])
    assert idempotency_key([]) != idempotency_key([""])
    key = idempotency_key(["a", 1])
    assert key == idempotency_key(("a", 1))
    assert key.startswith("idem:")
    assert len(key) == 37
    assert default_key("p", "s", "v", "h") == default_key("p", "s", "v", "h") != default_key("p", "s", "v2", "h")


DISTINCT = [
    None, True, False, 1, 0, -1, 255, 256, 2**70, 1.0, 0.0, -0.0, "1", b"1", bytearray(b"1"), "", b"", (), [], {},
    set(), frozenset(), [1], (1,), {1}, frozenset({1}), {"a": 1}, {"a": "1"}, {1: "a"}, [[1], 2], [1, [2]], [1, 2],
    [2, 1], Color.RED, Color.BLUE, Doc(1), Doc(2), Doc(1, "x"), Point(1), Point(1, 1), datetime.date(2026, 1, 1),
    datetime.datetime(2026, 1, 1), datetime.timedelta(1), decimal.Decimal("1"), decimal.Decimal("1.0"), 1j,
    np.zeros(2), np.zeros(2, "f4"), np.zeros((2, 1)), np.zeros((1, 2)), np.float64(1), Doc, Point, len, os,
    collections.OrderedDict(a=1), collections.Counter("a"), memoryview(b"1"), float("nan"), float("inf"), range(3),
]  # fmt: skip


def test_different_values_have_different_hashes():
    hashes = [hash_parameters(value) for value in DISTINCT]
    clashes = [(DISTINCT[i], DISTINCT[j]) for i in range(len(hashes)) for j in range(i) if hashes[i] == hashes[j]]
    assert clashes == []


def test_order_counts_only_where_it_means_something():
    assert hash_parameters({"a": 1, "b": {"x", "y"}}) == hash_parameters({"b": {"y", "x"}, "a": 1})
    assert hash_parameters(collections.Counter("ab")) == hash_parameters(collections.Counter("ba"))
    turned = np.arange(6).reshape(2, 3).T
    assert hash_parameters(turned) == hash_parameters(np.ascontiguousarray(turned))


def test_fields_restrict_mappings_and_objects():
    assert hash_parameters({"a": 1, "b": 2}, ["a"]) == hash_parameters({"a": 1, "c": 3}, ["a", "z"])
    assert hash_parameters({"a": 1}, ["a"]) != hash_parameters({"a": 2}, ["a"])
    assert hash_parameters(Point(1, 2), ["x"]) == hash_parameters(Point(1, 3), ["x"])
    assert hash_parameters("p", ["a"]) != hash_parameters("q", ["a"])


def test_a_value_inside_itself_is_hashed():
    loop: list[object] = [1]
    loop.append(loop)
    other: list[object] = [1]
    other.append(other)
    assert hash_parameters(loop) == hash_parameters(other) != hash_parameters([1, [1]])
    shared = [1]
    assert hash_parameters([shared, shared]) == hash_parameters([[1], [1]])


def test_what_cannot_be_hashed_is_named():
    with pytest.raises(NotShippableError) as caught:
        hash_parameters({"a": [1, (x for x in ())]})
    assert caught.value.path == "['a'][1]"


def test_hashes_agree_across_processes_with_other_hash_seeds():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from stageflow.store.keys import hash_parameters\n"
        "import collections\n"
        "print(hash_parameters({'a': {'x', 'y', 'z'}, 'b': collections.Counter('hello'), 'c': frozenset('qwertz')}))"
    )
    seen = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code, os.getcwd()],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        seen.add(run.stdout.strip())
    assert len(seen) == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(values)
def test_a_deep_copy_has_the_same_hash(value):
    import copy

    assert digest(value) == digest(copy.deepcopy(value))


@given(st.lists(st.text()), st.lists(st.text()))
def test_keys_are_injective_on_lists_of_text(left, right):
    assert (idempotency_key(left) == idempotency_key(right)) == (left == right)
