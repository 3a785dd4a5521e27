"""The gallery of error texts: each says what, where, why, the nearest name where there is one, and what to do.

The texts are held word for word, so that a change to one is a decision. Build and input errors are made by hand below;
the errors of runs come from real runs.
"""

import asyncio
import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from stageflow import DefinitionError, PipelineBuilder, RetryConfig, StageFailedError, StageKind, StageOutput
from stageflow.cli.inputs import read_inputs
from stageflow.cli.show import print_failures


def number(x: int) -> int:
    return x


def text(number: str) -> str:
    return number


def typo(lmit):
    return lmit


def pipeline(**keywords: Any) -> PipelineBuilder:
    return PipelineBuilder("shop", **keywords)


BUILD: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (
        lambda: pipeline().build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-EMPTY] pipeline 'shop' has no stages
      -> Add at least one: .stage("name", runner).""",
    ),
    "unknown stage in after": (
        lambda: pipeline().stage("fetch", number).stage("parse", lambda fetch: 1, ["fetsh"]).build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-MISSING_DEP] stage 'parse' is declared after 'fetsh', but there is no such stage
      -> Did you mean 'fetch'?""",
    ),
    "cycle": (
        lambda: pipeline().stage("a", lambda c: 1).stage("b", lambda a: 1).stage("c", lambda b: 1).build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-CYCLE] stages wait for each other: a -> b -> c -> a
      -> Remove one of these dependencies.""",
    ),
    "edge types": (
        lambda: pipeline().stage("number", number).stage("text", text).build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-TYPE] stage 'text': parameter 'number' is annotated str, but is bound to 'number', which returns int
      -> Change one of the two annotations, or rename the parameter: it is bound to stage 'number' by its name.""",
    ),
    "unbound parameter": (
        lambda: pipeline(inputs={"limit": int}).stage("typo", typo).build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-UNBOUND] stage 'typo': parameter 'lmit' names no upstream stage and no declared input
      -> Did you mean 'limit'? Or declare it: PipelineBuilder(..., inputs={'lmit': type}).""",
    ),
    "all at once": (
        lambda: (
            pipeline(inputs={"limit": int})
            .stage("typo", typo)
            .stage("late", lambda: 1, ["zz"])
            .stage("a", lambda b: 1)
            .stage("b", lambda a: 1)
            .build()
        ),
        """3 problems in the definition of pipeline 'shop':
  [CONTRACT-004-UNBOUND] stage 'typo': parameter 'lmit' names no upstream stage and no declared input
      -> Did you mean 'limit'? Or declare it: PipelineBuilder(..., inputs={'lmit': type}).
  [CONTRACT-004-MISSING_DEP] stage 'late' is declared after 'zz', but there is no such stage
      -> Stages: 'typo', 'a', 'b'.
  [CONTRACT-004-CYCLE] stages wait for each other: a -> b -> a
      -> Remove one of these dependencies.""",
    ),
    "self": (
        lambda: pipeline().stage("a", number, ["a"]).build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-SELF_DEP] stage 'a' depends on itself
      -> Take 'a' out of its own after=.""",
    ),
    "unknown keyword": (
        lambda: pipeline().stage("a", number, retires=3),
        "stage 'a': there is no keyword 'retires'\n  -> Did you mean 'retry'?",
    ),
    "wrong retry": (
        lambda: RetryConfig(max_attempts=0),
        "retry: max_attempts=0 is not possible\n  -> It must be a whole number of at least 1.",
    ),
    "branch without router": (
        lambda: pipeline().stage("a", number).stage("b", lambda a: 1, when="left").build(),
        """1 problem in the definition of pipeline 'shop':
  [CONTRACT-004-ROUTE] stage 'b': when='left', but no ROUTE stage is directly before it
      -> Declare the stage that decides with kind=StageKind.ROUTE, and put it in after=.""",
    ),
}


@pytest.mark.parametrize("name", sorted(BUILD))
def test_a_build_error(name):
    make, expected = BUILD[name]
    with pytest.raises(DefinitionError) as caught:
        make()
    assert str(caught.value) == expected


INPUTS = {
    "wrong type": (["x=many"], "input 'x' must be int, and 'many' is not"),
    "unknown": (["x=1", "y=2"], "the graph has no input 'y'. Inputs: 'x'."),
    "missing": ([], "input 'x' is missing (stage 'number'): give --input x=3"),
    "no value": (["x"], "--input 'x' is not NAME=VALUE"),
}


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_an_input_error(name):
    pairs, expected = INPUTS[name]
    with pytest.raises(DefinitionError) as caught:
        read_inputs(pipeline().stage("number", number).build(), pairs)
    assert str(caught.value) == expected


def test_a_plan_names_the_object_that_cannot_be_sent():
    lock = threading.Lock()
    held = functools.partial(lambda lock, x: x, lock)
    graph = pipeline().stage("number", number).stage("held", held, kind=StageKind.TRANSFORM).build()
    planned = graph.plan().stage("held")
    assert planned.lane == "thread"
    assert "lock" in planned.why


