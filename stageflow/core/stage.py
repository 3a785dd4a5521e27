"""The stage protocol, and the mark that `@stage` leaves on a runner."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final, Protocol, runtime_checkable

#: attribute set on a runner by `@stage`; holds the keywords given there
MARK: Final = "__stageflow__"


@runtime_checkable
class Stage(Protocol):
    """An object stage: `execute(ctx)` returns a StageOutput, a plain value, or an awaitable of either."""

    def execute(self, ctx: Any) -> Any | Awaitable[Any]:
        """Do the work of one attempt."""
        ...
