"""Walks a type and a value side by side and lets msgspec (or a pydantic model) judge every part of it.

`msgspec.convert` takes an instance of a class as it is and never looks inside, and it gives back a converted copy. Both
are wrong for a value that must leave unchanged: so instances are opened here, field by field, and copies thrown away.
"""

from __future__ import annotations

import collections.abc as cabc
import datetime
import decimal
import enum
import re
import types
import typing
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, Union, get_args, get_origin

import msgspec

from stageflow.contracts.annotations import annotate, fields_of, is_record, type_text, unwrap

#: types of Python that stand for themselves: text is not taken for a date, nor base64 for bytes
_NATIVE: Final = (
    bytes,
    bytearray,
    memoryview,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
    decimal.Decimal,
)
_SCALARS: Final = (int, float, str, bool, type(None))
_ITEMS: Final = (list, tuple, set, frozenset)
_ABSTRACT: Final = (cabc.Sequence, cabc.MutableSequence, cabc.Collection, cabc.Set, cabc.MutableSet)
_MAPPINGS: Final = (dict, cabc.Mapping, cabc.MutableMapping)
_PATH: Final = re.compile(r" - at `(?:key in )?(\$.*)`$")


class Misfit(Exception):
    """A part of a value that does not fit. `path` is built from the inside out."""

    def __init__(self, message: str, expected: str, got: str) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.got = got
        self.path: list[str] = []

    def under(self, segment: str) -> Misfit:
        """The same, one level further out."""
        self.path.insert(0, segment)
        return self


class Node:
    """Judges values of one type. `scalar` types are judged completely by one call into msgspec.

    `sure` are the classes of which every direct instance fits, so that knowing `type(value)` is enough.
    """

    scalar = False
    trivial = False
    expected = "any value"
    sure: frozenset[type] = frozenset()

    def check(self, value: Any) -> None:
        """Raise `Misfit` if the value does not fit."""

    def misfit(self, value: Any, message: str | None = None) -> Misfit:
        """What is wrong at this very place."""
        got = type_text(type(value))
        return Misfit(message or f"expected {self.expected}, got {got}", self.expected, got)


class AnyNode(Node):
    """Takes everything."""

    trivial = True


