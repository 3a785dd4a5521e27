"""`stageflow demo`: the whole job on a small tree: bad files, a pipe, compared, searched, with a worker killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stageflow.demo.index import FILES

STAGEFLOW = [sys.executable, "-m", "stageflow.cli.main", "demo", "--output", "out"]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("STAGEFLOW_", "COLUMNS"))}


def demo(folder, *args):
    command = [*STAGEFLOW, "--root", str(folder / "tree"), *args]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=55, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tree of 40 good modules, one that is no Python, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("demo")
    tree = folder / "tree"
    for number in range(40):
        path = tree / f"pkg{number % 4}" / f"mod{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        body = "".join(f"def fetch_{number}_{n}(url):\n    return url if url else None\n" for n in range(20))
        path.write_text(f'"""Module {number}."""\nimport os\n{body}')
    (tree / "broken.py").write_text("def (:\n")
    (tree / "gone.py").symlink_to("nowhere.py")
    return folder


def said(err: str) -> str:
    """What a run complained about, but for a loop that stood still: on a machine that is not ours alone it may."""
    return re.sub(r"^stage '\w+' has blocked the event loop for .*\n(?:[ \t].*\n|\n)*", "", err, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def done(folder):
    return demo(folder, "--processes", "2", "--compare")


def test_it_indexes_compares_and_says_where_the_time_went(done, folder):
    assert (done.returncode, said(done.stderr)) == (0, "")
    assert "40 of 42 files, 1,680 lines, 800 functions" in done.stdout
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 8}
    assert {rows["read"], rows["parse"], rows["terms"], rows["packages"]} == {"thread", "process", "async"}
    assert "of which the parent used" in done.stdout
    assert "the same, byte for byte" in done.stdout
    assert not (folder / "out" / ".one-worker").exists()
    assert {path.name for path in (folder / "out").iterdir()} == {*FILES, "report.html"}


def test_what_could_not_be_read_or_parsed_is_named_with_its_reason(done):
    assert "skipped broken.py: not valid Python: invalid syntax (line 1)" in done.stdout
    assert "skipped gone.py: cannot be read: No such file or directory" in done.stdout


def test_the_output_is_plain_in_a_pipe(done):
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout


def test_the_page_names_the_packages_that_the_async_stage_fetched(done, folder):
    page = (folder / "out" / "report.html").read_text()
    assert "msgspec" in page
    assert "not valid Python" in page


def test_a_query_searches_the_index_that_is_there(done, folder):
    found = subprocess.run(
        [*STAGEFLOW, "--query", "fetch_7_3 url"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "1 of 42 modules" in found.stdout
    assert "pkg3/mod7.py: " in found.stdout
    assert "def fetch_7_3(url):" in found.stdout


def test_json_has_the_numbers(folder):
    result = json.loads(demo(folder, "--json", "--processes", "1").stdout)
    assert result["success"] is True
    assert result["summary"]["indexed"] == 40
    assert result["stages"]["parse"]["items_in"] == 42
    assert 0 < result["parent_share"] < 1


def test_an_empty_tree_gives_an_empty_index(tmp_path):
    (tmp_path / "tree").mkdir()
    done = demo(tmp_path)
    assert done.returncode == 0
    assert "0 of 0 files" in done.stdout


@pytest.mark.parametrize(("name", "message"), [("missing", "there is no such folder"), ("file", "is a file")])
def test_an_unusable_root_is_one_message(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    command = [*STAGEFLOW, "--root", str(tmp_path / name)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_without_httpx_the_stage_is_skipped_and_says_so(done, folder):
    code = (
        "import sys; sys.modules['httpx'] = None; import importlib.util as u; real = u.find_spec; "
        "u.find_spec = lambda name, package=None: None if name == 'httpx' else real(name, package); "
        "from stageflow.cli.main import main; sys.argv = ['stageflow', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, "demo", "--output", "bare", "--root", str(folder / "tree")]
    bare = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert bare.returncode == 0
    assert "pip install 'stageflow[web]'" in bare.stderr
    assert "stage 'packages' was skipped: httpx is not installed" in bare.stdout
    assert (folder / "bare" / "words.txt").read_bytes() == (folder / "out" / "words.txt").read_bytes()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Path:
    """A tree that takes two workers a second."""
    folder = tmp_path_factory.mktemp("heavy")
    (folder / "tree").mkdir()
    for number in range(40):
        body = "".join(f"def fetch_{n}(url):\n    return [u for u in url if u and {n}] or None\n" for n in range(500))
        (folder / "tree" / f"mod{number}.py").write_text(body)
    return folder


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    command = [*STAGEFLOW, "--root", str(folder / "tree"), "--processes", "2", *args]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def busy_worker(process: subprocess.Popen[str]) -> psutil.Process:
    """A worker that has computed for a moment: it is in the middle of something."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "service.py" not in " ".join(child.cmdline()) and child.cpu_times().user > 0.3:
                    return child
            except psutil.Error:
                continue
        time.sleep(0.01)
    raise AssertionError("no worker became busy")


def test_killing_a_worker_changes_nothing(heavy):
    with start(heavy, "--json") as process:
        calm = json.loads(process.communicate(timeout=100)[0])
    before = {name: (heavy / "out" / name).read_bytes() for name in FILES}
    with start(heavy, "--json") as process:
        busy_worker(process).kill()
        out, err = process.communicate(timeout=100)
    assert (process.returncode, said(err)) == (0, "")
    assert json.loads(out)["summary"] == calm["summary"]
    assert {name: (heavy / "out" / name).read_bytes() for name in FILES} == before


def test_ctrl_c_drains_and_reports(heavy):
    with start(heavy) as process:
        children = psutil.Process(process.pid).children
        busy_worker(process)
        left = children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=80)
    assert process.returncode == 130
    assert "what was done until then" in out
    assert "Traceback" not in out + err
    _, alive = psutil.wait_procs(left, timeout=20)
    assert alive == []


def test_it_has_the_views_that_a_run_has(folder):
    done = demo(folder, "--report", "run.html", "--trace", "run.trace.json", "--metrics-port", "0", "--ui", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["success"] is True
    for said in ("live page: http://127.0.0.1:", "metrics: http://127.0.0.1:", "report: run.html"):
        assert said in done.stderr
    assert "parse" in (folder / "run.html").read_text()
    assert {"X", "M"} <= {entry["ph"] for entry in json.loads((folder / "run.trace.json").read_text())}
    wrong = demo(folder, "--report", "/proc/nowhere/run.html")
    assert wrong.returncode == 2
    assert "--report '/proc/nowhere/run.html' cannot be written" in wrong.stderr
