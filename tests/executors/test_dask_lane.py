"""The Dask lane on a real cluster of one worker process."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.core.errors import DefinitionError
from stageflow.core.executor import Call, Outcome, OutcomeKind, Shipped
from stageflow.testing.conformance import PROMISES, check_executor

distributed = pytest.importorskip("distributed")
from stageflow_executors.cluster.dask_lane import ADDRESS, DaskExecutor  # noqa: E402


def double(ctx: Any) -> tuple[int, int]:
    return 21 * 2, os.getpid()


def wait_for_the_flag(port: Any) -> Any:
    while not port.cancelled():
        time.sleep(0.005)
    return port.cancel_reason()


pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of distributed's own sockets and loops
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


CLUSTER = """
import distributed, sys
if __name__ == "__main__":
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


async def first_use(address: str) -> None:
    """Some threads distributed starts once and keeps for good."""
    async with DaskExecutor(address) as lane:
        assert await lane.submit(len, b"z" * 1_000_000) == 1_000_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler's address. It has a process of its own: what is left over in this one is the lane's."""
    script = tmp_path_factory.mktemp("cluster") / "cluster.py"
    script.write_text(CLUSTER)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        asyncio.run(first_use(address))
        yield address
        process.stdin.close()
        process.wait(30)


#: that a call has begun is heard from the cluster, a moment after it did
HEARD_LATE = "running_since_is_when_it_began"


@pytest.mark.parametrize("promise", [promise for promise in PROMISES if promise != HEARD_LATE])
def test_the_dask_lane_keeps_the_promises_of_the_port(cluster: str, promise: str) -> None:
    check_executor(lambda: DaskExecutor(cluster), only=promise)


async def test_calls_run_in_the_clusters_worker(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, cluster)
    async with DaskExecutor() as lane:
        assert lane.slots == 2
        pids = {await lane.submit(os.getpid) for _ in range(3)}
        assert len(pids) == 1
        assert os.getpid() not in pids
        with pytest.raises(ZeroDivisionError) as caught:
            await lane.submit(divmod, 1, 0)
        assert "ZeroDivisionError" in str(caught.value.__cause__)
        assert await lane.submit(lambda a, *, b: a + b, 1, b=2) == 3


async def test_a_running_call_is_known_to_run_and_heeds_its_flag(cluster: str) -> None:
    async with DaskExecutor(cluster) as lane:
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        before = time.monotonic()
        lane.start(Call(1, Shipped(wait_for_the_flag)), ended.set_result)
        while (since := lane.running_since(1)) is None:
            await asyncio.sleep(0.005)
        assert before <= since <= time.monotonic()
        lane.cancel(1, reason="enough")
        assert (await ended).value == "enough"


async def test_a_pipeline_stage_runs_on_the_cluster(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, cluster)
    graph = PipelineBuilder("cluster").stage("double", double, executor="dask").build()
    async with Engine(processes=1) as engine:
        result = await (await engine.start(graph))
    assert result.success, result
    value, pid = result.outputs["double"].data
    assert value == 42
    assert pid != os.getpid()


async def test_a_lane_that_is_not_built_says_so() -> None:
    graph = PipelineBuilder("nowhere").stage("double", double, executor="ray").build()
    async with Engine(processes=1) as engine:
        with pytest.raises(DefinitionError, match="'ray' is not built"):
            await engine.start(graph)


async def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    with pytest.raises(DefinitionError, match="knows no cluster"):
        await DaskExecutor().open()


async def test_a_dead_worker_loses_its_call_and_the_next_one_runs() -> None:
    import dask

    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        with distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as mortal:
            async with DaskExecutor(mortal.scheduler_address) as lane:
                ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
                lane.start(Call(1, Shipped(lambda port: os._exit(3))), ended.set_result)
                outcome = await ended
                assert outcome.kind is OutcomeKind.LOST
                assert outcome.suspect
                assert outcome.error is not None
                assert outcome.error.code == "SF-WORKER-DIED"
                started = time.monotonic()
                assert await lane.submit(len, "abc") == 3
                assert time.monotonic() - started < 60
