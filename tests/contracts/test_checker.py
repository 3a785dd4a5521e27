"""Contracts: what fits stays the same object, what does not is named with its path."""

import collections
import dataclasses
import datetime
import decimal
import enum
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, NotRequired, TypedDict, TypeVar

import attrs
import msgspec
import numpy as np
import pydantic
import pytest

from stageflow.contracts import nodes
from stageflow.contracts.checker import Checker, checker_for, compile_contract, schema_of
from stageflow.core.errors import ContractViolationError, DefinitionError

T = TypeVar("T")


class Color(enum.Enum):
    RED = "red"


class Line(msgspec.Struct, rename="camel"):
    unit_price: float
    tag: str = ""


class Doc(msgspec.Struct):
    title: str
    lines: list[Line] = []
    color: Color = Color.RED
    array: Any = None


class Tree(msgspec.Struct):
    name: str
    children: "list[Tree]" = []


class Tagged(msgspec.Struct, tag="t", forbid_unknown_fields=True):
    a: int


class Box(msgspec.Struct, Generic[T]):
    value: T


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    z: np.ndarray | None = None


@attrs.define
class Person:
    name: str
    age: int = 0


class Row(TypedDict):
    a: int
    b: NotRequired[str]


class Pair(NamedTuple):
    left: int
    right: str = ""


class Model(pydantic.BaseModel):
    a: int
    inner: "list[Model]" = []


class Opaque:
    pass


UserId = NewType("UserId", int)
Short = Annotated[list[int], msgspec.Meta(max_length=2)]

GOOD = [
    (int, 3),
    (float, 3),
    (float, np.float64(3.0)),
    (list[float], [1, np.float64(2.0)]),
    (str, "a"),
    (None, None),
    (UserId, 3),
    (Literal["a", 1], "a"),
    (int | str | None, None),
    (Color, Color.RED),
    (datetime.datetime, datetime.datetime(2026, 1, 1)),
    (bytes, b"x"),
    (list[int], [1, 2]),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], ()),
    (set[int], {1}),
    (dict[str, list[int]], collections.OrderedDict(a=[1])),
    (Sequence[int], (1, 2)),
    (Sequence[int], range(3)),
    (Mapping[str, Line], {"a": Line(1.0)}),
    (Doc, Doc("t", [Line(1.0)], array=np.zeros(2))),
    (list[Doc], [Doc("t")]),
    (Doc | None, None),
    (Doc | Line | int, Line(2.0)),
    (Tree, Tree("a", [Tree("b", [Tree("c")])])),
    (Box[int], Box(1)),
    (Point, Point(1, z=np.zeros(2))),
    (Person, Person("a")),
    (Row, {"a": 1}),
    (Pair, Pair(1)),
    (Model, Model(a=1, inner=[Model(a=2)])),
    (list[Model], [Model(a=1)]),
    (np.ndarray, np.zeros(2)),
    (dict[str, np.ndarray], {"a": np.zeros(2)}),
    (Opaque, Opaque()),
    (Callable[[], int], len),
    (complex, 1),
    (Short, [1, 2]),
    (Any, object()),
]

