"""Who runs when something was skipped, chosen, absent or failed: one table per question, the same in every lane."""

import pytest

from stageflow import FailureMode, PipelineBuilder, StageInputs, StageKind, StageOutput


def first():
    return 1


def fails():
    raise ValueError("no")


def skips():
    return StageOutput.skip("not today")


def hints():
    return {"skip_reason": "no data"}


def takes(dep):
    return ("ran", dep)


def takes_default(dep="default"):
    return ("ran", dep)


def takes_none(dep: str | None):
    return ("ran", dep)


class Looks:
    def execute(self, ctx):
        return tuple(ctx.inputs.failed), tuple(ctx.inputs.skipped), ctx.inputs.get("dep", "absent")


def behind(producer, consumer, lane, **policies):
    return PipelineBuilder("p").stage("dep", producer, executor=lane).stage("s", consumer, executor=lane, **policies)


#: what a consumer gets of a dependency that (failed under best_effort | was skipped beside another that ran)
ABSENT = [
    (takes, "skip", "input_absent: dep"),
    (takes_default, "ok", ("ran", "default")),
    (takes_none, "ok", ("ran", None)),
]


@pytest.mark.parametrize(("consumer", "status", "what"), ABSENT)
def test_a_parameter_of_a_failed_stage(engine, lane, consumer, status, what):
    output = engine.run(behind(fails, consumer, lane).build(), failure_mode="best_effort").outputs["s"]
    assert (str(output.status), output.data if status == "ok" else output.skip_reason) == (status, what)


@pytest.mark.parametrize(("consumer", "status", "what"), ABSENT)
def test_a_parameter_of_a_skipped_stage(engine, lane, consumer, status, what):
    graph = behind(skips, consumer, lane, after=["other"]).stage("other", first, executor=lane).build()
    output = engine.run(graph).outputs["s"]
    assert (str(output.status), output.data if status == "ok" else output.skip_reason) == (status, what)


def test_an_object_stage_always_runs_and_is_told_who_is_missing(engine, lane):
    graph = behind(fails, Looks, lane, after=["dep", "skipped"]).stage("skipped", skips, executor=lane).build()
    assert engine.run(graph, failure_mode="best_effort").data("s") == (("dep",), ("skipped",), "absent")


@pytest.mark.parametrize(
    ("mode", "status", "reason"),
    [
        (FailureMode.FAIL_FAST, "cancel", None),
        (FailureMode.CONTINUE_ON_FAILURE, "skip", "upstream_failed: dep"),
        (FailureMode.BEST_EFFORT, "ok", None),
    ],
)
def test_failure_modes_reach_every_descendant(engine, lane, mode, status, reason):
    graph = (
        behind(fails, takes_default, lane)
        .stage("behind", lambda s=0: "ran", executor="thread")
        .stage("far", lambda behind=0: "ran", executor="thread")
        .build()
    )
    result = engine.run(graph, failure_mode=mode)
    assert result.success is False
    assert [str(result.outputs[name].status) for name in ("s", "behind", "far")] == [status] * 3
    if reason:
        assert {result.outputs[name].skip_reason for name in ("s", "behind", "far")} == {reason}


def test_a_stages_own_mode_decides_about_its_failure(engine):
    graph = (
        PipelineBuilder("p")
        .stage("dep", fails, on_failure="continue_on_failure")
        .stage("s", takes)
        .stage("beside", first)
        .build()
    )
    result = engine.run(graph)
    assert result.outputs["s"].skip_reason == "upstream_failed: dep"
    assert result.data("beside") == 1
    assert result.status == "failed"


@pytest.mark.parametrize("producer", [skips, hints])
def test_conditional_stages_follow_a_skip(engine, lane, producer):
    graph = behind(producer, takes_default, lane, conditional=True).build()
    output = engine.run(graph).outputs["s"]
    assert output.status == "skip"
    assert ("not today" if producer is skips else "no data") in output.skip_reason


def test_a_stage_runs_unless_all_it_depends_on_was_skipped(engine, lane):
    alone = engine.run(behind(skips, takes_default, lane).build()).outputs["s"]
    assert alone.skip_reason == "all dependencies were skipped (dep)"
    graph = behind(skips, takes_default, lane, after=["other"]).stage("other", first, executor=lane).build()
    assert engine.run(graph).data("s") == ("ran", "default")


# ---------------------------------------------------------------- routes


def router(way):
    return way


def router_output(way):
    return StageOutput.ok(route=way)


def routed(function, way):
    return (
        PipelineBuilder("p")
        .stage("router", function, kind=StageKind.ROUTE)
        .stage("left", first, when="left", after=["router"])
        .stage("right", first, when=("router", "right"), after=["router"])
        .stage("behind", lambda right=None: right)
        .stage("merge", lambda left=None, right=None: (left, right))
        .build()
    )


@pytest.mark.parametrize("function", [router, router_output])
@pytest.mark.parametrize(
    ("way", "ran"), [("left", (1, None)), ("right", (None, 1)), (["left", "right"], (1, 1)), ([], None)]
)
def test_a_router_names_the_branches_that_run(engine, function, way, ran):
    result = engine.run(routed(function, way), {"way": way})
    assert result.success
    if ran is None:
        assert result.outputs["merge"].status == "skip"
        assert result.outputs["left"].skip_reason == "route: router chose nothing"
    else:
        assert result.data("merge") == ran
    if way == "left":
        assert result.outputs["right"].skip_reason == "route: router chose 'left'"
        assert result.outputs["behind"].status == "skip"


def test_a_decision_for_an_unknown_branch_fails_and_names_the_known(engine):
    output = engine.run(routed(router, "up"), {"way": "up"}).outputs["router"]
    assert output.status == "fail"
    assert "known: left, right" in output.error


def test_a_route_that_is_no_name_fails(engine):
    assert "not the name of a branch" in engine.run(routed(router, 7), {"way": 7}).outputs["router"].error


def test_a_predicate_sees_the_inputs_and_decides(engine, lane):
    seen = []

    def wants(inputs):
        assert isinstance(inputs, StageInputs)
        seen.append(inputs["dep"])
        return inputs["dep"] > 1

    graph = behind(first, takes, lane, when=wants).build()
    output = engine.run(graph).outputs["s"]
    assert (output.status, output.skip_reason) == ("skip", "condition: `when` said no")
    assert seen == [1]


def test_a_predicate_that_raises_fails_its_stage(engine):
    output = engine.run(behind(first, takes, "thread", when=lambda inputs: inputs["nobody"]).build()).outputs["s"]
    assert output.status == "fail"
    assert "nobody" in output.error


def test_builder_helpers_take_real_runners(engine):
    graph = (
        PipelineBuilder("p")
        .branch(
            ("router", router),
            {"left": first, "right": first},
            ("merge", lambda left=None, right=None: (left, right)),
        )
        .build()
    )
    assert engine.run(graph, {"way": "left"}).data("merge") == (1, None)
