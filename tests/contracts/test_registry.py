"""Versions of contracts, and what a change means for consumers."""

import datetime
import enum
import pickle
import threading
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest

from stageflow.contracts.checker import schema_of
from stageflow.contracts.diff import diff_schemas
from stageflow.contracts.registry import ContractRegistry, ContractVersionError, version_key
from stageflow.contracts.suggestions import ContractSuggestion, SuggestionRegistry, get_contract_suggestion


class A1(enum.Enum):
    X = "x"
    Y = "y"


class A2(enum.Enum):
    X = "x"
    Z = "z"


class Inner1(msgspec.Struct):
    a: int
    b: str = ""


class Inner2(msgspec.Struct):
    a: int
    b: str


class Node1(msgspec.Struct):
    value: int
    next: "Node1 | None" = None


class Node2(msgspec.Struct):
    value: str
    next: "Node2 | None" = None


def struct(name: str = "S", **fields: Any) -> Any:
    return msgspec.defstruct(
        name, [(key, *(value if isinstance(value, tuple) else (value,))) for key, value in fields.items()]
    )


def ge(limit: int) -> Any:
    return Annotated[int, msgspec.Meta(ge=limit)]


REQUIRED = "the optional field became required"
STRING = "the type changed from integer to string"

CHANGES = [
    # what changed, old, new, breaking findings, warnings
    ("nothing", struct(a=int), struct(a=int), [], []),
    ("field removed", struct(a=int, b=int), struct(a=int), ["$.b: the field was removed"], []),
    ("required added", struct(a=int), struct(a=int, b=int), ["$.b: a required field was added"], []),
    ("optional added", struct(a=int), struct(a=int, b=(int, 0)), [], ["$.b: an optional field was added"]),
    ("optional to required", struct(a=(int, 0)), struct(a=int), [f"$.a: {REQUIRED}"], []),
    ("required to optional", struct(a=int), struct(a=(int, 0)), [], ["$.a: the required field became optional"]),
    ("type", struct(a=int), struct(a=str), [f"$.a: {STRING}"], []),
    ("int to float", struct(a=int), struct(a=float), [], ["$.a: the type widened from integer to number"]),
    ("to untyped", struct(a=int), struct(a=Any), [], ["$.a: was integer, is now any value"]),
    ("from untyped", struct(a=Any), struct(a=int), [], ["$.a: was any value, is now integer"]),
    ("union wider", struct(a=int), struct(a=int | None), [], ["$.a: the alternative null was added"]),
    ("union narrower", struct(a=int | None), struct(a=int), ["$.a: the alternative null was removed"], []),
    ("nested optional to required", struct(i=Inner1), struct(i=Inner2), [f"$.i.b: {REQUIRED}"], []),
    ("in a list", struct(i=list[Inner1]), struct(i=list[Inner2]), [f"$.i[].b: {REQUIRED}"], []),
    ("in a dict", struct(i=dict[str, int]), struct(i=dict[str, str]), [f"$.i.*: {STRING}"], []),
    ("in an option", struct(i=Inner1 | None), struct(i=Inner2 | None), [f"$.i.b: {REQUIRED}"], []),
    ("in a tuple", tuple[int, str], tuple[int, int], ["$[1]: the type changed from string to integer"], []),
    (
        "tuple longer",
        tuple[int, str],
        tuple[int, str, int],
        ["$: minItems changed from 2 to 3", "$: 2 fixed items became 3"],
        None,
    ),
    ("enum", struct(a=A1), struct(a=A2), ["$.a: the value 'y' was removed"], ["$.a: the value 'z' was added"]),
    ("literal wider", Literal["a"], Literal["a", "b"], [], ["$: the value 'b' was added"]),
    ("format", struct(a=str), struct(a=datetime.date), ["$.a: format changed from None to 'date'"], []),
    ("bound tighter", struct(a=ge(0)), struct(a=ge(1)), ["$.a: minimum changed from 0 to 1"], []),
    ("bound looser", struct(a=ge(1)), struct(a=ge(0)), [], ["$.a: minimum changed from 1 to 0"]),
    ("bound new", struct(a=int), struct(a=ge(1)), ["$.a: minimum changed from None to 1"], []),
    ("recursive", Node1, Node2, [f"$.value: {STRING}"], []),
    ("opaque class", struct(a=np.ndarray), struct(a=threading.Thread), None, []),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "breaking", "warnings"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_change_is_judged_for_the_consumer(old, new, breaking, warnings):
    found = diff_schemas(schema_of(old), schema_of(new))
    if breaking is None:
        assert len(found[0]) >= 1
    else:
        assert list(found[0]) == breaking
    if warnings is not None:
        assert list(found[1]) == warnings


def test_hand_written_schemas_are_understood():
    old = {"properties": {"a": {"type": ["string", "null"]}, "b": {"properties": {"c": {}}}}}
    new = {"properties": {"a": {"type": "string"}, "b": {"type": "object"}}, "additionalProperties": False}
    breaking, _ = diff_schemas(old, new)
    assert breaking == (
        "$.a: the alternative null was removed",
        "$.b.c: the field was removed",
        "$: further fields are forbidden now",
    )


def test_registering_is_idempotent_and_a_changed_schema_needs_a_new_version():
    registry = ContractRegistry()
    first = registry.register("parse", "1.0", struct(a=int), "first")
    assert registry.register("parse", "1.0", struct(a=int)) is first
    with pytest.raises(ContractVersionError, match="needs a new version") as caught:
        registry.register("parse", "1.0", struct(a=str))
    assert (caught.value.code, caught.value.stage) == ("CONTRACT-003-VERSION", "parse")
    assert pickle.loads(pickle.dumps(caught.value)).version == "1.0"
    assert registry.get("parse", "1.0") is first
    assert (registry.get("parse", "2"), len(registry), registry.is_empty) == (None, 1, False)
    checker = registry.checker("parse", "1.0")
    assert checker is not None
    assert checker.fits({"a": 1})
    assert registry.checker("x", "1") is None
    registry.clear()
    assert registry.is_empty


def test_versions_are_ordered_as_versions():
    registry = ContractRegistry()
    for version in ("1.10", "1.9", "v2.0.0", "2.0.0-rc.2", "2.0.0-rc.10", "2.0.0-beta", "draft"):
        registry.register("b", version, {})
    registry.register("a", "9", {})
    listed = [(entry.stage, entry.version) for entry in registry.list()]
    assert listed[0] == ("a", "9")
    assert [version for _, version in listed[1:]] == [
        "1.9", "1.10", "2.0.0-beta", "2.0.0-rc.2", "2.0.0-rc.10", "v2.0.0", "draft",
    ]  # fmt: skip
    assert registry.latest("a") is not None
    assert registry.latest("none") is None
    assert version_key("1") == version_key("1.0.0+build")


def test_a_report_sums_up():
    registry = ContractRegistry()
    registry.register("s", "1", struct(a=int, b=int))
    registry.register("s", "2", struct(a=int, c=(int, 0)))
    registry.register("s", "3", struct(a=int, c=(int, 0), d=(int, 1)))
    bad, good = registry.diff("s", "1", "2"), registry.diff("s", "2", "3")
    assert (bad.is_compatible, good.is_compatible) == (False, True)
    assert bad.summary() == "s 1 -> 2: breaking (1 breaking, 1 warnings)"
    assert good.summary() == "s 2 -> 3: compatible (0 breaking, 1 warnings)"
    assert good.to_dict()["is_compatible"] is True
    with pytest.raises(ContractVersionError, match="known: 1, 2, 3"):
        registry.diff("s", "1", "9")


def test_one_of_many_threads_registers():
    registry, barrier, won = ContractRegistry(), threading.Barrier(6), []

    def body(n: int) -> None:
        barrier.wait()
        try:
            registry.register("s", "1", {"title": str(n)})
        except ContractVersionError:
            return
        won.append(str(n))

    threads = [threading.Thread(target=body, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = registry.get("s", "1")
    assert entry is not None
    assert won == [entry.schema["title"]]


def test_suggestions_by_code():
    for part in ("CYCLE", "MISSING_DEP", "SELF_DEP", "CONFLICT", "ORPHAN", "EMPTY"):
        suggestion = get_contract_suggestion(f"CONTRACT-004-{part}")
        assert suggestion is not None
        assert suggestion.title
        assert suggestion.fix_steps
        assert suggestion.doc_url is not None
        assert suggestion.doc_url.endswith(part.lower())
    assert get_contract_suggestion("NOPE") is None
    registry = SuggestionRegistry()
    registry.register(ContractSuggestion("MY-1", "Mine", "text", ("do",)))
    registry.register(ContractSuggestion("CONTRACT-004-CYCLE", "Other", "text"))
    found = registry.get("MY-1")
    assert found is not None
    assert found.to_dict()["fix_steps"] == ["do"]
    assert [each.code for each in registry.list()] == sorted(each.code for each in registry.list())
    assert (len(registry), SuggestionRegistry().get("MY-1")) == (10, None)
    replaced = registry.get("CONTRACT-004-CYCLE")
    assert replaced is not None
    assert replaced.title == "Other"
