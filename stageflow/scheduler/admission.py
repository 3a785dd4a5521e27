"""Limits beyond slots: concurrency and rate of a stage; tokens, memory and cores shared by stages. All or nothing:
whoever may not start waits at the one limit that refused it, in order of priority, depth and age, and is woken when
that limit has room for it. As many are woken as can pass, so a completion costs the same however many wait.

Nobody overtakes at tokens, memory and cores but by priority, depth or age: who needs much is not starved by those who
need little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from math import ceil
from typing import Any, Final

from stageflow.core.errors import DefinitionError
from stageflow.pipeline.policies import Policies, Resources
from stageflow.scheduler.layout import Layout

#: kind of the limit, and which of that kind: ("token", name), ("concurrency", (layout, stage)), ("memory", None), ...
Limit = tuple[str, Any]
CLOSE: Final = 1e-9  # seconds: clocks are floats


class Admission:
    """The books of all limits of one engine loop. `memory` (bytes) and `cores` are what stages can reserve of
    (0 = not limited)."""

    def __init__(self, tokens: Mapping[str, int], memory: int = 0, cores: int = 0) -> None:
        self.free_tokens: dict[str, list[int]] = {name: list(range(count)) for name, count in tokens.items()}
        self.total_tokens = dict(tokens)
        self.memory = memory
        self.memory_used = 0
        self.cores = cores
        self.cores_used = 0.0
        self.busy: dict[tuple[int, int], int] = {}
        self.next_start: dict[tuple[int, int], float] = {}
        self.parked: dict[Limit, dict[str, list[Any]]] = {}  # limit -> lane -> heap of entries
        self.woken: dict[int, tuple[Limit, str, float]] = {}  # number of an entry on its way -> where it waited, need
        self.coming: dict[tuple[Limit, str], float] = {}  # what those on their way in a lane will take of a limit
        self.timed: set[Limit] = set()  # rates for which a timer is set
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

    def ask(self, lane: str, entry: Any, policies: Policies, now: float) -> Limit | None:
        """None when one more attempt of the stage of `entry` may start now, else the limit that refuses."""
        key = (entry[4].layout.key, entry[5])
        if policies.concurrency is not None and self.busy.get(key, 0) >= policies.concurrency:
            return ("concurrency", key)
        if policies.rate is not None and now < self.next_start.get(key, 0.0) - CLOSE:
            return ("rate", key)
        resources = policies.resources
        if resources is not None:
            for limit, need in _needs(resources, lane):
                if not self._fits(limit, need) or self._behind(limit, lane, entry):
                    return limit
        return None

    def _fits(self, limit: Limit, need: float) -> bool:
        """Whether a shared limit has room. Who needs more than there is may have it all, alone."""
        kind, name = limit
        if kind == "token":
            return len(self.free_tokens[name]) >= need
        if kind == "memory":
            return not self.memory or not self.memory_used or self.memory_used + need <= self.memory
        return not self.cores or not self.cores_used or self.cores_used + need <= self.cores

    def may_pass(self, limit: Limit, entry: Any, lane: str, held: float) -> bool:
        """Whether an entry would pass a limit if nobody held anything of it but those who hold `held`."""
        kind, name = limit
        policies = entry[4].layout.specs[entry[5]].policies
        if kind == "rate" or not held:
            return True
        if kind == "concurrency":
            return held < (policies.concurrency or 1)
        assert policies.resources is not None
        need = next(need for found, need in _needs(policies.resources, lane) if found == limit)
        if kind == "token":
            return self.total_tokens[name] - held >= need
        most = self.memory if kind == "memory" else self.cores
        return not most or held + need <= most

    def _behind(self, limit: Limit, lane: str, entry: Any) -> bool:
        """Whether somebody who waits there has to go first."""
        waiting = self.parked.get(limit)
        heap = waiting.get(lane) if waiting is not None else None
        return bool(heap) and heap is not None and heap[0] < entry and heap[0][4].ending is None

    def take(
        self, lane: str, layout: int, stage: int, policies: Policies, now: float
    ) -> dict[str, tuple[int, ...]] | None:
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
            for (kind, name), need in _needs(resources, lane):
                if kind == "token":
                    held = {} if held is None else held
                    free = self.free_tokens[name]
                    held[name] = tuple(free[: int(need)])
                    del free[: int(need)]
                elif kind == "memory":
                    self.memory_used += int(need)
                else:
                    self.cores_used += need
        return held

    def give_back(
        self, lane: str, layout: int, stage: int, policies: Policies, held: Mapping[str, tuple[int, ...]] | None
    ) -> list[Limit]:
        """Return what an attempt held; the limits that have room again."""
        key = (layout, stage)
        freed: list[Limit] = []
        if policies.concurrency is not None:
            left = self.busy[key] - 1
            if left:
                self.busy[key] = left
            else:
                del self.busy[key]
            freed.append(("concurrency", key))
        resources = policies.resources
        if resources is not None:
            for limit, need in _needs(resources, lane):
                kind, name = limit
                if kind == "token":
                    free = self.free_tokens[name]
                    free.extend(held[name] if held else ())
                    free.sort()
                elif kind == "memory":
                    self.memory_used -= int(need)
                else:
                    self.cores_used -= need
                freed.append(limit)
        return freed

    # ------------------------------------------------------------ who waits

    def park(self, limit: Limit, lane: str, entry: Any) -> None:
        """Let an entry wait at `limit`."""
        heappush(self.parked.setdefault(limit, {}).setdefault(lane, []), entry)

    def waiting(self) -> Iterator[tuple[Limit, Any]]:
        """Everything that waits at a limit, in no order."""
        for limit, lanes in self.parked.items():
            for heap in lanes.values():
                for entry in heap:
                    yield limit, entry

    def wake(self, limit: Limit, now: float) -> list[tuple[str, Any]]:
        """Take out who can pass now, as (lane, entry), the first of each lane first. What is on its way counts as
        taken until `arrived` says otherwise; lanes do not wait for each other."""
        lanes = self.parked.get(limit)
        if lanes is None:
            return []
        out: list[tuple[str, Any]] = []
        for lane in list(lanes):
            heap = lanes[lane]
            while heap:
                entry = heap[0]
                if entry[4].ending is None:
                    policies = entry[4].layout.specs[entry[5]].policies
                    need = self._room(limit, lane, policies, now)
                    if need is None:
                        break
                    self.woken[entry[3]] = (limit, lane, need)
                    self.coming[limit, lane] = self.coming.get((limit, lane), 0.0) + need
                heappop(heap)
                out.append((lane, entry))
            if not heap:
                del lanes[lane]
        if not lanes:
            del self.parked[limit]
        return out

    def _room(self, limit: Limit, lane: str, policies: Policies, now: float) -> float | None:
        """What a stage will take of a limit, if there is room for it beside those on their way; else None."""
        kind, key = limit
        coming = self.coming.get((limit, lane), 0.0)
        if kind == "concurrency":
            return 1.0 if self.busy.get(key, 0) + coming < (policies.concurrency or 1) else None
        if kind == "rate":
            return None if coming or now < self.next_start.get(key, 0.0) - CLOSE else 1.0
        assert policies.resources is not None
        need = next(need for found, need in _needs(policies.resources, lane) if found == limit)
        if coming and kind != "token" and not (self.memory_used if kind == "memory" else self.cores_used):
            return None  # the first of them may take everything
        return need if self._fits(limit, need + coming) else None

    def arrived(self, number: int) -> Limit | None:
        """An entry that was woken has its turn; the limit it waited at, which is to be looked at again after it."""
        found = self.woken.pop(number, None)
        if found is None:
            return None
        limit, lane, need = found
        left = self.coming[limit, lane] - need
        if left > 0.0:
            self.coming[limit, lane] = left
        else:
            del self.coming[limit, lane]
        return limit

    def alarm(self, limit: Limit) -> float | None:
        """When to look at a rate again, if somebody waits there and nobody has been told to look yet."""
        if limit[0] != "rate" or limit in self.timed or limit not in self.parked:
            return None
        if any((limit, lane) in self.coming for lane in self.parked[limit]):
            return None
        self.timed.add(limit)
        return self.next_start[limit[1]]


def _needs(resources: Resources, lane: str) -> Iterator[tuple[Limit, float]]:
    """What an attempt takes of the shared limits. In the process lane cores are slots (`slots_of`)."""
    for name, count in resources.tokens.items():
        yield ("token", name), count
    if resources.memory is not None:
        yield ("memory", None), int(resources.memory)
    if resources.cpu and lane != "process":
        yield ("cpu", None), resources.cpu


def demands(layout: Layout, stage: int, lane: str) -> Iterator[tuple[Limit, float]]:
    """What an attempt of a stage holds while it runs, by limit."""
    policies = layout.specs[stage].policies
    if policies.concurrency is not None:
        yield ("concurrency", (layout.key, stage)), 1.0
    if policies.resources is not None:
        yield from _needs(policies.resources, lane)


def slots_of(policies: Policies, lane: str, slots: int) -> int:
    """Slots of its lane that one attempt takes: in the process lane one for each core it asks for."""
    resources = policies.resources
    if lane != "process" or resources is None or resources.cpu is None or resources.cpu <= 1:
        return 1
    return max(1, min(slots, ceil(resources.cpu)))
