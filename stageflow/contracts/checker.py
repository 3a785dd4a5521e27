"""Checks a value against a type without ever changing it. Runs where the value was made, workers included."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import msgspec

from stageflow.contracts.annotations import type_text
from stageflow.contracts.nodes import Compiler, Misfit
from stageflow.core.errors import ContractViolationError, DefinitionError


class Checker:
    """A compiled contract. Picklable (it is compiled again where it arrives), thread-safe.

    `exact` is the rule for annotations: a value must be of the type. Without it, the rule for `contract=`, a mapping
    also fits a class it could become, and text an enum. Nothing is converted: `check` returns the object it was given.
    """

    __slots__ = ("_node", "exact", "text", "type")

    def __init__(self, type_: Any, *, exact: bool = False) -> None:
        self.type = type_
        self.exact = exact
        self.text = type_text(type_)
        try:
            self._node = Compiler(exact=exact).node(type_)
        except (TypeError, NameError, AttributeError) as error:
            raise DefinitionError(
                f"the contract {self.text} cannot be checked: {error}",
                hint="use builtins, Structs, dataclasses, TypedDict, attrs classes or pydantic models",
                contract=self.text,
            ) from error

    def __repr__(self) -> str:
        return f"<Checker {self.text}{' exact' if self.exact else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _compile, (self.type, self.exact)

    @property
    def trivial(self) -> bool:
        """True if every value passes, so that calling `check` is a waste."""
        return self._node.trivial

    @property
    def sure(self) -> frozenset[type]:
        """Classes of which every direct instance passes: for them `type(value)` is all there is to look at."""
        return self._node.sure

    def check(self, value: Any, *, stage: str | None = None) -> Any:
        """Return `value` itself if it fits.

        Raises:
            ContractViolationError: it does not (fields `path`, such as "$.items[3].price", `expected`, `got`, `stage`).
        """
        try:
            self._node.check(value)
        except Misfit as misfit:
            raise self._error("$" + "".join(misfit.path), misfit.message, misfit.expected, misfit.got, stage) from None
        except RecursionError:
            got = type_text(type(value))
            raise self._error(
                "$", "the value is nested too deeply, or contains itself", self.text, got, stage
            ) from None
        return value

    def fits(self, value: Any) -> bool:
        """True if `check` would return."""
        try:
            self.check(value)
        except ContractViolationError:
            return False
        return True

    def _error(self, path: str, message: str, expected: str, got: str, stage: str | None) -> ContractViolationError:
        where = f"the value of stage {stage!r}" if stage is not None else "the value"
        return ContractViolationError(
            f"{where} breaks its contract {self.text} at {path}: {message}",
            hint="change what is returned, or the annotation or contract= that describes it",
            path=path,
            expected=expected,
            got=got,
            stage=stage,
            contract=self.text,
        )


def _compile(type_: Any, exact: bool) -> Checker:
    try:
        return _cached(type_, exact)
    except TypeError:
        return Checker(type_, exact=exact)  # not hashable, such as Annotated with a list in it


@lru_cache(maxsize=512)
def _cached(type_: Any, exact: bool) -> Checker:
    return Checker(type_, exact=exact)


def compile_contract(type_: Any, *, exact: bool = False) -> Checker:
    """The checker of a `contract=` type. DefinitionError if the type cannot be checked. Compiled once per type."""
    return _compile(type_, exact)


def checker_for(annotation: Any) -> Checker | None:
    """The exact checker of an annotation; None where there is nothing to check (Any, or beyond what is known)."""
    if annotation is inspect.Signature.empty:
        return None
    try:
        checker = _compile(annotation, True)
    except DefinitionError:
        return None
    return None if checker.trivial else checker


def schema_of(type_: Any) -> dict[str, Any]:
    """The JSON schema of a type: msgspec's, or the pydantic model's own. DefinitionError if it has none."""
    own = getattr(type_, "model_json_schema", None)
    try:
        schema: dict[str, Any] = own() if own is not None else msgspec.json.schema(type_, schema_hook=_opaque)
    except Exception as error:
        raise DefinitionError(
            f"{type_text(type_)} has no JSON schema: {error}",
            hint="pass a schema as a mapping, or a type that msgspec or pydantic describes",
        ) from error
    return schema


def _opaque(type_: Any) -> dict[str, Any]:
    """A class without a schema is named, so that exchanging it is still seen by a diff."""
    return {"title": type_text(type_), "x-python-type": type_text(type_)}
