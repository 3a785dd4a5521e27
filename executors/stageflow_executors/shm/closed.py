"""Closed types: Structs that typed msgspec gives back exactly as they were, alone or in a list.

A Struct is closed when each of its fields is declared as an exact scalar, a closed Struct, a list, tuple or dict of
such, or a union of which the wire tells the members apart; and when nothing can stand in its place (no subclasses,
no reduction or post-init of its own, no constraints). Values must hold exactly what was declared: an int in a float's
place would come back as a float.

May import the standard library and msgspec only: workers load it.
"""

from __future__ import annotations

import pickle
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

_SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))
_KEYS: Final = frozenset((int, str))
_OWN_WAYS: Final = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_closed: dict[type, bool] = {}
_to_msgpack = msgspec.msgpack.Encoder().encode


def encode(values: Iterable[Any], cls: type, message: Any) -> bytes | None:
    """`message` (one of `values`, or the list of all) as typed msgpack; None if it would not come back as it was."""
    if not is_closed(cls) or name_of(cls) == b"":
        return None
    try:
        # In this order: what contains itself is refused by the encoder, and would never be checked to its end.
        data = _to_msgpack(message)
        return data if _exact(values, cls) else None
    except Exception:
        return None


def decode(data: Any, name: bytes, *, many: bool) -> Any:
    """What `encode` was given; `name` is `name_of` the class. Raises what loading the class raises."""
    decoder = _decoders.get((name, many))
    if decoder is None:
        cls: Any = pickle.loads(name)
        decoder = _decoders[name, many] = msgspec.msgpack.Decoder(types.GenericAlias(list, cls) if many else cls)
    return decoder.decode(data)


_decoders: dict[tuple[bytes, bool], msgspec.msgpack.Decoder[Any]] = {}
_names: dict[type, bytes] = {}


def name_of(cls: type) -> bytes:
    """The class by reference; b"" if it has no importable name."""
    data = _names.get(cls)
    if data is None:
        try:
            data = pickle.dumps(cls, 5)
        except Exception:
            data = b""
        _names[cls] = data
    return data


# ---------------------------------------------------------------- which types


def is_closed(cls: type) -> bool:
    """Can instances of exactly `cls` go through typed msgspec unchanged? Cached per class."""
    if cls.__subclasses__():
        return False  # a field declared as `cls` may hold one of them, which would come back as `cls`
    known = _closed.get(cls)
    if known is None:
        _closed[cls] = True  # a recursive type is as closed as its other fields
        known = _closed[cls] = _judge(cls)
        if not known:
            _closed.update({other: False for other, verdict in _closed.items() if verdict and _mentions(other, cls)})
    return known


def _judge(cls: type) -> bool:
    config: Any = getattr(cls, "__struct_config__", None)
    if config is None or config.weakref or hasattr(cls, "__post_init__"):
        return False
    if any(name in cls.__dict__ for name in _OWN_WAYS):
        return False
    try:
        hints = typing.get_type_hints(cls, include_extras=True)  # a constraint could refuse what was held
        fields = msgspec.structs.fields(cls)
    except Exception:
        return False
    return all(_closed_type(hints.get(field.name)) for field in fields) and len(fields) == len(cls.__struct_fields__)  # type: ignore[attr-defined]


def _closed_type(hint: Any) -> bool:
    if hint in _SCALARS:
        return True
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return is_closed(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return _closed_type(args[0])
    if origin is tuple:
        return all(_closed_type(arg) for arg in args if arg is not Ellipsis)
    if origin is dict:
        return args[0] in _KEYS and _closed_type(args[1])
    if origin in (types.UnionType, typing.Union):
        members = [m for m in args if m is not type(None)]
        # A float field that may also be an int keeps both apart; one Struct or container beside None is unambiguous.
        return all(_closed_type(m) for m in members) and sum(m not in _SCALARS for m in members) <= 1
    return False


def _mentions(cls: type, other: type) -> bool:
    def inside(hint: Any) -> bool:
        return hint is other or any(inside(arg) for arg in typing.get_args(hint))

    try:
        return any(inside(hint) for hint in typing.get_type_hints(cls).values())
    except Exception:
        return True


# ---------------------------------------------------------------- which values

_Check = Callable[[Iterable[Any], list[Any]], bool]
_checks: dict[type, _Check] = {}


def _exact(values: Iterable[Any], cls: type) -> bool:
    """Are all of `values` a `cls`, and all that they hold of the declared types, no int in a float's place?"""
    nested: list[Any] = []
    found = _check_of(cls)(values, nested)
    while found and nested:
        inner: dict[type, list[Any]] = {}
        for one in nested:
            inner.setdefault(type(one), []).append(one)
        nested = []
        found = all(_check_of(kind)(some, nested) for kind, some in inner.items())
    return found


def _check_of(cls: type) -> _Check:
    """A function (values, nested) -> do all fields of all values hold exactly what they were declared for? It appends
    Structs it found inside to `nested`. Written out per class: it runs once per record, and saves decoding it again.
    """
    check = _checks.get(cls)
    if check is None:
        scope: dict[str, Any] = {"cls": cls}
        lines = ["def check(values, nested):", " for v in values:", "  if type(v) is not cls: return False"]
        for name, hint in typing.get_type_hints(cls).items():
            if name in cls.__struct_fields__:  # type: ignore[attr-defined]
                _write(lines, scope, "  ", f"v.{name}", type(None) if hint is None else hint)
        exec("\n".join([*lines, " return True"]), scope)
        check = _checks[cls] = scope["check"]
    return check


def _write(lines: list[str], scope: dict[str, Any], indent: str, what: str, hint: Any) -> None:
    """Lines that return False unless the expression `what` holds exactly what `hint` says."""

    def named(value: Any) -> str:
        name = f"n{len(scope)}"
        scope[name] = value
        return name

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        lines.append(f"{indent}if type({what}) is not {named(hint)}: return False")
        return
    if origin in (types.UnionType, typing.Union):
        kinds = frozenset(typing.get_origin(arg) or arg for arg in args)
        lines.append(f"{indent}if type({what}) not in {named(kinds)}: return False")
        for arg in args:
            if arg not in _SCALARS:
                lines.append(f"{indent}if type({what}) is {named(typing.get_origin(arg) or arg)}:")
                _write(lines, scope, indent + " ", what, arg)
        return
    lines.append(f"{indent}if type({what}) is not {named(origin or hint)}: return False")
    if origin is None:
        lines.append(f"{indent}nested.append({what})")
    elif origin is dict:
        key, value = named(None), named(None)
        lines.append(f"{indent}for {key}, {value} in {what}.items():")
        _write(lines, scope, indent + " ", key, args[0])
        _write(lines, scope, indent + " ", value, args[1])
    elif origin is list or args[1:] == (Ellipsis,):
        item = named(None)
        lines.append(f"{indent}for {item} in {what}:")
        _write(lines, scope, indent + " ", item, args[0])
    else:
        lines.append(f"{indent}if len({what}) != {len(args)}: return False")
        for number, arg in enumerate(args):
            _write(lines, scope, indent, f"{what}[{number}]", arg)
