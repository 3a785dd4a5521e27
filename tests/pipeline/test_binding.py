"""The binding table, row by row: which parameter gets which value."""

import json
import math
from functools import partial
from typing import Any

import pytest

from stageflow.core.errors import DefinitionError, PipelineValidationError
from stageflow.core.kinds import StageKind
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.decorator import stage
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Role


def one() -> int:
    return 1


def gen():
    yield 1


def shown(graph: StageGraph, name: str) -> dict[str, Any]:
    """Parameter -> stage name, "input:key", or the source."""
    found = {}
    for b in graph.stage_spec(name).bindings:
        if b.source == "stage":
            found[b.param] = graph.specs[b.ref].name
        elif b.source == "input":
            found[b.param] = f"input:{b.ref}"
        else:
            found[b.param] = b.source
    return found


def codes(builder: PipelineBuilder) -> list[str]:
    with pytest.raises(PipelineValidationError) as caught:
        builder.build()
    return [code.removeprefix("CONTRACT-004-") for code in caught.value.codes]


def test_a_required_parameter_that_names_no_stage_is_an_input():
    graph = PipelineBuilder("p").stage("f", lambda url, n=1: url).build()
    assert shown(graph, "f") == {"url": "input:url", "n": "input:n"}
    assert list(graph.inputs) == ["url"]
    assert list(graph.optional_inputs) == ["n"]


def test_where_inputs_are_declared_any_other_unbound_parameter_is_an_error():
    assert codes(PipelineBuilder("p", inputs={"url": str}).stage("f", lambda ulr: ulr)) == ["UNBOUND"]
    graph = PipelineBuilder("p", inputs={"url": str}).stage("f", lambda url, n=1: url).build()
    assert shown(graph, "f") == {"url": "input:url"}
    assert graph.inputs == {"url": str}


def test_a_missing_input_is_reported_at_the_start_with_stage_parameter_and_nearest_name():
    graph = PipelineBuilder("p").stage("fetch", lambda url: url).stage("x", lambda fetched: fetched).build()
    with pytest.raises(DefinitionError) as caught:
        graph.check_inputs(["urll"])
    text = str(caught.value)
    assert caught.value.missing == ["url", "fetched"]
    for part in ("'fetch'", "'url'", "given input 'urll'", "stage 'fetch'"):
        assert part in text
    graph.check_inputs(["url", "fetched", "more"])


def test_order_is_renames_then_ctx_then_stage_then_input_then_default():
    graph = (
        PipelineBuilder("p", inputs={"a": int, "b": int})
        .stage("s", one)
        .stage("t", one)
        .stage("f", lambda a, s, ctx, b=2, c=3: None, inputs={"s": "t"})
        .build()
    )
    assert shown(graph, "f") == {"a": "input:a", "s": "t", "ctx": "ctx", "b": "input:b"}
    assert graph.deps[graph.index["f"]] == (graph.index["t"],)


def test_a_name_that_is_both_a_stage_and_a_declared_input_is_a_conflict():
    assert codes(PipelineBuilder("p", inputs=["s"]).stage("s", one)) == ["CONFLICT"]


def test_a_stage_never_binds_to_itself_by_name_and_the_plan_names_the_shadowed_input():
    graph = PipelineBuilder("p").stage("url", lambda url: url).stage("f", lambda url: url).build()
    assert shown(graph, "url") == {"url": "input:url"}
    assert shown(graph, "f") == {"url": "url"}
    assert graph.plan().shadowed == ("url",)
    assert codes(PipelineBuilder("p").stage("s", lambda x: x, inputs={"x": "s"})) == ["SELF_DEP"]
    assert codes(PipelineBuilder("p").stage("s", one, "s")) == ["SELF_DEP"]


def test_a_parameter_with_a_default_binds_by_name_unless_told_to_keep_it():
    builder = PipelineBuilder("p").stage("limit", one)
    graph = (
        builder.stage("f", lambda limit=10: limit).stage("g", lambda limit=10: limit, inputs={"limit": None}).build()
    )
    assert shown(graph, "f") == {"limit": "limit"}
    assert shown(graph, "g") == {}
    assert graph.plan().stage("f").by_name[0].param == "limit"
    assert codes(PipelineBuilder("p").stage("f", lambda x: x, inputs={"x": None})) == ["UNBOUND"]


