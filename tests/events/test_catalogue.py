"""Golden JSON of every event type, and what the catalogue promises about reading it back."""

import json
import re
from pathlib import Path

import msgspec
import pytest

import stageflow
from stageflow.events import names
from stageflow.events.catalogue import CATALOGUE, EventData, typed
from stageflow.events.encoding import decode_json, encode_json
from stageflow.events.event import Event

GOLDEN = Path(__file__).with_name("golden.jsonl")


def _emitted_names() -> set[str]:
    return {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}


def _golden() -> list[str]:
    return GOLDEN.read_text().splitlines()


def _example(type_: str) -> Event:
    """An event of `type_` whose data has every field of its struct, with values that depend on the field's name
    only."""
    samples: dict[str, object] = {}
    for field in msgspec.structs.fields(CATALOGUE[type_]):
        samples[field.name] = _sample(field.name, field.type)
    return Event(type_, 1_700_000_000_000_000_000, 7, "run-1", "parse", (3,), 1, "process", samples)


def _sample(name: str, annotation: object) -> object:
    text = str(annotation)
    if text.startswith("dict[int"):
        return {4242: 1024}
    if "dict[str, float]" in text:
        return {"slot": 0.5, "token": 0.25}
    if "dict[str, int]" in text:
        return {"parse": 2}
    if "dict[str, str]" in text:
        return {"parse": "process"}
    if "tuple[str, str]" in text:
        return [["fetch", "parse"]]
    if "dict[str, Any]" in text or "dict[str, typing.Any]" in text:
        return [{"name": name}] if "list" in text else {"name": name}
    if "list[list[int]]" in text:
        return [[3]]
    if "list[int]" in text:
        return [3]
    if "list[str]" in text:
        return ["a", "b"]
    if "bool" in text:
        return True
    if "float" in text:
        return 1.5
    if "int" in text:
        return 2
    return f"<{name}>"


def test_every_emitted_name_has_a_struct() -> None:
    assert _emitted_names() == set(CATALOGUE)


def test_every_name_that_is_emitted_in_the_code_is_a_known_one() -> None:
    """Whoever emits a new event under a literal name has to say what it holds."""
    emitted = re.compile(
        r"""(?:emit|_tell|tell|_event|_said|put)\(\s*(?:self\._emit,\s*|ctx,\s*)?"([a-z_]+\.[a-z_]+)\""""
    )
    noted = re.compile(r"""\{"type": "([a-z_]+\.[a-z_]+)\"""")
    found = {
        name
        for path in Path(stageflow.__file__).parent.rglob("*.py")
        if path.parts[-2] not in ("testing", "demo")
        for pattern in (emitted, noted)
        for name in pattern.findall(path.read_text())
    }
    assert {"stage.artifact", "circuit.opened", "stream.buffer_overflow", "stage.cleanup_failed"} <= found
    assert found <= set(CATALOGUE), found - set(CATALOGUE)


def test_golden_lines_have_not_changed() -> None:
    """A changed line is a changed format: whoever reads our files must be told (delete the file to write it anew)."""
    lines = [encode_json(_example(type_)).decode() for type_ in sorted(CATALOGUE)]
    if not GOLDEN.exists():
        GOLDEN.write_text("\n".join(lines) + "\n")
    assert lines == _golden()


@pytest.mark.parametrize("line", _golden() if GOLDEN.exists() else [], ids=lambda line: json.loads(line)["type"])
def test_golden_line_reads_back_as_its_struct(line: str) -> None:
    event = decode_json(line)
    data = typed(event)
    assert isinstance(data, EventData)
    assert encode_json(msgspec.structs.replace(event, data=data.to_dict())).decode() == line
    assert list(json.loads(line)) == sorted(json.loads(line))


def test_aliases_name_emitted_events_and_are_never_emitted() -> None:
    assert set(names.ALIASES.values()) <= set(CATALOGUE)
    assert not set(names.ALIASES) & set(CATALOGUE)
    assert names.canonical("stage.retry_scheduled") == "stage.retrying"
    assert names.canonical("my.own") == "my.own"


def test_typed_reads_an_alias_ignores_unknown_keys_and_knows_no_user_types() -> None:
    retry = typed(Event("stage.retry_scheduled", 1, 1, data={"attempt": 2, "delay_ms": 5, "new_key": 1}))
    assert retry is not None
    assert retry.to_dict()["attempt"] == 2
    assert typed(Event("mine", 1, 1, data={"x": 1})) is None


def test_typed_refuses_a_wrong_type() -> None:
    with pytest.raises(msgspec.ValidationError, match="duration_ms"):
        typed(Event("stage.completed", 1, 1, data={"duration_ms": [1]}))


class _Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_json_never_fails_whatever_the_data_holds() -> None:
    data = {"set": {1}, "object": _Hostile(), "big": 2**80, "surrogate": "\udc80", 3: "int key", "path": Path("/x")}
    event = Event("mine", 1, 1, data=data)  # type: ignore[arg-type]
    read = json.loads(encode_json(event))["data"]
    assert read["set"] == [1]
    assert "RuntimeError" in read["object"]
    assert read["path"] == "/x"
    assert read["3"] == "int key"
    deep: dict[str, object] = {}
    deep["self"] = deep
    assert json.loads(encode_json(Event("mine", 1, 1, data={"x": deep, "y": 2**80})))["type"] == "mine"
