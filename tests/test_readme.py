"""The README is true: its code runs and prints what it says, its tables say what the code says, its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stageflow.cli.main import COMMANDS, cli
from stageflow.pipeline.placement import RULES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[str, str]]:
    """Each Python block with the output that the text block after it promises."""
    found = []
    for (language, body), (following, output) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language == "python":
            assert following == "text", f"an example without its output:\n{body}"
            found.append((body, output))
    return found


@pytest.mark.parametrize("number", range(len(examples())))
def test_an_example_prints_what_the_readme_says(number, tmp_path):
    source, expected = examples()[number]
    script = tmp_path / "example.py"
    script.write_text(source, "utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STAGEFLOW_")}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0)


def test_the_first_screen_has_both_commands():
    head = TEXT.splitlines()[:24]
    assert any(line.startswith("make demo") for line in head)
    assert any(line.startswith("make test") for line in head)


def test_the_placement_table_has_every_reason_of_the_code():
    missing = [rule.why for rule in RULES if rule.why not in TEXT and "subpipeline" not in rule.why]
    assert missing == []


def test_every_command_line_of_the_readme_is_understood():
    lines = [line for language, body in BLOCKS if language == "console" for line in body.splitlines()]
    commands = [line.partition("#")[0].split()[1:] for line in lines if line.startswith("stageflow ")]
    assert {args[0] for args in commands} >= {"demo", "run", "plan", "draw", "doctor"}
    for args in commands:
        assert args[0] in COMMANDS
        done = CliRunner().invoke(cli, [*args, "--help"])  # options before --help are parsed and must exist
        assert done.exit_code == 0, f"{args}: {done.output}"


@pytest.mark.parametrize("name", ["PROCESSES", "THREADS", "MEMORY_LIMIT", "LANE", "START_METHOD"])
def test_every_environment_variable_is_documented(name):
    assert f"`STAGEFLOW_{name}`" in TEXT


def test_every_room_is_on_the_map():
    rooms = {path.parent.name for path in (ROOT / "stageflow").glob("*/__init__.py")}
    assert {room for room in rooms if f"`stageflow/{room}`" not in TEXT} == set()


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


# ---------------------------------------------------------------- the rooms' own

ROOMS = sorted(
    path
    for pattern in ("stageflow/*/README.md", "executors/*/README.md", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
)
#: whose examples a test of the room runs
EXAMPLES_RUN_BY = {
    "benchmarks": "benchmarks/test_pipeline_benchmark.py",
    "helpers": "helpers/test_readme.py",
    "testing": "testing/test_kit.py",
    "tools": "tools/test_readme.py",
    "websearch": "websearch/test_readme.py",
}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.parent.name)
def test_what_the_readme_of_a_room_names_exists(path):
    text, room = path.read_text("utf-8"), path.parent
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    modules = {name for cell in cells for name in re.findall(r"`(\w+\.py)`", cell)}
    commands = set(re.findall(r"python -m (benchmarks[\w.]*)", text))
    paths = {name.rstrip("/") for name in re.findall(r"`((?:stageflow|tests|benchmarks)/[\w./]+)`", text)}
    assert {name for name in modules if not any(room.rglob(name))} == set()
    places = {name: ROOT / name.replace(".", "/") for name in commands}
    assert {name for name, at in places.items() if not (at.is_dir() or at.with_suffix(".py").is_file())} == set()
    assert {name for name in paths if not (ROOT / name).exists()} == set()
    if "```python" in text:
        assert "README" in (ROOT / "tests" / EXAMPLES_RUN_BY[room.name]).read_text("utf-8")
