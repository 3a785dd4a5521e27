"""Structs that go through typed msgspec: which types, which values, and that they come back as they were."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest

from stageflow_executors.shm import closed, codec, fidelity


class Leaf(msgspec.Struct, frozen=True):
    """Scalars only."""

    name: str
    weight: float


class Tree(msgspec.Struct):
    """Everything that is closed."""

    tags: tuple[str, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    empty: tuple[()] = ()
    rows: list[list[int]] = []
    leaves: dict[str, Leaf] = {}
    by_number: dict[int, list[Leaf]] = {}
    maybe: list[float] | None = None
    either: int | float | str | tuple[int, ...] = 0
    below: Tree | None = None
    trees: list[Tree] = []


class Loose(msgspec.Struct):
    """A list of anything."""

    items: list[Any]


class Bare(msgspec.Struct):
    """A list that says nothing."""

    items: list  # type: ignore[type-arg]


class Ordered(msgspec.Struct):
    """Keys that msgspec would not give back."""

    items: dict[float, int]


class Torn(msgspec.Struct):
    """Two containers that look alike on the wire."""

    items: list[int] | tuple[int, ...]


class Bounded(msgspec.Struct):
    """A constraint inside a container."""

    items: list[Annotated[int, msgspec.Meta(ge=0)]]


class Outer(msgspec.Struct):
    """Open because of what it holds, deep inside."""

    loose: dict[str, list[Loose]]


FULL = Tree(
    tags=("a", "b"),
    pair=(1, 2.5),
    rows=[[1, 2], [], [3]],
    leaves={"z": Leaf("z", 1.0), "a": Leaf("a", float("inf"))},
    by_number={-1: [Leaf("x", -0.0)], 7: []},
    maybe=[0.5],
    either=(1, 2),
    below=Tree(trees=[Tree(either="s"), Tree(either=1.0), Tree(either=1)]),
)


class Text(str):
    """Not exactly str."""


class Many(list):  # type: ignore[type-arg]
    """Not exactly list."""


@pytest.mark.parametrize("cls", [Leaf, Tree])
def test_types_that_are_closed(cls: type) -> None:
    assert closed.is_closed(cls)


@pytest.mark.parametrize("cls", [Loose, Bare, Ordered, Torn, Bounded, Outer])
def test_types_that_are_not(cls: type) -> None:
    assert not closed.is_closed(cls)


@pytest.mark.parametrize("value", [Tree(), FULL, [FULL, Tree()]])
def test_values_come_back_as_they_were(value: Any) -> None:
    result = codec.encode(value, None, 1 << 20)  # type: ignore[arg-type]
    assert result.encoded[0] == (codec.STRUCTS if type(value) is list else codec.STRUCT)
    assert repr(codec.decode(result.encoded, None)) == repr(value)
    assert fidelity.same(value, codec.decode(result.encoded, None))


@pytest.mark.parametrize(
    "value",
    [
        Tree(tags=["a"]),  # type: ignore[arg-type]
        Tree(tags=(Text("a"),)),
        Tree(tags=(1,)),  # type: ignore[arg-type]
        Tree(pair=(1, 2)),
        Tree(pair=(1, 2.0, 3)),  # type: ignore[arg-type]
        Tree(pair=(True, 2.0)),
        Tree(empty=(1,)),  # type: ignore[arg-type]
        Tree(rows=[[1], (2,)]),  # type: ignore[list-item]
        Tree(rows=Many()),
        Tree(leaves={"a": Leaf("a", 1)}),
        Tree(leaves={Text("a"): Leaf("a", 1.0)}),
        Tree(by_number={True: []}),
        Tree(maybe=[1]),
        Tree(either=(1, 2.0)),  # type: ignore[arg-type]
        Tree(below=Tree(trees=[Tree(tags=[])])),  # type: ignore[arg-type]
        Tree(by_number={2**70: []}),
        Tree(tags=("\ud800",)),
    ],
)
def test_values_that_would_change_are_pickled(value: Tree) -> None:
    result = codec.encode([Tree(), value], None, 1 << 20)  # type: ignore[arg-type]
    assert result.encoded[0] == codec.PICKLE
    assert repr(codec.decode(result.encoded, None)) == repr([Tree(), value])


def test_a_value_that_contains_itself_is_pickled() -> None:
    value = Tree()
    value.trees.append(value)
    back = codec.decode(codec.encode(value, None, 1 << 20).encoded, None)  # type: ignore[arg-type]
    assert back.trees[0] is back
