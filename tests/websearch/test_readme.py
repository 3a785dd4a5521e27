"""The worked example of this room's README, run as it stands, prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import stageflow.websearch

README = Path(stageflow.websearch.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_crawler_prints_what_the_readme_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (expected,) = re.findall(r"^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    script = tmp_path / "crawler.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=55, check=False
    )
    assert (done.stdout, done.stderr) == (expected, "")


def test_every_file_is_in_the_table() -> None:
    folder = Path(stageflow.websearch.__file__).parent
    table = README.partition("## What is where")[2].partition("## Promises")[0]
    for module in folder.glob("*.py"):
        if module.stem not in {"__init__", "errors"}:
            assert f"`{module.stem}`" in table
