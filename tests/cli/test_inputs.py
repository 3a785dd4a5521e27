"""`--input`: text becomes what the stage declares, or one message says why it cannot."""

import datetime
import io
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stageflow import PipelineBuilder
from stageflow.cli.inputs import InputError, read_inputs


class Colour(Enum):
    RED = "red"


class Box(msgspec.Struct):
    wide: int
    note: str = ""


def graph_of(annotation: Any):
    def use(value):
        return value

    use.__annotations__["value"] = annotation
    return PipelineBuilder("p").stage("use", use).build()


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "7", 7),
        (float, "7", 7.0),
        (bool, "true", True),
        (str, "7", "7"),
        (str, '{"a": 1}', '{"a": 1}'),
        (bytes, "abc", b"abc"),
        (str | None, "null", "null"),
        (int | None, "null", None),
        (list[int], "[1, 2]", [1, 2]),
        (tuple[int, str], '[1, "b"]', (1, "b")),
        (dict[str, float], '{"a": 1}', {"a": 1.0}),
        (Colour, "red", Colour.RED),
        (Box, '{"wide": 3}', Box(3)),
        (Path, "/tmp/x", Path("/tmp/x")),
        (datetime.date, "2024-02-29", datetime.date(2024, 2, 29)),
        (Any, "7", 7),
        (Any, "seven", "seven"),
        (Any, '"7"', "7"),
        (str, "a=b=c", "a=b=c"),
        (str, "", ""),
        (str, "@@home", "@home"),
    ],
)
def test_the_annotation_decides_what_a_text_means(annotation, text, value):
    found = read_inputs(graph_of(annotation), [f"value={text}"])["value"]
    assert (found, type(found)) == (value, type(value))


def test_an_input_without_annotation_is_json_if_it_is_json():
    def use(value):
        return value

    graph = PipelineBuilder("p").stage("use", use).build()
    assert read_inputs(graph, ["value=[1]"]) == {"value": [1]}
    assert read_inputs(graph, ["value=[1"]) == {"value": "[1"}


def test_a_value_may_come_from_a_file(tmp_path):
    (tmp_path / "v.json").write_text('{"wide": 4}')
    (tmp_path / "raw").write_bytes(b"\xff\x00")
    assert read_inputs(graph_of(Box), [f"value=@{tmp_path / 'v.json'}"]) == {"value": Box(4)}
    assert read_inputs(graph_of(bytes), [f"value=@{tmp_path / 'raw'}"]) == {"value": b"\xff\x00"}
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_inputs(graph_of(str), [f"value=@{tmp_path / 'raw'}"])
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_inputs(graph_of(str), [f"value=@{tmp_path / 'gone'}"])


def test_inputs_may_come_from_a_file_or_standard_input_and_pairs_win(tmp_path, monkeypatch):
    file = tmp_path / "inputs.json"
    file.write_text('{"value": "5"}')
    assert read_inputs(graph_of(int), [], str(file)) == {"value": 5}
    assert read_inputs(graph_of(int), ["value=6"], str(file)) == {"value": 6}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"value": 8}')))
    assert read_inputs(graph_of(int), [], "-") == {"value": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "holds list, not an object"), ("{", "is not JSON"), ('{"value": "x"}', "input 'value' must be int")],
)
def test_a_bad_input_file_is_explained(tmp_path, content, message):
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_inputs(graph_of(int), [], str(tmp_path / "inputs.json"))


def test_every_problem_is_reported_at_once():
    def use(limit: int, day: str, box: Box) -> int:
        return limit

    graph = PipelineBuilder("p").stage("use", use).build()
    with pytest.raises(InputError) as caught:
        read_inputs(graph, ["limit=many", "dya=friday", "box", 'box={"wide": "x"}'])
    text = str(caught.value)
    assert "input 'limit' must be int, and 'many' is not" in text
    assert "no input 'dya'. Did you mean 'day'?" in text
    assert "--input 'box' is not NAME=VALUE" in text
    assert "input 'box' must be Box" in text
    assert "$.wide" in text
    assert "input 'day' is missing (stage 'use'): give --input day=TEXT" in text


def test_a_stage_that_takes_ctx_may_read_any_input():
    graph = PipelineBuilder("p").stage("use", lambda ctx: ctx.snapshot.inputs["anything"]).build()
    assert read_inputs(graph, ["anything=1"]) == {"anything": 1}
