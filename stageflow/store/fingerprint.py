"""The version of a piece of code: changes when what it does changes, also in the helpers it calls.

A fingerprint covers bytecode, constants, defaults, closures and referenced globals, and follows functions and classes
that belong to the project (not the standard library, not installed packages, whose versions are named instead).
Comments, docstrings and line numbers do not count. It holds for one minor version of Python.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import site
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from stageflow.core.errors import NotShippableError
from stageflow.store.keys import digest, name_of

_MAX_FOLLOWED: Final = 2000  # functions and classes: beyond that a change is seen by names only
_IGNORED: Final = frozenset(
    {"__doc__", "__module__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"}
)


def code_fingerprint(runner: Any) -> str:
    """The fingerprint of a function, method, partial, class or instance with its state: 32 hexadecimal digits."""
    return _Walk().of(runner)[:32]


def explain_fingerprint(runner: Any) -> dict[str, str]:
    """What went into the fingerprint: the name of every part and its own hash. Two of these tell what changed."""
    walk = _Walk()
    walk.of(runner)
    return dict(walk.parts)


class _Walk:
    """One walk over the code that a runner reaches. Each function and class is visited once."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self._seen: dict[int, Any] = {}
        self._queue: list[Any] = []

    def of(self, runner: Any) -> str:
        self._queue.append(runner)
        while self._queue and len(self._seen) < _MAX_FOLLOWED:
            thing = self._queue.pop(0)
            if id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            name, description = self._describe(thing)
            self._add(name, description)
        python = f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}"
        return hashlib.sha256(digest((python, self.parts)).encode("ascii")).hexdigest()

    def _add(self, name: str, description: Any) -> None:
        hashed = digest(description)
        # Two lambdas of one function share their name.
        unique, count = name, 1
        while self.parts.get(unique, hashed) != hashed:
            count += 1
            unique = f"{name}#{count}"
        self.parts[unique] = hashed

    def _describe(self, thing: Any) -> tuple[str, Any]:
        if isinstance(thing, types.MethodType):
            self._queue += [thing.__func__, thing.__self__]
            return f"method {name_of(thing.__func__)}", "method"
        if isinstance(thing, functools.partial):
            self._queue.append(thing.func)
            bound = (thing.args, tuple(sorted(thing.keywords.items())))
            return f"partial {name_of(thing.func)}", self._value(bound)
        if isinstance(thing, types.FunctionType):
            return f"function {name_of(thing)}", self._function(thing)
        if isinstance(thing, type):
            return f"class {name_of(thing)}", self._class(thing)
        if isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
            return f"builtin {name_of(thing)}", _package_version(thing)
        # An instance: its class and its state.
        self._queue.append(type(thing))
        return f"instance {name_of(type(thing))}", self._value(thing)

    def _function(self, function: types.FunctionType) -> Any:
        closure: list[Any] = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                closure.append((name, self._value(cell.cell_contents)))
            except ValueError:
                closure.append((name, "empty"))
        defaults = tuple(self._value(value) for value in function.__defaults__ or ())
        keywords = tuple((name, self._value(value)) for name, value in sorted((function.__kwdefaults__ or {}).items()))
        return (_code(function.__code__), defaults, keywords, tuple(closure), self._globals(function))

    def _globals(self, function: types.FunctionType) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        wanted = sorted(_names(function.__code__))
        for name in wanted:
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType) and _is_local(value.__name__):
                # `helpers.clean(x)`: what is read of a module of the project is followed like a global of our own.
                for inner in wanted:
                    if inner in vars(value):
                        found.append((f"{name}.{inner}", self._value(vars(value)[inner])))
            else:
                found.append((name, self._value(value)))
        return found

    def _class(self, cls: type) -> Any:
        if not _is_local(cls.__module__):
            return _package_version(cls)
        self._queue += [base for base in cls.__bases__ if base is not object]
        members: list[tuple[str, Any]] = []
        for name, member in sorted(vars(cls).items()):
            if name in _IGNORED:
                continue
            if isinstance(member, staticmethod | classmethod):
                members.append((name, self._value(member.__func__)))
            elif isinstance(member, property):
                accessors = (member.fget, member.fset, member.fdel)
                members.append((name, tuple(self._value(each) for each in accessors if each is not None)))
            elif isinstance(member, types.GetSetDescriptorType | types.MemberDescriptorType):
                members.append((name, "slot"))
            else:
                members.append((name, self._value(member)))
        return members

    def _value(self, value: Any) -> Any:
        """What stands for a referenced value: code is followed, data is hashed, the rest is named by its type."""
        if isinstance(value, types.FunctionType | type | types.MethodType | functools.partial):
            if _is_local(getattr(value, "__module__", None) or ""):
                self._queue.append(value)
                return f"-> {name_of(value)}"
            return f"{name_of(value)} {_package_version(value)}"
        if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            return f"{name_of(value)} {_package_version(value)}"
        if isinstance(value, functools._lru_cache_wrapper):
            self._queue.append(value.__wrapped__)
            return f"cached {name_of(value)}"
        try:
            return digest(value)
        except (NotShippableError, RecursionError):
            return f"a {name_of(type(value))}"


def _code(code: types.CodeType) -> Any:
    """What a code object does: instructions with what they load, not where it lies. A docstring is never loaded."""
    does: list[Any] = []
    for instruction in dis.get_instructions(code):
        argument: Any = instruction.arg
        if instruction.opcode in dis.hasconst:
            argument = instruction.argval
            if isinstance(argument, types.CodeType):
                argument = _code(argument)
        elif instruction.opcode in dis.hasname or instruction.opcode in dis.haslocal:
            argument = instruction.argrepr
        does.append((instruction.opname, argument))
    return (
        does,
        code.co_flags & ~_HAS_DOCSTRING,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_varnames[: code.co_argcount + code.co_kwonlyargcount],
        code.co_freevars,
        code.co_cellvars,
        code.co_exceptiontable,
    )


_HAS_DOCSTRING: Final = 0x4000000  # a flag of code objects from 3.13 on


def _names(code: types.CodeType) -> set[str]:
    """Names a code object and those inside it read as globals or attributes."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Folders whose code changes only with a package's version."""
    folders = {sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= set(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    folders.add(site.getusersitepackages())
    return tuple(sorted(folders))


@lru_cache(maxsize=4096)
def _is_local(module: str) -> bool:
    """True for modules of the project: not of the standard library, not installed, not Stageflow itself."""
    top = module.partition(".")[0]
    if (
        not module
        or (top in sys.stdlib_module_names and top != "__main__")
        or top in ("stageflow", "stageflow_executors")
    ):
        return False
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None:
        return loaded is None or top == "__main__"  # notebooks and code shipped by value
    return not str(file).startswith(_installed())


@lru_cache(maxsize=1)
def _distributions() -> Mapping[str, list[str]]:
    import importlib.metadata  # 12 ms, for the few runs that ask for a version

    return importlib.metadata.packages_distributions()


def _package_version(thing: Any) -> str:
    """The version of the package a thing comes from, as far as it has one."""
    module = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None) or ""
    return _version_of(module.partition(".")[0])


@lru_cache(maxsize=1024)
def _version_of(top: str) -> str:
    if not top or top in sys.stdlib_module_names:
        return ""
    version = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(version, str):
        return version
    return " ".join(_versions(_distributions().get(top, ())))


def _versions(names: Any) -> Iterator[str]:
    import importlib.metadata

    for name in sorted(set(names)):
        try:
            yield importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
