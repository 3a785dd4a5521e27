"""`MODULE:GRAPH` to a compiled graph: imports what the user names and says in one message what is wrong with it."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from stageflow.core.errors import DefinitionError, StageflowError
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.names import did_you_mean


class TargetError(DefinitionError):
    """What stands for MODULE:GRAPH names no graph."""

    code = "SF-TARGET"


def load_graph(target: str) -> StageGraph:
    """The graph that `target` names.

    MODULE is a dotted name (looked up from the current folder first) or the path of a .py file. GRAPH is a StageGraph,
    a PipelineBuilder (which is built), or a function without arguments that returns either; left out, it is `graph`,
    or the only graph of the module. Raises TargetError, or the errors of building.
    """
    place, colon, name = _split(target)
    if not place:
        raise TargetError(
            f"{target!r} names no module", hint="Write MODULE:GRAPH, such as shop.pipeline:graph or shop.py:graph."
        )
    if colon and not name:
        raise TargetError(f"{target!r} names no graph after the colon", hint="Write MODULE:GRAPH, or MODULE alone.")
    module = _load_module(place)
    return _as_graph(_find(module, name, place) if name else _only(module, place), f"{place}:{name}" if name else place)


def _split(target: str) -> tuple[str, str, str]:
    """At the last colon, unless that is the one of a Windows drive."""
    place, colon, name = target.rpartition(":")
    if not colon or "/" in name or "\\" in name:
        return target, "", ""
    return place, colon, name


def _load_module(place: str) -> ModuleType:
    path = Path(place)
    if place.endswith(".py") or os.sep in place or path.is_file():
        return _load_file(path)
    if not all(part.isidentifier() for part in place.split(".")):
        raise TargetError(
            f"{place!r} is neither a module name nor a file", hint="Write shop.pipeline:graph or shop.py:graph."
        )
    _look_first_in(Path.cwd())
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            known = {child.stem for child in Path.cwd().glob("*.py")} | {
                child.parent.name for child in Path.cwd().glob("*/__init__.py")
            }
            hint = did_you_mean(place, sorted(known), what="Modules in this folder")
            if Path(f"{place}.py").is_file():
                hint = f"There is a file {place}.py: write {place}.py:GRAPH."
            raise TargetError(
                f"there is no module {error.name!r}", hint=hint or "Is it installed, and is this its folder?"
            ) from error
        raise _import_failed(place, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(place, error) from error


def _load_file(path: Path) -> ModuleType:
    if path.is_dir():
        raise TargetError(f"{str(path)!r} is a folder", hint="Name a .py file, or the dotted name of a module.")
    if not path.is_file():
        near = did_you_mean(
            path.name, sorted(other.name for other in path.parent.glob("*.py")), what="Python files there"
        )
        raise TargetError(f"there is no file {str(path)!r}", hint=near or None)
    if not os.access(path, os.R_OK):
        raise TargetError(f"the file {str(path)!r} cannot be read", hint="Check its permissions.")
    full = path.resolve()
    # A file of a package keeps its full name, so that its relative imports work.
    top, name = full.parent, full.stem
    while (top / "__init__.py").is_file():
        name, top = f"{top.name}.{name}", top.parent
    _look_first_in(top)
    try:
        if name.isidentifier() or "." in name:
            known = sys.modules.get(name)
            found = known or importlib.util.find_spec(name)
            origin = getattr(found, "__file__", None) or getattr(found, "origin", None)
            if origin is not None and Path(origin).resolve() == full:
                return import_module(name)
        return _load_alone(full)
    except (Exception, SystemExit) as error:
        raise _import_failed(str(path), error) from error


def _load_alone(path: Path) -> ModuleType:
    """Load a file whose name is taken or no identifier. Workers cannot import it, so its functions travel by value."""
    import cloudpickle

    name = f"_stageflow_script_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{str(path)!r} is no Python file", hint="Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    cloudpickle.register_pickle_by_value(module)
    return module


def _look_first_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def _import_failed(place: str, error: BaseException) -> StageflowError:
    """One message for whatever the user's module raised; a pipeline that could not be built speaks for itself."""
    if isinstance(error, StageflowError):
        return error
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}"
        return TargetError(
            f"{place} cannot be imported: {error.msg} ({where})", hint=(error.text or "").strip() or None
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename and f.filename != __file__
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    hint = None
    if isinstance(error, SystemExit):
        hint = "The module ends the program when it is imported: put that under `if __name__ == '__main__':`."
    elif isinstance(error, ModuleNotFoundError):
        hint = f"It imports {error.name!r}, which is not installed here."
    return TargetError(f"{place} cannot be imported: {what}{where}", hint=hint)


def _graphs(module: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, StageGraph | PipelineBuilder) and not name.startswith("_")
    }


def _find(module: ModuleType, name: str, place: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            graphs = _graphs(module)
            hint = did_you_mean(name, graphs or vars(module), what="Graphs there") if graphs else ""
            raise TargetError(
                f"{place} has no {name!r}", hint=hint or "It defines no graph at all: does it call .build()?"
            )
        found = getattr(found, part)
    return found


def _only(module: ModuleType, place: str) -> Any:
    graphs = _graphs(module)
    if "graph" in vars(module):
        return vars(module)["graph"]
    built = {name: value for name, value in graphs.items() if isinstance(value, StageGraph)} or graphs
    if len({id(value) for value in built.values()}) == 1:
        return next(iter(built.values()))
    if not built:
        raise TargetError(f"{place} defines no graph", hint="Name a function that returns one: MODULE:FUNCTION.")
    raise TargetError(f"{place} defines several graphs", hint=f"Write {place}:NAME with one of {', '.join(built)}.")


def _as_graph(found: Any, target: str) -> StageGraph:
    if callable(found) and not isinstance(found, StageGraph | PipelineBuilder):
        try:
            found = found()
        except StageflowError:
            raise
        except Exception as error:
            hint = "GRAPH may be a function only if it takes no arguments." if isinstance(error, TypeError) else None
            raise TargetError(f"calling {target} failed: {type(error).__name__}: {error}", hint=hint) from error
    if isinstance(found, PipelineBuilder):
        found = found.build()
    if not isinstance(found, StageGraph):
        raise TargetError(
            f"{target} is {_article(type(found).__name__)}, not a graph",
            hint="Name what PipelineBuilder(...).build() returns, a PipelineBuilder, or a function that returns one.",
        )
    return found


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
