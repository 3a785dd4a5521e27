"""Building: every problem together, shapes, composing, size."""

import gc
import pickle
import random
import time
import tracemalloc

import pytest

from stageflow.core.errors import DefinitionError, PipelineValidationError
from stageflow.core.kinds import StageKind
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.decorator import stage
from stageflow.pipeline.policies import DEFAULT_POLICIES, GuardRetryPolicy


def noop():
    return None


def gen():
    yield 1


def take(x):
    return x


@stage(kind="enrich", timeout=2)
def marked(x):
    return x


def fails(builder: PipelineBuilder) -> PipelineValidationError:
    with pytest.raises(PipelineValidationError) as caught:
        builder.build()
    return caught.value


def short(error: PipelineValidationError) -> list[str]:
    return [code.removeprefix("CONTRACT-004-") for code in error.codes]


def test_all_problems_come_together_with_names_and_what_to_do():
    def a(x: int) -> str: ...

    def b(a: int, lmit): ...

    error = fails(
        PipelineBuilder("p", inputs={"limit": int, "x": int})
        .stage("a", a)
        .stage("b", b, after=["aa", "b"])
        .stage("dup", noop)
        .stage("dup", noop)
        .stage(" ", noop)
        .stage("c1", noop, "c2")
        .stage("c2", noop, "c1")
        .map("m", take, "nowhere")
        .stage("r", noop, when="left")
    )
    assert sorted(short(error)) == sorted(
        ["MISSING_DEP", "SELF_DEP", "UNBOUND", "CONFLICT", "BLANK", "CYCLE", "OVER", "ROUTE", "TYPE"]
    )
    assert all(problem.fix_hint for problem in error.problems)
    by_code = dict(zip(short(error), error.problems, strict=True))
    assert "'a'" in by_code["MISSING_DEP"].fix_hint
    assert "'limit'" in by_code["UNBOUND"].fix_hint
    assert by_code["CYCLE"].context["path"] == ["c1", "c2", "c1"]
    assert pickle.loads(pickle.dumps(error)).codes == error.codes


def test_empty_and_blank_pipelines():
    assert short(fails(PipelineBuilder(" "))) == ["BLANK", "EMPTY"]


def test_every_separate_cycle_is_reported_and_what_hangs_below_is_not():
    builder = PipelineBuilder("p").stage("a", noop, "b").stage("b", noop, "c").stage("c", noop, "a")
    builder.stage("x", noop, "y").stage("y", noop, "x").stage("below", noop, ["a", "x"])
    error = fails(builder)
    assert [problem.context["path"] for problem in error.problems] == [["a", "c", "b", "a"], ["x", "y", "x"]]


def test_a_failed_call_leaves_the_builder_unchanged():
    builder = PipelineBuilder("p").stage("a", noop)
    for call in (
        lambda: builder.stage("b", noop, timout=3),
        lambda: builder.stage("b", noop, timeout=-1),
        lambda: builder.stage("b", noop, executor="proces"),
        lambda: builder.stage("b", noop, kind="wrk"),
        lambda: builder.chain([("b", noop), ("c", noop)], "a", timeout="soon"),
        lambda: builder.branch(("r", noop), {"x": noop, "y": lambda: 0}, object()),
        lambda: builder.subpipeline("b", noop),
    ):
        with pytest.raises(DefinitionError):
            call()
    assert builder.stage_count == 1
    assert builder.last_stage == "a"
    with pytest.raises(DefinitionError, match="Did you mean 'timeout'"):
        builder.stage("b", noop, timout=3)
    with pytest.raises(DefinitionError, match="Did you mean 'process'"):
        builder.stage("b", noop, executor="proces")


def test_forward_references_order_and_depth():
    graph = PipelineBuilder("p").stage("c", noop, ["b", "a"]).stage("b", noop, "a").stage("a", noop).build()
    assert graph.execution_order == ["a", "b", "c"]
    assert list(graph.depth) == [2, 1, 0]
    assert graph.deps == [(1, 2), (2,), ()]
    assert graph.dependents == [(), (0,), (0, 1)]
    assert graph.roots == (2,)


def test_random_graphs_are_ordered_and_turned_round():
    rng = random.Random(7)
    for _ in range(50):
        count = rng.randint(1, 40)
        order = rng.sample(range(count), count)
        builder = PipelineBuilder("p")
        for i in range(count):
            below = [j for j in range(count) if order[j] < order[i] and rng.random() < 0.15]
            builder.stage(f"s{i}", noop, [f"s{j}" for j in below])
        graph = builder.build()
        place = {i: k for k, i in enumerate(graph.order)}
        edges = {(j, i) for i, deps in enumerate(graph.deps) for j in deps}
        assert sorted(graph.order) == list(range(count))
        assert all(place[j] < place[i] and graph.depth[j] < graph.depth[i] for j, i in edges)
        assert edges == {(j, i) for j, below in enumerate(graph.dependents) for i in below}


