"""How to mend each kind of problem, by its code."""

from __future__ import annotations

import threading
from typing import Any, Final

import msgspec

_DOC: Final = "stageflow/contracts/README.md#"


class ContractSuggestion(msgspec.Struct, frozen=True):
    """What a code means and the steps that mend it."""

    code: str
    title: str
    summary: str
    fix_steps: tuple[str, ...] = ()
    doc_url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {**msgspec.structs.asdict(self), "fix_steps": list(self.fix_steps)}


def _known(code: str, title: str, summary: str, *steps: str) -> tuple[str, ContractSuggestion]:
    return code, ContractSuggestion(code, title, summary, steps, _DOC + code.lower())


_KNOWN: Final = dict(
    (
        _known(
            "CONTRACT-001-VALIDATION",
            "Invalid definition",
            "Something about the pipeline is wrong; the message names it.",
            "Read every problem of the error: all are reported together.",
            "Correct the named stage and build again.",
        ),
        _known(
            "CONTRACT-002-SCHEMA",
            "Value breaks its contract",
            "A stage returned something other than its annotation or contract= says.",
            "Look at the path in the message: it names the offending field.",
            "Correct the value, or describe it differently.",
        ),
        _known(
            "CONTRACT-003-VERSION",
            "Contract version conflict",
            "A version is unknown, or exists with another schema.",
            "Register a changed schema under a new version.",
            "List the known versions with `ContractRegistry.list(stage)`.",
        ),
        _known(
            "CONTRACT-004-CYCLE",
            "Stages wait for each other",
            "The dependencies form a loop, so none of its stages could ever start.",
            "Follow the path in the message.",
            "Remove one of its edges, or split a stage into the part before and the part after.",
        ),
        _known(
            "CONTRACT-004-MISSING_DEP",
            "Unknown dependency",
            "A stage depends on a name that no stage has.",
            "Check the spelling; the message names the nearest stage.",
            "Add the missing stage, or declare the name as an input of the pipeline.",
        ),
        _known(
            "CONTRACT-004-SELF_DEP",
            "Stage depends on itself",
            "A stage names itself in after= or inputs=.",
            "Remove the stage's own name from its dependencies.",
            "To work again on its own result, use a retry policy or a guard.",
        ),
        _known(
            "CONTRACT-004-CONFLICT",
            "Conflicting stages",
            "Two stages have one name but differ.",
            "Rename one of them.",
            "When composing, use the same runner, dependencies and policies on both sides.",
        ),
        _known(
            "CONTRACT-004-ORPHAN",
            "Stage without connection",
            "A stage neither uses another nor is used by one.",
            "Connect it through a parameter, inputs= or after=.",
            "Remove it if it is not needed.",
        ),
        _known(
            "CONTRACT-004-EMPTY",
            "Empty pipeline",
            "The pipeline has no stage.",
            "Add at least one stage before `build()`.",
        ),
    )
)


def get_contract_suggestion(code: str) -> ContractSuggestion | None:
    """What Stageflow itself knows about a code, or None."""
    return _KNOWN.get(code)


class SuggestionRegistry:
    """The known suggestions, and one's own. Thread-safe; each registry is independent."""

    def __init__(self) -> None:
        self._entries = dict(_KNOWN)
        self._lock = threading.Lock()

    def register(self, suggestion: ContractSuggestion) -> None:
        """Add a suggestion, or replace the one of the same code."""
        with self._lock:
            self._entries[suggestion.code] = suggestion

    def get(self, code: str) -> ContractSuggestion | None:
        """The suggestion for a code, or None."""
        return self._entries.get(code)

    def list(self) -> list[ContractSuggestion]:
        """All, sorted by code."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda suggestion: suggestion.code)

    def __len__(self) -> int:
        return len(self._entries)
