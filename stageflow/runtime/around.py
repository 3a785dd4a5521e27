"""What happens around an attempt in the parent: idempotency and interceptors. Both see the call before any lane
does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stageflow.pipeline.policies import Policies

if TYPE_CHECKING:
    from stageflow.core.executor import Call
    from stageflow.runtime.driver import Driver, Running
    from stageflow.runtime.engine import Engine


class Around:
    """One per engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def wanted(self, policies: Policies) -> bool:
        """Whether an attempt with these policies needs anything around it."""
        return policies.idempotency is not None or bool(policies.interceptors)

    def around(self, driver: Driver, running: Running, call: Call, spec: Any) -> None:
        """Run the attempt with everything around it."""
        running.executor.start(call, driver._attempt_outcome)

    def close(self) -> None:
        """Close the store."""
