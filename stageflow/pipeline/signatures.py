"""What a runner looks like from outside: its form, its parameters and its annotations. Never calls it.

Plain functions are read without `inspect`, which takes almost as long to import as this room does, and the fork server
of a first run waits for that.
"""

from __future__ import annotations

import sys
import types
import typing
from typing import Any, Final, Union, get_args, get_origin

import msgspec

from stageflow.core.stage import MARK
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Form


class UNKNOWN:
    """Stands for "not annotated", or annotated with a name that cannot be resolved here."""


#: what a function may carry that says other than it is
_SAYS_OTHERWISE: Final = ("__wrapped__", "__signature__", "_is_coroutine_mark", "_is_coroutine")
_COROUTINE, _GENERATOR, _ASYNC_GENERATOR = 0x80, 0x20, 0x200  #: of `co_flags`


class Parameter(msgspec.Struct, frozen=True):
    """One parameter that can be bound."""

    name: str
    positional: bool  #: may be passed by position
    positional_only: bool
    has_default: bool
    default: Any
    nullable: bool
    annotation: Any


class Traits(msgspec.Struct, frozen=True, eq=False):
    """What is read off a runner once, however many stages it serves.

    `parameters` is None where the callable has no readable signature. `problem` is (what is wrong, what to do) for a
    runner that cannot be one.
    """

    runner: Any
    form: Form
    is_async: bool = False
    is_generator: bool = False
    parameters: tuple[Parameter, ...] | None = ()
    wants_ctx: bool = False
    returns: Any = UNKNOWN
    problem: tuple[str, str] | None = None


def read_traits(runner: Any) -> Traits:
    """Analyse `runner`; never raises for a runner that is merely wrong (see `Traits.problem`)."""
    if isinstance(runner, StageGraph):
        return Traits(runner, "graph", is_async=True)
    if isinstance(runner, type) and callable(getattr(runner, "execute", None)):
        return _object_traits(runner, getattr(runner, "execute", None), "class", _construction_problem(runner))
    if not isinstance(runner, type) and callable(getattr(runner, "execute", None)) and not _is_function(runner):
        return _object_traits(runner, runner.execute, "object", None)
    if not callable(runner):
        problem = (
            f"{_show(runner)} is neither callable nor has it an execute(ctx) method",
            "Give a function, or an object or class with execute(self, ctx).",
        )
        return Traits(runner, "function", problem=problem)
    called = _called(runner)
    parameters = _parameters(runner)
    return Traits(
        runner,
        "function",
        is_async=_is_async(called),
        is_generator=_is_generator(called),
        parameters=parameters,
        wants_ctx=parameters is not None and any(p.name == "ctx" for p in parameters),
        returns=annotations_of(runner).get("return", UNKNOWN),
    )


def _is_function(runner: Any) -> bool:
    return isinstance(runner, types.FunctionType | types.BuiltinFunctionType | types.MethodType)


def _object_traits(runner: Any, execute: Any, form: Form, problem: tuple[str, str] | None) -> Traits:
    if problem is None:
        problem = _execute_problem(execute, bound=form == "object" or isinstance(execute, types.MethodType))
    return Traits(
        runner,
        form,
        is_async=_is_async(execute),
        is_generator=_is_generator(execute),
        wants_ctx=True,
        returns=annotations_of(execute).get("return", UNKNOWN),
        problem=problem,
    )


def _construction_problem(cls: type) -> tuple[str, str] | None:
    import inspect

    if inspect.isabstract(cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        return f"the class {cls.__qualname__} is abstract ({missing})", "Give a class that can be constructed."
    try:
        signature = inspect.signature(cls)
    except (ValueError, TypeError):
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in variadic]
    if needed:
        return (
            f"the class {cls.__qualname__} cannot be constructed without arguments ({', '.join(needed)})",
            "Give an instance, or defaults for these parameters.",
        )
    return None


def _execute_problem(execute: Any, *, bound: bool) -> tuple[str, str] | None:
    import inspect

    try:
        signature = inspect.signature(execute)
        signature.bind(*([object()] if bound else [object(), object()]))
    except TypeError:
        return f"{_show(execute)} cannot be called with one argument, the context", "Declare it as execute(self, ctx)."
    except ValueError:
        pass
    return None


def _is_plain(function: Any) -> bool:
    """A function of Python that is what its code says."""
    return type(function) is types.FunctionType and not any(name in function.__dict__ for name in _SAYS_OTHERWISE)


def _parameters(runner: Any) -> tuple[Parameter, ...] | None:
    if _is_plain(runner):
        return _plain_parameters(runner)
    if isinstance(runner, type) and runner.__module__ == "builtins":
        return None  # `int` has no signature in one Python and one with a made-up name in the next
    import inspect

    try:
        signature = inspect.signature(runner)
    except (ValueError, TypeError):
        return None
    hints = annotations_of(runner)
    return tuple(
        Parameter(
            p.name,
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD),
            p.kind is p.POSITIONAL_ONLY,
            p.default is not p.empty,
            None if p.default is p.empty else p.default,
            admits_none(hints.get(p.name, p.annotation)),
            hints.get(p.name, UNKNOWN),
        )
        for p in signature.parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )


