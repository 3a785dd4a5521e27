"""One pipeline with everything that has an order: its results are those of plain Python for every number of workers,
batch size, lane and length, with fusion and without."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from stageflow import DROP, Engine, PipelineBuilder

#: of the source index; the tree over them is what makes a sum of floats come out bit-equal
BLOCK = 16


def numbers(n: int):
    yield from range(n)


def kept(x: int):
    return DROP if x % 5 == 2 else x


def left(x: int) -> int:
    return x * 3


def right(x: int):
    return DROP if x % 7 == 3 else x + 100


def pair(left: int, right: int) -> tuple[int, int]:
    return left, right


def spread(both: tuple[int, int]):
    for k in range(both[0] % 4):
        yield (*both, k)


def spread_again(parts):
    for k in range(parts[2] % 3):
        yield (*parts, k)


def marked(xs: list) -> list:
    return [DROP if x[0] % 11 == 1 else (*x, "m") for x in xs]


def tenth(x) -> float:
    return 0.1 * (x[0] + x[1] + x[2] + x[3])


def text(x) -> str:
    return f"{x[0]}.{x[1]}.{x[2]}.{x[3]},"


def joined(a: str, b: str) -> str:
    return a + b


def add(a: float, b: float) -> float:
    return a + b


def look(marked) -> tuple:
    middle = len(marked) // 2
    return len(marked), list(marked[:3]), marked[middle : middle + 2], list(marked) == list(marked)


def built(batch: int, fuse: bool | None, lane: str | None, sunk: list, unordered: list):
    more = {} if fuse is None else {"fuse": fuse}
    at = {} if lane is None else {"executor": lane}

    async def take(marked) -> None:
        sunk.append(marked)

    async def take_any(marked) -> None:
        unordered.append(marked)

    return (
        PipelineBuilder("equal")
        .stage("numbers", numbers)
        .map("kept", kept, "numbers", **more, **at)
        .map("left", left, "kept", **more, **at)
        .map("right", right, "kept", **more, **at)
        .map("both", pair, "left", inputs={"right": "right"}, **more, **at)
        .map("parts", spread, "both", **at)
        .map("again", spread_again, "parts", **at)
        .map("marked", marked, "again", batch=batch, keep=True, **at)
        .map("tenth", tenth, "marked", **more, **at)
        .map("text", text, "marked", **more, **at)
        .reduce("sum", add, "tenth", combine=add, block=BLOCK, **at)
        .reduce("whole", joined, "text", combine=joined, initial="", block=BLOCK, **at)
        .reduce("chained", joined, "text", initial="", **at)
        .stage("looked", look, inputs={"marked": "marked"})
        .sink("take", take, "marked", ordered=True)
        .sink("take_any", take_any, "marked")
        .build()
    )


def expected(n: int) -> list[tuple]:
    """The items of `marked`."""

    def items() -> Iterator[tuple]:
        for x in range(n):
            if x % 5 == 2 or x % 7 == 3:
                continue
            for k in range(x * 3 % 4):
                for j in range(k % 3):
                    yield (x * 3, x + 100, k, j, "m")

    return [item for item in items() if item[0] % 11 != 1]


@pytest.fixture(scope="module")
def engines():
    made = {count: Engine(processes=count, threads=3) for count in (1, 2, 3)}
    yield made
    for engine in made.values():
        engine.close()


def check(result, n: int, sunk: list, unordered: list) -> float:
    wanted = expected(n)
    assert result.success, result.error
    assert list(result.data("marked")) == wanted
    assert result.data("whole") == result.data("chained") == "".join(map(text, wanted))
    middle = len(wanted) // 2
    assert result.data("looked") == (len(wanted), wanted[:3], wanted[middle : middle + 2], True)
    assert sunk == wanted
    assert sorted(unordered) == sorted(wanted)
    return result.data("sum")


@pytest.mark.parametrize("lane", [None, "thread"])
@pytest.mark.parametrize("fuse", [None, False])
def test_workers_batches_and_fusion_change_nothing(engines, lane, fuse):
    sums = set()
    for batch, count in itertools.product((1, 3, 64), (1, 2, 3)):
        sunk, unordered = [], []
        graph = built(batch, fuse, lane, sunk, unordered)
        sums.add(check(engines[count].run(graph, {"n": 120}), 120, sunk, unordered))
    assert len(sums) == 1, "a sum of floats depends on how the work was divided"


def test_any_length_gives_what_plain_python_gives(engines):
    dice = random.Random(7)
    lengths = [1, 2, 3, BLOCK, BLOCK * 8, BLOCK * 8 + 1, *(dice.randrange(5, 400) for _ in range(4))]
    for n in lengths:
        if not expected(n):
            continue
        count, batch, fuse = dice.choice((1, 2, 3)), dice.choice((1, 2, 5, 50)), dice.choice((None, False))
        sunk, unordered = [], []
        graph = built(batch, fuse, None, sunk, unordered)
        first = check(engines[count].run(graph, {"n": n}), n, sunk, unordered)
        sunk, unordered = [], []
        graph = built(batch + 1, None, "inline", sunk, unordered)
        assert check(graph.run({"n": n}, lane="inline"), n, sunk, unordered) == first, n
