"""What failed is saved with what it was called with, in every lane, and `stageflow replay` fails again the same way."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from stageflow.report.failed import find_failed, load_failed

STAGEFLOW = [sys.executable, "-m", "stageflow.cli.main"]

SHOP = """
    import os
    import signal
    import sys
    from stageflow import PipelineBuilder, RetryConfig

    def load(count: int):
        yield from range(count)

    async def double(load: int) -> int:
        return 2 * load

    def sift(double: int, by: int = 3) -> int:
        if double in (14, 20):
            raise ValueError(f"no {double}")
        return double

    def ranges(double: int):
        yield double
        if double == 8:
            raise KeyError("eight")

    def leaf(ranges: int) -> int:
        if ranges == 12:
            raise LookupError("leaf of twelve")
        return ranges

    def batch(double: list) -> list:
        if 12 in double:
            raise RuntimeError("twelve in batch")
        return double

    def zipped(double: int, sift: int, base: int) -> int:
        if double == 16:
            raise ValueError(f"zip {double} {sift} {base}")
        return double + sift

    def base(count: int) -> int:
        return count

    def other() -> int:
        return 0

    def final(base: int, other: int) -> float:
        return base // other

    def deadly(load: int) -> int:
        if load == 3 and "stageflow.cli.replay" not in sys.modules:
            os.kill(os.getpid(), signal.SIGKILL)
        return load


    def make(lane):
        retry = RetryConfig(max_attempts=2, base_delay_ms=1)
        b = PipelineBuilder("shop").stage("load", load).map("double", double, over="load")
        b = b.map("sift", sift, over="double", executor=lane, retry=retry)
        b = b.map("ranges", ranges, over="double", executor=lane)
        b = b.map("leaf", leaf, over="ranges", executor=lane)
        b = b.map("batch", batch, over="double", batch=4, executor=lane)
        b = b.stage("base", base).stage("other", other).stage("final", final, executor=lane)
        return b.map("zipped", zipped, over="double", executor=lane).build()

    thread, process, inline = make("thread"), make("process"), make("inline")
    killed = PipelineBuilder("killed").stage("load", load).map("deadly", deadly, "load", executor="process").build()
