"""Whether anything is around an attempt in the parent. What that is, is imported by the first stage that has some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.pipeline.policies import asks_for_worker

if TYPE_CHECKING:
    from stageflow.core.executor import Call
    from stageflow.pipeline.policies import Policies
    from stageflow.pipeline.spec import StageSpec
    from stageflow.runtime.around import Around
    from stageflow.runtime.config import EngineConfig
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.running import Running


class Surroundings:
    """Interceptors and idempotency of one engine, made on first use."""

    __slots__ = ("_config", "_made")

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._made: Around | None = None

    def wanted(self, policies: Policies) -> bool:
        """Whether an attempt with these policies needs anything around it."""
        if policies.idempotency is not None:
            return True
        return any(not asks_for_worker(one) for one in policies.interceptors)

    def around(self, driver: Driver, running: Running, call: Call, spec: StageSpec) -> None:
        """Run the attempt with everything around it; its outcome goes to the driver as any other."""
        if self._made is None:
            from stageflow.runtime.around import Around

            self._made = Around(self._config)
        self._made.around(driver, running, call, spec)

    def forget(self, run_id: str) -> None:
        """The run is over: what its interceptors kept goes."""
        if self._made is not None:
            self._made.forget(run_id)

    def close(self) -> None:
        """Close a store that the engine opened."""
        if self._made is not None:
            self._made.close()