BAD = [
    (int, "x", "$", "expected int, got str"),
    (int, True, "$", "expected int, got bool"),
    (list[int], [1, "x"], "$[1]", "expected int, got str"),
    (list[float], [1.0, np.float64(2), "x"], "$[2]", "expected float, got str"),
    (dict[str, list[int]], {"a": [1], "b c": [1, None]}, "$['b c'][1]", "expected int, got None"),
    (dict[str, int], {1: 1}, "$", "key 1: expected str, got int"),
    (tuple[int, str], (1, 2), "$[1]", "expected str, got int"),
    (tuple[int, str], (1,), "$", "expected 2 items, got 1"),
    (set[int], {"x"}, "$[...]", "expected int, got str"),
    (datetime.datetime, "2026-01-01T00:00:00", "$", "expected datetime.datetime, got str"),
    (bytes, "YQ==", "$", "expected bytes, got str"),
    (Sequence[int], "abc", "$", "got str"),
    (Doc, Doc(5), "$.title", "expected str, got int"),  # type: ignore[arg-type]
    (Doc, Doc("t", [Line(1.0), Line("x")]), "$.lines[1].unit_price", "expected float, got str"),  # type: ignore[arg-type]
    (Tree, Tree("a", [Tree("b", [Tree(3)])]), "$.children[0].children[0].name", "expected str, got int"),  # type: ignore[arg-type]
    (Doc | None, Doc("t", [Line("x")]), "$.lines[0].unit_price", "expected float, got str"),  # type: ignore[arg-type]
    (Doc | Line | int, "x", "$", "expected"),
    (Box[int], Box("x"), "$.value", "expected int, got str"),
    (Point, Point("x"), "$.x", "expected int, got str"),  # type: ignore[arg-type]
    (Point, Point(1, z=[1.0]), "$.z", "numpy.ndarray"),  # type: ignore[arg-type]
    (Person, Person(3), "$.name", "expected str, got int"),  # type: ignore[arg-type]
    (Row, {"a": "x"}, "$.a", "expected int, got str"),
    (Row, {"b": "x"}, "$.a", "required field 'a' is missing"),
    (Pair, Pair("x"), "$.left", "expected int, got str"),  # type: ignore[arg-type]
    (Opaque, 3, "$", "expected"),
    (dict[str, np.ndarray], {"a": [1]}, "$.a", "expected numpy.ndarray, got list"),
    (Short, [1, 2, 3], "$", "length <= 2"),
    (Annotated[int, msgspec.Meta(ge=0)], -1, "$", ">= 0"),
    (Color, "blue", "$", "invalid enum value 'blue'"),
    (list[Model], [Model(a=1), 3], "$[1]", "Model, got int"),
]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("type_", "value"), GOOD, ids=[f"{n}" for n in range(len(GOOD))])
def test_what_fits_is_returned_itself(type_, value, exact):
    assert compile_contract(type_, exact=exact).check(value) is value


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("type_", "value", "path", "text"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_what_does_not_fit_is_named_with_its_path(type_, value, path, text, exact):
    with pytest.raises(ContractViolationError) as caught:
        compile_contract(type_, exact=exact).check(value, stage="s")
    assert caught.value.path == path
    assert text in caught.value.message
    assert caught.value.stage == "s"
    assert "stage 's'" in caught.value.message
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.expected, copy.got) == (path, caught.value.expected, caught.value.got)


LOOSE = [
    (Doc, {"title": "t", "lines": [{"unitPrice": 1.0}, Line(2.0)], "color": "red"}),
    (Tagged, {"type": "t", "a": 1}),
    (Point, {"x": 1}),
    (Person, {"name": "a"}),
    (Model, {"a": 1, "inner": [{"a": 2}]}),
    (Color, "red"),
    (tuple[int, str], [1, "a"]),
    (list[int], (1, 2)),
    (Doc | Line, {"unitPrice": 3}),
]


@pytest.mark.parametrize(("type_", "value"), LOOSE, ids=[f"{n}" for n in range(len(LOOSE))])
def test_a_contract_takes_what_could_become_it_and_an_annotation_does_not(type_, value):
    before = repr(value)
    assert compile_contract(type_).check(value) is value
    assert repr(value) == before
    assert not compile_contract(type_, exact=True).fits(value)


@pytest.mark.parametrize(
    ("type_", "value", "path"),
    [
        (Doc, {"title": "t", "lines": [{"unitPrice": "x"}]}, "$.lines[0].unitPrice"),
        (Doc, {"title": "t", "lines": [Line("x")]}, "$.lines[0].unit_price"),  # type: ignore[arg-type]
        (Doc, {"lines": []}, "$.title"),
        (Tagged, {"type": "t", "a": 1, "b": 2}, "$"),
        (Tagged, {"type": "other", "a": 1}, "$.type"),
        (Model, {"a": 1, "inner": [{"a": "2"}]}, "$.inner[0].a"),
    ],
)
def test_inside_mappings_the_path_is_found_too(type_, value, path):
    with pytest.raises(ContractViolationError) as caught:
        compile_contract(type_).check(value)
    assert caught.value.path == path


