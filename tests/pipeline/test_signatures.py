"""Plain functions are read without `inspect`, and as it would have read them."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Optional

import pytest

from stageflow.pipeline import signatures
from stageflow.pipeline.signatures import Traits, read_traits


def nothing():  # type: ignore[no-untyped-def]
    return None


def some(a: int, b: str | None, /, c, d: Optional[float] = None, *rest: int, e: bool, f="x", **named: Any) -> list[int]:  # type: ignore[no-untyped-def]  # noqa: UP045
    return [a, len(rest), len(named)]


def only_names(*, ctx: Any, later: int = 3) -> None: ...


def unresolved(a: Missing, b: Missing | None = None) -> Missing: ...  # type: ignore[name-defined]  # noqa: F821


async def coroutine(a: int) -> int:
    return a


def generator(a: int) -> Iterator[int]:
    yield a


async def async_generator(a: int) -> AsyncIterator[int]:
    yield a


def wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def signed(*args: Any) -> Any: ...


signed.__signature__ = inspect.signature(coroutine)  # type: ignore[attr-defined]
bound_default = lambda x, y=[1]: (x, y)  # noqa: E731


@pytest.mark.parametrize(
    "function",
    [
        *(nothing, some, only_names, unresolved, coroutine, generator, async_generator, bound_default),
        *(wrapping(some), wrapping(coroutine), signed, functools.partial(some, 1)),
    ],
)
def test_both_ways_to_read_a_function_agree(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = read_traits(function)
    monkeypatch.setattr(signatures, "_is_plain", lambda function: False)
    slow = read_traits(function)
    for name in Traits.__struct_fields__:
        assert getattr(quick, name) == getattr(slow, name), name


def test_a_graph_of_functions_is_built_without_inspect() -> None:
    text = (
        "import sys; from stageflow import PipelineBuilder\n"
        "def double(number: int, *, by: float = 2.0) -> float: return number * by\n"
        "PipelineBuilder('one').stage('double', double).build()\n"
        "assert not {'inspect', 'dataclasses', 'subprocess', 'socket', 'asyncio'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
