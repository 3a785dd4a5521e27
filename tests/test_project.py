"""The project itself: what the distribution carries, what CI runs, and the bounds every test runs under."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = ROOT / "tests" / "conftest.py"
PACKAGES = ("stageflow", "executors/stageflow_executors")


@pytest.fixture(scope="module")
def project() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def rooms() -> list[str]:
    return sorted(
        str(init.parent.relative_to(ROOT)) for package in PACKAGES for init in (ROOT / package).rglob("__init__.py")
    )


def test_the_wheel_carries_both_import_names(project):
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == list(PACKAGES)
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()


def test_entry_points_name_what_exists(project):
    scripts = project["project"]["scripts"]
    plugins = project["project"]["entry-points"]["pytest11"]
    for target in [*scripts.values(), *plugins.values()]:
        module, _, attribute = target.partition(":")
        source = ROOT / (module.replace(".", "/") + ".py")
        assert source.is_file(), f"{target} names no file"
        if attribute:
            tree = ast.parse(source.read_text("utf-8"))
            names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
            names |= {
                t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
            }
            assert attribute in names


def test_every_extra_is_installable_through_all_or_a_named_one(project):
    extras = project["project"]["optional-dependencies"]
    assert set(extras) >= {"web", "extract", "dask", "ray", "bench", "test", "dev", "all"}
    for name, requirements in extras.items():
        for requirement in requirements:
            if requirement.startswith("stageflow["):
                named = requirement.removeprefix("stageflow[").removesuffix("]").split(",")
                assert set(named) <= set(extras), f"{name} refers to a missing extra"


@pytest.mark.parametrize("room", rooms())
def test_every_room_says_what_it_is_for(room):
    tree = ast.parse((ROOT / room / "__init__.py").read_text("utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring, f"{room}/__init__.py has no docstring"
    assert len(docstring) > 40


def test_every_room_of_the_engine_has_its_layer(project):
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    named = {room.strip() for layer in contract["layers"] for room in layer.split("|")}
    present = {path.parent.name for path in (ROOT / "stageflow").glob("*/__init__.py")}
    assert contract["exhaustive"] is True
    assert named == present


def test_ci_runs_what_a_contributor_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text("utf-8").splitlines()
    assert lines[0].startswith("#!")
    assert lines[-1] == "exec make test"


def run_pytest(folder: Path, source: str, repeat: float = 2.0) -> subprocess.CompletedProcess[str]:
    """Run the given test file under this project's conftest in a fresh interpreter."""
    conftest = CONFTEST.read_text("utf-8")
    assert "\nREPEAT = 2.0\n" in conftest
    (folder / "conftest.py").write_text(conftest.replace("\nREPEAT = 2.0\n", f"\nREPEAT = {repeat}\n"), "utf-8")
    (folder / "test_it.py").write_text(source, "utf-8")
    markers = ["[pytest]", "markers =", "    timeout(seconds): limit", "    uvloop: loop"]
    (folder / "pytest.ini").write_text("\n".join(markers) + "\n", "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


HANGING = """
import asyncio, threading, time
import pytest, uvloop

@pytest.mark.timeout(0.5)
def test_thread():
    def stuck_in_thread():
        event.wait()
    event = threading.Event()
    threading.Thread(target=stuck_in_thread, daemon=True).start()
    event.wait()

@pytest.mark.timeout(0.5)
async def test_asyncio():
    async def stuck_in_asyncio():
        await asyncio.Event().wait()
    await asyncio.create_task(stuck_in_asyncio())

@pytest.mark.uvloop
@pytest.mark.timeout(0.5)
async def test_uvloop():
    async def stuck_in_uvloop():
        await asyncio.Event().wait()
    await asyncio.create_task(stuck_in_uvloop())

@pytest.mark.uvloop
@pytest.mark.timeout(0.5)
async def test_blocked_loop():
    def stuck_in_blocked_loop():
        time.sleep(60)
    stuck_in_blocked_loop()

@pytest.mark.timeout(0.5)
def test_swallower():
    def stuck_in_swallower():
        try:
            time.sleep(60)
        except BaseException:
            pass
        time.sleep(60)
    stuck_in_swallower()

def test_next():
    assert True
"""


def test_a_hanging_test_fails_with_every_stack_and_the_next_one_runs(tmp_path):
    result = run_pytest(tmp_path, HANGING, repeat=0.5)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "5 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    for kind in ("thread", "asyncio", "uvloop", "blocked_loop", "swallower"):
        shown, _, stacks = result.stderr.partition(f"test_{kind} is still running after 0.5 s")
        assert stacks, result.stderr
        assert f"stuck_in_{kind}" in stacks
        assert f"stuck_in_{kind}" not in shown
    assert result.stdout.count("timeout: still running after 0.5 s (every stack is on standard error)") >= 5


def test_async_tests_really_run_on_the_loop_they_ask_for(tmp_path):
    source = """
import asyncio, pytest

async def test_plain(tmp_path):
    assert type(asyncio.get_running_loop()).__module__.startswith("asyncio")

@pytest.mark.uvloop
async def test_uvloop():
    assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")

async def test_fails():
    await asyncio.sleep(0)
    assert False, "seen"
"""
    result = run_pytest(tmp_path, source)
    assert "1 failed, 2 passed" in result.stdout, result.stdout + result.stderr
    assert "seen" in result.stdout
