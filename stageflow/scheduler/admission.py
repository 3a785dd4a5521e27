"""Limits beyond slots: concurrency and rate of a stage, tokens and memory shared by stages. All or nothing: whoever
may not start
waits at the one limit that refused it, and is looked at again when that limit has room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stageflow.core.errors import DefinitionError
from stageflow.pipeline.policies import Policies


class Admission:
    """The books of all limits of one engine loop."""

    def __init__(self, tokens: Mapping[str, int], memory: int = 0) -> None:
        self.free_tokens: dict[str, list[int]] = {name: list(range(count)) for name, count in tokens.items()}
        self.total_tokens = dict(tokens)
        self.memory = memory
        self.memory_used = 0
        self.busy: dict[tuple[int, int], int] = {}
        self.next_start: dict[tuple[int, int], float] = {}
        self.parked: dict[Any, list[Any]] = {}
        self.timers: dict[int, Callable[..., None]] = {}

    def check(self, stage: str, policies: Policies) -> None:
        """Raise DefinitionError where a stage asks for tokens that do not exist or more than there are."""
        if policies.resources is None:
            return
        for name, count in policies.resources.tokens.items():
            total = self.total_tokens.get(name)
            if total is None:
                known = ", ".join(sorted(self.total_tokens)) or "none"
                raise DefinitionError(
                    f"stage {stage!r} needs the token {name!r}, which the engine does not have (known: {known})",
                    hint=f"give the engine `tokens={{{name!r}: {count}}}`",
                )
            if count > total:
                raise DefinitionError(
                    f"stage {stage!r} needs {count} of token {name!r}; the engine has {total}",
                    hint="ask for fewer, or give the engine more",
                )

    def ask(self, layout: int, stage: int, policies: Policies, now: float) -> Any | None:
        """None when one more attempt may start now, else the limit that refuses: ("concurrency", key), ("rate", key),
        ..."""
        key = (layout, stage)
        if policies.concurrency is not None and self.busy.get(key, 0) >= policies.concurrency:
            return ("concurrency", key)
        if policies.rate is not None and now < self.next_start.get(key, 0.0) - 1e-9:
            return ("rate", key)
        resources = policies.resources
        if resources is not None:
            for name, count in resources.tokens.items():
                if len(self.free_tokens[name]) < count:
                    return ("token", name)
            need = resources.memory
            if need is not None and self.memory and self.memory_used and self.memory_used + int(need) > self.memory:
                return ("memory", None)
        return None

    def take(self, layout: int, stage: int, policies: Policies, now: float) -> dict[str, tuple[int, ...]] | None:
        """Hold what one attempt needs; the indices of the tokens it got."""
        key = (layout, stage)
        if policies.concurrency is not None:
            self.busy[key] = self.busy.get(key, 0) + 1
        if policies.rate is not None:
            # a bucket of one: starts are spaced evenly, never in bursts
            begin = max(now, self.next_start.get(key, 0.0))
            self.next_start[key] = begin + 1.0 / policies.rate.per_second
        held: dict[str, tuple[int, ...]] | None = None
        resources = policies.resources
        if resources is not None:
            if resources.tokens:
                held = {}
                for name, count in resources.tokens.items():
                    free = self.free_tokens[name]
                    held[name] = tuple(free[:count])
                    del free[:count]
            if resources.memory is not None:
                self.memory_used += int(resources.memory)
        return held

    def give_back(
        self, layout: int, stage: int, policies: Policies, held: Mapping[str, tuple[int, ...]] | None
    ) -> list[Any]:
        """Return what an attempt held; the limits that have room again."""
        key = (layout, stage)
        freed: list[Any] = []
        if policies.concurrency is not None:
            left = self.busy[key] - 1
            if left:
                self.busy[key] = left
            else:
                del self.busy[key]
            freed.append(("concurrency", key))
        if held:
            for name, indices in held.items():
                free = self.free_tokens[name]
                free.extend(indices)
                free.sort()
                freed.append(("token", name))
        resources = policies.resources
        if resources is not None and resources.memory is not None:
            self.memory_used -= int(resources.memory)
            freed.append(("memory", None))
        return freed

    def park(self, reason: Any, entry: Any) -> float | None:
        """Let an entry wait at `reason`; the time at which to look again, for a rate (once per limit)."""
        waiting = self.parked.setdefault(reason, [])
        waiting.append(entry)
        if reason[0] == "rate" and len(waiting) == 1:
            return self.next_start[reason[1]]
        return None

    def unpark(self, reason: Any) -> list[Any]:
        """Take out everything that waits at `reason`."""
        return self.parked.pop(reason, [])
