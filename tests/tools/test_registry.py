"""Registries, the decorator, and calls as models write them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow.core.errors import DefinitionError
from stageflow.tools.definitions import Tool, ToolDefinition, ToolInput
from stageflow.tools.registry import (
    FunctionTool,
    ResolvedToolCall,
    ToolRegistry,
    UnresolvedToolCall,
    current_registry,
    tool,
    use_registry,
)


class Echo(Tool):
    definition = ToolDefinition(name="Echo", action_type="echo")

    def execute(self, input: ToolInput) -> Any:
        return input.payload


def test_tools_are_keyed_by_action_type_and_the_last_one_wins() -> None:
    registry = ToolRegistry()
    first, second = Echo(), Echo()
    registry.register(first)
    registry.register(second)
    assert registry.get_tool("echo") is second
    assert registry.get_tool("Echo") is None
    assert "echo" in registry
    assert "other" not in registry
    assert 3 not in registry
    assert len(registry) == 1
    assert registry.definition("echo") is Echo.definition
    assert registry.unregister("echo") is True
    assert registry.unregister("echo") is False
    with pytest.raises(DefinitionError):
        registry.register(object())
    with pytest.raises(DefinitionError):
        registry.register(Echo)


def test_a_factory_is_called_once_and_only_when_needed() -> None:
    made: list[Echo] = []

    def factory() -> Echo:
        made.append(Echo())
        return made[-1]

    registry = ToolRegistry()
    registry.register_factory("echo", factory)
    assert registry.can_execute("echo")
    assert registry.list_tools() == []
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(registry.get_tool("echo"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(results) == {made[0]}
    assert registry.list_tools() == made
    assert [found.name for found in registry.definitions()] == ["Echo"]
    registry.clear()
    assert len(registry) == 0


def test_the_decorator_marks_registers_and_returns_the_class_unchanged() -> None:
    registry = ToolRegistry()

    class Sum(Tool):
        def execute(self, input: ToolInput) -> int:
            return sum(input.payload["numbers"])

    assert tool("sum", "Sum", "adds numbers", registry=registry, undoable=True)(Sum) is Sum
    assert Sum.__stageflow_tool__.description == "adds numbers"  # type: ignore[attr-defined]
    assert registry.list_tools() == []
    assert registry.definition("sum") is Sum.__stageflow_tool__  # type: ignore[attr-defined]
    made = registry.get_tool("sum")
    assert isinstance(made, Sum)
    assert made.definition.undoable
    assert made.execute(ToolInput(tool_name="sum", payload={"numbers": [1, 2]})) == 3


def test_functions_and_plain_classes_can_be_tools() -> None:
    registry = ToolRegistry()

    @tool("double", registry=registry)
    def double(input: ToolInput) -> int:
        return int(input.payload) * 2

    @tool("plain", registry=registry)
    class Plain:
        def execute(self, input: ToolInput) -> str:
            return "done"

        def undo(self, metadata: Any) -> str:
            return "undone"

    assert double(ToolInput(tool_name="double", payload=4)) == 8
    found = registry.get_tool("double")
    assert isinstance(found, FunctionTool)
    assert (found.name, found.can_undo) == ("double", False)
    plain = registry.get_tool("plain")
    assert plain is not None
    assert plain.can_undo
    assert plain.undo(None) == "undone"  # type: ignore[arg-type]


async def test_the_current_registry_belongs_to_its_context() -> None:
    with pytest.raises(DefinitionError, match="use_registry"):
        current_registry()
    outer, inner = ToolRegistry(), ToolRegistry()

    async def other() -> ToolRegistry:
        with use_registry(inner):
            await asyncio.sleep(0)
            return current_registry()

    with use_registry(outer):
        seen = await asyncio.gather(other(), other())
        assert seen == [inner, inner]
        assert current_registry() is outer

        @tool("late")
        def late(input: ToolInput) -> None: ...

    assert "late" in outer
    assert "late" not in inner

    @tool("nowhere")
    def nowhere(input: ToolInput) -> None: ...

    outer.register(nowhere)
    assert "nowhere" in outer


@pytest.fixture
def registry() -> ToolRegistry:
    found = ToolRegistry()
    found.register(Echo())
    return found


def one(registry: ToolRegistry, call: Any, **fields: Any) -> ResolvedToolCall | UnresolvedToolCall:
    (answer,) = registry.parse_and_resolve([call], **fields)
    return answer


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        ("  ", {}),
        (None, {}),
        (5, {}),
        ([1], {}),
    ],
)
def test_arguments_in_all_forms(registry: ToolRegistry, arguments: Any, expected: dict[str, Any]) -> None:
    call = {"id": "c1", "function": {"name": "echo", "arguments": arguments}}
    answer = one(registry, call)
    assert answer == ResolvedToolCall(call_id="c1", name="echo", arguments=expected, raw=call)
    assert isinstance(answer, ResolvedToolCall)
    made = answer.to_input(behavior="practice")
    assert (made.tool_name, made.payload, made.behavior) == ("echo", expected, "practice")


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        ({"id": "c1"}, "Missing 'function'", None),
        ({"id": "c1", "function": "echo"}, "Missing 'function'", None),
        ({"id": "c1", "function": {}}, "Missing 'name'", None),
        ({"id": "c1", "function": {"name": 3}}, "Missing 'name'", None),
        ({"id": "c1", "function": {"name": "echo", "arguments": "{"}}, "Invalid JSON", "echo"),
        ({"id": "c1", "function": {"name": "echo", "arguments": "[1]"}}, "Invalid JSON", "echo"),
        ({"id": "c1", "function": {"name": "echo", "arguments": '{"a": NaN}'}}, "Invalid JSON", "echo"),
        ({"id": "c1", "function": {"name": "echo", "arguments": '{"a":' * 100_000}}, "Invalid JSON", "echo"),
        ({"id": "c1", "function": {"name": "gone"}}, "No tool registered", "gone"),
    ],
)
def test_calls_that_cannot_be_made(registry: ToolRegistry, call: Any, error: str, name: str | None) -> None:
    answer = one(registry, call)
    assert isinstance(answer, UnresolvedToolCall)
    assert error in answer.error
    assert (answer.call_id, answer.name, answer.raw) == ("c1", name, call)


def test_ids_shapes_and_order(registry: ToolRegistry) -> None:
    assert one(registry, {"function": {"name": "echo"}}).call_id == ""
    assert one(registry, {"function": {"name": "gone"}}).call_id is None
    assert one(registry, "text").error == "a call is an object, not str"  # type: ignore[union-attr]
    flat = one(
        registry,
        {"call": 7, "tool": "echo", "input": {"x": 1}},
        id_field="call",
        function_wrapper=None,
        name_field="tool",
        arguments_field="input",
    )
    assert isinstance(flat, ResolvedToolCall)
    assert (flat.call_id, flat.arguments) == ("7", {"x": 1})
    calls = [{"id": str(n), "function": {"name": "echo" if n % 2 else "gone"}} for n in range(5)]
    answers = registry.parse_and_resolve(calls)
    assert [type(answer).__name__[0] for answer in answers] == ["U", "R", "U", "R", "U"]
    assert [answer.call_id for answer in answers] == list("01234")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "function", "name", "arguments"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)  # a loaded machine is no failure
@given(st.lists(JSON, max_size=4))
def test_whatever_a_model_writes_is_answered(calls: list[Any]) -> None:
    registry = ToolRegistry()
    registry.register(Echo())
    answers = registry.parse_and_resolve(calls)
    assert len(answers) == len(calls)