def test_variadic_parameters_receive_nothing_and_positional_only_go_by_position():
    def f(s, /, t, *args, u=1, **kwargs): ...

    graph = (
        PipelineBuilder("p").stage("s", one).stage("t", one).stage("u", one).stage("args", one).stage("f", f).build()
    )
    assert shown(graph, "f") == {"s": "s", "t": "t", "u": "u"}
    assert [b.positional for b in graph.stage_spec("f").bindings] == [True, False, False]


def test_a_positional_only_default_before_a_bound_one_is_passed_explicitly():
    def f(x=7, s=8, /): ...

    graph = PipelineBuilder("p").stage("s", one).stage("f", f, inputs={"x": None}).build()
    gap, bound = graph.stage_spec("f").bindings
    assert (gap.source, gap.default, bound.source) == ("default", 7, "stage")


@pytest.mark.parametrize("runner", [int, dict, partial(int, base=2)])
def test_without_a_readable_signature_the_single_dependency_goes_by_position(runner):
    graph = PipelineBuilder("p").stage("text", one).stage("f", runner, ["text"]).build()
    (binding,) = graph.stage_spec("f").bindings
    assert (binding.source, binding.ref, binding.positional) == ("stage", 0, True)
    two = PipelineBuilder("p").stage("a", one).stage("b", one).stage("f", runner, ["a", "b"])
    assert codes(two) == ["UNBOUND"]
    mapped = PipelineBuilder("p").stage("src", gen).map("f", runner, "src").build()
    assert mapped.stage_spec("f").bindings[0].source == "element"


def test_library_functions_take_the_element_in_their_first_parameter():
    graph = PipelineBuilder("p").stage("src", gen).map("doc", json.loads, "src").map("root", math.sqrt, "src").build()
    assert shown(graph, "doc")["s"] == "element"
    assert list(graph.inputs) == []
    assert shown(graph, "root") == {"x": "element"}
    assert graph.stage_spec("root").bindings[0].positional


def test_the_element_goes_to_the_parameter_named_like_over_else_to_the_first_free_one():
    builder = PipelineBuilder("p").stage("src", gen).stage("cfg", one)
    graph = (
        builder.map("a", lambda cfg, src: None, "src")
        .map("b", lambda cfg, anything, ctx: None, "src")
        .map("c", lambda x, y: None, "src", inputs={"y": "src", "x": "cfg"})
        .build()
    )
    assert shown(graph, "a") == {"cfg": "cfg", "src": "element"}
    assert shown(graph, "b") == {"cfg": "cfg", "anything": "element", "ctx": "ctx"}
    assert shown(graph, "c") == {"x": "cfg", "y": "element"}
    assert codes(PipelineBuilder("p").stage("src", gen).stage("cfg", one).map("m", lambda cfg: None, "src")) == [
        "UNBOUND"
    ]


def test_a_reduce_takes_accumulator_and_item_by_position_and_the_rest_by_name():
    def fold(acc, item, cfg, ctx): ...

    graph = PipelineBuilder("p").stage("src", gen).stage("cfg", one).reduce("r", fold, "src", initial=None).build()
    assert shown(graph, "r") == {"acc": "acc", "item": "element", "cfg": "cfg", "ctx": "ctx"}
    assert [b.positional for b in graph.stage_spec("r").bindings] == [True, True, False, False]
    assert graph.stage_spec("r").reduce.has_initial
    assert (
        not PipelineBuilder("p").stage("src", gen).reduce("r", fold, "src").build().stage_spec("r").reduce.has_initial
    )
    assert codes(PipelineBuilder("p").stage("src", gen).reduce("r", lambda item: 0, "src")) == ["UNBOUND"]


def test_another_map_of_the_same_space_is_joined_by_element_and_any_other_is_a_barrier():
    def flat(x):
        yield x

    graph = (
        PipelineBuilder("p")
        .stage("src", gen)
        .map("a", lambda src: src, "src")
        .map("b", lambda src: src, "src", batch=4)
        .map("flat", flat, "src")
        .map("joined", lambda a, b, src: None, "a")
        .map("apart", lambda a, flat: None, "a")
        .stage("all", lambda a: a)
        .reduce("fold", lambda acc, item, b: None, "a")
        .build()
    )
    number = graph.index
    assert graph.joins == {number["joined"]: (number["b"], number["src"])} or graph.joins == {
        number["joined"]: (number["src"], number["b"])
    }
    assert graph.barriers == {
        number["apart"]: (number["flat"],),
        number["all"]: (number["a"],),
        number["fold"]: (number["b"],),
    }
    assert graph.space[number["a"]] == graph.space[number["b"]] == graph.space[number["src"]] >= 0
    assert graph.space[number["flat"]] not in (-1, graph.space[number["src"]])
    assert graph.plan().stage("apart").waits_for_all_of == ("flat",)