"""

#: stage -> item of its first failure, and what the replay must end with
WANTED = {
    ("sift", (7,)): "ValueError: no 14",
    ("sift", (10,)): "ValueError: no 20",
    ("ranges", (4,)): "KeyError: 'eight'",
    ("leaf", (6, 0)): "LookupError: leaf of twelve",
    ("batch", (6,)): "RuntimeError: twelve in batch",
    ("zipped", (8,)): "ValueError: zip 16 16 20",
    ("final", None): "ZeroDivisionError: integer division or modulo by zero",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    return tmp_path


def stageflow(folder, *args, text=None):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("STAGEFLOW_", "COLUMNS"))}
    return subprocess.run(
        [*STAGEFLOW, *args], cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("lane", ["thread", "process", "inline"])
def test_items_batches_and_stages_fail_again_from_their_files(folder, lane):
    done = stageflow(
        folder, "run", f"shop.py:{lane}", "-i", "count=20", "--save-failed", "failed", "--failure-mode", "best_effort"
    )
    assert done.returncode == 1, done.stderr
    found = {(one.stage, one.item): one for one in map(load_failed, find_failed(folder / "failed"))}
    assert set(found) == set(WANTED)
    assert all(one.has_input and one.input_error is None for one in found.values())
    assert found["zipped", (8,)].load_input().values == {"double": 16, "sift": 16, "base": 20}
    assert found["batch", (6,)].load_input().values == {"double": [12]}
    assert found["final", None].load_input().values == {"base": 20, "other": 0}
    for key in [("zipped", (8,)), ("leaf", (6, 0)), ("ranges", (4,)), ("final", None)]:
        again = stageflow(folder, "replay", found[key].path)
        assert again.returncode == 1
        assert WANTED[key] in again.stderr, again.stderr


def test_the_debugger_opens_where_an_item_of_a_generator_fails(folder):
    stageflow(
        folder, "run", "shop.py:process", "-i", "count=20", "--save-failed", "failed", "--failure-mode", "best_effort"
    )
    (saved,) = (folder / "failed").rglob("ranges/4.sfail")
    again = stageflow(folder, "replay", str(saved), "--pdb", text="p double * 1000\nq\n")
    assert "8000" in again.stdout


def test_the_item_that_killed_its_workers_is_saved_with_its_element(folder):
    stageflow(
        folder, "run", "shop.py:killed", "-i", "count=6", "--save-failed", "failed", "--failure-mode", "best_effort",
        "--processes", "1",
    )  # fmt: skip
    (saved,) = find_failed(folder / "failed")
    failed = load_failed(saved)
    assert (failed.stage, failed.item, failed.load_input().values) == ("deadly", (3,), {"load": 3})
    assert "SIGKILL" in json.dumps(failed.error_info)
    again = stageflow(folder, "replay", str(saved))
    assert (again.returncode, again.stdout) == (0, "it succeeds now: 3\n")


REDUCES = """
    from stageflow import PipelineBuilder, StageKind, stage

    def load(count: int):
        yield from range(count)

    @stage(kind=StageKind.ENRICH)
    async def ask(load: int) -> int:
        if load == 5:
            raise ConnectionError("no answer for 5")
        return load

    @stage(kind=StageKind.GUARD)
    def check(count: int) -> int:
        raise PermissionError(f"{count} are too many")

    def add(acc: int, load: int, count: int) -> int:
        if load == 300:
            raise ValueError(f"{load} of {count} onto {acc}")
        return acc + load

    async def late(acc: int, load: int) -> int:
        if load == 300:
            raise ValueError(f"late {load} onto {acc}")
        return acc + load

    def first(acc: int, load: int) -> int:
        if load == 3:
            raise ValueError(f"first {load} onto {acc}")
        return acc + load

    def gather(acc: list, load: int) -> list:
        return [*acc, load]

    def join(a: list, b: list) -> list:
        if b[0] == 512:
            raise IndexError(f"from {a[0]} to {b[-1]}")
        return a + b

    def source(count: int):
        yield count
        raise OSError("the source is gone")

    def make(lane):
        b = PipelineBuilder("reduces").stage("load", load).map("ask", ask, over="load").stage("check", check)
        b = b.reduce("add", add, over="load", initial=0, executor=lane)
        b = b.reduce("late", late, over="load", initial=0, executor="async")
        b = b.reduce("first", first, over="load", executor=lane)
        b = b.reduce("blocks", add, over="load", initial=0, combine=int.__add__, executor=lane, inputs={"load": "load"})
        return b.reduce("join", gather, over="load", initial=[], combine=join, executor=lane).build()

    thread, process = make("thread"), make("process")
    sources = PipelineBuilder("sources").stage("source", source).map("ask", lambda source: source, "source").build()
"""

#: stage -> what the replay must end with
REDUCED = {
    "ask": "ConnectionError: no answer for 5",
    "check": "PermissionError: 600 are too many",
    "add": "ValueError: 300 of 600 onto 44850",
    "late": "ValueError: late 300 onto 44850",
    "first": "ValueError: first 3 onto 3",
    "blocks": "ValueError: 300 of 600 onto 12210",
    "join": "IndexError: from 0 to 599",
}


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_steps_of_reduces_coroutines_and_guards_fail_again_from_their_files(tmp_path, lane):
    (tmp_path / "shop.py").write_text(textwrap.dedent(REDUCES))
    done = stageflow(
        tmp_path, "run", f"shop.py:{lane}", "-i", "count=600", "--save-failed", "failed", "--failure-mode",
        "best_effort", "--report", "r.html",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = {one.stage: one for one in map(load_failed, find_failed(tmp_path / "failed"))}
    assert set(found) == set(REDUCED)
    page = (tmp_path / "r.html").read_text()
    for stage, one in found.items():
        assert one.has_input, (stage, one.input_error)
        assert f"stageflow replay {os.path.relpath(one.path, tmp_path)} --pdb" in page
        if lane == "process" or stage in ("ask", "join"):
            again = stageflow(tmp_path, "replay", one.path)
            assert again.returncode == 1
            assert REDUCED[stage] in again.stderr, again.stderr
    looked = stageflow(tmp_path, "replay", found["add"].path, "--pdb", text="p acc * 10\nq\n")
    assert "448500" in looked.stdout


def test_a_source_fails_again_from_its_file(tmp_path):
    (tmp_path / "shop.py").write_text(textwrap.dedent(REDUCES))
    stageflow(tmp_path, "run", "shop.py:sources", "-i", "count=2", "--save-failed", "failed")
    (saved,) = find_failed(tmp_path / "failed")
    again = stageflow(tmp_path, "replay", str(saved))
    assert (again.returncode, "OSError: the source is gone" in again.stderr) == (1, True)
