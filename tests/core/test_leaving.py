"""The end of an interpreter in which an engine was imported: everything is finalized, as without."""

from __future__ import annotations

import subprocess
import sys

ENDS = """
import atexit, gc, os, sys
atexit.register(lambda: os.write(1, f"collects {gc.isenabled()}\\n".encode()))  # runs after the engine's
import stageflow.runtime.engine
if "off" in sys.argv:
    gc.disable()

class Loud:
    def __init__(self, name):
        self.name, self.me = name, self

    def __del__(self, write=os.write):
        try:
            import colorsys
            imports = "imports"
        except ImportError:
            imports = "-"
        write(1, f"{self.name} {imports}\\n".encode())

kept = Loud("kept")
old = Loud("old")
gc.collect()
del old
Loud("recent")
assert gc.isenabled() != ("off" in sys.argv)
"""


def ends(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", ENDS, *arguments], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_recent_garbage_is_finalized_while_all_is_there_and_the_rest_with_what_is_in_use() -> None:
    first, second, *others = ends()
    assert (first, second) == ("recent imports", "collects False")
    assert sorted(others) == ["kept -", "old -"]


def test_who_has_switched_the_collector_off_is_not_made_to_collect() -> None:
    first, *others = ends("off")
    assert first == "collects False"
    assert sorted(others) == ["kept -", "old -", "recent -"]