def reversed_chain(count: int) -> PipelineBuilder:
    builder = PipelineBuilder("chain")
    for i in range(count - 1):
        builder.stage(f"s{i}", take, inputs={"x": f"s{i + 1}"})
    return builder.stage(f"s{count - 1}", noop)


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(300)
def test_a_chain_declared_in_reverse_builds_without_recursion(count):
    begun = time.perf_counter()
    graph = reversed_chain(count).build()
    seconds = time.perf_counter() - begun
    assert graph.order[0] == count - 1
    assert graph.depth[0] == count - 1
    assert seconds < count * 100e-6  # a million took 10 s on a slow core; quadratic work would take hours


def test_a_stage_costs_some_hundred_bytes():
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        graph = reversed_chain(20_000).build()
        gc.collect()
        per_stage = (tracemalloc.get_traced_memory()[0] - before) / graph.stage_count
    finally:
        tracemalloc.stop()
    assert per_stage < 700
    assert graph.specs[5].policies is DEFAULT_POLICIES


def test_equal_policies_are_one_object():
    graph = (
        PipelineBuilder("p")
        .stage("a", noop, timeout=3)
        .stage("b", noop, timeout=3.0)
        .stage("c", noop, timeout=4)
        .build()
    )
    a, b, c = (spec.policies for spec in graph.specs)
    assert a is b
    assert a is not c


def test_graphs_and_marked_runners_pickle():
    graph = (
        PipelineBuilder("p")
        .stage("src", gen)
        .map("m", marked, "src", batch=2)
        .stage("end", take, inputs={"x": "m"})
        .build()
    )
    twin = pickle.loads(pickle.dumps(graph))
    assert twin.stage_spec("m").runner is marked
    assert twin.stage_spec("m").policies == graph.stage_spec("m").policies
    assert (twin.order, twin.barriers, twin.inputs) == (graph.order, graph.barriers, graph.inputs)
    assert pickle.loads(pickle.dumps(marked)) is marked
    with pytest.raises(AttributeError):
        graph.name = "other"


def test_a_stage_is_found_by_name_and_by_runner():
    graph = PipelineBuilder("p").stage("one", noop).stage("two", take).stage("three", take).build()
    assert graph.number_of(noop) == 0
    with pytest.raises(DefinitionError, match="Did you mean 'three'"):
        graph.stage_spec("thre")
    with pytest.raises(DefinitionError, match="several stages"):
        graph.number_of(take)


# ---------------------------------------------------------------- shapes


def test_chain_hands_each_value_on():
    builder = PipelineBuilder("p").stage("start", noop).chain([take, take, take], "start", prefix="stage")
    assert builder.last_stage == "stage3"
    graph = builder.build()
    assert graph.execution_order == ["start", "stage1", "stage2", "stage3"]
    assert [graph.specs[b.ref].name for s in graph.specs for b in s.bindings] == ["start", "stage1", "stage2"]
    assert PipelineBuilder("p").stage("a", noop).chain([]).stage_count == 1
    assert PipelineBuilder("p").with_linear_chain("s", [take] * 3).last_stage == "s3"


def test_fan_out_and_fan_in():
    builder = PipelineBuilder("p").fan_out_fan_in(
        ("split", noop), [take] * 3, ("join", lambda w1, w3, ctx: 0), prefix="w"
    )
    graph = builder.build()
    assert (builder.stage_count, builder.last_stage) == (5, "join")
    assert graph.stage_spec("join").declared_deps == ("w1", "w2", "w3")
    assert [graph.stage_spec(f"w{k}").bindings[0].ref for k in (1, 2, 3)] == [0, 0, 0]
    assert PipelineBuilder("p").fan_out_fan_in(("a", noop), [], ("b", take)).build().deps == [(), (0,)]
    lost = PipelineBuilder("p").with_fan_out_fan_in(("a", noop), "w", [take, take], ("b", take))
    assert short(fails(lost)) == ["UNBOUND"]