def crash(x):
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(x):
    os._exit(7)


def sleepy(x):
    time.sleep(60)


async def patient(x):
    await asyncio.sleep(60)


def lock(x):
    return threading.Lock()


def boom(x):
    raise ValueError("bad day")


def busy(x):
    return StageOutput.retry("the service is busy")


def elements(x):
    yield from range(x)


def third(elements):
    if elements == 2:
        raise KeyError("three")


def undeclared(ctx):
    return ctx.inputs["fetsh"]


def alone(runner: Any, **policies: Any) -> PipelineBuilder:
    return pipeline().stage("store", runner, **policies)


async def blocking_call_in_a_loop() -> None:
    alone(number).build().run({"x": 1})


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "missing input": (
        lambda: alone(number).build().run({"y": 1}),
        r"pipeline 'shop' needs the input 'x' \(parameter 'x' of stage 'store'\)\n  -> give it as run\({'x': \.\.\.}\)",
    ),
    "unknown option": (
        lambda: alone(number).build().run({"x": 1}, procesess=2),
        r"run\(\) has no option 'procesess'\n  -> Did you mean 'processes'\?",
    ),
    "impossible setting": (
        lambda: alone(number).build().run({"x": 1}, processes=0),
        r"engine setting processes is 0\n  -> give a whole number from 1",
    ),
    "unknown lane": (
        lambda: alone(number).build().run({"x": 1}, lane="gpu"),
        r"there is no lane 'gpu'\n  -> Lanes: .*'process'",
    ),
    "inside a loop": (
        lambda: asyncio.run(blocking_call_in_a_loop()),
        r"an event loop is running in this thread\n  -> result = await graph\.execute\(inputs=\.\.\.\)",
    ),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_call_error(name):
    make, expected = CALLS[name]
    with pytest.raises(DefinitionError, match=expected):
        make()


RUNS: dict[str, tuple[Callable[[], Any], str]] = {
    "exception": (
        lambda: alone(boom, executor="process"),
        r"stage 'store' failed after 1 attempt: ValueError: bad day",
    ),
    "retries used up": (
        lambda: alone(busy, retry=RetryConfig(max_attempts=2, base_delay_ms=1)),
        r"stage 'store' failed after 2 attempts: .*the service is busy",
    ),
    "killed": (lambda: alone(crash, executor="process"), r"stage 'store' failed .*worker \d+ was killed by SIGSEGV"),
    "exited": (lambda: alone(leave, executor="process"), r"stage 'store' failed .*worker \d+ exited with status 7"),
    "timeout": (
        lambda: alone(patient, timeout=0.1),
        r"stage 'store' \(attempt 1\) ran for 0\.\d+ s; its timeout is 0\.1 s",
    ),
    "killed by timeout": (
        lambda: alone(sleepy, timeout=0.1, executor="process"),
        r"stage 'store' \(attempt 1\) ran for \d\.\d+ s; its timeout is 0\.1 s",
    ),
    "value that cannot cross": (
        lambda: alone(lock, executor="process"),
        r"stage 'store' failed .*cannot cross to another process: lock: cannot pickle '_thread\.lock' object",
    ),
    "undeclared": (
        lambda: pipeline().stage("fetch", lambda: 1).stage("store", undeclared, ["fetch"]),
        r"stage 'store' reads 'fetsh', which is not one of its dependencies \(fetch\)",
    ),
    "item": (
        lambda: pipeline().stage("elements", elements).map("store", third, over="elements"),
        r"stage 'store' failed at item \[2\] after 1 attempt: KeyError: 'three'",
    ),
    "no elements": (
        lambda: pipeline().stage("one", lambda: 3).map("store", number, over="one"),
        r"stage 'store' goes over stage 'one', which is int and no sequence of elements",
    ),
}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_run_error(name):
    make, expected = RUNS[name]
    result = make().build().run({"x": 4}, grace=0.2)
    with pytest.raises(StageFailedError) as caught:
        result.raise_for_failure()
    assert re.search(expected, str(caught.value))


def test_the_command_prints_what_to_do_about_a_failure(capsys):
    print_failures(alone(lock, executor="process").build().run({"x": 4}))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("failed: stage 'store', process lane: NotShippableError: ")
    assert any(line.strip().startswith("-> hand over the data it was made from instead") for line in lines)


def test_a_crash_is_one_line_and_the_end_of_its_standard_error(capsys):
    print_failures(alone(crash, executor="process").build().run({"x": 4}))
    text = capsys.readouterr().err
    assert re.match(r"failed: stage 'store', process lane: WorkerDiedError: worker \d+ was killed by SIGSEGV.*\n", text)
    assert "killed by signal 11" in text
    assert "the end of its standard error:" in text
    assert len(text.splitlines()) < 15
