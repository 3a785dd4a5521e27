"""How every test here runs: `async def` tests on a fresh loop, and no test longer than its limit.

A phase (setup, call, teardown) past its limit dumps the stack of every thread and of every task of the running loop to
the real standard error, then fails the test. If that failure cannot get through (the main thread is inside C code that
never returns), faulthandler ends the process half a minute later, with stacks once more.
"""

import asyncio
import faulthandler
import gc
import inspect
import os
import signal
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

import pytest
from hypothesis import HealthCheck, settings

DEFAULT_LIMIT = 120.0
HARD_EXIT_AFTER = 30.0
# A raise may be swallowed by whatever code it lands in, so it is repeated until the phase ends.
REPEAT = 2.0

# How long an example takes says how busy the machine is; every test has a limit of its own.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

_real_stderr = pytest.StashKey[TextIO]()


@dataclass(slots=True)
class _AsyncTest:
    """The `async def` test that is running: what a timeout needs in order to show it and to end it."""

    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[None] | None = None
    expired: str | None = None


_async_test: _AsyncTest | None = None


def pytest_configure(config: pytest.Config) -> None:
    # Descriptor 2 is redirected while a test runs; here it is still the terminal.
    config.stash[_real_stderr] = os.fdopen(os.dup(2), "w", buffering=1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there now stays: a test that collects garbage need not walk every module and every test once more."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    stream = config.stash.get(_real_stderr, None)
    if stream is not None:
        stream.close()


def _limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else DEFAULT_LIMIT


def _dump(item: pytest.Item, limit: float, out: TextIO) -> None:
    out.write(f"\n=== {item.nodeid} is still running after {limit:g} s; every stack follows ===\n")
    out.flush()
    faulthandler.dump_traceback(file=out, all_threads=True)
    if _async_test is not None:
        for task in asyncio.all_tasks(_async_test.loop):
            task.print_stack(file=out)
    out.flush()


def _bounded(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run one phase under the item's limit; off the main thread or without SIGALRM there is the hard exit alone."""
    limit = _limit(item)
    out = item.config.stash[_real_stderr]
    soft = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    dumped = False

    def expired(signum: int, frame: FrameType | None) -> None:
        nonlocal dumped
        if not dumped:
            dumped = True
            _dump(item, limit, out)
        message = f"timeout: still running after {limit:g} s (every stack is on standard error)"
        # Only now: one that came while the stacks are written would cut them off.
        signal.setitimer(signal.ITIMER_REAL, REPEAT)
        if _async_test is not None and _async_test.task is not None:
            # uvloop logs what a signal handler raises while it waits, and waits on: there the cancellation ends it.
            _async_test.expired = message
            _async_test.loop.call_soon_threadsafe(_async_test.task.cancel)
        pytest.fail(message)

    faulthandler.dump_traceback_later(limit + HARD_EXIT_AFTER if soft else limit, exit=True, file=out)
    previous: Any = None
    if soft:
        previous = signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (yield)
    finally:
        if soft:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _bounded(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _bounded(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _bounded(item))


def _new_loop(item: pytest.Item) -> asyncio.AbstractEventLoop:
    if item.get_closest_marker("uvloop") is None:
        return asyncio.SelectorEventLoop() if sys.platform != "win32" else asyncio.new_event_loop()
    uvloop = pytest.importorskip("uvloop")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Run an `async def` test on a loop of its own; leave any other test to pytest."""
    global _async_test
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    with asyncio.Runner(loop_factory=lambda: _new_loop(pyfuncitem)) as runner:
        running = _async_test = _AsyncTest(runner.get_loop())

        async def body() -> None:
            running.task = asyncio.current_task()
            await pyfuncitem.obj(**arguments)

        try:
            runner.run(body())
        except asyncio.CancelledError:
            if running.expired is None:
                raise
            pytest.fail(running.expired)
        finally:
            _async_test = None
    return True
