"""Collects everything wrong with a definition, so that it is reported together and not one rerun at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stageflow.core.errors import ContractErrorInfo, PipelineValidationError

PREFIX = "CONTRACT-004-"


class Problems:
    """The problems found so far, in order."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[ContractErrorInfo] = []

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(
        self, code: str, summary: str, hint: str | None = None, *, stages: Iterable[str] = (), **context: Any
    ) -> None:
        """Note one problem. `code` is the last part of CONTRACT-004-..., `stages` the names it concerns."""
        self.found.append(
            ContractErrorInfo(PREFIX + code, summary, hint or None, None, {"stages": list(stages), **context})
        )

    def raise_if_any(self, pipeline: str) -> None:
        """Raise all of them as one PipelineValidationError, in the order of codes found."""
        if self.found:
            raise PipelineValidationError(problems=self.found, pipeline=pipeline)
