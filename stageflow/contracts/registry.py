"""Versions of the contracts of stages. One explicit object; there is no process-wide registry."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import msgspec

from stageflow.contracts.checker import Checker, compile_contract, schema_of
from stageflow.contracts.diff import ContractCompatibilityReport, diff_schemas
from stageflow.core.errors import DefinitionError

_SEMVER: Final = re.compile(r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?")


class ContractVersionError(DefinitionError):
    """A version is unknown, or was registered before with another schema (fields `stage`, `version`)."""

    code: ClassVar[str] = "CONTRACT-003-VERSION"


class ContractMetadata(msgspec.Struct, frozen=True):
    """One version of a stage's contract. `created_at` is UTC."""

    stage: str
    version: str
    schema: dict[str, Any]
    description: str | None = None
    created_at: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {**msgspec.structs.asdict(self), "created_at": self.created_at.isoformat()}


def version_key(version: str) -> tuple[Any, ...]:
    """Orders versions by semantic versioning: 1.9 < 1.10, 2.0-rc.1 < 2.0. Other texts come last, alphabetically."""
    found = _SEMVER.fullmatch(version.strip())
    if found is None:
        return (1, version)
    numbers = tuple(int(part or 0) for part in found.group(1, 2, 3))
    if found[4] is None:
        return (0, *numbers, 1)
    # Numeric identifiers come before alphanumeric ones and compare as numbers.
    rest = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in found[4].split("."))
    return (0, *numbers, 0, rest)


class ContractRegistry:
    """Keeps schemas by stage and version. Thread-safe; `now` gives the time of registration."""

    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._entries: dict[tuple[str, str], ContractMetadata] = {}
        self._types: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def register(
        self, stage: str, version: str, schema: Mapping[str, Any] | Any, description: str | None = None
    ) -> ContractMetadata:
        """Keep a schema, or the schema of a type. The same again gives back what is there.

        Raises:
            ContractVersionError: this version exists with another schema.
        """
        is_schema = isinstance(schema, Mapping)
        entry = ContractMetadata(
            stage, version, dict(schema) if is_schema else schema_of(schema), description, self._now()
        )
        with self._lock:
            existing = self._entries.get((stage, version))
            if existing is None:
                self._entries[(stage, version)] = existing = entry
            elif existing.schema != entry.schema:
                raise ContractVersionError(
                    f"version {version!r} of the contract of {stage!r} is registered with another schema",
                    hint="a changed schema needs a new version",
                    stage=stage,
                    version=version,
                )
            if not is_schema:
                self._types.setdefault((stage, version), schema)
            return existing

    def get(self, stage: str, version: str) -> ContractMetadata | None:
        """One version, or None."""
        return self._entries.get((stage, version))

    def latest(self, stage: str) -> ContractMetadata | None:
        """The highest version of a stage, or None."""
        versions = self.list(stage)
        return versions[-1] if versions else None

    def list(self, stage: str | None = None) -> list[ContractMetadata]:
        """All versions, or those of one stage, sorted by stage and then by version."""
        with self._lock:
            entries = [entry for entry in self._entries.values() if stage is None or entry.stage == stage]
        return sorted(entries, key=lambda entry: (entry.stage, version_key(entry.version)))

    def checker(self, stage: str, version: str) -> Checker | None:
        """What checks values of this version; None if it was registered as a bare schema or not at all."""
        type_ = self._types.get((stage, version))
        return None if type_ is None else compile_contract(type_)

    def diff(self, stage: str, from_version: str, to_version: str) -> ContractCompatibilityReport:
        """What changed for consumers between two versions.

        Raises:
            ContractVersionError: one of them is unknown.
        """
        found: dict[str, ContractMetadata] = {}
        for version in (from_version, to_version):
            entry = self._entries.get((stage, version))
            if entry is None:
                known = ", ".join(each.version for each in self.list(stage)) or "none"
                raise ContractVersionError(
                    f"the contract of {stage!r} has no version {version!r}; known: {known}",
                    stage=stage,
                    version=version,
                )
            found[version] = entry
        breaking, warnings = diff_schemas(found[from_version].schema, found[to_version].schema)
        return ContractCompatibilityReport(stage, from_version, to_version, breaking, warnings)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._types.clear()

    @property
    def is_empty(self) -> bool:
        """True without entries."""
        return not self._entries

    def __len__(self) -> int:
        return len(self._entries)
