"""Shared mutable bags with conflict rules: what is there is never replaced by accident. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from stageflow.core.errors import DataConflictError, OutputConflictError


class ContextBag:
    """Key/value pairs shared by the stages of a run inside one process. A key is set once, unless forced."""

    __slots__ = ("_data", "_lock")

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        self._data: dict[str, Any] = dict(data or {})
        self._lock = threading.Lock()

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> ContextBag:
        """A bag that starts with a copy of `data`."""
        return cls(data)

    def set(self, key: str, value: Any) -> None:
        """Set a new key.

        Raises:
            DataConflictError: the key exists (field `key`); nothing was changed.
        """
        with self._lock:
            if key in self._data:
                raise DataConflictError(
                    f"the context already holds {key!r}", hint="use another key, or set_force to replace it", key=key
                )
            self._data[key] = value

    def set_force(self, key: str, value: Any) -> None:
        """Set a key, whether it exists or not."""
        with self._lock:
            self._data[key] = value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, else `default`."""
        return self._data.get(key, default)

    def contains_key(self, key: str) -> bool:
        """True if the key is set."""
        return key in self._data

    def keys(self) -> list[str]:
        """The keys in the order they were first set."""
        with self._lock:
            return list(self._data)

    def to_dict(self) -> dict[str, Any]:
        """A shallow copy of the whole."""
        with self._lock:
            return dict(self._data)

    @property
    def is_empty(self) -> bool:
        """True without keys."""
        return not self._data

    def copy(self) -> ContextBag:
        """A bag with the same entries that changes on its own."""
        return ContextBag(self.to_dict())

    __copy__ = copy

    def __contains__(self, key: object) -> bool:
        return key in self._data

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._data)

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextBag, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"ContextBag({self._data!r})"


class OutputEntry(msgspec.Struct, frozen=True):
    """What one attempt of a stage left. `attempt` counts from 1; a final entry is not overwritten."""

    data: Any
    attempt: int = 1
    is_final: bool = True


class OutputBag:
    """Outputs of stages by name. A final entry stays unless forced; others may be written again."""

    __slots__ = ("_entries", "_lock")

    def __init__(self) -> None:
        self._entries: dict[str, OutputEntry] = {}
        self._lock = threading.Lock()

    def set(self, stage: str, data: Any, attempt: int = 1, is_final: bool = True) -> None:
        """Keep the output of an attempt. Attempt numbers are recorded, not compared: finality alone protects an entry.

        Raises:
            OutputConflictError: the stage's output is final already (fields `stage`, `attempt`, `existing_attempt`).
        """
        with self._lock:
            existing = self._entries.get(stage)
            if existing is not None and existing.is_final:
                raise OutputConflictError(
                    f"the output of {stage!r} is final since attempt {existing.attempt}",
                    hint="set_force replaces it, as a guard's retry does",
                    stage=stage,
                    attempt=attempt,
                    existing_attempt=existing.attempt,
                )
            self._entries[stage] = OutputEntry(data, attempt, is_final)

    def set_force(self, stage: str, data: Any, attempt: int = 1, is_final: bool = True) -> None:
        """Keep the output, whatever is there."""
        with self._lock:
            self._entries[stage] = OutputEntry(data, attempt, is_final)

    def get(self, stage: str, default: Any = None) -> Any:
        """The data of the stage, else `default`."""
        entry = self._entries.get(stage)
        return default if entry is None else entry.data

    def get_entry(self, stage: str) -> OutputEntry | None:
        """The data with its attempt and finality."""
        return self._entries.get(stage)

    def contains(self, stage: str) -> bool:
        """True if the stage left something."""
        return stage in self._entries

    def stages(self) -> list[str]:
        """Names in the order of their first output."""
        with self._lock:
            return list(self._entries)

    def to_dict(self) -> dict[str, Any]:
        """Stage name to data, as a shallow copy."""
        with self._lock:
            return {stage: entry.data for stage, entry in self._entries.items()}

    @property
    def is_empty(self) -> bool:
        """True without outputs."""
        return not self._entries

    def __contains__(self, stage: object) -> bool:
        return stage in self._entries

    def __len__(self) -> int:
        return len(self._entries)
