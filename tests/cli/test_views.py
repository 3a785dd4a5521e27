"""What can watch a run from the command line, and the replay of what failed."""

import gzip
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

STAGEFLOW = [sys.executable, "-m", "stageflow.cli.main"]

SHOP = """
    from stageflow import PipelineBuilder

    def load(count: int):
        yield from range(count)

    def double(load: int) -> int:
        return 2 * load

    def divide(count: int, by: int = 0) -> float:
        return 10 / (count + by)

    graph = PipelineBuilder("shop").stage("load", load).map("double", double, over="load").build()
    divided = PipelineBuilder("divided").stage("divide", divide).build()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    return tmp_path


def stageflow(folder, *args, text=None):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("STAGEFLOW_", "COLUMNS"))}
    return subprocess.run(
        [*STAGEFLOW, *args],
        cwd=folder,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_view_at_once(folder):
    done = stageflow(
        folder,
        *("run", "shop.py:graph", "-i", "count=30", "--progress", "--ui", "--metrics-port", "0"),
        *("--report", "out/run.html", "--trace", "out/run.json.gz"),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"live page: http://127\.0\.0\.1:\d+/\S{20,}/", done.stderr)
    assert re.search(r"metrics: http://127\.0\.0\.1:\d+/metrics", done.stderr)
    assert "double" in (folder / "out" / "run.html").read_text()
    assert json.loads(gzip.decompress((folder / "out" / "run.json.gz").read_bytes()))
    assert "double" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("option", ["--report", "--trace", "--save-failed"])
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(folder, option):
    done = stageflow(folder, "run", "shop.py:graph", "-i", "count=1", option, "shop.py/x")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{option} 'shop.py/x" in done.stderr


def test_a_report_that_can_no_longer_be_written_is_told_and_the_result_is_shown(folder):
    (folder / "gone.py").write_text(
        textwrap.dedent("""
        import pathlib, shutil
        from stageflow import PipelineBuilder

        def close(folder: str) -> int:
            shutil.rmtree(folder)
            pathlib.Path(folder).touch()
            return 42

        graph = PipelineBuilder("gone").stage("close", close, executor="thread").build()
        """)
    )
    done = stageflow(folder, "run", "gone.py:graph", "-i", "folder=out", "--report", "out/run.html")
    assert (done.returncode, "42" in done.stdout) == (0, True), done.stderr
    assert "the report cannot be written to out/run.html: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failure_is_saved_and_replayed(folder):
    done = stageflow(folder, "run", "shop.py:divided", "-i", "count=0", "--save-failed", "failed")
    assert done.returncode == 1
    (saved,) = (folder / "failed").rglob("*.sfail")
    again = stageflow(folder, "replay", str(saved))
    assert again.returncode == 1
    assert "stage 'divide' failed with ZeroDivisionError: division by zero" in again.stderr
    assert "in divide" in again.stderr
    (folder / "shop.py").write_text(textwrap.dedent(SHOP).replace("by: int = 0", "by: int = 5"))
    os.utime(folder / "shop.py", (2e9, 2e9))  # of the same size and second, the byte code would still pass for fresh
    mended = stageflow(folder, "replay", str(saved))
    assert (mended.returncode, mended.stdout) == (0, "it succeeds now: 2.0\n")


def test_pdb_opens_where_it_failed(folder):
    stageflow(folder, "run", "shop.py:divided", "-i", "count=0", "--save-failed", "failed")
    (saved,) = (folder / "failed").rglob("*.sfail")
    done = stageflow(folder, "replay", str(saved), "--pdb", text="p ('count', count)\nq\n")
    assert "('count', 0)" in done.stdout


def test_what_is_no_saved_failure_is_one_message(folder):
    for name, message in (("gone.sfail", "cannot be read"), ("shop.py", "is not a saved failure")):
        done = stageflow(folder, "replay", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr


PRINTS = """
    from stageflow import PipelineBuilder

    def numbers():
        print("source")
        yield from range(4)

    def process(numbers: int) -> int:
        print(f"process {numbers}")
        return numbers

    def thread(process: int) -> int:
        print(f"thread {process}")
        return process

    async def later(thread: int) -> int:
        print(f"later {thread}")
        return thread

    graph = (
        PipelineBuilder("prints").stage("numbers", numbers).map("process", process, over="numbers", executor="process")
        .map("thread", thread, over="process", executor="thread").map("later", later, over="thread").build()
    )
"""


@pytest.mark.parametrize("options", [(), ("--progress",), ("--json",)])
def test_prints_of_every_lane_come_out_once_in_whole_lines(folder, options):
    (folder / "prints.py").write_text(textwrap.dedent(PRINTS))
    done = stageflow(folder, "run", "prints.py:graph", *options)
    assert done.returncode == 0, done.stderr
    lines = [
        re.sub(r"^\[process (\d)\] (?=process \1$)", "", line) for line in (done.stdout + done.stderr).splitlines()
    ]
    for lane in ("process", "thread", "later"):
        assert sorted(line for line in lines if re.fullmatch(rf"{lane} \d", line)) == [f"{lane} {n}" for n in range(4)]
    assert lines.count("source") == 1
    if "--json" in options:
        assert json.loads(done.stdout)["status"] == "completed"
