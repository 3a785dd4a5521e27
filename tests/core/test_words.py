"""The shared words: statuses, the two sentinels, outputs. What they mean is fixed; every room relies on it."""

import copy
import json
import pickle

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow.core.kinds import DROP, UNSET, Drop, StageKind, StageStatus
from stageflow.core.output import ErrorInfo, StageArtifact, StageEvent, StageOutput

#: status: (terminal, success, failure)
STATUSES = {
    StageStatus.OK: (True, True, False),
    StageStatus.SKIP: (True, True, False),
    StageStatus.CANCEL: (True, False, True),
    StageStatus.FAIL: (True, False, True),
    StageStatus.RETRY: (False, False, False),
    StageStatus.PENDING: (False, False, False),
    StageStatus.RUNNING: (False, False, False),
}


@pytest.mark.parametrize("status", StageStatus)
def test_what_a_status_counts_as(status):
    assert (status.is_terminal, status.is_success, status.is_failure) == STATUSES[status]
    assert pickle.loads(pickle.dumps(status)) is status
    assert msgspec.json.decode(msgspec.json.encode(status)) == status.value


@pytest.mark.parametrize("kind", ["transform", "enrich", "route", "guard", "work", "agent"])
def test_a_kind_is_its_word(kind):
    assert str(StageKind(kind)) == StageKind[kind.upper()].value == kind
    assert msgspec.json.encode(StageKind(kind)) == f'"{kind}"'.encode()
    assert len(StageKind) == 6


@pytest.mark.parametrize("travel", [lambda it: pickle.loads(pickle.dumps(it, 5)), copy.copy, copy.deepcopy])
def test_the_sentinels_keep_their_identity_wherever_they_travel(travel):
    assert travel(DROP) is DROP
    assert travel(UNSET) is UNSET
    assert Drop() is DROP
    assert not UNSET


def test_fields_of_ok_merge_into_a_mapping_and_into_nothing_else():
    assert StageOutput.ok("x").data == "x"
    assert StageOutput.ok(a=1).data == {"a": 1}
    assert StageOutput.ok({"a": 1, "b": 0}, b=2).data == {"a": 1, "b": 2}
    assert StageOutput.ok_value("k", 3).data == {"k": 3}
    assert StageOutput.ok_empty().data is None
    with pytest.raises(TypeError, match=r"\['b'\] cannot merge into list data"):
        StageOutput.ok([1], b=2)


#: constructor: (status, success, failure, retryable, the key that holds the reason)
OUTCOMES = {
    "ok": (lambda why: StageOutput.ok(why), StageStatus.OK, True, False, False, "data"),
    "skip": (StageOutput.skip, StageStatus.SKIP, True, False, False, "skip_reason"),
    "cancel": (StageOutput.cancel, StageStatus.CANCEL, False, True, False, "cancel_reason"),
    "fail": (StageOutput.fail, StageStatus.FAIL, False, True, False, "error"),
    "fail_retryable": (StageOutput.fail_retryable, StageStatus.FAIL, False, True, True, "error"),
    "retry": (StageOutput.retry, StageStatus.RETRY, False, False, True, "error"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_how_each_outcome_reads(name):
    make, status, success, failure, retryable, holds = OUTCOMES[name]
    output = make("why")
    assert (output.status, output.is_success, output.is_failure, output.is_retryable) == (
        status,
        success,
        failure,
        retryable,
    )
    assert output.to_dict() == {"status": status.value, holds: "why"} | ({"retryable": True} if retryable else {})
    with pytest.raises(AttributeError):
        output.status = StageStatus.OK


def test_every_change_is_a_copy():
    first = StageOutput.ok({"a": 1}).add_metadata("m", 1)
    changed = (
        first.with_data({"a": 2, "b": 3})
        .add_metadata("n", 2)
        .with_events([StageEvent.with_data("seen", {"n": 1})])
        .with_artifacts([StageArtifact.new("table", "t1", "Table").with_metadata("rows", 3)])
    )
    assert first == StageOutput.ok({"a": 1}).with_metadata({"m": 1})
    assert (changed.data, changed.metadata) == ({"a": 2, "b": 3}, {"m": 1, "n": 2})
    assert changed.artifacts[0].to_dict()["metadata"] == {"rows": 3}
    assert "metadata" not in StageArtifact.new("table", "t1", "Table").to_dict()
    assert changed.events[0].add_data("m", 2).data == {"n": 1, "m": 2}
    assert changed.events[0].data == {"n": 1}
    json.dumps(changed.to_dict())


def test_reading_data_that_is_no_mapping():
    assert StageOutput.ok([1]).get("a", "none") == "none"
    assert StageOutput.ok([1]).data_or_empty() == {}
    mapping = StageOutput.ok({"a": 1})
    mapping.data_or_empty()["a"] = 2
    assert mapping.get("a") == 1


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(), max_size=5),
    st.text(),
)
def test_an_output_is_the_same_after_a_round_trip(data, reason):
    for output in (StageOutput.ok(data), StageOutput.fail(reason, data=data, retryable=True), StageOutput.skip(reason)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StageOutput) == output
        assert pickle.loads(pickle.dumps(output, 5)) == output


def test_what_is_absent_is_not_written_and_not_missed():
    assert msgspec.json.encode(StageOutput.ok_empty()) == b"{}"
    assert msgspec.json.decode(b'{"status": "skip"}', type=StageOutput) == StageOutput(StageStatus.SKIP)
    written = msgspec.json.decode(msgspec.json.encode(StageOutput.retry("busy")))
    assert written == {"status": "retry", "error": "busy", "retryable": True}
    artifact = StageArtifact.new("table", "t1", "Table", [1])
    assert msgspec.json.decode(msgspec.json.encode(artifact), type=StageArtifact) == artifact
    assert msgspec.json.decode(msgspec.json.encode(artifact))["metadata"] == {}


def test_the_standard_events_of_a_stage():
    assert StageEvent.started("s").to_dict() | {"timestamp": ""} == {
        "type": "stage.started",
        "timestamp": "",
        "data": {"stage": "s"},
    }
    assert StageEvent.completed("s", 2.5).data == {"stage": "s", "duration_ms": 2.5}
    assert StageEvent.failed("s", "e").data == {"stage": "s", "error": "e"}
    assert StageEvent.skipped("s", "r").data == {"stage": "s", "reason": "r"}
    assert "data" not in StageEvent.new("bare").to_dict()


def test_an_error_description_shows_only_what_is_there():
    info = ErrorInfo(type="ValueError", message="bad", pickled=b"x", cause=ErrorInfo(type="OSError", message="disk"))
    assert info.to_dict() == {
        "type": "ValueError",
        "message": "bad",
        "retryable": False,
        "cause": {"type": "OSError", "message": "disk", "retryable": False},
    }
