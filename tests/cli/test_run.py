"""`stageflow run`: somebody's graph from the command line, in a pipe, under Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

STAGEFLOW = [sys.executable, "-m", "stageflow.cli.main"]

SHOP = """
    import os, signal, time
    from stageflow import PipelineBuilder, StageKind, stage

    def load(count: int):
        yield from range(count)

    def double(load: int) -> int:
        return 2 * load

    def total(acc: int, item: int) -> int:
        return acc + item

    @stage(kind=StageKind.TRANSFORM)
    def divide(count: int) -> float:
        return 10 / count

    @stage(kind=StageKind.TRANSFORM)
    def where(count: int) -> int:
        return os.getpid()

    def wait(fifo: str, ctx) -> str:
        with open(fifo, "w") as ready:
            ready.write("ready")
        while not ctx.token.cancelled:
            time.sleep(0.01)
        return "told"

    def deaf(fifo: str, ctx) -> str:
        for told in (False, True):
            while told and not ctx.token.cancelled:
                time.sleep(0.01)
            with open(fifo, "w") as ready:
                ready.write("ready")
        time.sleep(600)

    def first() -> str:
        return "done before"

    graph = (
        PipelineBuilder("shop")
        .stage("load", load)
        .map("double", double, over="load")
        .reduce("total", total, over="double", initial=0, combine=total)
        .build()
    )
    divided = PipelineBuilder("divided").stage("divide", divide).build()
    place = PipelineBuilder("place").stage("where", where).build()
    waiting = PipelineBuilder("waiting").stage("first", first).stage("wait", wait, ["first"]).build()
    stuck = PipelineBuilder("stuck").stage("deaf", deaf, executor="process").build()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STAGEFLOW_", "COLUMNS"))}
    return {**kept, **more}


def stageflow(folder, *args, **more):
    return subprocess.run(
        [*STAGEFLOW, *args],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_run_prints_values_and_a_table_and_succeeds(folder):
    done = stageflow(folder, "run", "shop.py", "--input", "count=100")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("total: 9900\n")
    assert any(line.split()[:2] == ["double", "process"] for line in done.stdout.splitlines())
    assert "completed in" in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_one_object_on_standard_output(folder):
    done = stageflow(folder, "run", "shop:graph", "-i", "count=10", "--json", "--processes", "1")
    result = json.loads(done.stdout)
    assert done.returncode == 0
    assert result["outputs"]["total"] == {"status": "ok", "data": 90}
    assert result["stats"]["double"]["items_in"] == 10
    assert (result["success"], result["pipeline"]) == (True, "shop")


def test_a_failed_stage_is_named_with_its_line_and_no_traceback(folder):
    done = stageflow(folder, "run", "shop:divided", "-i", "count=0")
    assert done.returncode == 1
    assert "failed: stage 'divide', process lane: ZeroDivisionError: division by zero" in done.stderr
    assert 'shop.py", line 16, in divide' in done.stderr
    assert "Traceback" not in done.stderr
    assert "failed in" in done.stdout
    whole = stageflow(folder, "run", "shop:divided", "-i", "count=0", "--traceback")
    assert "Traceback (most recent call last)" in whole.stderr


def test_a_failed_run_is_json_too(folder):
    done = stageflow(folder, "run", "shop:divided", "-i", "count=0", "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["success"] is False
    assert result["outputs"]["divide"]["error"]["type"] == "ZeroDivisionError"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_inline_lane_runs_everything_in_this_process(folder, how):
    if how == "option":
        done = stageflow(folder, "run", "shop:place", "-i", "count=1", "--lane", "inline", "--json")
    else:
        done = stageflow(folder, "run", "shop:place", "-i", "count=1", "--json", STAGEFLOW_LANE="inline")
    result = json.loads(done.stdout)
    assert result["stats"]["where"]["lane"] == "inline"
    ours = stageflow(folder, "run", "shop:place", "-i", "count=1", "--json")
    assert json.loads(ours.stdout)["stats"]["where"]["lane"] == "process"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "shop:graph"], "input 'count' is missing (stage 'load'): give --input count=3"),
        (["run", "shop:graph", "-i", "count=many"], "input 'count' must be int, and 'many' is not"),
        (["run", "shop:graph", "-i", "count=1", "--memory-limit", "lots"], "'lots'"),
        (["run", "shop:graph", "-i", "count=1", "--input-file", "gone.json"], "'gone.json' cannot be read"),
        (["plan", "shop:grph"], "Did you mean 'graph'?"),
        (["draw", "shop:graph", "--output", "no/such/folder.svg"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(folder, args, message):
    done = stageflow(folder, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_environment_value_is_one_message(folder):
    done = stageflow(folder, "run", "shop:graph", "-i", "count=1", STAGEFLOW_THREADS="lots")
    assert (done.returncode, done.stdout) == (2, "")
    assert "STAGEFLOW_THREADS" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_and_draw_look_without_running(folder):
    planned = stageflow(folder, "plan", "shop:graph")
    assert planned.returncode == 0
    assert "CPU-bound work needs its own interpreter" in planned.stdout
    assert json.loads(stageflow(folder, "plan", "shop:graph", "--json").stdout)["pipeline"] == "shop"
    inline = stageflow(folder, "plan", "shop:graph", "--lane", "inline", "--json")
    assert {stage["lane"] for stage in json.loads(inline.stdout)["stages"]} == {"inline"}
    drawn = stageflow(folder, "draw", "shop:graph", "-o", "shop.svg")
    assert drawn.returncode == 0
    assert (folder / "shop.svg").read_text().startswith("<svg")
    assert "double" in stageflow(folder, "draw", "shop:graph").stdout
    assert stageflow(folder, "draw", "shop:graph", "-f", "mermaid").stdout.startswith("flowchart")


def start(folder, *args):
    return subprocess.Popen(
        [*STAGEFLOW, *args], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until_ready(folder) -> None:
    with open(folder / "fifo") as ready:  # opens when the stage does
        assert ready.read() == "ready"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drains_and_reports_what_was_done(folder, number, code):
    with start(folder, "run", "shop:waiting", "-i", "fifo=fifo") as process:
        until_ready(folder)
        process.send_signal(number)
        out, err = process.communicate(timeout=80)
    assert process.returncode == code
    assert "Traceback" not in err
    assert "cancelled" in out
    row = next(line for line in out.splitlines() if line.startswith("first"))
    assert row.split()[2] == "ok"


def test_a_second_signal_stops_at_once(folder):
    took = []
    while len(took) < 3 and not (took and min(took) < 4):  # a machine may be busy for seconds, but not each time
        with start(folder, "run", "shop:stuck", "-i", "fifo=fifo") as process:
            until_ready(folder)
            process.send_signal(signal.SIGINT)
            until_ready(folder)  # the stage has been told, and will not end by itself
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, err = process.communicate(timeout=80)
            took.append(time.monotonic() - begun)
        assert process.returncode == 130
        assert "Traceback" not in err
    assert min(took) < 4, "the grace of one signal is 5 s"


def test_a_reader_that_goes_away_is_no_error(folder):
    command = f"{sys.executable} -m stageflow.cli.main plan shop:graph | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stderr == ""
