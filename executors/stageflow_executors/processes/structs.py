"""`msgspec.Struct` classes by value: what cloudpickle makes of them has no fields.

Loaded in workers when such a class arrives. May import the standard library and msgspec only.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import msgspec

_CONFIG: Final = (
    *("frozen", "eq", "order", "array_like", "gc", "repr_omit_defaults", "omit_defaults", "forbid_unknown_fields"),
    *("weakref", "dict", "cache_hash", "tag", "tag_field"),
)
_OWN: Final = frozenset(
    (
        "__module__",
        "__qualname__",
        "__annotations__",
        "__doc__",
        "__slots__",
        "__dict__",
        "__weakref__",
        "__match_args__",
    )
)
_made: dict[str, type] = {}


def make(
    key: str,
    name: str,
    bases: tuple[type, ...],
    namespace: dict[str, Any],
    config: dict[str, Any],
    renamed: dict[str, str],
) -> type:
    """The class with its fields, once per process and key, so that it stays the same class when it is sent again."""
    known = _made.get(key)
    if known is None:
        for field, value in list(namespace.items()):
            if isinstance(value, _Factory):
                namespace[field] = msgspec.field(default_factory=value.make)
        meta: Any = type(msgspec.Struct)
        known = _made[key] = meta(name, bases, namespace, rename=renamed or None, **config)
    assert known is not None
    return known


class _Factory:
    """A field's default factory on its way."""

    __slots__ = ("make",)

    def __init__(self, make: Any) -> None:
        self.make = make

    def __reduce__(self) -> Any:
        return _Factory, (self.make,)


def set_methods(cls: type, methods: dict[str, Any]) -> None:
    """What may refer to the class itself is set once it exists."""
    for name, value in methods.items():
        if name not in cls.__dict__:
            setattr(cls, name, value)


def reduce(cls: Any) -> Any:
    """`cls` for a Pickler's `reducer_override`."""
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__annotations__": dict(inspect.get_annotations(cls)),
        "__doc__": cls.__doc__,
    }
    methods: dict[str, Any] = {}
    own = namespace["__annotations__"]
    for field in msgspec.structs.fields(cls):
        if field.name in own:
            if field.default is not msgspec.NODEFAULT:
                namespace[field.name] = field.default
            elif field.default_factory is not msgspec.NODEFAULT:
                namespace[field.name] = _Factory(field.default_factory)
    for name, value in cls.__dict__.items():
        if name == "__post_init__":
            namespace[name] = value  # msgspec looks for it when it makes the class
        elif name not in _OWN and name not in own and not name.startswith("__struct") and not _generated(name, value):
            methods[name] = value
    config = {name: getattr(cls.__struct_config__, name) for name in _CONFIG if hasattr(cls.__struct_config__, name)}
    config = {name: value for name, value in config.items() if value is not None}
    renamed = {
        field: sent
        for field, sent in zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True)
        if field != sent
    }
    key = f"{cls.__module__}.{cls.__qualname__}:{id(cls)}"
    return make, (key, cls.__name__, cls.__bases__, namespace, config, renamed), methods, None, None, set_methods


def _generated(name: str, value: Any) -> bool:
    """Members and methods that msgspec itself puts into the class."""
    return type(value).__name__ in (
        "member_descriptor",
        "getset_descriptor",
        "wrapper_descriptor",
        "builtin_function_or_method",
    )
