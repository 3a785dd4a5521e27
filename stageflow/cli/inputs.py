"""`--input k=v` and `--input-file` to the typed inputs of a graph.

The annotation of the input decides what a text means; without one, text that is a JSON literal is that value. `@path`
gives the contents of a file, `@@text` a text that begins with `@`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.names import did_you_mean


class InputError(DefinitionError):
    """An input cannot be what was given for it (field `input`)."""

    code = "SF-INPUT"


def read_inputs(graph: StageGraph, pairs: Iterable[str], file: str | None = None) -> dict[str, Any]:
    """The inputs of one run, each of the type its stage declares; `pairs` win over the file.

    All problems come as one InputError.
    """
    given: dict[str, Any] = _from_file(graph, file) if file is not None else {}
    problems: list[str] = []
    tried: set[str] = set()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        tried.add(name)
        if not equals or not name:
            problems.append(f"--input {pair!r} is not NAME=VALUE")
            continue
        try:
            given[name] = _from_text(graph, name, text)
        except InputError as error:
            problems.append(str(error))
    known = {**graph.inputs, **graph.optional_inputs}
    if not any(spec.wants_ctx or spec.form in ("object", "class") for spec in graph.specs):
        for name in sorted(given.keys() - known.keys()):
            problems.append(f"the graph has no input {name!r}. {did_you_mean(name, known, what='Inputs')}".rstrip())
    missing = [name for name in graph.inputs if name not in given and name not in tried]
    if missing:
        problems.append(missing_text(graph, missing))
    if problems:
        raise InputError("\n".join(problems))
    return given


def missing_text(graph: StageGraph, missing: Iterable[str]) -> str:
    """Which inputs are missing, which stage wants each, and how to give it."""
    lines = []
    for name in missing:
        users = [
            spec.name
            for spec in graph.specs
            if name == spec.over_input or any(b.source == "input" and b.ref == name for b in spec.bindings)
        ]
        wanted = f" (stage {users[0]!r})" if users else ""
        lines.append(f"input {name!r} is missing{wanted}: give --input {name}={_example(graph.inputs.get(name))}")
    return "\n".join(lines)


def describe(annotation: Any) -> str:
    """An annotation the way it is written in source."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _example(annotation: Any) -> str:
    if annotation is None or annotation is Any:
        return "VALUE"
    return {"int": "3", "float": "0.5", "bool": "true", "str": "TEXT", "bytes": "@FILE"}.get(
        describe(annotation), "VALUE"
    )


def _from_file(graph: StageGraph, file: str) -> dict[str, Any]:
    data = sys.stdin.buffer.read() if file == "-" else _read(Path(file), "--input-file")
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise InputError(f"--input-file {file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(
            f"--input-file {file} holds {type(found).__name__}, not an object", hint='Write {"name": value, ...}.'
        )
    return {name: _converted(graph, name, value) for name, value in found.items()}


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{what}: {str(path)!r} cannot be read: {error.strerror or error}") from error


def _annotation(graph: StageGraph, name: str) -> Any:
    found = graph.inputs.get(name, graph.optional_inputs.get(name))
    return Any if found is None else found


def _is(annotation: Any, wanted: type) -> bool:
    """True for `wanted` and for `wanted | None`."""
    if get_origin(annotation) in (Union, UnionType):
        return set(get_args(annotation)) == {wanted, type(None)}
    return annotation is wanted


def _from_text(graph: StageGraph, name: str, text: str) -> Any:
    annotation = _annotation(graph, name)
    if text.startswith("@@"):
        text = text[1:]
    elif text.startswith("@"):
        data = _read(Path(text[1:]), f"input {name!r}")
        if _is(annotation, bytes):
            return data
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"input {name!r}: {text[1:]!r} is not UTF-8 text (byte {error.start})") from error
        if annotation is Any and not text[1:].endswith(".json"):
            return text
    if _is(annotation, str):
        return text
    if _is(annotation, bytes):
        return text.encode()
    try:
        literal = msgspec.json.decode(text.encode())
    except msgspec.DecodeError:
        return _converted(graph, name, text)
    if annotation is Any:
        return literal
    try:
        return _converted(graph, name, literal)
    except InputError as first:
        try:
            return _converted(graph, name, text)  # 2024 is a number to JSON, and may be meant as the text of a year
        except InputError:
            raise first from None


def _converted(graph: StageGraph, name: str, value: Any) -> Any:
    annotation = _annotation(graph, name)
    if annotation is Any:
        return value
    try:
        return msgspec.convert(value, annotation, strict=False, dec_hook=_built)
    except msgspec.ValidationError as error:
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
        detail = f": {error}" if "$" in str(error) or not isinstance(value, str) else ""
        wanted = describe(annotation)
        raise InputError(f"input {name!r} must be {wanted}, and {shown} is not{detail}", input=name) from error
    except TypeError:
        return value  # a type msgspec does not know: the stage itself will judge


def _built(cls: Any, value: Any) -> Any:
    """Types msgspec does not know but text can make: pathlib.Path, ipaddress, and the like."""
    if isinstance(value, cls):
        return value
    if isinstance(value, str):
        try:
            return cls(value)
        except Exception as error:
            raise ValueError(str(error)) from error
    raise NotImplementedError
