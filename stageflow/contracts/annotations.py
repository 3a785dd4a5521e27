"""What an annotation is made of: its bare type and limits, the fields of a record class, and how one would write it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Final, Union, get_args, get_origin

import msgspec

_STRIP: Final = {typing.Final, typing.ClassVar, typing.Required, typing.NotRequired}


def unwrap(type_: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type without `Annotated`, `NewType`, aliases and qualifiers, and the msgspec constraints found on the way."""
    meta: tuple[Any, ...] = ()
    while True:
        origin = get_origin(type_)
        if origin is Annotated:
            inner, *extra = get_args(type_)
            meta = (*(each for each in extra if isinstance(each, msgspec.Meta)), *meta)
            type_ = inner
        elif origin in _STRIP:
            type_ = get_args(type_)[0]
        elif isinstance(type_, typing.NewType):
            type_ = type_.__supertype__
        elif type(type_).__name__ == "TypeAliasType" and hasattr(type_, "__value__"):
            type_ = type_.__value__
        else:
            return type_, meta


def annotate(type_: Any, meta: tuple[Any, ...]) -> Any:
    """`Annotated[type_, *meta]`, or the type itself."""
    for each in meta:
        type_ = Annotated[type_, each]
    return type_


def is_record(base: Any) -> bool:
    """True for a class with fields that msgspec knows: Struct, dataclass, attrs, TypedDict, NamedTuple."""
    if not isinstance(base, type):
        return False
    return (
        issubclass(base, msgspec.Struct)
        or dataclasses.is_dataclass(base)
        or hasattr(base, "__attrs_attrs__")
        or typing.is_typeddict(base)
        or (issubclass(base, tuple) and hasattr(base, "_fields"))
    )


def fields_of(type_: Any) -> Iterator[tuple[str, str, Any, bool]]:
    """Attribute, key, type and whether it is required, of every field of a record class."""
    base: Any = get_origin(type_) or type_
    if issubclass(base, msgspec.Struct):
        for field in msgspec.structs.fields(type_):
            yield field.name, field.encode_name, field.type, field.required
        return
    hints = typing.get_type_hints(base, include_extras=True)
    bound = dict(zip(getattr(base, "__parameters__", ()), get_args(type_), strict=False))
    if typing.is_typeddict(base):
        for name, hint in hints.items():
            yield name, name, bound.get(hint, hint), name in base.__required_keys__
        return
    if dataclasses.is_dataclass(base):
        for each in dataclasses.fields(base):
            optional = each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
            hint = hints[each.name]
            yield each.name, each.name, bound.get(hint, hint), each.init and not optional
        return
    if hasattr(base, "__attrs_attrs__"):
        for attribute in base.__attrs_attrs__:
            hint = hints.get(attribute.name, Any)
            # attrs marks "no default" by a member of an enum of its own.
            missing = getattr(attribute.default, "name", None) == "NOTHING"
            yield attribute.name, attribute.name, bound.get(hint, hint), attribute.init and missing
        return
    for name in base._fields:
        hint = hints.get(name, Any)
        yield name, name, bound.get(hint, hint), name not in base._field_defaults


def type_text(type_: Any) -> str:
    """A type as one would write it, without `typing.` and without the module of a builtin."""
    type_, _ = unwrap(type_)
    if type_ is type(None) or type_ is None:
        return "None"
    if isinstance(type_, type) and get_origin(type_) is None:
        return type_.__qualname__ if type_.__module__ == "builtins" else f"{type_.__module__}.{type_.__qualname__}"
    if get_origin(type_) in (Union, types.UnionType):
        return " | ".join(type_text(choice) for choice in get_args(type_))
    return str(type_).replace("typing.", "")
