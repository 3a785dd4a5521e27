"""MODULE:GRAPH: what may stand there, and what is said when it names nothing."""

import sys
import textwrap

import pytest

from stageflow import PipelineValidationError
from stageflow.cli.loading import TargetError, load_graph

SHOP = """
    from stageflow import PipelineBuilder

    def price(item: str) -> int:
        return len(item)

    builder = PipelineBuilder("shop").stage("price", price)
    graph = builder.build()
    number = 7

    def make():
        return PipelineBuilder("made").stage("price", price)

    def needs(argument):
        return graph

    class Menu:
        inner = graph
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; modules loaded from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("shop:graph", "shop"),
        ("shop.py:graph", "shop"),
        ("shop", "shop"),
        ("./shop.py", "shop"),
        ("shop:builder", "shop"),
        ("shop:make", "made"),
        ("shop:Menu.inner", "shop"),
    ],
)
def test_a_graph_may_be_named_in_many_ways(folder, target, name):
    write(folder / "shop.py", SHOP)
    assert load_graph(target).name == name


def test_a_file_in_a_package_keeps_its_relative_imports(folder):
    write(folder / "store" / "__init__.py", "")
    write(folder / "store" / "prices.py", "def price(item): return 1")
    write(
        folder / "store" / "shop.py",
        SHOP.replace("def price(item: str)", "from .prices import price\n    def other(x)"),
    )
    assert load_graph("store/shop.py:graph").name == "shop"
    assert "store.shop" in sys.modules


@pytest.mark.parametrize("name", ["json.py", "my-shop.py"])
def test_a_file_whose_name_is_taken_or_no_identifier_is_loaded_all_the_same(folder, name):
    import json

    write(folder / name, SHOP)
    assert load_graph(f"{name}:graph").name == "shop"
    assert sys.modules["json"] is json


def test_the_only_graph_is_found_and_several_are_listed(folder):
    write(
        folder / "one.py",
        SHOP.replace("graph = builder.build()", "other = graph_ = builder.build()").replace(
            "inner = graph", "inner = 1"
        ),
    )
    assert load_graph("one.py").name == "shop"
    write(
        folder / "two.py",
        SHOP.replace("graph = ", "first = ").replace("inner = graph", "inner = 1") + "\n    second = make().build()\n",
    )
    with pytest.raises(TargetError, match=r"two\.py defines several graphs\n.*first, second"):
        load_graph("two.py")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("shpo:graph", r"there is no module 'shpo'\n.*'shop'"),
        ("shpo.py:graph", r"there is no file 'shpo\.py'\n.*'shop\.py'"),
        ("shop:grph", r"shop has no 'grph'\n.*'graph'"),
        ("shop:number", r"shop:number is an int, not a graph"),
        ("shop:needs", r"calling shop:needs failed.*\n.*takes no arguments"),
        ("empty:graph", r"empty has no 'graph'\n.*no graph at all"),
        ("empty", r"empty defines no graph"),
        ("shop:", r"names no graph after the colon"),
        (":graph", r"names no module"),
        ("not a module:graph", r"neither a module name nor a file"),
        ("store/:graph", r"is a folder"),
        ("broken:graph", r"broken cannot be imported: ZeroDivisionError: division by zero \(.*broken\.py, line 2\)"),
        ("syntax.py:graph", r"syntax\.py cannot be imported: .* \(.*syntax\.py, line 2\)"),
        ("exits.py", r"exits\.py cannot be imported: SystemExit.*\n.*__main__"),
        ("needy:graph", r"needy cannot be imported: ModuleNotFoundError.*\n.*'surely_not_installed'"),
        ("shop.py.graph:graph", r"there is no module"),
    ],
)
def test_what_names_no_graph_is_explained(folder, target, message):
    write(folder / "shop.py", SHOP)
    write(folder / "store" / "readme.txt", "")
    write(folder / "empty.py", "")
    write(folder / "broken.py", "\nx = 1 / 0\n")
    write(folder / "syntax.py", "\nx = (1\n")
    write(folder / "exits.py", "import sys\nsys.exit(3)\n")
    write(folder / "needy.py", "import surely_not_installed\n")
    with pytest.raises(TargetError, match=message):
        load_graph(target)


def test_a_pipeline_that_cannot_be_built_speaks_for_itself(folder):
    write(folder / "bad.py", "from stageflow import PipelineBuilder\ngraph = PipelineBuilder('p').build()\n")
    with pytest.raises(PipelineValidationError, match="has no stages"):
        load_graph("bad.py")
