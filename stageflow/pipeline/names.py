"""Which names are allowed, and which existing name a mistyped one probably means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: above this many candidates only those of about the same length and first letter are compared: difflib takes ~10 us
#: each
_MANY: Final = 2_000
MAX_LENGTH: Final = 200


def nearest(name: str, candidates: Iterable[str], *, limit: int = 3) -> tuple[str, ...]:
    """The candidates most like `name`, best first; none when nothing is near."""
    import difflib  # for mistakes only

    known = list(candidates)
    if len(known) > _MANY:
        known = [c for c in known if abs(len(c) - len(name)) <= 2 and c[:2] == name[:2]][:_MANY]
    found = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if not found:
        folded = {candidate.casefold(): candidate for candidate in known}
        found = [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, n=limit, cutoff=0.6)]
    return tuple(found)


def did_you_mean(name: str, candidates: Iterable[str], *, what: str = "Known") -> str:
    """A sentence that names the nearest candidates, or all of them when there are few, or nothing."""
    known = list(candidates)
    near = nearest(name, known)
    if near:
        return f"Did you mean {' or '.join(repr(one) for one in near)}?"
    if not known:
        return ""
    shown = ", ".join(repr(one) for one in known[:8]) + (", ..." if len(known) > 8 else "")
    return f"{what}: {shown}."


def name_problem(name: object) -> tuple[str, str] | None:
    """Why `name` cannot name a stage, and what to do; None when it can."""
    if not isinstance(name, str):
        return f"a stage name must be text, not {type(name).__name__}", "Give the name as a string."
    if name.isidentifier() and name.isascii():  # the common case, decided without looking at each character
        if name == "ctx":
            return "a stage cannot be called 'ctx'", "That name is taken by the stage's context; choose another."
        if len(name) <= MAX_LENGTH:
            return None
    if not name.strip():
        return f"the stage name {name!r} is blank", "Give the stage a name of 1 to 200 printable characters."
    if name != name.strip():
        return f"the stage name {name!r} begins or ends with a blank", f"Write {name.strip()!r}."
    if len(name) > MAX_LENGTH:
        return f"the stage name {name[:40]!r}... has {len(name)} characters", f"Use at most {MAX_LENGTH}."
    if "/" in name:
        return (
            f"the stage name {name!r} holds '/'",
            f"'/' joins a subpipeline and its stages; write {name.replace('/', '-')!r}.",
        )
    if not name.isprintable():
        return f"the stage name {name!r} holds characters that cannot be printed", "Use printable characters only."
    return None