def test_branch_makes_a_router_branches_and_a_merge():
    builder = PipelineBuilder("p").stage("load", noop)
    builder.branch(
        ("choose", lambda load: "fast"), {"fast": take, "slow": take}, ("merge", lambda fast=None, slow=None: 0), "load"
    )
    graph = builder.build()
    choose = graph.index["choose"]
    assert graph.stage_spec("choose").kind is StageKind.ROUTE
    assert graph.routes == {graph.index["fast"]: (choose, "fast"), graph.index["slow"]: (choose, "slow")}
    assert graph.stage_spec("fast").bindings[0].ref == graph.index["load"]
    assert graph.stage_spec("merge").declared_deps == ("fast", "slow")
    assert [b.may_be_absent for b in graph.plan().stage("merge").bindings] == ["its default"] * 2
    twin = PipelineBuilder("p").with_conditional_branch(("r", noop), {"a": noop, "b": noop}, ("m", noop))
    assert twin.last_stage == "m"
    assert twin.build().stage_count == 4


def test_when_looks_at_the_one_router_before_the_stage():
    def two(when):
        builder = PipelineBuilder("p").stage("r1", noop, kind="route").stage("r2", noop, kind="route")
        return builder.stage("x", noop, ["r1", "r2"], when=when)

    error = fails(two("b"))
    assert short(error) == ["ROUTE"]
    assert "('r1', 'b')" in error.problems[0].fix_hint
    assert two(("r2", "b")).build().routes == {2: (1, "b")}
    assert two(lambda inputs: True).build().routes == {}
    assert short(fails(PipelineBuilder("p").stage("a", noop).stage("x", noop, when=("a", "b")))) == ["ROUTE"]
    assert short(fails(PipelineBuilder("p").stage("x", noop, when=("nobody", "b")))) == ["MISSING_DEP"]


def test_guard_retry_is_checked_and_its_path_found():
    def guarded(retry_stage, kind="guard"):
        builder = PipelineBuilder("p").stage("src", gen).stage("a", noop).stage("b", take, inputs={"x": "a"})
        builder.stage("other", noop, "a").map("m", take, "src").stage("all", take, inputs={"x": "m"})
        return builder.stage("g", noop, ["b", "all"], kind=kind, guard_retry=GuardRetryPolicy(retry_stage))

    graph = guarded("a").build()
    assert [graph.specs[i].name for i in next(iter(graph.guard_paths.values()))] == ["a", "b", "g"]
    for wrong in ("nobody", "g", "other", "m"):
        assert short(fails(guarded(wrong))) == ["GUARD"], wrong
    assert short(fails(guarded("a", kind="work"))) == ["GUARD"]


def test_a_sink_has_no_values_to_read():
    builder = PipelineBuilder("p").stage("src", gen).sink("out", take, "src")
    assert builder.stage("end", noop, "out").build().barriers == {}
    assert short(fails(PipelineBuilder("p").stage("src", gen).sink("out", take, "src").map("m", take, "out"))) == [
        "OVER"
    ]
    assert short(
        fails(PipelineBuilder("p").stage("src", gen).sink("out", take, "src").stage("end", lambda out: 0))
    ) == ["OVER"]


def test_a_subpipeline_binds_the_inputs_of_its_graph():
    child = PipelineBuilder("child", inputs={"page": str, "lang": str}).stage("x", lambda page, lang="en": page)
    graph = PipelineBuilder("p").stage("page", noop).subpipeline("sub", child).build()
    spec = graph.stage_spec("sub")
    assert spec.form == "graph"
    assert {b.param: (b.source, b.ref) for b in spec.bindings} == {"page": ("stage", 0), "lang": ("input", "lang")}
    assert list(graph.optional_inputs) == ["lang"]
    mapped = PipelineBuilder("p").stage("src", gen).subpipeline("sub", child, over="src").build()
    assert mapped.stage_spec("sub").bindings[0].source == "element"


# ---------------------------------------------------------------- compose


def test_compose_keeps_equal_stages_once_and_appends_the_rest_in_order():
    left = PipelineBuilder("left").stage("a", noop).stage("b", noop, "a")
    right = PipelineBuilder("right").stage("a", noop).stage("z", noop, "b").stage("c", noop, "z")
    graph = left.compose(right).build()
    assert graph.name == "left+right"
    assert [spec.name for spec in graph.specs] == ["a", "b", "z", "c"]
    assert left.last_stage == "c"


def test_compose_reports_every_conflict_and_changes_nothing():
    left = PipelineBuilder("left").stage("a", noop).stage("b", noop, "a").stage("k", noop, kind="work")
    right = PipelineBuilder("right").stage("a", take).stage("b", noop).stage("k", noop, kind="enrich").stage("d", noop)
    with pytest.raises(PipelineValidationError) as caught:
        left.compose(right)
    assert short(caught.value) == ["CONFLICT"] * 3
    assert [p.context["different"] for p in caught.value.problems] == [["runners"], ["dependencies"], ["kind"]]
    assert (left.name, left.stage_count) == ("left", 3)
