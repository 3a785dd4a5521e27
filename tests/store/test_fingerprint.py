"""The version of code: sees helpers, constants and closures; not comments, docstrings or places."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from stageflow.store.fingerprint import code_fingerprint, explain_fingerprint

BASE = '''
"""Module."""
import functools
import json
LIMIT = 3
TABLE = {"a": 1}

def helper(x):
    """Old."""
    return x + LIMIT

class Tool:
    size = 4
    def use(self, x):
        return helper(x) * self.size

def stage(x, k=1):
    # comment
    return Tool().use(x) + k + len(json.dumps(TABLE))

class Stage:
    def __init__(self, n=1): self.n = n
    def execute(self, ctx): return helper(self.n)

def make(n):
    def inner(x): return helper(x) + n
    return inner

@functools.lru_cache
def cached(x): return helper(x)

recursive = lambda x: recursive(x - 1) if x else helper(x)
'''


@pytest.fixture
def load(tmp_path: Path):
    def loader(source: str = BASE) -> ModuleType:
        path = tmp_path / "project_code.py"
        path.write_text(source, "utf-8")
        spec = importlib.util.spec_from_file_location("project_code", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["project_code"] = module
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module

    yield loader
    sys.modules.pop("project_code", None)


SAME = [
    ("comment", "# comment", "# other comment\n    # and more"),
    ("docstring", '"""Old."""', '"""New and much longer."""'),
    ("no docstring", '    """Old."""\n', ""),
    ("line numbers", "LIMIT = 3", "\n\n\nLIMIT = 3"),
    ("unused", "LIMIT = 3", "LIMIT = 3\nUNUSED = 4"),
]
OTHER = [
    ("body", "+ k +", "- k +"),
    ("default", "k=1", "k=2"),
    ("constant of a helper", "LIMIT = 3", "LIMIT = 4"),
    ("helper", "return x + LIMIT", "return x - LIMIT"),
    ("class attribute", "size = 4", "size = 5"),
    ("method", "* self.size", "/ self.size"),
    ("table", '{"a": 1}', '{"a": 2}'),
    ("attribute read of a module", "json.dumps", "json.loads"),
]


@pytest.mark.parametrize(("old", "new"), [c[1:] for c in SAME], ids=[c[0] for c in SAME])
def test_what_changes_nothing_does_not_count(load, old, new):
    assert old in BASE
    before = code_fingerprint(load().stage)
    assert code_fingerprint(load(BASE.replace(old, new)).stage) == before


@pytest.mark.parametrize(("old", "new"), [c[1:] for c in OTHER], ids=[c[0] for c in OTHER])
def test_what_changes_the_work_counts(load, old, new):
    assert old in BASE
    before = code_fingerprint(load().stage)
    assert code_fingerprint(load(BASE.replace(old, new)).stage) != before


def test_every_form_of_runner_has_a_version_that_sees_its_helper(load):
    forms = {
        "class": lambda m: m.Stage,
        "instance": lambda m: m.Stage(2),
        "method": lambda m: m.Stage(2).execute,
        "partial": lambda m: functools.partial(m.stage, k=5),
        "closure": lambda m: m.make(3),
        "cached": lambda m: m.cached,
        "recursive": lambda m: m.recursive,
    }
    before = {name: code_fingerprint(form(load())) for name, form in forms.items()}
    again = {name: code_fingerprint(form(load())) for name, form in forms.items()}
    changed = load(BASE.replace("return x + LIMIT", "return x * LIMIT"))
    after = {name: code_fingerprint(form(changed)) for name, form in forms.items()}
    assert before == again
    assert {name for name in forms if before[name] == after[name]} == set()


def test_state_and_bound_values_count(load):
    module = load()
    assert code_fingerprint(module.Stage(1)) != code_fingerprint(module.Stage(2))
    assert code_fingerprint(module.make(1)) != code_fingerprint(module.make(2))
    assert code_fingerprint(functools.partial(module.stage, k=1)) != code_fingerprint(
        functools.partial(module.stage, k=2)
    )


def test_builtins_and_installed_code_are_named_not_read():
    assert code_fingerprint(len) == code_fingerprint(len) != code_fingerprint(max)
    assert code_fingerprint(int) != code_fingerprint(dict)
    assert list(explain_fingerprint(functools.reduce)) == ["builtin _functools:reduce"]


def test_the_explanation_says_what_changed(load):
    before = explain_fingerprint(load().stage)
    after = explain_fingerprint(load(BASE.replace("return x + LIMIT", "return x * LIMIT")).stage)
    assert {name for name in before if before[name] != after[name]} == {"function project_code:helper"}


def test_it_is_the_same_in_another_process(load, tmp_path):
    here = code_fingerprint(load().stage)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import project_code;"
        "from stageflow.store.fingerprint import code_fingerprint; print(code_fingerprint(project_code.stage))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == here
