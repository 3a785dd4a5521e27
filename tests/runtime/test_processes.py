"""The engine as a process among others: scripts with and without a guard, the REPL, signals, and death."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

PRELUDE = """
import os, sys, time, threading
from stageflow import PipelineBuilder, Engine
def square(x):
    return x * x
"""
GRAPH = """
graph = (
    PipelineBuilder("p")
    .map("m", square, "xs", executor="process")
    .stage("n", lambda m: sum(m), executor="process")
    .build()
)
"""


def script(tmp_path, body):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def output(command, **keywords):
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("guard", [True, False])
def test_functions_of_a_script_and_lambdas_run_in_workers(tmp_path, guard):
    run = 'print(graph.run({"xs": list(range(10))}, processes=2).data("n"))'
    body = GRAPH + (f"if __name__ == '__main__':\n    {run}\n" if guard else run + "\n")
    assert output(script(tmp_path, body)) == "285"


def test_functions_of_the_repl_run_in_workers():
    code = PRELUDE + GRAPH + 'print(graph.run({"xs": [1, 2, 3]}, processes=1).data("n"))\n'
    assert output([sys.executable, "-c", code]) == "14"
    assert output([sys.executable, "-"], input=code) == "14"


def test_a_fresh_worker_has_nothing_of_the_engine(tmp_path):
    (tmp_path / "stages_only.py").write_text("import sys\ndef names():\n    return sorted(sys.modules)\n")
    body = """
    from stages_only import names
    graph = PipelineBuilder("p").stage("names", names, executor="process").build()
    print("\\n".join(graph.run(processes=1).data("names")))
    """
    names = set(output(script(tmp_path, body), cwd=tmp_path).splitlines())
    assert "stages_only" in names
    for forbidden in ("stageflow.scheduler", "stageflow.runtime", "stageflow.cli", "stageflow.report", "rich", "numpy",
                      "opentelemetry.sdk"):  # fmt: skip
        assert not {name for name in names if name == forbidden or name.startswith(forbidden + ".")}, forbidden


def test_a_run_started_inside_a_worker_uses_no_further_processes(tmp_path):
    body = """
    def outer():
        inner = PipelineBuilder("in").map("m", square, "xs", executor="process").build()
        return list(inner.run({"xs": [1, 2, 3]}).data("m"))
    graph = PipelineBuilder("p").stage("outer", outer, executor="process").build()
    print(graph.run(processes=1).data("outer"))
    """
    assert output(script(tmp_path, body)) == "[1, 4, 9]"


# ---------------------------------------------------------------- signals

WAITING = """
def wait(x, ctx):
    ctx.defer(lambda: print("cleaned", flush=True))
    {heard}
    open(os.environ["ENTERED"], "w").close()
    while True:
        {heed}
        time.sleep(0.005)
graph = PipelineBuilder("p").stage("wait", wait, inputs={{"x": "x"}}, executor="{lane}", kind="work").build()
engine = Engine(processes=1, grace={grace})
try:
    engine.run(graph, {{"x": 1}})
except KeyboardInterrupt as stop:
    print("interrupted", stop.result.status, flush=True)
    engine.close()
    sys.exit(130)