def _plain_parameters(function: types.FunctionType) -> tuple[Parameter, ...]:
    code = function.__code__
    by_position, all_of_them = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    given = function.__defaults__ or ()
    names = code.co_varnames[:all_of_them]
    defaults = dict(zip(names[by_position - len(given) : by_position], given, strict=True))
    defaults.update(function.__kwdefaults__ or {})
    hints, raw = annotations_of(function), function.__annotations__
    return tuple(
        Parameter(
            name,
            at < by_position,
            at < code.co_posonlyargcount,
            name in defaults,
            defaults.get(name),
            admits_none(hints.get(name, raw.get(name))) if name in raw else False,
            hints.get(name, UNKNOWN),
        )
        for at, name in enumerate(names)
    )


def _called(runner: Any) -> Any:
    """What runs when `runner` is called: the function below partials, or the `__call__` of an instance."""
    while hasattr(runner, "func") and hasattr(runner, "keywords"):
        runner = runner.func
    if not isinstance(runner, type) and not _is_routine(runner):
        return getattr(type(runner), "__call__", runner)  # noqa: B004 - we want the function, not whether it has one
    return runner


def _is_routine(runner: Any) -> bool:
    if type(runner) is types.FunctionType:
        return True
    import inspect

    return inspect.isroutine(runner)


def _is_async(function: Any) -> bool:
    if _is_plain(function):
        return bool(function.__code__.co_flags & (_COROUTINE | _ASYNC_GENERATOR))
    import inspect

    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _is_generator(function: Any) -> bool:
    if _is_plain(function):
        return bool(function.__code__.co_flags & (_GENERATOR | _ASYNC_GENERATOR))
    import inspect

    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def annotations_of(runner: Any) -> dict[str, Any]:
    """The annotations of a callable as types; those that name something unknown here are left out."""
    function = runner
    while hasattr(function, "func") and hasattr(function, "keywords"):
        function = function.func
    returns: Any = UNKNOWN
    if isinstance(function, type):
        returns = function  # calling a class gives an instance
        function = function.__init__  # type: ignore[misc]
    elif not _is_routine(function):
        function = getattr(type(function), "__call__", None)  # noqa: B004
    try:
        hints = dict(typing.get_type_hints(function))
    except Exception:
        hints = _one_by_one(function)
    if returns is not UNKNOWN:
        hints["return"] = returns
    return hints


def _one_by_one(function: Any) -> dict[str, Any]:
    """Resolve each annotation by itself: one name that cannot be resolved must not hide the others."""
    if callable(function) and hasattr(function, "__wrapped__"):
        import inspect

        function = inspect.unwrap(function)
    function = getattr(function, "__func__", function)
    raw = getattr(function, "__annotations__", None)
    if not isinstance(raw, dict):
        return {}
    scope = getattr(function, "__globals__", None) or vars(sys.modules.get(getattr(function, "__module__", ""), typing))
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    local: dict[str, Any] = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        try:
            local[name] = cell.cell_contents
        except ValueError:
            continue
    found: dict[str, Any] = {}
    for name, annotation in raw.items():
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, dict(scope), local)  # the author's own source text
            except Exception:
                if "None" in annotation or "Optional" in annotation:
                    found[name] = Any  # all that can be said: it may be None
                continue
        found[name] = type(None) if annotation is None else annotation
    return found


def admits_none(annotation: Any) -> bool:
    """True when a value of this annotation may be None. Not annotated admits nothing."""
    if annotation is None or annotation is Any or annotation is object or annotation is type(None):
        return annotation is not UNKNOWN
    if isinstance(annotation, str):
        return "None" in annotation or "Optional" in annotation
    origin = get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return any(admits_none(one) for one in get_args(annotation))
    if origin is typing.Annotated:
        return admits_none(get_args(annotation)[0])
    return False


def _show(thing: Any) -> str:
    text = getattr(thing, "__qualname__", None) or repr(thing)
    return text if len(text) <= 80 else text[:77] + "..."


def runner_name(runner: Any) -> str | None:
    """The name a runner gives itself: `@stage(name=)`, its `name` attribute, or its `__name__`; else None."""
    mark = getattr(runner, MARK, None)
    for name in (
        mark.get("name") if isinstance(mark, dict) else None,
        getattr(runner, "name", None) if hasattr(runner, "execute") else None,
        getattr(runner, "__name__", None),
        getattr(getattr(runner, "func", None), "__name__", None),
    ):
        if isinstance(name, str) and name and name != "<lambda>":
            return name
    return None


class TraitsCache:
    """`read_traits`, once per runner object. Keeps the runners alive, so an id is never taken for another's."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, Traits] = {}

    def of(self, runner: Any) -> Traits:
        """The traits of `runner`."""
        found = self._known.get(id(runner))
        if found is None:
            found = self._known[id(runner)] = read_traits(runner)
        return found
