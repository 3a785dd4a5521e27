"""The demo's stages as what they are: plain functions. And the service they ask."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from functools import reduce
from pathlib import Path

import pytest

from stageflow.demo import pipeline, service
from stageflow.demo.index import Index, add


@pytest.fixture
def address():
    """The package service, as the demo starts it."""
    command = [sys.executable, "-P", service.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process.stdout.readline().decode().strip()
        process.stdin.close()
        assert process.wait(10) == 0  # it ends when its standard input does


async def test_packages_asks_the_service_about_everything_installed(address):
    found = {package.name: package for package in await pipeline.packages(address)}
    assert found["msgspec"].version
    assert found["msgspec"].files > 0
    assert "pytest" in found


def test_the_service_pages_and_says_what_it_does_not_have(address):
    with urllib.request.urlopen(f"{address}/packages", timeout=30) as reply:
        first = json.load(reply)
    assert len(first["packages"]) == service.PAGE
    with urllib.request.urlopen(f"{address}/packages?page={first['pages']}", timeout=30) as reply:
        last = json.load(reply)
    assert first["packages"][0]["name"] < last["packages"][-1]["name"]
    for elsewhere in (
        "packages?page=0",
        f"packages?page={first['pages'] + 1}",
        "packages?page=x",
        "packages/click",
        "",
    ):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/{elsewhere}", timeout=30)


async def test_without_httpx_packages_is_skipped_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    output = await pipeline.packages("http://127.0.0.1:9")
    assert "pip install 'stageflow[web]'" in output.skip_reason


def test_the_stages_compose_as_functions(tmp_path):
    root, out = tmp_path / "tree", tmp_path / "out"
    root.mkdir()
    (root / "good.py").write_text("def f():\n    return 1\n")
    (root / "bad.py").write_text("def f(:\n")
    (root / "gone.py").symlink_to("nowhere")
    elements = list(pipeline.walk(str(root)))
    assert elements == [(0, "bad.py"), (1, "gone.py"), (2, "good.py")]
    words = [pipeline.terms(pipeline.parse(pipeline.read(element, str(root)))) for element in elements]
    summary = pipeline.report(reduce(add, words, Index()), str(root), str(out))
    assert (summary.files, summary.indexed, summary.functions) == (3, 1, 1)
    assert set(summary.skipped) == {"bad.py", "gone.py"}
    assert summary.nbytes == {name: os.path.getsize(out / name) for name in os.listdir(out)}


def test_the_graph_uses_every_lane_and_says_why():
    lanes = {stage.name: stage.lane for stage in pipeline.graph.plan().stages}
    assert lanes == {
        "walk": "thread",
        "read": "thread",
        "parse": "process",
        "terms": "process",
        "index": "process",
        "packages": "async",
        "report": "process",
    }
    assert set(pipeline.graph.inputs) == {"root", "service", "output"}


def test_the_example_stays_short():
    assert len(Path(pipeline.__file__).read_text("utf-8").splitlines()) <= 130
