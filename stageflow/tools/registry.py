"""Which tools there are: explicit registries, the one of the present context, `@tool`, and calls as models write them.

There is no process-wide registry. `use_registry` sets one for a context (a task, a thread), and only there.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from stageflow.core.errors import DefinitionError
from stageflow.tools.definitions import Tool, ToolDefinition, ToolInput, UndoMetadata

__all__ = [
    "FunctionTool",
    "ResolvedToolCall",
    "ToolRegistry",
    "UnresolvedToolCall",
    "current_registry",
    "tool",
    "use_registry",
]

T = TypeVar("T")
MARK: Final = "__stageflow_tool__"


class FunctionTool(Tool):
    """A tool whose `execute` is one function of `ToolInput`, and its `undo`, if any, one of `UndoMetadata`."""

    def __init__(
        self,
        definition: ToolDefinition,
        function: Callable[[ToolInput], Any],
        undo: Callable[[UndoMetadata], Any] | None = None,
    ) -> None:
        self.definition = definition
        self.function = function
        self._undo = undo

    @property
    def can_undo(self) -> bool:
        """Whether a function or the definition's handler undoes it."""
        return self._undo is not None or self.definition.undo_handler is not None

    def execute(self, input: ToolInput) -> Any:
        """Call the function."""
        return self.function(input)

    def undo(self, metadata: UndoMetadata) -> Any:
        """Call the definition's handler, else the undo function."""
        if self.definition.undo_handler is None and self._undo is not None:
            return self._undo(metadata)
        return super().undo(metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedToolCall:
    """A call that names a registered tool. `call_id` is "" where the model gave none."""

    call_id: str
    name: str
    arguments: dict[str, Any]
    raw: Any

    def to_input(self, **fields: Any) -> ToolInput:
        """The call for a `ToolExecutor`; `fields` are further fields of `ToolInput`."""
        return ToolInput(tool_name=self.name, payload=self.arguments, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnresolvedToolCall:
    """A call that cannot be made, and why."""

    error: str
    raw: Any
    call_id: str | None = None
    name: str | None = None


class ToolRegistry:
    """Tools by action type. Thread-safe; a factory is called once, when its tool is first asked for."""

    def __init__(self) -> None:
        self._tools: dict[str, Tool] = {}
        self._factories: dict[str, tuple[Callable[[], Tool], ToolDefinition | None]] = {}
        self._lock = threading.RLock()

    def register(self, tool: Any) -> None:
        """Add a tool, replacing the one of its action type: an instance of `Tool`, or what `@tool` decorated.

        Raises:
            DefinitionError: it is neither.
        """
        if isinstance(tool, Tool) and isinstance(getattr(tool, "definition", None), ToolDefinition):
            with self._lock:
                self._factories.pop(tool.action_type, None)
                self._tools[tool.action_type] = tool
            return
        definition = getattr(tool, MARK, None)
        if not isinstance(definition, ToolDefinition):
            raise DefinitionError(
                f"{tool!r} is no tool",
                hint="give a Tool with a definition, or decorate the class or function with @tool",
            )
        self.register_factory(definition.action_type, lambda: _build(tool, definition), definition)

    def register_factory(
        self, action_type: str, factory: Callable[[], Tool], definition: ToolDefinition | None = None
    ) -> None:
        """Add a tool that is built when first used; its definition, where given, is known before that."""
        with self._lock:
            self._tools.pop(action_type, None)
            self._factories[action_type] = (factory, definition)

    def unregister(self, action_type: str) -> bool:
        """Remove a tool; False where there was none."""
        with self._lock:
            instance, factory = self._tools.pop(action_type, None), self._factories.pop(action_type, None)
            return instance is not None or factory is not None

    def get_tool(self, action_type: str) -> Tool | None:
        """The tool, built by its factory if need be; None where the action is unknown."""
        with self._lock:
            found = self._tools.get(action_type)
            if found is None and action_type in self._factories:
                found = self._tools[action_type] = self._factories[action_type][0]()
            return found

    def definition(self, action_type: str) -> ToolDefinition | None:
        """The definition; builds the tool only where its factory came without one."""
        with self._lock:
            known = self._factories.get(action_type, (None, None))[1] if action_type not in self._tools else None
            if known is not None:
                return known
        found = self.get_tool(action_type)
        return None if found is None else found.definition

    def can_execute(self, action_type: str) -> bool:
        """Whether a tool or factory is there."""
        with self._lock:
            return action_type in self._tools or action_type in self._factories

    def __contains__(self, action_type: object) -> bool:
        return isinstance(action_type, str) and self.can_execute(action_type)

    def __len__(self) -> int:
        with self._lock:
            return len(self._tools.keys() | self._factories.keys())

    def list_tools(self) -> list[Tool]:
        """The tools built so far, in the order they were."""
        with self._lock:
            return list(self._tools.values())

    def definitions(self) -> list[ToolDefinition]:
        """Definitions of everything registered: what a model or a human can be offered. Builds what is not known."""
        with self._lock:
            names = list(dict.fromkeys((*self._factories, *self._tools)))
        return [found for name in names if (found := self.definition(name)) is not None]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tools.clear()
            self._factories.clear()

    def parse_and_resolve(
        self,
        calls: Iterable[Any],
        id_field: str = "id",
        function_wrapper: str | None = "function",
        name_field: str = "name",
        arguments_field: str = "arguments",
    ) -> list[ResolvedToolCall | UnresolvedToolCall]:
        """Read calls as a model wrote them, in their order, one answer each; never raises for what a model wrote.

        `function_wrapper` names the object that holds name and arguments (None: the call itself does). Arguments may be
        an object or a JSON text of one; empty text, other types and absence read as no arguments.
        """
        fields = (id_field, function_wrapper, name_field, arguments_field)
        return [self._resolve(call, *fields) for call in calls]

    def _resolve(
        self, call: Any, id_field: str, function_wrapper: str | None, name_field: str, arguments_field: str
    ) -> ResolvedToolCall | UnresolvedToolCall:
        if not isinstance(call, Mapping):
            return UnresolvedToolCall(error=f"a call is an object, not {type(call).__name__}", raw=call)
        given_id = call.get(id_field)
        call_id = None if given_id is None else str(given_id)
        body = call if function_wrapper is None else call.get(function_wrapper)
        if not isinstance(body, Mapping):
            return UnresolvedToolCall(error=f"Missing '{function_wrapper}' object", raw=call, call_id=call_id)
        name = body.get(name_field)
        if not isinstance(name, str) or not name:
            return UnresolvedToolCall(error=f"Missing '{name_field}'", raw=call, call_id=call_id)
        try:
            arguments = _arguments(body.get(arguments_field))
        except (ValueError, RecursionError) as error:
            return UnresolvedToolCall(error=f"Invalid JSON in arguments: {error}", raw=call, call_id=call_id, name=name)
        if not self.can_execute(name):
            return UnresolvedToolCall(error=f"No tool registered for '{name}'", raw=call, call_id=call_id, name=name)
        return ResolvedToolCall(call_id=call_id or "", name=name, arguments=arguments, raw=call)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _arguments(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        if not given.strip():
            return {}
        parsed = json.loads(given, parse_constant=_no_constant)
        if not isinstance(parsed, dict):
            raise ValueError(f"an object is needed, not {type(parsed).__name__}")
        return parsed
    return dict(given) if isinstance(given, Mapping) else {}


def _build(decorated: Any, definition: ToolDefinition) -> Tool:
    """The tool behind what `@tool` decorated: an instance of the class, or the function in a `FunctionTool`."""
    if not isinstance(decorated, type):
        return FunctionTool(definition, decorated)
    made = decorated()
    if not isinstance(made, Tool):
        return FunctionTool(definition, made.execute, getattr(made, "undo", None))
    made.definition = definition
    return made


_current: ContextVar[ToolRegistry | None] = ContextVar("stageflow_tool_registry", default=None)


def current_registry() -> ToolRegistry:
    """The registry of this context.

    Raises:
        DefinitionError: none was set by `use_registry`.
    """
    found = _current.get()
    if found is None:
        raise DefinitionError(
            "this context has no tool registry", hint="run inside `with use_registry(ToolRegistry()):`, or pass one"
        )
    return found


@contextlib.contextmanager
def use_registry(registry: ToolRegistry) -> Iterator[ToolRegistry]:
    """Make `registry` the one of this context (this task or thread and what it starts) inside the block."""
    token = _current.set(registry)
    try:
        yield registry
    finally:
        _current.reset(token)


def tool(
    action_type: str,
    name: str | None = None,
    description: str = "",
    *,
    registry: ToolRegistry | None = None,
    allowed_behaviors: Sequence[str] = (),
    **fields: Any,
) -> Callable[[T], T]:
    """Mark a class or a function as a tool and return it unchanged; `fields` are further ones of `ToolDefinition`.

    It is registered as a factory with `registry`, or with the context's where one is set; where neither is, the mark
    waits for `registry.register(it)`. The definition is stored as `__stageflow_tool__`.
    """
    definition = ToolDefinition(
        name=name or action_type,
        action_type=action_type,
        description=description,
        allowed_behaviors=tuple(allowed_behaviors),
        **fields,
    )

    def decorate(decorated: T) -> T:
        setattr(decorated, MARK, definition)
        target = registry if registry is not None else _current.get()
        if target is not None:
            target.register(decorated)
        return decorated

    return decorate
