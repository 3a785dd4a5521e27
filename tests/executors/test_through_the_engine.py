"""What the process lane promises about bytes, as the stages of a graph meet it."""

import gc
from typing import Any

import pytest

from stageflow import Engine, PipelineBuilder, StageContext
from stageflow_executors.shm.arena import Arena

SIZE = 500_000


def born(ctx: StageContext) -> Any:
    array = ctx.empty((SIZE // 2, 2), "float64")
    array[:] = 1.0
    return array


def raw(ctx: StageContext) -> Any:
    view = ctx.buffer(SIZE * 8)
    view[:3] = b"abc"
    return view


def doubled(born: Any) -> Any:
    return born * 2


def total(doubled: Any) -> float:
    return float(doubled.sum())


def head(raw: memoryview) -> bytes:
    return bytes(raw[:3])


def scribbled(born: Any) -> float:
    born += 1
    return float(born.sum())


def untouched(born: Any, scribbled: float) -> tuple[float, bool]:
    return float(born.sum()), bool(born.flags.writeable)


def test_results_are_born_shared_and_pass_the_parent_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent lays nothing large down and maps nothing: the stages read each other's bytes."""
    laid: list[int] = []
    allocate = Arena.allocate
    monkeypatch.setattr(Arena, "allocate", lambda self, n: (laid.append(n), allocate(self, n))[1])
    graph = PipelineBuilder("chain")
    for stage in (born, doubled, total, raw, head):
        graph = graph.stage(stage.__name__, stage, executor="process")
    with Engine(processes=2) as engine:
        result = engine.run(graph.build())
        books = engine.supply().books
        assert (result.data("total"), result.data("head")) == (SIZE * 2.0, b"abc")
        assert not [n for n in laid if n > 100_000]
        assert not [m for m in books.mappings.values() if m._memory is not None], "the parent looked into a segment"
        del result
        gc.collect()
        assert books.live() == 0


def test_writable_inputs_are_private_to_their_stage() -> None:
    graph = (
        PipelineBuilder("private")
        .stage("born", born, executor="process")
        .stage("scribbled", scribbled, executor="process", writable=True)
        .stage("untouched", untouched, executor="process")
        .build()
    )
    with Engine(processes=2) as engine:
        result = engine.run(graph)
    assert result.data("scribbled") == SIZE * 2.0
    assert result.data("untouched") == (SIZE * 1.0, False)
