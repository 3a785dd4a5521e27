"""`@stage`: notes what a runner asks for on the runner itself, which stays the same object.

The same object, because a wrapper would no longer pickle by reference ("not the same object as module.name").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import UNSET, StageKind
from stageflow.core.stage import MARK
from stageflow.pipeline.policies import PolicyPool, check_keywords

R = TypeVar("R")
_pool = PolicyPool()


@overload
def stage(runner: R, /) -> R: ...
@overload
def stage(
    *,
    kind: StageKind | str | None = ...,
    name: str | None = ...,
    inputs: Mapping[str, str | None] | None = ...,
    **policies: Any,
) -> Callable[[R], R]: ...
def stage(
    runner: Any = UNSET,
    /,
    *,
    kind: StageKind | str | None = None,
    name: str | None = None,
    inputs: Mapping[str, str | None] | None = None,
    **policies: Any,
) -> Any:
    """Set what the builder will use for this runner wherever a builder call says nothing else.

    Returns the runner itself.

    Works bare and with keywords. `name` serves where the builder is given no name; `inputs` renames parameters. Every
    policy of the builder is accepted.

    Raises:
        DefinitionError: unknown keyword, impossible value, or a runner that takes no attributes (a builtin, say).
    """
    where = "@stage"
    check_keywords(policies, where=where, also=("kind", "name", "inputs"))
    _pool.make(policies, where=where)
    keywords: dict[str, Any] = dict(policies)
    if kind is not None:
        keywords["kind"] = to_kind(kind, where=where)
    if name is not None:
        keywords["name"] = name
    if inputs is not None:
        keywords["inputs"] = dict(inputs)

    def mark(target: Any) -> Any:
        try:
            setattr(target, MARK, keywords)
        except (AttributeError, TypeError):
            raise DefinitionError(
                f"@stage cannot mark {target!r}: it takes no attributes",
                hint="Give these keywords on the builder call instead.",
            ) from None
        return target

    return mark if runner is UNSET else mark(runner)


def to_kind(kind: StageKind | str, *, where: str) -> StageKind:
    """`kind` as a StageKind; text is accepted. Raises DefinitionError with the known kinds."""
    try:
        return StageKind(kind)
    except ValueError:
        known = ", ".join(StageKind)
        raise DefinitionError(f"{where}: there is no stage kind {kind!r}", hint=f"Kinds: {known}.", kind=kind) from None


def marked(runner: Any) -> dict[str, Any]:
    """The keywords `@stage` left on the runner, or on its class for an instance; {} without a mark."""
    found = getattr(runner, MARK, None)
    return found if isinstance(found, dict) else {}
