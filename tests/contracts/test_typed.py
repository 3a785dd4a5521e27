"""Typed outputs: strict, version and context are read; violations name the field."""

import datetime

import msgspec
import pydantic
import pytest

from stageflow.contracts.typed import (
    TypedOutputConfig,
    TypedStageOutput,
    extract_field,
    into_stage_output,
    validate_output_fields,
)
from stageflow.core.errors import ContractViolationError
from stageflow.core.output import StageOutput


class Doc(msgspec.Struct):
    title: str
    pages: int = 0
    day: datetime.date | None = None


class Model(pydantic.BaseModel):
    a: int
    day: datetime.date | None = None


def test_out_and_in_again():
    typed = TypedStageOutput(Doc, TypedOutputConfig(default_version="1.2", context={"team": "x"}))
    doc = Doc("t", 3, datetime.date(2026, 1, 2))
    output = typed.ok(doc)
    assert output.data == {"title": "t", "pages": 3, "day": "2026-01-02"}
    assert output.metadata == {"team": "x", "version": "1.2"}
    assert typed.from_output(output) == doc
    assert typed.from_json(b'{"title": "t", "pages": "3"}') == Doc("t", 3)
    assert TypedStageOutput(Doc).ok(doc).metadata == {}


def test_strict_wants_instances_and_exact_data():
    loose, strict = TypedStageOutput(Doc), TypedStageOutput(Doc, TypedOutputConfig(strict=True, context={"k": 1}))
    assert loose.serialize({"title": "t"}) == {"title": "t"}  # type: ignore[arg-type]
    assert loose.from_dict({"title": "t", "pages": "3", "new": 1}) == Doc("t", 3)
    with pytest.raises(ContractViolationError) as caught:
        strict.validate({"title": "t"})  # type: ignore[arg-type]
    assert (caught.value.path, caught.value.context) == ("$", {"k": 1})
    with pytest.raises(ContractViolationError) as caught:
        strict.from_dict({"title": "t", "pages": "3"})
    assert (caught.value.path, caught.value.context) == ("$.pages", {"k": 1})
    with pytest.raises(ContractViolationError, match="unknown fields: new"):
        strict.from_dict({"title": "t", "new": 1})
    assert strict.from_dict({"title": "t", "day": "2026-01-02"}).day == datetime.date(2026, 1, 2)


def test_models_work_the_same():
    typed = TypedStageOutput(Model, TypedOutputConfig(strict=True))
    assert typed.ok(Model(a=1, day=datetime.date(2026, 1, 2))).data == {"a": 1, "day": "2026-01-02"}
    assert typed.from_dict({"a": 1, "day": "2026-01-02"}) == Model(a=1, day=datetime.date(2026, 1, 2))
    with pytest.raises(ContractViolationError):
        typed.from_dict({"a": "1"})
    assert TypedStageOutput(Model).from_dict({"a": "1"}) == Model(a=1)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ContractViolationError, match="must become a mapping, not list"):
        TypedStageOutput(list[int]).ok([1])
    assert TypedStageOutput(list[int]).validate([1]) == [1]
    with pytest.raises(ContractViolationError, match="not JSON"):
        TypedStageOutput(Doc).from_json("{")
    with pytest.raises(ContractViolationError, match="cannot be serialised"):
        into_stage_output(object())
    with pytest.raises(ContractViolationError, match="must become a mapping, not int"):
        into_stage_output(3)
    assert into_stage_output(Doc("t")).get("title") == "t"
    assert into_stage_output(Model(a=1)).get("a") == 1


def test_fields_of_outputs():
    output = StageOutput.ok(a=1, doc={"b": [1, "x"]})
    validate_output_fields(output, ["a", "doc"])
    with pytest.raises(ContractViolationError) as caught:
        validate_output_fields(output, ["a", "z"])
    assert (caught.value.field, caught.value.path) == ("z", "$.z")
    with pytest.raises(ContractViolationError, match="no data"):
        validate_output_fields(StageOutput.ok_empty(), ["a"])
    with pytest.raises(ContractViolationError, match="list data"):
        extract_field(StageOutput.ok([1]), "a")
    assert extract_field(output, "a", int) == 1
    assert extract_field(output, "doc") is output.data["doc"]
    with pytest.raises(ContractViolationError) as caught:
        extract_field(output, "doc", dict[str, list[int]])
    assert (caught.value.field, caught.value.path) == ("doc", "$.doc.b[1]")
