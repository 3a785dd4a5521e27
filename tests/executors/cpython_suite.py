"""Run CPython's own tests of `concurrent.futures` against ours:
`python cpython_suite.py FOLDER MODULE walltime|quick [PART PARTS]`, of PARTS the part number PART.

FOLDER is a `test` package that holds `test_concurrent_futures`; nothing of it is copied here. The standard's executor
names are replaced before its modules are imported, so that every class they define uses ours. One JSON object goes to
standard output: what ran, failed and was skipped, by name; the run itself to standard error.
"""

import atexit
import concurrent.futures
import functools
import importlib
import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import stageflow_executors.futures as ours

PRIVATE = "reads private attributes of the standard's executor"
QUEUE = "gives the initializer a multiprocessing queue, which only multiprocessing's own processes inherit"
#: test -> why it is left out. A name without a class holds for every class.
LEFT_OUT = {
    **({} if hasattr(os, "process_cpu_count") else {"test_default_workers": "counts cores as a later Python does"}),
    "test_killed_child": "demands that one lost worker breaks the whole pool",
    "test_saturation": PRIVATE,
    "test_idle_process_reuse_one": PRIVATE,
    "test_idle_process_reuse_multiple": PRIVATE,
    "test_max_tasks_per_child": PRIVATE,
    "test_max_tasks_per_child_defaults_to_spawn_context": PRIVATE,
    "test_python_finalization_error": "replaces private functions of the standard's executor and of threading",
    "test_processes_terminate": PRIVATE,
    "ProcessPoolForkserverProcessPoolShutdownTest.test_context_manager_shutdown": PRIVATE,
    "ProcessPoolSpawnProcessPoolShutdownTest.test_context_manager_shutdown": PRIVATE,
    "ProcessPoolForkserverProcessPoolShutdownTest.test_del_shutdown": PRIVATE,
    "ProcessPoolSpawnProcessPoolShutdownTest.test_del_shutdown": PRIVATE,
    "ProcessPoolForkserverProcessPoolShutdownTest.test_shutdown_no_wait": PRIVATE,
    "ProcessPoolSpawnProcessPoolShutdownTest.test_shutdown_no_wait": PRIVATE,
    "ProcessPoolForkserverFailingInitializerTest.test_initializer": QUEUE,
    "ProcessPoolSpawnFailingInitializerTest.test_initializer": QUEUE,
    **dict.fromkeys(
        (
            "test_error_at_task_unpickle",
            "test_exit_at_task_unpickle",
            "test_error_during_result_unpickle_in_result_handler",
            "test_exit_during_result_unpickle_in_result_handler",
        ),
        "demands that the pool breaks when one value cannot be decoded: here that call alone gets the error",
    ),
    "test_traceback": "asserts the private type of the cause; test_futures.py checks its text",
    "test_shutdown_deadlock_pickle": PRIVATE,
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "replaces private classes of the standard's executor",
    "FailingInitializerResourcesTest.test_spawn": "stops multiprocessing's resource tracker, which ours does not use",
    "FailingInitializerResourcesTest.test_forkserver": "stops multiprocessing's resource tracker",
}
PATCH = """
import concurrent.futures as _standard, stageflow_executors.futures as _ours
_standard.ProcessPoolExecutor, _standard.ThreadPoolExecutor = _ours.ProcessPoolExecutor, _ours.ThreadPoolExecutor
"""


#: Names that the suite of a later Python expects of `test.support`.
LATER = """
Py_GIL_DISABLED = False
requires_gil_enabled = skip_if_sanitizer = lambda *why, **which: lambda function: function
check_sanitizer = lambda **which: False
"""


def borrow(folder: Path) -> str:
    """A folder to import `test` from: this Python's helpers, and the suite of another one."""
    import test.support

    helpers = Path(test.support.__file__)
    made = Path(tempfile.mkdtemp(prefix="stageflow-suite-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    (made / "test" / "support").mkdir(parents=True)
    (made / "test" / "__init__.py").write_text("")
    (made / "test" / "test_concurrent_futures").symlink_to(folder / "test_concurrent_futures")
    (made / "test" / "support" / "__init__.py").write_text(
        f"__file__, __path__ = {str(helpers)!r}, [{str(helpers.parent)!r}]\n"
        f"exec(compile(open(__file__).read(), __file__, 'exec'))\n{LATER}"
    )
    for name in [name for name in sys.modules if name == "test" or name.startswith("test.")]:
        del sys.modules[name]
    sys.path.insert(0, str(made))
    return str(made)


def prepare(folder: Path) -> Any:
    """Put ours in the place of the standard's, and the suite on the path. Returns `test.support`."""
    concurrent.futures.ProcessPoolExecutor = ours.ProcessPoolExecutor  # type: ignore[misc,assignment]
    concurrent.futures.ThreadPoolExecutor = ours.ThreadPoolExecutor  # type: ignore[misc,assignment]
    import test

    path = borrow(folder) if str(folder) not in test.__path__ else None
    from test import support
    from test.support import script_helper

    standard = script_helper.assert_python_ok

    @functools.wraps(standard)
    def assert_python_ok(flag: str, code: str, *rest: str, **env: str) -> Any:
        first = f"import sys; sys.path.insert(0, {path!r})" if path else ""
        return standard(flag, f"{first}\n{PATCH}\nexec({code!r})", *rest, **env)

    script_helper.assert_python_ok = assert_python_ok
    return support


def every(suite: unittest.TestSuite) -> Any:
    """The cases of a suite."""
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from every(part)
        else:
            yield part


def main(folder: str, module_name: str, mode: str, part: str = "0", parts: str = "1") -> None:
    """Run one module of the suite, or a part of it."""
    support = prepare(Path(folder))
    support.verbose = False
    if mode == "quick":
        support.use_resources = []  # not those that sleep for seconds
    module = importlib.import_module(f"test.test_concurrent_futures.{module_name}")
    chosen, left_out = unittest.TestSuite(), {}
    for case in every(unittest.defaultTestLoader.loadTestsFromModule(module)):
        kind, name = case.id().split(".")[-2:]
        reason = LEFT_OUT.get(name) or LEFT_OUT.get(f"{kind}.{name}")
        if reason is None and kind.startswith("ProcessPoolFork") and not kind.startswith("ProcessPoolForkserver"):
            reason = "ours forks from a server whatever context is given: the same as the class for forkserver"
        if reason is None and mode == "quick" and kind.startswith("ProcessPoolSpawn"):
            reason = "each test starts interpreters for seconds: only in the soak"
        if reason is not None:
            left_out[f"{kind}.{name}"] = reason
        else:
            chosen.addTest(case)
    chosen = unittest.TestSuite(list(every(chosen))[int(part) :: int(parts)])
    count = chosen.countTestCases()
    result = unittest.TextTestRunner(verbosity=2).run(chosen)
    bad = [case.id() for case, _ in [*result.failures, *result.errors]]
    report = {"ran": count, "bad": bad, "left_out": left_out, "skipped": len(result.skipped)}
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
