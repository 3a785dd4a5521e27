"""The mutable side of a run: forks cancel downwards, events are enriched, the first reason wins."""

from stageflow.context.identity import RunIdentity
from stageflow.context.pipeline_context import DictContextAdapter, ExecutionContext, PipelineContext
from stageflow.context.snapshot import ContextSnapshot, Enrichments


def test_a_fork_shares_what_it_should_and_is_cancelled_from_above():
    parent = PipelineContext(RunIdentity(pipeline_run_id="p", request_id="r"), topology="docs", service="svc")
    parent.data.set("k", 1)
    parent.outputs.set("s", 1)
    parent.set_enrichment("profile", {"n": 1})
    child = parent.fork_for_subpipeline()
    assert child.parent is parent
    assert child.pipeline_run_id() not in (None, "p")
    assert (child.request_id(), child.topology(), child.service) == ("r", "docs", "svc")
    assert (child.data.is_empty, child.outputs.is_empty, child.enrichments) == (True, True, {"profile": {"n": 1}})
    child.enrichments["profile"]["n"] = 2
    child.set_enrichment("x", 1)
    assert parent.enrichments == {"profile": {"n": 1}}
    named = parent.fork_for_subpipeline("child-7")
    assert named.pipeline_run_id() == "child-7"
    named.mark_cancelled("just me")
    assert not parent.is_cancelled()
    parent.mark_cancelled_with_reason("all")
    parent.mark_cancelled("later")
    assert (child.is_cancelled(), child.cancel_reason(), named.cancel_reason()) == (True, "all", "just me")
    assert parent.cancel_reason() == "all"


def test_events_are_enriched_and_never_raise():
    seen = []
    context = PipelineContext(RunIdentity.with_pipeline_run_id("p"), emitter=lambda *event: seen.append(event))
    context.try_emit_event("a", {"pipeline_run_id": "forged", "x": 1})
    context.with_topology("docs").with_execution_mode("test").try_emit_event("b")
    context.try_emit_event("c", [1, 2])
    assert seen == [
        ("a", {"x": 1, "pipeline_run_id": "p", "execution_mode": "production"}),
        ("b", {"pipeline_run_id": "p", "execution_mode": "test", "topology": "docs"}),
        ("c", [1, 2]),
    ]
    context.with_event_sink(lambda *event: 1 / 0).try_emit_event("d")
    PipelineContext.new(RunIdentity.new()).try_emit_event("nowhere")


def test_from_snapshot_takes_identity_and_enrichments():
    snapshot = ContextSnapshot(run_id=RunIdentity.new(), enrichments=Enrichments(profile={"a": 1}, documents=("d",)))
    context = PipelineContext.from_snapshot(snapshot, topology="t").with_service("s")
    assert context.run_id == snapshot.run_id
    assert context.enrichments == {"profile": {"a": 1}, "documents": ("d",)}
    assert (context.topology(), context.service) == ("t", "s")


def test_both_contexts_keep_the_protocol():
    adapter = DictContextAdapter({"pipeline_run_id": "p", "request_id": 5, "cancelled": True, "topology": "t"})
    assert isinstance(adapter, ExecutionContext)
    assert isinstance(PipelineContext(), ExecutionContext)
    assert (adapter.pipeline_run_id(), adapter.request_id(), adapter.topology()) == ("p", None, "t")
    assert (adapter.execution_mode(), adapter.is_cancelled()) == ("production", True)
    assert (adapter.get("request_id"), adapter.get_string("request_id")) == (5, None)
    adapter.try_emit_event("x", object())
    assert DictContextAdapter().is_cancelled() is False
