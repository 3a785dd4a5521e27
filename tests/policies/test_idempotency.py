"""The same work is done once: across runs, engines and processes, also when somebody is killed in the middle."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from stageflow import (
    Engine,
    IdempotencyConfig,
    InMemoryIdempotencyStore,
    PipelineBuilder,
    RetryConfig,
    SqliteIdempotencyStore,
    StageOutput,
)

ONCE = IdempotencyConfig()


def charge(amount, path):
    with open(path, "a") as file:
        file.write("x")
    return {"charged": amount, "shape": (1, 2)}


async def charge_slowly(amount, path):
    await asyncio.sleep(0.05)
    return charge(amount, path)


def fails_once(ctx, path):
    with open(path, "a") as file:
        file.write("x")
    if count(path) == 1:
        raise ValueError("first")
    return StageOutput.ok({"n": count(path)})


def skips(path):
    with open(path, "a") as file:
        file.write("x")
    return StageOutput.skip("not today")


def charge_item(x, path):
    with open(path, "a") as file:
        file.write(str(x))
    return x * 10


def graph_of(function, lane="thread", config=ONCE, **policies):
    return PipelineBuilder("pay").stage("charge", function, executor=lane, idempotency=config, **policies).build()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "charged")


def count(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def test_a_second_run_gets_the_first_ones_value_with_its_types(engine, lane, path, sink):
    graph = graph_of(charge, lane)
    first = engine.run(graph, {"amount": 5, "path": path})
    second = engine.run(graph, {"amount": 5, "path": path}, event_sinks=[sink])
    assert first.data("charge") == second.data("charge") == {"charged": 5, "shape": (1, 2)}
    assert count(path) == 1
    assert [event.data["waited"] for event in sink if event.type == "stage.idempotency_hit"] == [False]
    engine.run(graph, {"amount": 6, "path": path})
    assert count(path) == 2


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
async def test_concurrent_duplicates_wait_for_the_first(lane, path):
    graph = graph_of(charge_slowly, lane)
    async with Engine(processes=2, grace=20.0) as engine:
        results = await asyncio.gather(*(engine.execute(graph, {"amount": 5, "path": path}) for _ in range(8)))
    assert {result.data("charge")["charged"] for result in results} == {5}
    assert count(path) == 1


@pytest.mark.parametrize("shared", ["memory", "sqlite"])
async def test_engines_that_share_a_store_share_the_work(shared, path, tmp_path):
    store = InMemoryIdempotencyStore() if shared == "memory" else str(tmp_path / "store.sqlite")
    graph = graph_of(charge_slowly, "async")
    async with Engine(store=store) as one, Engine(store=store) as two:
        results = await asyncio.gather(
            *(engine.execute(graph, {"amount": 5, "path": path}) for engine in (one, two, one, two))
        )
    assert all(result.success for result in results)
    assert count(path) == 1


def test_another_amount_under_the_same_key_is_a_mismatch(engine, lane, path):
    graph = graph_of(charge, lane, IdempotencyConfig(key=f"order-{lane}", fields=("amount",)))
    assert engine.run(graph, {"amount": 5, "path": path}).success
    assert engine.run(graph, {"amount": 5, "path": path + "-elsewhere"}).success
    output = engine.run(graph, {"amount": 6, "path": path}).outputs["charge"]
    assert output.error_info.type.endswith("IdempotencyMismatchError")
    assert count(path) == 1


def test_without_enforcement_the_key_alone_counts(engine, path):
    graph = graph_of(charge, "thread", IdempotencyConfig(key="loose", enforce_params_match=False))
    assert engine.run(graph, {"amount": 5, "path": path}).data("charge")["charged"] == 5
    assert engine.run(graph, {"amount": 6, "path": path}).data("charge")["charged"] == 5


def test_only_successes_are_kept(engine, lane, path):
    graph = graph_of(fails_once, lane)
    assert engine.run(graph, {"path": path}).status == "failed"
    assert engine.run(graph, {"path": path}).data("charge") == {"n": 2}
    assert engine.run(graph, {"path": path}).data("charge") == {"n": 2}
    assert count(path) == 2


def test_a_retry_is_the_same_work(engine, lane, path):
    graph = graph_of(fails_once, lane, retry=RetryConfig(3, 0))
    assert engine.run(graph, {"path": path}).data("charge") == {"n": 2}


def test_a_skip_is_no_success(engine, path):
    graph = graph_of(skips)
    for _ in range(2):
        assert engine.run(graph, {"path": path}).outputs["charge"].status == "skip"
    assert count(path) == 2


def test_items_of_a_map_are_kept_one_by_one(engine, lane, path):
    graph = PipelineBuilder(f"items-{lane}").map("m", charge_item, over="xs", executor=lane, idempotency=ONCE).build()
    assert list(engine.run(graph, {"xs": [1, 2, 1], "path": path}).data("m")) == [10, 20, 10]
    assert list(engine.run(graph, {"xs": [2, 3], "path": path}).data("m")) == [20, 30]
    with open(path) as file:
        assert sorted(file.read()) == ["1", "2", "3"]


async def test_a_cancelled_attempt_gives_its_claim_back(path):
    begun = asyncio.Event()

    async def charge_at_the_second_try(amount, path):
        if not begun.is_set():
            begun.set()
            await asyncio.sleep(3600)
        return charge(amount, path)

    graph = graph_of(charge_at_the_second_try, "async")
    async with Engine(grace=20.0) as engine:
        handle = await engine.start(graph, {"amount": 5, "path": path})
        await begun.wait()
        handle.cancel("enough")
        assert (await handle).cancelled
        assert (await engine.execute(graph, {"amount": 5, "path": path})).success
    assert count(path) == 1


SCRIPT = """
import os, sys, time
from stageflow import Engine, IdempotencyConfig, PipelineBuilder

def charge(path, die):
    with open(path, "a") as file:
        file.write("x")
    if die:
        os.kill({parent}, 9)
        time.sleep(30)
    return "charged"

graph = PipelineBuilder("pay").stage(
    "charge", charge, executor="thread", idempotency=IdempotencyConfig(key="order", enforce_params_match=False)
).build()
if __name__ == "__main__":
    with Engine(store=sys.argv[1], processes=1) as engine:
        print(engine.run(graph, {{"path": sys.argv[2], "die": sys.argv[3] == "die"}}).data("charge"))
"""


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path, path):
    script = tmp_path / "pay.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("{parent}", "os.getpid()").replace("{{", "{").replace("}}", "}"))
    store = str(tmp_path / "store.sqlite")

    def run(how):
        return subprocess.run(
            [sys.executable, str(script), store, path, how], capture_output=True, text=True, timeout=100
        )

    assert run("die").returncode == -signal.SIGKILL
    second = run("live")
    assert second.stdout.strip() == "charged", second.stderr
    assert count(path) == 2
    assert run("live").stdout.strip() == "charged"
    assert count(path) == 2
    SqliteIdempotencyStore(store).close()
