"""The gallery of error texts: each says what, where, why, the nearest name where there is one, and what to do.

The texts are held word for word, so that a change to one is a decision. Build and input errors are made by hand below;
the errors of runs come from real runs.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from stageflow import DefinitionError, PipelineBuilder, RetryConfig, StageKind
from stageflow.cli.inputs import read_inputs


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
    assert str(caught.value) == expected or (name == "no value" and str(caught.value).startswith(expected))


def test_a_plan_names_the_object_that_cannot_be_sent():
    lock = threading.Lock()
    held = functools.partial(lambda lock, x: x, lock)
    graph = pipeline().stage("number", number).stage("held", held, kind=StageKind.TRANSFORM).build()
    planned = graph.plan().stage("held")
    assert planned.lane == "thread"
    assert "lock" in planned.why
