"""Edge types: certain mismatches are reported, everything else is taken to fit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NewType, Optional, Protocol, TypedDict, TypeVar, Union

import pytest

from stageflow.core.errors import PipelineValidationError
from stageflow.core.kinds import Drop
from stageflow.core.output import StageOutput
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.signatures import annotations_of
from stageflow.pipeline.types import mismatch, value_of

T = TypeVar("T")
Id = NewType("Id", int)


@dataclass
class Doc:
    n: int


class Page(Doc): ...


class Box(TypedDict):
    n: int


class Speaks(Protocol):
    def speak(self) -> str: ...


FITS = [
    (int, int),
    (int, float),
    (bool, int),
    (bytes, memoryview),
    (Page, Doc),
    (Doc, Page),  # narrowing is the author's business
    (int, Any),
    (Any, int),
    (int, object),
    (int, "NotDefined"),
    (int | None, int),
    (int, int | None),
    (Optional[int], Union[str, int]),  # noqa: UP007, UP045
    (list[int], Sequence[int]),
    (list[int], list),
    (list, list[int]),
    (list[int], Iterable[float]),
    (dict[str, int], Mapping[str, int]),
    (dict[str, Any], Box),
    (Box, dict[str, int]),
    (tuple[int, str], tuple[int, str]),
    (tuple[int, ...], tuple[int, int]),
    (Id, int),
    (int, Id),
    (Annotated[int, "unit"], int),
    (Literal["a", "b"], str),
    (str, Literal["a"]),
    (Doc, Speaks),
    (T, int),
    (Doc, Callable[[], int]),
    (Doc, Sequence[int]),  # a class may well be one
    (str, Sequence[str]),
]
CLASHES = [
    (int, str),
    (str, int),
    (float, int),
    (Doc, str),
    (Doc, dict[str, int]),
    (int | None, str),
    (int | float, str | bytes),
    (list[int], list[str]),
    (list[int], dict[str, int]),
    (list[Doc], Sequence[str]),
    (dict[str, int], Mapping[int, int]),
    (tuple[int, str], tuple[int, int]),
    (tuple[int, str], tuple[int, str, int]),
    (int, Iterable[int]),
    (int, Sequence[int]),
    (Id, str),
    (Literal["a"], Literal["b"]),
    (Literal["a"], int),
    (Annotated[int, "unit"], str),
]


@pytest.mark.parametrize(("given", "wanted"), FITS)
def test_fits(given, wanted):
    assert not mismatch(given, wanted)


@pytest.mark.parametrize(("given", "wanted"), CLASHES)
def test_clashes(given, wanted):
    assert mismatch(given, wanted)


def test_what_arrives_of_a_return_annotation():
    assert value_of(Awaitable[int]) is int
    assert value_of(Iterator[int], is_generator=True) is int
    assert value_of(AsyncIterator[bytes], is_generator=True) is bytes
    assert not mismatch(value_of(StageOutput), int)
    assert not mismatch(value_of(StageOutput | int), str)
    assert mismatch(value_of(Doc | Drop), str)


def test_one_annotation_that_cannot_be_resolved_does_not_hide_the_others():
    def f(a: int, b: Nowhere) -> str: ...  # noqa: F821

    assert annotations_of(f) == {"a": int, "return": str}


def ints() -> Iterator[int]:
    yield 1


async def aints() -> AsyncIterator[int]:
    yield 1


def one() -> int:
    return 1


def many() -> list[int]:
    return [1]


def takes_int(x: int) -> int:
    return x


def takes_str(x: str) -> str:
    return x


def takes_ints(x: Sequence[int]) -> list[int]:
    return list(x)


def takes_strs(x: list[str]) -> None: ...


def wrong(builder: PipelineBuilder) -> list[tuple[str, str]]:
    try:
        builder.build()
    except PipelineValidationError as error:
        return [(code, p.context["stages"][-1]) for code, p in zip(error.codes, error.problems, strict=True)]
    return []


X = {"x": "m"}


@pytest.mark.parametrize(
    ("builder", "blamed"),
    [
        (PipelineBuilder("p").stage("s", one).stage("e", takes_int, inputs={"x": "s"}), []),
        (PipelineBuilder("p").stage("s", one).stage("e", takes_str, inputs={"x": "s"}), ["e"]),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_int, "s"), []),
        (PipelineBuilder("p").stage("s", aints).map("m", takes_str, "s"), ["m"]),
        (PipelineBuilder("p").stage("s", many).map("m", takes_int, "s"), []),
        (PipelineBuilder("p").stage("s", many).map("m", takes_str, "s"), ["m"]),
        (PipelineBuilder("p").stage("s", one).map("m", takes_int, "s"), ["m"]),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_ints, "s", batch=8), []),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_int, "s", batch=8), ["m"]),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_ints, "s", batch=8).map("n", takes_int, "m"), []),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_int, "s").stage("e", takes_ints, inputs=X), []),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_int, "s").stage("e", takes_strs, inputs=X), ["e"]),
        (PipelineBuilder("p").stage("s", ints).map("m", takes_int, "s").stage("e", takes_int, inputs=X), ["e"]),
        (PipelineBuilder("p").stage("s", one, contract=str).stage("e", takes_str, inputs={"x": "s"}), []),
        (PipelineBuilder("p", inputs={"x": str}).stage("e", takes_int), ["e"]),
        (PipelineBuilder("p", inputs={"x": list[int]}).map("e", takes_int, "x"), []),
        (PipelineBuilder("p", inputs={"x": list[str]}).map("e", takes_int, "x"), ["e"]),
    ],
)
def test_edges(builder, blamed):
    assert wrong(builder) == [("CONTRACT-004-TYPE", name) for name in blamed]
