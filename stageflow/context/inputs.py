"""What a stage may read of the stages before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stageflow.core.errors import UndeclaredDependencyError


class StageInputs(Mapping[str, Any]):
    """Read-only view of the outputs of a stage's declared dependencies, the same in every lane.

    `inputs["fetch"]` is the value of stage `fetch`. A dependency that failed or was skipped has no value: it is named
    in `failed`
    or `skipped`, and reading it gives KeyError (`get` gives the default). Reading a stage that was not declared raises
    UndeclaredDependencyError.
    """

    __slots__ = ("_declared", "_stage", "_values", "failed", "skipped")

    def __init__(
        self,
        values: Mapping[str, Any],
        declared: tuple[str, ...] = (),
        stage: str = "",
        *,
        failed: tuple[str, ...] = (),
        skipped: tuple[str, ...] = (),
    ) -> None:
        self._values = values
        self._declared = declared
        self._stage = stage
        self.failed = failed  #: names of dependencies that failed
        self.skipped = skipped  #: names of dependencies that were skipped

    @property
    def declared(self) -> tuple[str, ...]:
        """Names of the declared dependencies, in order."""
        return self._declared

    def __getitem__(self, stage: str) -> Any:
        try:
            return self._values[stage]
        except KeyError:
            self._check(stage)
            raise

    def get(self, stage: str, default: Any = None) -> Any:
        """The value of `stage`, else `default` where it has none."""
        self._check(stage)
        return self._values.get(stage, default)

    def value(self, stage: str, key: str, default: Any = None) -> Any:
        """One key of a stage's mapping value, else `default`."""
        found = self.get(stage)
        return found.get(key, default) if isinstance(found, Mapping) else default

    def _check(self, stage: str) -> None:
        if stage not in self._values and stage not in self._declared:
            known = ", ".join(self._declared) or "none"
            raise UndeclaredDependencyError(
                f"stage {self._stage!r} reads {stage!r}, which is not one of its dependencies ({known})",
                hint=f"add {stage!r} to `after=` or bind a parameter to it",
                stage=self._stage,
                key=stage,
            )

    def __contains__(self, stage: object) -> bool:
        return stage in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"StageInputs({dict(self._values)!r})"


EMPTY_INPUTS = StageInputs({})
