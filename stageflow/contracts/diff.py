"""Says whether a consumer of one version of a stage's output can live with another.

A change breaks if something that was promised is gone or narrower: a field, an alternative, an enum value, a bound. It
warns if something is new or wider. `$ref` is followed, recursive schemas included; every finding names the path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

Schema = Mapping[str, Any]

#: keyword -> True if a greater value is narrower
_BOUNDS: Final = {
    "minimum": True,
    "exclusiveMinimum": True,
    "minLength": True,
    "minItems": True,
    "minProperties": True,
    "maximum": False,
    "exclusiveMaximum": False,
    "maxLength": False,
    "maxItems": False,
    "maxProperties": False,
}
_EXACT: Final = ("format", "pattern", "multipleOf", "uniqueItems", "contentEncoding", "x-python-type")
_ABSENT: Final = object()


class ContractCompatibilityReport(msgspec.Struct, frozen=True):
    """What changed between two versions of a stage's contract."""

    stage: str
    from_version: str
    to_version: str
    breaking_changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_compatible(self) -> bool:
        """True without breaking changes."""
        return not self.breaking_changes

    def summary(self) -> str:
        """One line with the verdict and the counts."""
        verdict = "compatible" if self.is_compatible else "breaking"
        return (
            f"{self.stage} {self.from_version} -> {self.to_version}: {verdict} "
            f"({len(self.breaking_changes)} breaking, {len(self.warnings)} warnings)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {**msgspec.structs.asdict(self), "is_compatible": self.is_compatible}


def diff_schemas(old: Schema, new: Schema) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Breaking changes and warnings from `old` to `new`, in the order of the old schema's fields."""
    comparison = _Comparison(old, new)
    found = _Findings()
    comparison.compare(old, new, "$", found)
    return tuple(dict.fromkeys(found.breaking)), tuple(dict.fromkeys(found.warnings))


class _Findings:
    __slots__ = ("breaking", "warnings")

    def __init__(self) -> None:
        self.breaking: list[str] = []
        self.warnings: list[str] = []

    def take(self, other: _Findings) -> None:
        self.breaking += other.breaking
        self.warnings += other.warnings


class _Comparison:
    """One comparison of two documents. Pairs that are being compared are taken as equal, which ends recursion."""

    def __init__(self, old: Schema, new: Schema) -> None:
        self._old_root = old
        self._new_root = new
        self._open: set[tuple[str, str]] = set()

    def compare(self, old: Schema, new: Schema, path: str, found: _Findings) -> None:
        pair = (str(old.get("$ref", "")), str(new.get("$ref", "")))
        if all(pair):
            if pair in self._open:
                return
            self._open.add(pair)
        old, new = _resolve(self._old_root, old), _resolve(self._new_root, new)
        was, now = _choices(old), _choices(new)
        if not was:
            if now:
                found.warnings.append(f"{path}: was any value, is now {_names(now)}")
        elif not now:
            found.warnings.append(f"{path}: was {_names(was)}, is now any value")
        elif len(was) == 1 and len(now) == 1:
            self._one(was[0], now[0], path, found)
        else:
            self._many(was, now, path, found)
        if all(pair):
            self._open.discard(pair)

    def _many(self, was: list[Schema], now: list[Schema], path: str, found: _Findings) -> None:
        taken: set[int] = set()
        for choice in was:
            attempts: list[tuple[int, _Findings]] = []
            for position, candidate in enumerate(now):
                attempt = _Findings()
                self.compare(choice, candidate, path, attempt)
                attempts.append((position, attempt))
            fits = [each for each in attempts if not each[1].breaking]
            if fits:
                position, best = min(fits, key=lambda each: len(each[1].warnings))
                taken.add(position)
                found.take(best)
                continue
            kind = _kind(_resolve(self._old_root, choice))
            same = [each for each in attempts if _kind(_resolve(self._new_root, now[each[0]])) == kind]
            if len(same) == 1:
                taken.add(same[0][0])
                found.take(same[0][1])
            else:
                found.breaking.append(f"{path}: the alternative {kind} was removed")
        for position, candidate in enumerate(now):
            if position not in taken:
                kind = _kind(_resolve(self._new_root, candidate))
                found.warnings.append(f"{path}: the alternative {kind} was added")

    def _one(self, old: Schema, new: Schema, path: str, found: _Findings) -> None:
        old, new = _resolve(self._old_root, old), _resolve(self._new_root, new)
        before, after = _kind(old), _kind(new)
        if before != after and not (before == "integer" and after == "number"):
            found.breaking.append(f"{path}: the type changed from {before} to {after}")
            return
        if before != after:
            found.warnings.append(f"{path}: the type widened from integer to number")
        self._values(old, new, path, found)
        self._limits(old, new, path, found)
        if before == "object":
            self._object(old, new, path, found)
        elif before == "array":
            self._array(old, new, path, found)

    @staticmethod
    def _values(old: Schema, new: Schema, path: str, found: _Findings) -> None:
        was, now = _enum(old), _enum(new)
        if now is None:
            if was is not None:
                found.warnings.append(f"{path}: any value is allowed now, not only {was}")
            return
        if was is None:
            found.breaking.append(f"{path}: only {now} are allowed now")
            return
        for value in was:
            if value not in now:
                found.breaking.append(f"{path}: the value {value!r} was removed")
        for value in now:
            if value not in was:
                found.warnings.append(f"{path}: the value {value!r} was added")

    @staticmethod
    def _limits(old: Schema, new: Schema, path: str, found: _Findings) -> None:
        for keyword, up in _BOUNDS.items():
            was, now = old.get(keyword), new.get(keyword)
            if was == now:
                continue
            narrower = now is not None and (was is None or ((now > was) if up else (now < was)))
            text = f"{path}: {keyword} changed from {was} to {now}"
            (found.breaking if narrower else found.warnings).append(text)
        for keyword in _EXACT:
            was, now = old.get(keyword), new.get(keyword)
            if was != now:
                text = f"{path}: {keyword} changed from {was!r} to {now!r}"
                (found.warnings if now in (None, False) else found.breaking).append(text)

    def _object(self, old: Schema, new: Schema, path: str, found: _Findings) -> None:
        was: Schema = old.get("properties", {})
        now: Schema = new.get("properties", {})
        needed_before, needed_now = set(old.get("required", ())), set(new.get("required", ()))
        for name, schema in was.items():
            here = f"{path}.{name}"
            if name not in now:
                found.breaking.append(f"{here}: the field was removed")
                continue
            if name in needed_now and name not in needed_before:
                found.breaking.append(f"{here}: the optional field became required")
            elif name in needed_before and name not in needed_now:
                found.warnings.append(f"{here}: the required field became optional")
            self.compare(_schema(schema), _schema(now[name]), here, found)
        for name in now:
            if name not in was:
                if name in needed_now:
                    found.breaking.append(f"{path}.{name}: a required field was added")
                else:
                    found.warnings.append(f"{path}.{name}: an optional field was added")
        before, after = old.get("additionalProperties", True), new.get("additionalProperties", True)
        if after is False and before is not False:
            found.breaking.append(f"{path}: further fields are forbidden now")
        elif before is False and after is not False:
            found.warnings.append(f"{path}: further fields are allowed now")
        elif isinstance(after, Mapping) or isinstance(before, Mapping):
            self.compare(_schema(before), _schema(after), f"{path}.*", found)

    def _array(self, old: Schema, new: Schema, path: str, found: _Findings) -> None:
        was, now = list(old.get("prefixItems", ())), list(new.get("prefixItems", ()))
        for position, (before, after) in enumerate(zip(was, now, strict=False)):
            self.compare(_schema(before), _schema(after), f"{path}[{position}]", found)
        if len(was) != len(now) and was:
            text = f"{path}: {len(was)} fixed items became {len(now)}"
            (found.breaking if len(now) != 0 else found.warnings).append(text)
        before, after = old.get("items", True), new.get("items", True)
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            self.compare(_schema(before), _schema(after), f"{path}[]", found)


def _schema(value: Any) -> Schema:
    return value if isinstance(value, Mapping) else {}


def _resolve(root: Schema, schema: Schema) -> Schema:
    """Follow `$ref` inside the document; keywords beside it stay."""
    seen: set[str] = set()
    while isinstance(reference := schema.get("$ref"), str) and reference not in seen:
        seen.add(reference)
        target: Any = root
        for part in reference.removeprefix("#").strip("/").split("/") if reference.startswith("#") else ():
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part, {}) if isinstance(target, Mapping) else {}
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**_schema(target), **beside} if target is not root else beside
    return schema


def _choices(schema: Schema) -> list[Schema]:
    """The alternatives of a schema; none if it takes any value."""
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return [_schema(choice) for choice in schema[keyword]]
    kinds = schema.get("type")
    if isinstance(kinds, Iterable) and not isinstance(kinds, str):
        return [{**schema, "type": kind} for kind in kinds]
    return [schema] if _kind(schema) != "any value" else []


def _kind(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, str):
        return kind
    if "properties" in schema or isinstance(schema.get("additionalProperties"), Mapping):
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    values = _enum(schema)
    if values is not None:
        kinds = {_JSON.get(type(value), "object") for value in values}
        return kinds.pop() if len(kinds) == 1 else "mixed values"
    if "x-python-type" in schema:
        return str(schema["x-python-type"])
    return "one of" if "anyOf" in schema or "oneOf" in schema else "any value"


_JSON: Final = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array"}


def _enum(schema: Schema) -> list[Any] | None:
    if schema.get("const", _ABSENT) is not _ABSENT:
        return [schema["const"]]
    values = schema.get("enum")
    return None if values is None else list(values)


def _names(choices: Iterable[Schema]) -> str:
    return " or ".join(dict.fromkeys(_kind(choice) for choice in choices))