def test_a_value_that_contains_itself_is_refused():
    loop = Tree("a")
    loop.children.append(loop)
    loop.children = [loop]
    with pytest.raises(ContractViolationError, match="contains itself"):
        compile_contract(Tree).check(loop)


def test_an_unset_attribute_is_a_violation():
    person = Person.__new__(Person)
    with pytest.raises(ContractViolationError, match="never set"):
        compile_contract(Person).check(person)


@pytest.mark.parametrize("type_", ["Doc", T, list["Missing"], 5])  # noqa: F821
def test_a_contract_that_cannot_be_checked_is_refused_at_once(type_):
    with pytest.raises(DefinitionError, match="cannot be checked"):
        compile_contract(type_)
    assert checker_for(type_) is None


def test_annotations_without_a_meaning_need_no_checker():
    assert checker_for(Any) is None
    assert checker_for(object) is None
    none = checker_for(None)
    assert none is not None
    assert (none.fits(None), none.fits(1)) == (True, False)
    assert compile_contract(Any).trivial


def test_checkers_are_kept_and_travel():
    assert compile_contract(list[Doc]) is compile_contract(list[Doc])
    copy = pickle.loads(pickle.dumps(compile_contract(list[dict[str, int]], exact=True)))
    assert isinstance(copy, Checker)
    assert (copy.exact, copy.fits([{"a": 1}]), copy.fits([{"a": "1"}])) == (True, True, False)


def test_schemas_come_from_msgspec_or_the_model():
    assert schema_of(Doc)["$defs"]["Line"]["properties"]["unitPrice"] == {"type": "number"}
    assert schema_of(Model)["$defs"]["Model"]["required"] == ["a"]
    assert "numpy.ndarray" in str(schema_of(dict[str, np.ndarray]))


def test_a_worker_needs_neither_pydantic_nor_anything_above():
    code = """
import sys
from stageflow.contracts.checker import compile_contract
compile_contract(dict[str, int]).check({})
above = ("pydantic", "asyncio", "stageflow.context", "stageflow.pipeline", "stageflow.runtime", "stageflow.store")
print([name for name in sys.modules if name.startswith(above)])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "path"),
    [
        (dict[str, bytes], {f"w{i}": b"x" for i in range(500)}, {"a": b"x", "b": "text"}, "$.b"),
        (list[bytes], [b"x"] * 500, [b"x", b"x", 3], "$[2]"),
        (tuple[decimal.Decimal, ...], (decimal.Decimal(1),) * 500, (decimal.Decimal(1), 1.0), "$[1]"),
        (dict[uuid.UUID, int], {uuid.uuid4(): i for i in range(500)}, {uuid.UUID(int=1): True}, "[UUID("),
        (Mapping[str, bytes], {f"w{i}": b"x" for i in range(500)}, {"a": None}, "$.a"),
    ],
)
def test_items_whose_class_says_it_all_are_not_judged_one_by_one(
    annotation: Any, good: Any, bad: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = checker_for(annotation)
    assert checker is not None
    judged: list[Any] = []
    convert = nodes.convert

    def counting(value: Any, *args: Any, **kwargs: Any) -> Any:
        judged.append(value)
        return convert(value, *args, **kwargs)

    monkeypatch.setattr(nodes, "convert", counting)
    assert checker.check(good) is good
    assert len(judged) <= 2, "a walk over five hundred items"
    with pytest.raises(ContractViolationError) as raised:
        checker.check(bad)
    assert path in raised.value.path


def test_an_instance_of_a_subclass_is_still_judged_beside_items_whose_class_says_it_all() -> None:
    class Path(bytes):
        pass

    checker = checker_for(dict[str, bytes])
    assert checker is not None
    value = {"a": b"x", "b": Path(b"y")}
    assert checker.check(value) is value
