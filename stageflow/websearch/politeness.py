"""How often one host may be asked, and what its robots.txt allows.

`HostGates` bounds concurrency and rate per host; `RobotsRules` asks protego. Both belong to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stageflow.websearch import encoding, urls
from stageflow.websearch.errors import require

ROBOTS_MAX_BYTES = 512 * 1024  # RFC 9309 asks for at least 500 KiB
_MAX_LINE = 2048  # protego's patterns become regular expressions; nobody needs longer ones
_MAX_LINES = 20_000
_MAX_WILDCARDS = 16  # in one line: backtracking over many "*" is how a robots.txt could hang a crawler
_KEPT_HOSTS = 10_000

Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class _Gate:
    slots: asyncio.Semaphore
    users: int = 0
    next_start: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class HostGates:
    """At most `concurrency` requests at once and, where `interval` seconds are asked for, that long between two
    starts."""

    def __init__(
        self,
        *,
        concurrency: int,
        interval: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._concurrency = concurrency
        self._interval = interval
        self._clock = clock
        self._sleep = sleep
        self._gates: OrderedDict[str, _Gate] = OrderedDict()

    @asynccontextmanager
    async def enter(self, host: str, *, interval: float = 0.0) -> AsyncIterator[None]:
        """Wait for this host's turn; the slot is held inside. `interval` (a Crawl-delay) only ever lengthens the
        wait."""
        gate = self._gates.get(host)
        if gate is None:
            gate = self._gates[host] = _Gate(asyncio.Semaphore(self._concurrency))
            self._forget_idle()
        self._gates.move_to_end(host)
        gate.users += 1
        try:
            async with gate.slots:
                pause = max(self._interval, interval)
                if pause > 0:
                    async with gate.turn:
                        wait = gate.next_start - self._clock()
                        if wait > 0:
                            await self._sleep(wait)
                        gate.next_start = max(self._clock(), gate.next_start) + pause
                yield
        finally:
            gate.users -= 1

    def _forget_idle(self) -> None:
        """Drop the hosts not seen for longest that nobody uses: a crawl of the web must not remember every host."""
        if len(self._gates) <= _KEPT_HOSTS:
            return
        now = self._clock()
        for host, gate in list(self._gates.items())[: _KEPT_HOSTS // 10]:
            if gate.users == 0 and gate.next_start <= now:
                del self._gates[host]


@dataclass(frozen=True, slots=True)
class RobotsAnswer:
    """Whether a URL may be fetched, why not, and the seconds the site wants between two requests."""

    allowed: bool
    reason: str = ""
    crawl_delay: float = 0.0


class RobotsRules:
    """One site's rules. Hostile text is cut down before protego sees it."""

    def __init__(self, status: int, body: bytes) -> None:
        self._status = status
        self._rules: Any = None
        if 200 <= status < 300:
            self._rules = require("protego").Protego.parse(self._tamed(body))

    @staticmethod
    def _tamed(body: bytes) -> str:
        text = encoding.decode(body[:ROBOTS_MAX_BYTES], "text/plain; charset=utf-8")[0].replace("\0", "")
        lines = text.splitlines()[:_MAX_LINES]
        return "\n".join(line for line in lines if len(line) <= _MAX_LINE and line.count("*") <= _MAX_WILDCARDS)

    def ask(self, url: str, user_agent: str) -> RobotsAnswer:
        """The answer for `url` (RFC 9309: 4xx means no rules, 5xx means stay away)."""
        if self._rules is None:
            if self._status >= 500:
                return RobotsAnswer(False, f"robots.txt answered {self._status}, which means: stay away for now")
            return RobotsAnswer(True)
        try:
            allowed = bool(self._rules.can_fetch(url, user_agent))
            delay = self._rules.crawl_delay(user_agent)
        except Exception as error:  # a parser's bug on hostile text: when in doubt, stay away
            return RobotsAnswer(False, f"robots.txt cannot be read: {error}")
        seconds = float(delay) if isinstance(delay, int | float) and delay > 0 else 0.0
        return RobotsAnswer(allowed, "" if allowed else "robots.txt disallows it", min(seconds, 86_400.0))


FetchRobots = Callable[[str], Awaitable[tuple[int, bytes]]]


class RobotsCache:
    """robots.txt per origin, fetched once however many ask at the same time, kept for `ttl` seconds."""

    def __init__(self, fetch: FetchRobots, *, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._ttl = ttl
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, RobotsRules]] = OrderedDict()
        self._pending: dict[str, asyncio.Task[RobotsRules]] = {}

    async def ask(self, url: str, user_agent: str) -> RobotsAnswer:
        """Whether `url` may be fetched. Raises what fetching robots.txt raises when the host cannot be reached at
        all."""
        origin = urls.origin_of(url)
        if urlsplit(url).path == "/robots.txt":
            return RobotsAnswer(True)
        kept = self._known.get(origin)
        if kept is not None and kept[0] > self._clock():
            return kept[1].ask(url, user_agent)
        task = self._pending.get(origin)
        if task is None:
            task = asyncio.ensure_future(self._load(origin))
            self._pending[origin] = task
            task.add_done_callback(lambda done: self._settle(origin, done))
        # shielded: one impatient caller must not take the answer from the others
        return (await asyncio.shield(task)).ask(url, user_agent)

    def _settle(self, origin: str, done: asyncio.Task[RobotsRules]) -> None:
        self._pending.pop(origin, None)
        if not done.cancelled():
            done.exception()  # looked at, so that nobody is told of it when every caller has gone

    async def _load(self, origin: str) -> RobotsRules:
        status, body = await self._fetch(urls.join(origin, "/robots.txt") or "")
        rules = RobotsRules(status, body)
        # trouble at the site is asked about again soon
        lifetime = min(self._ttl, 60.0) if status >= 500 else self._ttl
        self._known[origin] = (self._clock() + lifetime, rules)
        while len(self._known) > _KEPT_HOSTS:
            self._known.popitem(last=False)
        return rules

    async def aclose(self) -> None:
        """Cancel what is still being fetched."""
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