class InstanceNode(Node):
    """Takes instances of a class that neither msgspec nor pydantic describes."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.expected = type_text(cls)
        self.sure = frozenset({cls})

    def check(self, value: Any) -> None:
        try:
            fits = isinstance(value, self.cls) or (self.cls is complex and isinstance(value, int | float))
        except TypeError:
            fits = True  # a protocol without runtime checks says nothing
        if not fits:
            raise self.misfit(value)


class LeafNode(Node):
    """Whatever one call of `msgspec.convert` decides. `exact`: of the type, not only convertible to it."""

    def __init__(self, type_: Any, exact: bool, scalar: bool) -> None:
        self.type = type_
        self.exact = exact
        self.scalar = scalar
        self.expected = type_text(type_)
        self.sure = _sure(type_)

    def check(self, value: Any) -> None:
        try:
            converted = convert(value, self.type)
        except msgspec.ValidationError as error:
            plain = _as_plain(value)
            if plain is value:
                raise self._describe(value, error) from None
            try:
                converted = convert(plain, self.type)
            except msgspec.ValidationError as again:
                raise self._describe(value, again) from None
            value = plain
        if self.exact and converted is not value and not isinstance(value, type(converted)):
            if not (type(converted) is float and isinstance(value, int)):
                raise self.misfit(value)

    def _describe(self, value: Any, error: msgspec.ValidationError) -> Misfit:
        message = str(error)
        found = _PATH.search(message)
        if message.startswith("Expected `") and ", got `" in message and found is None:
            return self.misfit(value)
        text = message[: found.start()] if found else message
        misfit = Misfit(text[:1].lower() + text[1:], self.expected, type_text(type(value)))
        if found and found[1] != "$":
            misfit.path.append(found[1][1:])
        return misfit


class ItemsNode(Node):
    """A list, tuple, set or an abstract collection of one item type."""

    def __init__(self, type_: Any, origin: type, item: Node, exact: bool, limits: Any, fast: bool) -> None:
        self.origin = origin
        self.item = item
        self.exact = exact
        self.limits = limits
        self.fast = type_ if fast else None
        self.expected = type_text(type_)
        if item.trivial and limits is None and origin in _ITEMS:
            self.sure = frozenset({origin})

    def check(self, value: Any) -> None:
        if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(
            value, self.origin if self.exact else (self.origin, *_ITEMS)
        ):
            raise self.misfit(value)
        if not isinstance(value, _ITEMS):
            return  # a lazy or foreign collection: looking at its items could consume or compute them
        if self.fast is not None:
            try:
                convert(value, self.fast)
                return
            except msgspec.ValidationError:
                pass  # item by item below: it finds the place, and takes a numpy.float64 for the float it is
        check_limits(self, value, self.limits)
        if self.item.trivial or all_sure(value, self.item):
            return
        position = 0
        try:
            for element in value:
                self.item.check(element)
                position += 1
        except Misfit as misfit:
            raise misfit.under(f"[{position}]" if isinstance(value, list | tuple) else "[...]") from None


class TupleNode(Node):
    """A tuple of fixed length."""

    def __init__(self, type_: Any, items: tuple[Node, ...], exact: bool) -> None:
        self.items = items
        self.exact = exact
        self.expected = type_text(type_)

    def check(self, value: Any) -> None:
        if not isinstance(value, tuple if self.exact else (tuple, list)):
            raise self.misfit(value)
        if len(value) != len(self.items):
            raise self.misfit(value, f"expected {len(self.items)} items, got {len(value)}")
        for position, (node, element) in enumerate(zip(self.items, value, strict=True)):
            try:
                node.check(element)
            except Misfit as misfit:
                raise misfit.under(f"[{position}]") from None


class MapNode(Node):
    """A mapping of one key type and one value type."""

    def __init__(self, type_: Any, origin: type, key: Node, item: Node, limits: Any, fast: bool) -> None:
        self.origin = origin
        self.key = key
        self.item = item
        self.limits = limits
        self.fast = type_ if fast else None
        self.expected = type_text(type_)
        if key.trivial and item.trivial and limits is None:
            self.sure = frozenset({dict})

    def check(self, value: Any) -> None:
        if not isinstance(value, self.origin):
            raise self.misfit(value)
        if self.fast is not None and isinstance(value, dict):
            try:
                convert(value, self.fast)
                return
            except msgspec.ValidationError:
                pass
        check_limits(self, value, self.limits)
        keys = not self.key.trivial and not all_sure(value, self.key)
        items = not self.item.trivial and not (isinstance(value, dict) and all_sure(value.values(), self.item))
        if not keys and not items:
            return
        for key, element in value.items():
            try:
                if keys:
                    self.key.check(key)
            except Misfit as misfit:
                misfit.message = f"key {key!r:.80}: {misfit.message}"
                raise misfit from None
            try:
                if items:
                    self.item.check(element)
            except Misfit as misfit:
                raise misfit.under(_key(key)) from None


class Field(typing.NamedTuple):
    """A field of a class: the attribute, the key in a mapping, and who judges it."""

    name: str
    key: str
    node: Node
    required: bool


class ObjectNode(Node):
    """A Struct, dataclass, attrs class or TypedDict: instances are opened, mappings judged as what would become one."""

    def __init__(self, cls: Any, mappings: bool) -> None:
        self.cls = cls
        self.base: Any = get_origin(cls) or cls
        self.is_dict = typing.is_typeddict(self.base)
        self.mappings = mappings or self.is_dict
        self.expected = type_text(cls)
        self.fields: tuple[Field, ...] = ()
        self.twin: Any = None
        self.rest: tuple[Field, ...] = ()
        self.convertible = True

    def fill(self, fields: Iterable[Field], types_: dict[str, Any]) -> None:
        """Give it its fields; afterwards, since a field may be of this same class."""
        self.fields = self.rest = tuple(fields)
        self.convertible = _supported(self.cls)
        scalars = [field for field in self.fields if field.node.scalar]
        if len(scalars) > 1 and not self.is_dict:
            # One call into msgspec judges all scalar fields of an instance.
            twin = msgspec.defstruct("Fields", [(field.name, types_[field.name]) for field in scalars])
            if _supported(twin):
                self.twin = twin
                self.rest = tuple(field for field in self.fields if not field.node.scalar)

    def matches(self, value: Any) -> bool:
        """True for an instance of the class."""
        return not self.is_dict and isinstance(value, self.base)

    def check(self, value: Any) -> None:
        if self.matches(value):
            self._instance(value)
        elif self.mappings and isinstance(value, cabc.Mapping):
            self._mapping(value)
        else:
            raise self.misfit(value)

    def _instance(self, value: Any) -> None:
        fields = self.fields
        if self.twin is not None:
            try:
                convert(value, self.twin, from_attributes=True)
                fields = self.rest
            except msgspec.ValidationError:
                pass
        for field in fields:
            try:
                element = getattr(value, field.name)
            except AttributeError:
                raise self.misfit(value, f"the field {field.name!r} was never set").under(f".{field.name}") from None
            if element is msgspec.UNSET:
                continue
            try:
                field.node.check(element)
            except Misfit as misfit:
                raise misfit.under(f".{field.name}") from None

    def _mapping(self, value: cabc.Mapping[Any, Any]) -> None:
        for field in self.fields:
            if field.key in value:
                try:
                    field.node.check(value[field.key])
                except Misfit as misfit:
                    raise misfit.under(f".{field.key}") from None
            elif field.required:
                raise self.misfit(value, f"the required field {field.key!r} is missing").under(f".{field.key}")
        if not self.convertible:
            return
        # Tags, forbidden keys, and what a __post_init__ checks.
        try:
            convert(dict(value), self.cls)
        except msgspec.ValidationError as error:
            if not any(
                _as_plain(value[field.key]) is not value[field.key] for field in self.fields if field.key in value
            ):
                raise LeafNode(self.cls, False, False)._describe(value, error) from None


class ModelNode(Node):
    """A pydantic model, by its own validator and in strict mode, since nothing is converted."""

    def __init__(self, cls: Any, mappings: bool) -> None:
        self.cls = cls
        self.mappings = mappings
        self.expected = type_text(cls)

    def check(self, value: Any) -> None:
        if not isinstance(value, self.cls) and not (self.mappings and isinstance(value, cabc.Mapping)):
            raise self.misfit(value)
        try:
            self.cls.__pydantic_validator__.validate_python(value, strict=True)
        except ValueError as error:
            raise _from_pydantic(error, self.expected, value) from None


class UnionNode(Node):
    """Fits if one alternative does. An instance is judged by the alternative of its class alone."""

    def __init__(self, type_: Any, choices: tuple[Node, ...]) -> None:
        self.choices = choices
        self.expected = type_text(type_)
        self.sure = frozenset().union(*(node.sure for node in choices))

    def check(self, value: Any) -> None:
        own = [node for node in self.choices if isinstance(node, ObjectNode) and node.matches(value)]
        misfits: list[Misfit] = []
        for node in sorted(own, key=lambda node: node.base is not type(value)) or self.choices:
            try:
                node.check(value)
                return
            except Misfit as misfit:
                misfits.append(misfit)
        # If exactly one alternative was the right kind of thing, what it found inside is the story.
        deeper = [misfit for misfit in misfits if misfit.path]
        if len(deeper) == 1:
            raise deeper[0]
        raise misfits[0] if len(misfits) == 1 else self.misfit(value)


class Compiler:
    """Turns types into nodes. `exact` forbids what is merely convertible, such as a mapping for a class."""

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self.mappings = not exact
        self._objects: dict[Any, ObjectNode] = {}

    def node(self, type_: Any) -> Node:
        """The node of a type. TypeError if neither msgspec nor pydantic knows it."""
        type_, meta = unwrap(type_)
        if type_ is Any or type_ is object:
            return AnyNode()
        if type_ is None:
            type_ = type(None)
        origin = get_origin(type_)
        if origin in (Union, types.UnionType):
            return self._union(type_, meta)
        if origin is Literal:
            return LeafNode(type_, self.exact, True)
        if isinstance(type_, str | typing.TypeVar | typing.ForwardRef):
            raise TypeError(f"the annotation {type_!r} is not a type")
        base = origin or type_
        if hasattr(base, "__pydantic_validator__"):
            return ModelNode(type_, self.mappings)
        if is_record(base):
            return self._object(type_)
        if base is tuple and get_args(type_) and get_args(type_)[-1] is not Ellipsis and get_args(type_) != ((),):
            return TupleNode(type_, tuple(self.node(item) for item in get_args(type_)), self.exact)
        if base in _ITEMS or base in _ABSTRACT:
            return self._items(type_, base, meta)
        if base in _MAPPINGS:
            return self._map(type_, base, meta)
        return self._plain(type_, base, meta)

    def _plain(self, type_: Any, base: Any, meta: tuple[Any, ...]) -> Node:
        whole = annotate(type_, meta)
        if base in _SCALARS:
            return LeafNode(whole, self.exact, True)
        if not isinstance(base, type):
            raise TypeError(f"{type_!r} is not a type that a value can have")
        if base in _NATIVE or issubclass(base, enum.Enum):
            return LeafNode(whole, self.exact, False)
        # Iterators and callables are of their kind; what they will give is checked where it comes out.
        return InstanceNode(base)

    def _union(self, type_: Any, meta: tuple[Any, ...]) -> Node:
        choices = tuple(self.node(choice) for choice in get_args(type_))
        whole = annotate(type_, meta)
        if all(node.scalar for node in choices) and _supported(whole):
            return LeafNode(whole, self.exact, True)
        return AnyNode() if any(node.trivial for node in choices) else UnionNode(type_, choices)

    def _items(self, type_: Any, base: Any, meta: tuple[Any, ...]) -> Node:
        arguments = get_args(type_)
        item = self.node(arguments[0]) if arguments and arguments != ((),) else AnyNode()
        whole = annotate(type_, meta)
        fast = (item.scalar or item.trivial) and _supported(whole)
        limits = annotate(list[Any], meta) if meta else None
        return ItemsNode(whole, base, item, self.exact, limits, fast)

    def _map(self, type_: Any, base: Any, meta: tuple[Any, ...]) -> Node:
        arguments = get_args(type_) or (Any, Any)
        key, item = self.node(arguments[0]), self.node(arguments[1])
        whole = annotate(type_, meta)
        fast = (key.scalar or key.trivial) and (item.scalar or item.trivial) and _supported(whole)
        limits = annotate(dict[Any, Any], meta) if meta else None
        return MapNode(whole, base, key, item, limits, fast)

    def _object(self, type_: Any) -> Node:
        known = self._objects.get(type_)
        if known is not None:
            return known
        node = self._objects[type_] = ObjectNode(type_, self.mappings)
        listed = list(fields_of(type_))
        node.fill(
            [Field(name, key, self.node(field_type), required) for name, key, field_type, required in listed],
            {name: field_type for name, _, field_type, _ in listed},
        )
        return node


# ---------------------------------------------------------------- helpers


def all_sure(values: Iterable[Any], node: Node) -> bool:
    """True if the classes of `values` say that each of them fits: one look in C, where judging each would be a call."""
    return bool(node.sure) and node.sure.issuperset(map(type, values))


def convert(value: Any, type_: Any, *, from_attributes: bool = False) -> Any:
    """`msgspec.convert` by our rules: no conversions between native types, foreign classes by isinstance."""
    return msgspec.convert(
        value, type_, builtin_types=_NATIVE, dec_hook=_foreign, from_attributes=from_attributes, strict=True
    )


def _sure(type_: Any) -> frozenset[type]:
    """The scalar classes of which every instance fits `type_`, a plain scalar or a union of them."""
    if get_origin(type_) in (Union, types.UnionType):
        return frozenset().union(*(_sure(one) for one in get_args(type_)))
    if type_ is float:
        return frozenset({float, int})
    return frozenset({type_}) if type_ in _SCALARS or type_ in _NATIVE else frozenset()


def _foreign(type_: Any, value: Any) -> Any:
    base = get_origin(type_) or type_
    if isinstance(base, type) and not isinstance(value, base):
        raise ValueError(f"Expected `{type_text(base)}`, got `{type_text(type(value))}`")
    return value


def _supported(type_: Any) -> bool:
    """True if msgspec can judge the type. It says so only when it is first used."""
    try:
        convert(_Nothing(), type_)
    except msgspec.ValidationError:
        return True
    except Exception:
        return False
    return True


class _Nothing:
    __slots__ = ()


def _as_plain(value: Any) -> Any:
    """A subclass's instance as the builtin scalar it is: msgspec does not take a numpy.float64 for a float. A numpy
    scalar counts as the number it is: nobody who writes `-> int` means to forbid what `sum()` of an array gives."""
    if isinstance(value, enum.Enum):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, float) and type(value) is not float:
        return float(value)
    if isinstance(value, bytes) and type(value) is not bytes:
        return bytes(value)
    return value


def check_limits(node: Node, value: Any, limits: Any) -> None:
    """Apply length limits of an `Annotated` container."""
    if limits is None:
        return
    try:
        convert(dict(value) if isinstance(value, cabc.Mapping) else list(value), limits)
    except msgspec.ValidationError as error:
        text = _PATH.sub("", str(error))
        raise node.misfit(value, text[:1].lower() + text[1:]) from None


def _key(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r:.80}]"


def _from_pydantic(error: ValueError, expected: str, value: Any) -> Misfit:
    describe: Callable[..., list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if describe is None:
        return Misfit(str(error), expected, type_text(type(value)))
    problems = describe(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    misfit = Misfit(f"{first['msg'][:1].lower()}{first['msg'][1:]}{more}", expected, type_text(type(value)))
    misfit.path = [f"[{part}]" if isinstance(part, int) else _key(part) for part in first["loc"]]
    return misfit
