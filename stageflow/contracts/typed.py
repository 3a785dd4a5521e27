"""Typed payloads on top of `StageOutput`: checked on the way out, rebuilt on the way in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from stageflow.contracts.annotations import fields_of, is_record, type_text
from stageflow.contracts.checker import Checker, compile_contract
from stageflow.core.errors import ContractViolationError
from stageflow.core.output import StageOutput

T = TypeVar("T")


class TypedOutputConfig(msgspec.Struct, frozen=True):
    """How a typed output behaves.

    `strict`: payloads must be instances (a mapping is not enough), reading converts no text to numbers and refuses
    unknown fields. `default_version` goes into the metadata of outputs as `version`. `context` goes into their metadata
    too, and into the fields of violations.
    """

    strict: bool = False
    default_version: str | None = None
    context: dict[str, Any] = {}


class TypedStageOutput(Generic[T]):
    """Makes and reads stage outputs whose data is a `T`."""

    __slots__ = ("_checker", "config", "type")

    def __init__(self, type_: type[T], config: TypedOutputConfig | None = None) -> None:
        self.type = type_
        self.config = config if config is not None else TypedOutputConfig()
        self._checker: Checker = compile_contract(type_, exact=self.config.strict)

    def validate(self, payload: T) -> Any:
        """The payload as JSON-able builtins, if it fits. ContractViolationError otherwise."""
        try:
            self._checker.check(payload)
        except ContractViolationError as error:
            raise self._with_context(error) from None
        return _to_builtins(payload)

    def serialize(self, payload: T) -> dict[str, Any]:
        """`validate`, for payloads that become a mapping."""
        value = self.validate(payload)
        if not isinstance(value, dict):
            got = type_text(type(value))
            raise self._violation(f"a typed output must become a mapping, not {got}", "$", "mapping", got)
        return value

    def ok(self, payload: T) -> StageOutput:
        """A successful output with the serialised payload, the version and the context."""
        output = StageOutput.ok(self.serialize(payload))
        metadata = dict(self.config.context)
        if self.config.default_version is not None:
            metadata["version"] = self.config.default_version
        return output.with_metadata(metadata) if metadata else output

    def from_json(self, text: str | bytes) -> T:
        """A `T` from JSON text. ContractViolationError if it is no JSON or does not fit."""
        try:
            decoded = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise self._violation(f"not JSON: {error}", "$", "JSON", "text") from None
        return self.from_dict(decoded)

    def from_dict(self, data: Any) -> T:
        """A `T` from builtins. ContractViolationError if it does not fit."""
        strict = self.config.strict
        model: Any = self.type
        try:
            if hasattr(model, "__pydantic_validator__"):
                # In JSON mode pydantic's strictness allows what JSON cannot say otherwise, such as dates as text.
                built: T = model.__pydantic_validator__.validate_json(msgspec.json.encode(data), strict=strict)
            else:
                built = msgspec.convert(data, self.type, strict=strict)
        except ValueError as error:
            text, _, rest = str(error).partition(" - at `")
            path = rest.rstrip("`") or "$"
            raise self._violation(text, path, type_text(self.type), type_text(type(data))) from None
        if strict and isinstance(data, Mapping) and is_record(self.type):
            unknown = sorted(set(data) - {key for _, key, _, _ in fields_of(self.type)})
            tag = getattr(getattr(self.type, "__struct_config__", None), "tag_field", None)
            if unknown := [name for name in unknown if name != tag]:
                raise self._violation(
                    f"unknown fields: {', '.join(unknown)}", f"$.{unknown[0]}", "no such field", "field"
                )
        return built

    def from_output(self, output: StageOutput) -> T:
        """A `T` from the data of an output."""
        return self.from_dict(output.data)

    def _violation(self, message: str, path: str, expected: str, got: str) -> ContractViolationError:
        return ContractViolationError(
            message, path=path, expected=expected, got=got, contract=type_text(self.type), context=self.config.context
        )

    def _with_context(self, error: ContractViolationError) -> ContractViolationError:
        return ContractViolationError(
            error.message, hint=error.hint, **{**error.fields, "context": self.config.context}
        )


def into_stage_output(payload: Any) -> StageOutput:
    """An OK output from any object that serialises to a mapping. ContractViolationError otherwise."""
    value = _to_builtins(payload)
    if not isinstance(value, dict):
        got = type_text(type(value))
        raise ContractViolationError(
            f"an output must become a mapping, not {got}", path="$", expected="mapping", got=got
        )
    return StageOutput.ok(value)


def validate_output_fields(output: StageOutput, required: Iterable[str]) -> None:
    """Check that the output's data has all these fields; ContractViolationError names the first missing."""
    for name in required:
        _field(output, name)


def extract_field(output: StageOutput, field: str, type_: Any = Any) -> Any:
    """One field of an output's data, checked against a type. ContractViolationError if absent or of another type."""
    value = _field(output, field)
    try:
        return compile_contract(type_, exact=True).check(value)
    except ContractViolationError as error:
        inner = getattr(error, "path", "$")
        fields = {**error.fields, "path": f"$.{field}{inner[1:]}", "field": field}
        raise ContractViolationError(f"field {field!r}: {error.message}", hint=error.hint, **fields) from None


def _field(output: StageOutput, name: str) -> Any:
    data = output.data
    if not isinstance(data, Mapping):
        what = "no data" if data is None else f"{type_text(type(data))} data"
        raise ContractViolationError(
            f"field {name!r}: the output has {what}", path=f"$.{name}", expected="mapping", got=what, field=name
        )
    if name not in data:
        raise ContractViolationError(
            f"field {name!r} is missing", path=f"$.{name}", expected="a value", got="nothing", field=name
        )
    return data[name]


def _to_builtins(payload: Any) -> Any:
    dump = getattr(payload, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    try:
        return msgspec.to_builtins(payload, str_keys=True)
    except (TypeError, ValueError) as error:
        raise ContractViolationError(
            f"the payload cannot be serialised: {error}", path="$", expected="JSON-able", got=type_text(type(payload))
        ) from error
