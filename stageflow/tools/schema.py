"""Checks the arguments of a call against JSON Schema and msgspec types. Reaches no network: remote references fail.

`jsonschema` (extra `tools`) is imported when the first schema is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.tools.definitions import ToolDefinition

__all__ = ["compile_schema", "convert_payload"]

Check = Callable[[Any], list[str]]

PROBLEMS_SHOWN = 20


def compile_schema(schema: Mapping[str, Any]) -> Check:
    """Return a function that lists what is wrong with a value, each problem with its path; an empty list is a pass.

    The dialect is the schema's `$schema`, else draft 2020-12; `format` is checked for the formats that need no library.

    Raises:
        DefinitionError: the schema is no valid schema, or the extra `tools` is not installed.
    """
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise DefinitionError(
            "checking a tool's input_schema needs the jsonschema package",
            hint="pip install 'stageflow[tools]', or declare input_type= instead",
        ) from error
    dialect = validator_for(schema, default=Draft202012Validator)
    try:
        dialect.check_schema(dict(schema))
    except SchemaError as error:
        raise DefinitionError(f"the input_schema is no valid schema: {error.message}", path=list(error.path)) from error
    # An explicit empty registry: the default one would fetch remote references.
    validator = dialect(dict(schema), registry=Registry(), format_checker=dialect.FORMAT_CHECKER)

    def check(value: Any) -> list[str]:
        problems: list[str] = []
        try:
            for found in validator.iter_errors(value):
                problems.append(f"{found.json_path}: {found.message[:300]}")
                if len(problems) == PROBLEMS_SHOWN:
                    break
        except Unresolvable as error:
            raise DefinitionError(
                f"the input_schema refers to {error.ref!r}, which is not in it",
                hint="put the definition under $defs: nothing is fetched",
            ) from error
        except RecursionError:
            return ["$: nested too deeply to be checked"]
        return problems

    return check


def convert_payload(definition: ToolDefinition, payload: Any) -> tuple[Any, str | None]:
    """Convert the payload to the definition's `input_type`: the value and None, or None and what does not fit.

    Strict: a number is not read from text. Without a type the payload is the value.
    """
    if definition.input_type is None:
        return payload, None
    try:
        return msgspec.convert(payload, definition.input_type), None
    except msgspec.ValidationError as error:
        return None, str(error)