def test_two_maps_over_one_list_or_one_input_run_in_step():
    graph = (
        PipelineBuilder("p")
        .stage("urls", lambda: ["a"])
        .map("page", lambda u: u, "urls")
        .map("meta", lambda u: u, "urls")
        .map("both", lambda page, meta: None, "page")
        .map("left", lambda f: f, "files")
        .map("right", lambda left, f: f, "files", inputs={"f": "files"})
        .build()
    )
    assert graph.joins == {graph.index["both"]: (graph.index["meta"],), graph.index["right"]: (graph.index["left"],)}
    assert graph.stage_spec("left").over_input == "files"
    assert list(graph.inputs) == ["files"]


def test_a_generator_is_a_source_with_and_without_upstream():
    graph = PipelineBuilder("p").stage("a", gen).stage("s", one).stage("b", lambda s: (yield s)).build()
    assert [spec.role for spec in graph.specs] == [Role.SOURCE, Role.TASK, Role.SOURCE]
    assert graph.deps[2] == (1,)


@pytest.mark.parametrize("name", ["", "  ", " a", "a ", "a/b", "ctx", "x" * 201, "a\nb"])
def test_names_that_cannot_be(name):
    assert codes(PipelineBuilder("p").stage(name, one)) in (["BLANK"], ["NAME"])


def test_a_name_that_is_no_identifier_binds_through_inputs():
    graph = (
        PipelineBuilder("p").stage("the page", one).stage("f", lambda page: page, inputs={"page": "the page"}).build()
    )
    assert shown(graph, "f") == {"page": "the page"}


def test_forms_of_runners():
    class Work:
        kind = StageKind.ENRICH

        async def execute(self, ctx): ...

    class Adder:
        async def __call__(self, one): ...

    graph = (
        PipelineBuilder("p").stage("one", one).stage("c", Work).stage("o", Work(), ["one"]).stage("f", Adder()).build()
    )
    forms = [(s.form, s.is_async, s.kind, s.wants_ctx) for s in graph.specs[1:]]
    assert forms == [
        ("class", True, StageKind.ENRICH, True),
        ("object", True, StageKind.ENRICH, True),
        ("function", True, StageKind.WORK, False),
    ]
    assert graph.stage_spec("o").declared_deps == ("one",)
    assert graph.stage_spec("o").bindings == ()


def test_runners_that_cannot_be_are_problems():
    class Needs:
        def __init__(self, x): ...

        def execute(self, ctx): ...

    class NoArgument:
        def execute(self): ...

    builder = PipelineBuilder("p").stage("a", Needs).stage("b", NoArgument()).stage("c", 3)
    assert codes(builder) == ["RUNNER", "RUNNER", "RUNNER"]


def test_the_mark_leaves_the_same_object_and_the_builder_wins_per_keyword():
    def f(x): ...

    assert stage(f) is f
    assert stage(kind="enrich", timeout=3, priority=5, inputs={"x": "y"})(f) is f
    graph = PipelineBuilder("p").stage("a", f).stage("b", f, timeout=None, kind="work", inputs={"x": "z"}).build()
    a, b = graph.specs
    assert (a.kind, a.policies.timeout, a.policies.priority, shown(graph, "a")) == ("enrich", 3, 5, {"x": "input:y"})
    assert (b.kind, b.policies.timeout, b.policies.priority, shown(graph, "b")) == ("work", None, 5, {"x": "input:z"})


def test_nullable_parameters_are_seen():
    def f(a: int | None, b: int, c: "Unknowable | None", d, e: Any): ...  # noqa: F821

    graph = PipelineBuilder("p").stage("f", f).build()
    assert [b.nullable for b in graph.stage_spec("f").bindings] == [True, False, True, False, True]


def test_kinds_that_are_not_declared():
    async def co(x): ...

    graph = (
        PipelineBuilder("p")
        .stage("s", gen)
        .map("m", lambda x: x, "s")
        .map("co", co, "s")
        .sink("k", lambda x: 0, "m")
        .build()
    )
    assert [s.kind for s in graph.specs] == [StageKind.WORK, StageKind.TRANSFORM, StageKind.WORK, StageKind.WORK]
    assert not any(s.kind_declared for s in graph.specs)