"""


HEEDS = {"heed": "ctx.raise_if_cancelled()", "heard": ""}
#: in a stage that keeps the loop from turning: whoever waits for it learns that a signal has come to the handlers
DEAF = {
    "heed": "pass",
    "heard": """
    import signal
    real = signal.getsignal(signal.SIGINT)
    def noted(number, frame):
        open(os.environ["HEARD"], "w").close()
        real(number, frame)
    signal.signal(signal.SIGINT, noted)
    """,
}
#: in a worker: it was told, and goes on
STUBBORN = {"heed": 'ctx.token.cancelled and open(os.environ["HEARD"], "w").close()', "heard": ""}


def start(tmp_path, body):
    """The script as a process, as soon as its stage runs."""
    entered = tmp_path / "entered"
    process = subprocess.Popen(
        script(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "ENTERED": str(entered), "HEARD": str(tmp_path / "heard")},
    )  # fmt: skip
    wait_for(process, entered)
    return process


def wait_for(process, sign):
    limit = time.monotonic() + 40
    while not sign.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"no {sign.name}"
        time.sleep(0.01)


def press_twice(process, tmp_path):
    """Two presses of Ctrl-C: the second when the first has been heard, since two at once count as one."""
    process.send_signal(signal.SIGINT)
    wait_for(process, tmp_path / "heard")
    time.sleep(0.15)  # the length of a press
    process.send_signal(signal.SIGINT)


def lines(process):
    out, err = process.communicate(timeout=80)
    return out.splitlines(), err


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_ctrl_c_stops_a_run_and_its_cleanup_runs(tmp_path, lane):
    process = start(tmp_path, WAITING.format(**HEEDS, lane=lane, grace=20))
    process.send_signal(signal.SIGINT)
    out, err = lines(process)
    assert process.returncode == 130, err
    assert "interrupted cancelled" in out
    if lane == "thread":
        assert "cleaned" in out


@pytest.mark.parametrize("lane", ["inline", "async"])
def test_a_second_ctrl_c_reaches_a_stage_that_keeps_the_loop_from_turning(tmp_path, lane):
    process = start(tmp_path, WAITING.format(**DEAF, lane=lane, grace=30))
    press_twice(process, tmp_path)
    out, err = lines(process)
    assert process.returncode == 130, err
    assert "cleaned" in out
    assert out[-1] == "interrupted cancelled"


def test_a_third_signal_ends_a_process_whose_loop_does_not_turn(tmp_path):
    process, sent = start(tmp_path, WAITING.format(heed="pass", heard="", lane="inline", grace=30)), 0
    while process.poll() is None and sent < 100:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)  # those that come at once count as one
        sent += 1
    assert process.wait(timeout=20) == -signal.SIGTERM
    assert sent >= 3
    process.communicate()


def test_ctrl_c_twice_does_not_wait_for_the_grace(tmp_path):
    process = start(tmp_path, WAITING.format(**STUBBORN, lane="process", grace=60))
    press_twice(process, tmp_path)
    out, err = lines(process)  # in less than the grace
    assert process.returncode == 130, err
    assert "interrupted cancelled" in out


def test_sigterm_stops_a_run(tmp_path):
    process = start(tmp_path, WAITING.format(**HEEDS, lane="process", grace=20))
    process.send_signal(signal.SIGTERM)
    _, err = lines(process)
    assert process.returncode in (143, -signal.SIGTERM), err


def test_killing_the_engine_leaves_no_process_within_two_seconds(tmp_path):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    took = []
    while len(took) < 3 and not (took and min(took) < 2):  # a machine may be busy for seconds, but not each time
        (folder := tmp_path / str(len(took))).mkdir()
        process = start(folder, WAITING.format(heed="pass", heard="", lane="process", grace=30))
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        begun = time.monotonic()
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        took.append(time.monotonic() - begun)
        assert not alive
        process.stdout.close()
        process.stderr.close()
    assert min(took) < 2
    if before:
        assert {name for name in set(os.listdir("/dev/shm")) - before if "stageflow" in name} == set()


def test_a_value_is_encoded_once_however_many_calls_take_it(tmp_path):
    module = """
    class Big:
        encoded = 0
        def __init__(self, number):
            self.number = number
        def __reduce__(self):
            Big.encoded += 1
            return Big, (self.number,)

    def add(item, big):
        return item + big.number
    """
    (tmp_path / "big_values.py").write_text(textwrap.dedent(module))
    body = """
    from big_values import Big, add

    def taken(builder, name):
        for n in range(3):
            builder.stage(f"c{n}", eval(f"lambda {name}: {name}.number + {n}"), executor="process", fuse=False)
        return builder.build()

    async def before() -> Big:
        return Big(2)

    def run(graph, inputs, *names):
        Big.encoded = 0
        result = graph.run(inputs, processes=2)
        result.raise_for_failure()
        return [result.data(name) for name in names], Big.encoded

    print(run(taken(PipelineBuilder("i", inputs={"big": Big}), "big"), {"big": Big(1)}, "c0", "c2"))
    print(run(taken(PipelineBuilder("s").stage("before", before), "before"), {}, "c0", "c2"))
    blocks = PipelineBuilder("m", inputs={"items": list, "big": Big})
    blocks.map("added", add, over="items", executor="process", batch=None)
    found, encoded = run(blocks.build(), {"items": list(range(300)), "big": Big(1)}, "added")
    print(sum(found[0]), encoded)
    """
    assert output(script(tmp_path, body)).splitlines() == ["([1, 3], 1)", "([2, 4], 1)", "45150 1"]
