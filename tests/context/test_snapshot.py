"""The input of a run and what a stage may read of it: immutable, whole after a round trip, and strict about names."""

import dataclasses
import pickle
import uuid

import msgspec
import pytest

from stageflow.context.identity import RunIdentity
from stageflow.context.inputs import EMPTY_INPUTS, StageInputs
from stageflow.context.snapshot import ContextSnapshot, Conversation, Enrichments, ExtensionBundle, Message
from stageflow.core.errors import UndeclaredDependencyError


@dataclasses.dataclass
class Limits:
    pages: int
    hosts: list[str]


def full():
    return (
        ContextSnapshot.new({"root": "/data"})
        .with_run_id(
            RunIdentity.with_pipeline_run_id("r")
            .with_request_id("q")
            .with_session_id("s")
            .with_user_id("u")
            .with_org_id("o")
            .with_interaction_id("i")
        )
        .with_inputs({"depth": 3})
        .with_conversation(
            Conversation()
            .with_messages([Message.system("be brief"), Message.user("first")])
            .add_message(Message.assistant("yes"))
            .add_message(Message.user("second"))
            .add_message(Message.new("tool", "done"))
            .with_routing_decision("index")
        )
        .with_enrichments(
            Enrichments()
            .with_profile({"name": "n"})
            .with_memory([1])
            .with_documents(["d"])
            .with_web_results(["w"])
            .with_custom("k", 1)
        )
        .with_extensions(ExtensionBundle().register("limits", Limits(3, ["a"])))
        .with_input_text("text")
        .with_metadata("source", "test")
    )


@pytest.mark.parametrize(
    "travel",
    [
        lambda it: pickle.loads(pickle.dumps(it, 5)),
        lambda it: msgspec.msgpack.decode(msgspec.msgpack.encode(it), type=ContextSnapshot),
    ],
    ids=["pickle", "msgpack"],
)
def test_a_snapshot_is_the_same_after_a_round_trip(travel):
    assert travel(full()) == full()


def test_what_a_snapshot_shows():
    snapshot = full()
    ids = (snapshot.pipeline_run_id, snapshot.request_id, snapshot.session_id, snapshot.user_id)
    assert ids == ("r", "q", "s", "u")
    shown = snapshot.to_dict()
    assert shown["inputs"] == {"root": "/data", "depth": 3}
    assert shown["extensions"] == {"limits": {"pages": 3, "hosts": ["a"]}}
    assert shown["pipeline_run_id"] == shown["run_id"]["pipeline_run_id"] == "r"
    assert (shown["org_id"], shown["interaction_id"]) == ("o", "i")
    assert (shown["input_text"], shown["metadata"]) == ("text", {"source": "test"})
    bare = ContextSnapshot().to_dict()
    assert not {"inputs", "input_text", "metadata"} & set(bare)
    assert bare["user_id"] is None


def test_every_change_is_a_copy_and_nothing_can_be_assigned():
    before = full()
    before.with_inputs({"root": "elsewhere"}).with_metadata("source", "changed")
    before.conversation.add_message(Message.user("third"))
    before.extensions.register("limits", {})
    assert before == full()
    for frozen, name in ((before, "inputs"), (before.run_id, "user_id"), (before.conversation, "messages")):
        with pytest.raises(AttributeError):
            setattr(frozen, name, None)


def test_the_latest_message_of_the_user():
    assert full().conversation.last_user_message() == "second"
    assert Conversation((Message.assistant("hello"),)).last_user_message() is None


def test_extensions_are_kept_as_they_came_and_typed_when_they_are_read():
    bundle = ExtensionBundle({"unknown": {"deep": [1, {"a": None}]}}).register("limits", Limits(3, ["a"]))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(bundle), type=ExtensionBundle)
    assert again.get("unknown") == {"deep": [1, {"a": None}]}
    assert again.get_as("limits", Limits) == Limits(3, ["a"])
    assert again.contains("limits")
    assert not again.contains("absent")
    assert again.get("absent", "none") == "none"
    with pytest.raises(KeyError):
        again.get_as("absent", Limits)
    with pytest.raises(msgspec.ValidationError, match=r"\$\.pages"):
        again.register("limits", {"pages": "many", "hosts": []}).get_as("limits", Limits)


def test_a_fresh_run_id_is_a_random_uuid_and_nothing_else_is_made_up():
    first, second = RunIdentity.new(), RunIdentity.new()
    assert first != second
    assert uuid.UUID(first.pipeline_run_id).version == 4
    assert uuid.UUID(first.pipeline_run_id).variant == uuid.RFC_4122
    assert list(first.ids()) == ["pipeline_run_id"]
    assert set(first.to_dict()) == set(RunIdentity.__struct_fields__)
    assert RunIdentity().ids() == {}


def test_inputs_give_what_was_declared_and_refuse_the_rest():
    inputs = StageInputs(
        {"fetch": {"url": "u"}, "size": 3}, ("fetch", "size", "lost"), "parse", failed=("lost",), skipped=("late",)
    )
    assert (inputs["fetch"], inputs.value("fetch", "url"), inputs.get("size")) == ({"url": "u"}, "u", 3)
    assert inputs.value("size", "no mapping", "default") == "default"
    assert inputs.value("fetch", "absent", 7) == 7
    assert (inputs.failed, inputs.skipped, inputs.declared) == (("lost",), ("late",), ("fetch", "size", "lost"))
    assert ("fetch" in inputs, "lost" in inputs, sorted(inputs), len(inputs)) == (True, False, ["fetch", "size"], 2)
    assert inputs.get("lost", "none") == "none"
    with pytest.raises(KeyError):
        inputs["lost"]
    for read in (inputs.__getitem__, inputs.get, lambda name: inputs.value(name, "k")):
        with pytest.raises(UndeclaredDependencyError, match="'parse' reads 'other'") as refused:
            read("other")
        assert (refused.value.stage, refused.value.key) == ("parse", "other")
    with pytest.raises(UndeclaredDependencyError, match=r"\(none\)"):
        EMPTY_INPUTS["anything"]
