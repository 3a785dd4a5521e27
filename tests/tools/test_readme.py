"""The worked examples of this room's README, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import stageflow.tools

README = Path(stageflow.tools.__file__).with_name("README.md")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_example(number: int, folder: Path) -> subprocess.Popen[str]:
    """Start an example as a script of its own, in `folder`."""
    script = folder / f"example_{number}.py"
    script.write_text(EXAMPLES[number], encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_approval_example(tmp_path: Path) -> None:
    process = run_example(0, tmp_path)
    store = tmp_path / "approvals.sqlite"
    decide = "import sys; from stageflow.tools.commands import approvals; approvals(sys.argv[1:])"
    listed = ""
    pause = threading.Event()
    try:
        while "older than 30 days" not in listed:
            assert process.poll() is None, process.communicate()
            pause.wait(0.05)
            if store.exists():
                listed = subprocess.run(
                    [sys.executable, "-c", decide, "--store", str(store), "list"],
                    capture_output=True, text=True, timeout=30, check=False,
                ).stdout  # fmt: skip
        assert '{"plan":{"delete":["/tmp/old/a.tmp","/tmp/old/b.tmp"]}}' in listed
        request_id = listed.split()[0]
        subprocess.run(
            [sys.executable, "-c", decide, "--store", str(store), "approve", request_id[:8], "--by", "ada"],
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
        out, err = process.communicate(timeout=80)
    finally:
        process.kill()
        process.communicate()
    assert out == "2 deleted, as ada said\n", err


def test_the_tools_example(tmp_path: Path) -> None:
    process = run_example(1, tmp_path)
    out, err = process.communicate(timeout=60)
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("c2 Invalid JSON")
    assert lines[1] == "{'milk': '2 l'}"
    assert lines[2] == "{} ['tool.invoked', 'tool.started', 'tool.completed', 'tool.undone']"


def test_every_example_is_run() -> None:
    assert len(EXAMPLES) == 2
