"""Where a stage runs: a table with one reason per row; the first row that fits wins. `stageflow plan` prints the row.

The lane is decided from the runner alone, before any value exists.
"""

from __future__ import annotations

import importlib
import pickle
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import Lane, StageKind
from stageflow.pipeline.names import did_you_mean
from stageflow.pipeline.spec import StageSpec

#: above this many bytes the form in which a callable is sent to each worker is worth a line in the plan
BIG_SHIPMENT: Final = 10_000_000
_BLOCKING: Final = frozenset({StageKind.GUARD, StageKind.AGENT, StageKind.ENRICH, StageKind.WORK})


class Traits(NamedTuple):
    """What the table looks at."""

    spec: StageSpec
    overrides: Mapping[str, str]
    forced: str | None  #: a lane for the whole run

    @property
    def unshippable(self) -> str | None:
        """Why the runner cannot cross to another process; None when it can."""
        return shippable(self.spec.runner)


class Rule(NamedTuple):
    """One row. `lane` None means that `choose` says which."""

    when: Callable[[Traits], bool]
    lane: Lane | None
    why: str
    choose: Callable[[Traits], str] | None = None
    detail: Callable[[Traits], str | None] | None = None


class Placement(msgspec.Struct, frozen=True):
    """A lane and the reason for it."""

    lane: Lane
    why: str


def _is_subpipeline(t: Traits) -> bool:
    return t.spec.form == "graph"


RULES: Final[Sequence[Rule]] = (
    Rule(_is_subpipeline, Lane.ASYNC, "a subpipeline's own stages are placed one by one; the stage itself only waits"),
    Rule(lambda t: t.forced is not None, None, "this run has one lane for everything", lambda t: str(t.forced)),
    Rule(
        lambda t: t.spec.policies.executor is not None,
        None,
        "the author decided: executor=",
        lambda t: str(t.spec.policies.executor),
    ),
    Rule(
        lambda t: t.spec.kind in t.overrides,
        None,
        "the operator decided: placement=",
        lambda t: str(t.overrides[t.spec.kind]),
    ),
    Rule(lambda t: t.spec.is_async, Lane.ASYNC, "a coroutine yields at its waits"),
    Rule(lambda t: t.spec.kind is StageKind.ROUTE, Lane.ASYNC, "a cheap decision, made on the loop"),
    Rule(lambda t: t.spec.kind in _BLOCKING, Lane.THREAD, "blocking calls release the GIL"),
    Rule(lambda t: t.unshippable is None, Lane.PROCESS, "CPU-bound work needs its own interpreter"),
    Rule(lambda t: True, Lane.THREAD, "cannot cross to another process", None, lambda t: t.unshippable),
)


def place(
    spec: StageSpec,
    *,
    overrides: Mapping[Any, Any] | None = None,
    lane: str | None = None,
    rules: Sequence[Rule] = RULES,
) -> Placement:
    """The lane of one stage and why. `overrides` maps kinds to lanes; `lane` forces every stage of a run into one."""
    traits = Traits(spec, overrides or {}, lane)
    rule = next(rule for rule in rules if rule.when(traits))
    chosen = rule.lane if rule.choose is None else to_lane(rule.choose(traits))
    assert chosen is not None
    detail = rule.detail(traits) if rule.detail is not None else None
    why = rule.why if detail is None else f"{rule.why}: {detail}"
    return Placement(chosen, why)


def to_lane(lane: str) -> Lane:
    """`lane` as a Lane; DefinitionError with the nearest name for anything else."""
    try:
        return Lane(lane)
    except ValueError:
        hint = did_you_mean(str(lane), [str(one) for one in Lane], what="Lanes")
        raise DefinitionError(f"there is no lane {lane!r}", hint=hint, lane=lane) from None


# ---------------------------------------------------------------- can it be sent

#: id(runner) -> (why not, or None; bytes sent by value); an entry goes with its runner, before the id can be another's
_known: dict[int, tuple[str | None, int]] = {}


def shippable(runner: Any) -> str | None:
    """None when `runner` can be sent to another process, else a message that names the object that cannot.

    By reference where it can be imported, else by value.
    """
    return _examine(runner)[0]


def shipped_bytes(runner: Any) -> int:
    """How many bytes each worker is sent for `runner`; 0 when it is sent by reference or not at all."""
    return _examine(runner)[1]


def _examine(runner: Any) -> tuple[str | None, int]:
    key = id(runner)
    found = _known.get(key)
    if found is None:
        found = (None, 0) if importable(runner) else _by_value(runner)
        try:
            weakref.finalize(runner, _known.pop, key, None).atexit = False
        except TypeError:
            return found  # cannot be watched, so its id cannot be trusted later
        _known[key] = found
    return found


def importable(runner: Any) -> bool:
    """True when `module.qualname` of `runner` is `runner` itself in any process: then its name is enough."""
    module, qualname = getattr(runner, "__module__", None), getattr(runner, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module == "__main__" or "<" in qualname:
        return False
    found: Any = sys.modules.get(module)
    if found is None or getattr(getattr(found, "__spec__", None), "name", module) != module:
        return False
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is runner


def _by_value(runner: Any) -> tuple[str | None, int]:
    cloudpickle = importlib.import_module("cloudpickle")
    try:
        return None, len(cloudpickle.dumps(runner))
    except Exception as error:
        return _blame(runner, error), 0


def _blame(runner: Any, error: Exception) -> str:
    """Name the smallest part of `runner` that will not go, as a path of attributes."""
    path, thing, seen = _label(runner), runner, {id(runner)}
    for _ in range(8):
        step = next(((name, part) for name, part in _parts(thing) if id(part) not in seen and not _goes(part)), None)
        if step is None:
            break
        path, thing = f"{path} -> {step[0]}", step[1]
        seen.add(id(thing))
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} ({type(thing).__qualname__}) cannot be sent: {said}"


def _goes(part: Any) -> bool:
    if isinstance(part, type | str | bytes | int | float | bool | None):
        return True
    try:
        importlib.import_module("cloudpickle").dumps(part, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:
        return False
    return True


def _parts(thing: Any) -> list[tuple[str, Any]]:
    """What an object is made of, with a name for each part."""
    parts: list[tuple[str, Any]] = []
    if isinstance(thing, Mapping):
        return [(f"[{key!r}]", value) for key, value in list(thing.items())[:100]]
    if isinstance(thing, list | tuple | set | frozenset):
        return [(f"[{i}]", value) for i, value in enumerate(list(thing)[:100])]
    for attribute in ("__self__", "func", "args", "keywords", "__wrapped__"):
        if hasattr(thing, attribute) and not isinstance(thing, type):
            parts.append((attribute, getattr(thing, attribute)))
    code, cells = getattr(thing, "__code__", None), getattr(thing, "__closure__", None) or ()
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        try:
            parts.append((f"variable {name!r}", cell.cell_contents))
        except ValueError:
            continue
    scope = getattr(thing, "__globals__", {})
    parts.extend((f"global {name!r}", scope[name]) for name in getattr(code, "co_names", ()) if name in scope)
    for i, default in enumerate(getattr(thing, "__defaults__", None) or ()):
        parts.append((f"default {i + 1}", default))
    if not hasattr(thing, "__code__"):
        parts.extend((f".{name}", value) for name, value in getattr(thing, "__dict__", {}).items())
    return parts


def _label(runner: Any) -> str:
    text = getattr(runner, "__qualname__", None)
    return text if isinstance(text, str) else f"{type(runner).__qualname__} object"
