"""What leaves a stage is of the type it says: by annotation or `contract=`, in the lane where it was made."""

import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from stageflow import DROP, Engine, PipelineBuilder, StageOutput


class Point(msgspec.Struct):
    x: int
    y: int


@dataclasses.dataclass
class Order:
    id: int
    items: list[Point]


def broken_order(n) -> Order:
    return Order(n, [Point(1, 2), Point(3, "four")])  # type: ignore[arg-type]


def liar() -> int:
    return "one"  # type: ignore[return-value]


async def async_liar() -> dict[str, list[int]]:
    return {"a": [1, "b"]}  # type: ignore[list-item]


def honest() -> list[Point]:
    return [Point(1, 2)]


def wrapped() -> StageOutput:
    return StageOutput.ok("anything")


def maybe(x) -> int:
    return DROP if x == 1 else "x" if x == 2 else x


def fanned(x) -> Iterator[int]:
    yield x
    yield x if x != 2 else "two"  # type: ignore[misc]


def batched(x: list[int]) -> list[int]:
    return [value if value != 2 else "two" for value in x]  # type: ignore[misc]


def total(acc: int, item: int) -> int:
    return acc + item if item != 2 else "two"  # type: ignore[return-value]


class Stage:
    def execute(self, ctx) -> dict[str, int]:
        return {"a": "b"}  # type: ignore[dict-item]


def numpy_sum() -> int:
    numpy = pytest.importorskip("numpy")
    return numpy.arange(3).sum()


def counted(n: int) -> Iterator[int]:
    for number in range(n):
        yield number if number != 2 else "two"  # type: ignore[misc]


async def counted_async(n: int) -> AsyncIterator[int]:
    for number in range(n):
        yield number if number != 2 else "two"  # type: ignore[misc]


def test_the_path_of_the_offending_field_is_named(one, lane):
    info = one(broken_order, lane, {"n": 1}).outputs["s"].error_info
    assert info.type == "stageflow.core.errors.ContractViolationError"
    assert "at $.items[1].y: expected int, got str" in info.message


@pytest.mark.parametrize(
    ("function", "where"), [(liar, "$: expected int"), (async_liar, "$.a[1]"), (Stage, "$.a: expected int")]
)
def test_a_value_that_breaks_its_annotation_fails_its_stage(one, lane, function, where):
    output = one(function, lane).outputs["s"]
    assert output.status == "fail"
    assert where in output.error


@pytest.mark.parametrize("function", [honest, wrapped, numpy_sum])
def test_what_keeps_its_word_passes_unchanged(one, lane, function):
    assert one(function, lane).success


def test_contract_takes_the_place_of_the_annotation(one, lane):
    assert one(liar, lane, contract=str).data("s") == "one"
    assert "contract bytes" in one(liar, lane, contract=bytes).outputs["s"].error


@pytest.mark.parametrize(
    ("function", "kept", "batch"), [(maybe, [0, 3], None), (fanned, [0, 0, 1, 1, 3, 3], None), (batched, [0, 1, 3], 3)]
)
def test_each_element_of_a_map_is_checked_alone(engine, lane, function, kept, batch):
    graph = PipelineBuilder("p").map("m", function, over="xs", executor=lane, batch=batch)
    result = engine.run(graph.build(), {"xs": [0, 1, 2, 3]}, failure_mode="continue_on_failure")
    assert list(result.data("m")) == kept
    (failure,) = result.failures
    assert failure.item == (2,)
    assert failure.error_type.endswith("ContractViolationError")


def test_a_reduce_is_checked_by_its_accumulator(engine, lane):
    graph = PipelineBuilder("p").reduce("r", total, over="xs", initial=0, executor=lane).build()
    assert engine.run(graph, {"xs": [0, 1]}).data("r") == 1
    assert "expected int" in engine.run(graph, {"xs": [0, 2]}).outputs["r"].error


@pytest.mark.parametrize("function", [counted, counted_async])
def test_a_source_is_checked_item_by_item(engine, function):
    graph = PipelineBuilder("p").stage("src", function).map("m", lambda src: src, over="src", executor="thread").build()
    assert engine.run(graph, {"n": 2}).success
    assert "expected int" in engine.run(graph, {"n": 4}).outputs["src"].error


def test_checking_annotations_can_be_switched_off_and_contracts_not():
    with Engine(processes=1, check_annotations=False) as engine:
        builder = PipelineBuilder("p").stage("a", liar, executor="thread").stage("m", Stage, executor="thread")
        assert engine.run(builder.build()).success
        strict = PipelineBuilder("p").stage("a", liar, executor="thread", contract=int).build()
        assert not engine.run(strict).success


def test_the_plan_shows_what_is_checked():
    plan = PipelineBuilder("p").stage("a", honest).stage("b", liar, contract=str).build().plan()
    assert plan.stage("a").gives == f"list[{__name__}.Point]"
    assert plan.stage("b").gives == "str"
    assert "str (contract, checked)" in plan.to_text()


def test_an_annotation_that_says_nothing_costs_nothing():
    from stageflow.pipeline.checks import checked_annotation

    def anything() -> Any: ...
    def nothing(): ...
    def unknown() -> "Missing": ...  # type: ignore[name-defined]  # noqa: F821
    def output() -> StageOutput: ...  # type: ignore[empty-body]
    def either() -> int | StageOutput: ...  # type: ignore[empty-body]

    for number, function in enumerate((anything, nothing, unknown, output, either)):
        graph = PipelineBuilder(f"p{number}").stage("s", function).build()
        assert checked_annotation(graph.specs[0]) is None, function
