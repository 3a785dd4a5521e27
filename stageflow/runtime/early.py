"""Starts the fork server of a first run before the engine is imported, so that both come up at once.

May import what `stageflow.pipeline` has imported already, and no asyncio: the fork server waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from typing import Any, Final

from stageflow.core.kinds import StageKind
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import StageSpec
from stageflow.runtime.config import EngineConfig

_LAUNCH: Final = "stageflow_executors.processes.launch"
#: what a worker imports to run a stage, besides its own
_STAGES: Final = ("stageflow.context.attempt",)
#: what it imports besides to make functions of a script
_BY_VALUE: Final = ("cloudpickle.cloudpickle",)
#: set in the environment of every worker: an engine there has no process lane
IN_WORKER: Final = "STAGEFLOW_IN_WORKER"
LOOK_AT: Final = 64  #: stages; a graph of a million must not be gone through for a guess


@contextmanager
def fork_server_for(graph: StageGraph, config: EngineConfig) -> Iterator[bool]:
    """Within it, a fork server comes up if it looks as if a run of `graph` would want one, and it is True; one that
    nobody took is ended with it. A guess: wrong, it costs the time of an exec."""
    launch: Any = None
    if sys.platform == "linux" and config.start_method in (None, "forkserver") and not os.environ.get(IN_WORKER):
        going = [spec for spec in islice(graph.specs, LOOK_AT) if _goes_to_a_worker(spec, config)]
        if going:
            launch = import_module(_LAUNCH)
            by_value = any(getattr(spec.runner, "__module__", None) == "__main__" for spec in going)
            launch.begin(config.processes, (*_STAGES, *_BY_VALUE) if by_value else _STAGES)
    try:
        yield launch is not None
    finally:
        if launch is not None:
            launch.discard()


def _goes_to_a_worker(spec: StageSpec, config: EngineConfig) -> bool:
    """What `stageflow.pipeline.placement` will say, but for runners that cannot be sent."""
    lane = config.lane or spec.policies.executor or config.placement.get(str(spec.kind))
    if spec.form == "graph":
        return False
    return lane == "process" if lane is not None else spec.kind is StageKind.TRANSFORM and not spec.is_async
