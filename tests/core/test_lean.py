"""msgspec without `typing_extensions`: the same for whoever uses it."""

from __future__ import annotations

import subprocess
import sys
import threading
import typing

import pytest

from stageflow.contracts.checker import compile_contract
from stageflow.core.kinds import SURE
from stageflow.core.lean import _Without

typing_extensions = pytest.importorskip("typing_extensions")

IMPORTS = """
import sys
from stageflow import PipelineBuilder
assert "msgspec" in sys.modules and "typing_extensions" not in sys.modules
assert not any("Without" in type(finder).__name__ for finder in sys.meta_path)
import msgspec, typing_extensions
class Named(typing_extensions.TypedDict):
    name: str
    age: typing_extensions.NotRequired[int]
class Held(msgspec.Struct):
    named: Named
    text: "typing_extensions.Annotated[str, msgspec.Meta(max_length=3)]" = ""
print(msgspec.json.decode(b'{"named": {"name": "Ada"}, "text": "abc"}', type=Held))
try:
    msgspec.json.decode(b'{"named": {"age": 1}}', type=Held)
except msgspec.ValidationError as error:
    print(error)
"""


def run(text: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_msgspec_takes_from_there_is_what_typing_has() -> None:
    assert typing_extensions.Required is typing.Required
    assert typing_extensions.NotRequired is typing.NotRequired

    class Kind(typing.TypedDict):
        one: typing.Required[int]
        two: typing.NotRequired[typing.Annotated[str, "noted"]]

    def ours(number: int | None = None) -> typing.Annotated[str, 1]: ...

    for one in (Kind, ours):
        assert typing_extensions.get_type_hints(one, include_extras=True) == typing.get_type_hints(
            one, include_extras=True
        )


def test_the_first_import_leaves_it_out_and_types_from_there_work() -> None:
    decoded, refused = run(IMPORTS)
    assert decoded == "Held(named={'name': 'Ada'}, text='abc')"
    assert "missing required field `name`" in refused


def test_another_thread_may_import_it_meanwhile() -> None:
    without = _Without()
    with pytest.raises(ModuleNotFoundError):
        without.find_spec("typing_extensions")
    without.find_spec("typing")
    found = []
    other = threading.Thread(target=lambda: found.append(without.find_spec("typing_extensions")))
    other.start()
    other.join()
    assert found == [None]


def test_what_is_known_without_a_checker_is_what_the_checker_says() -> None:
    for annotation, classes in SURE.items():
        assert compile_contract(annotation, exact=True).sure == classes
