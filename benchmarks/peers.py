"""Finding the peers: which are here, which are not and why; and environments of their own for those that need one.

stageflow-core ships our import name, so it lives in `.venv-peers/stageflow-core`; wfcommons brings half of scientific
Python along and lives beside it. Both are made on first use; without a network they are skipped by name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import MissingPeerError
from benchmarks.work import burn

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
#: folder of the peers' own environments
APART: Final = ROOT / ".venv-peers"
INSTALL_SECONDS: Final = 300.0
WORKERS: Final = 2

VERSIONS: Final = ("msgspec", "uvloop", "numpy", "loky", "joblib", "mpire", "dask", "distributed", "ray")


def need(module: str) -> None:
    """Raise MissingPeerError when `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingPeerError(f"{module} is not installed")


def apart(package: str) -> Path:
    """The interpreter that has `package`, made on first use. MissingPeerError when it cannot be had."""
    home = APART / package
    python = home / "bin" / "python"
    stamp = home / ".made"
    if stamp.exists() and python.exists():
        return python
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True, timeout=120
        )
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", package, "uvloop"]
        subprocess.run(pip, check=True, capture_output=True, timeout=INSTALL_SECONDS, env=_clean())
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or b""
        last = stderr.decode(errors="replace").strip().splitlines()[-1:] or [type(error).__name__]
        raise MissingPeerError(f"{package} could not be installed apart: {last[0]}") from None
    stamp.touch()
    return python


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


class Service:
    """A script in another interpreter that answers one JSON line per JSON line."""

    def __init__(self, python: Path, script: Path) -> None:
        self.process = subprocess.Popen(
            [str(python), "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_clean(), text=True
        )

    def ask(self, **question: Any) -> Any:
        """Send a question, wait for its answer. MissingPeerError when the other side has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise MissingPeerError(f"the peer's process ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def stageflow_core() -> Iterator[Service]:
    """stageflow-core, in its own interpreter."""
    service = Service(apart("stageflow-core"), HERE / "scripts" / "stageflow_core_peer.py")
    try:
        yield service
    finally:
        service.close()


@contextmanager
def ray_here(workers: int = WORKERS) -> Iterator[Any]:
    """Ray on this machine only, warm."""
    need("ray")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import logging

    import ray

    try:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        remote = ray.remote(burn)
        ray.get([remote.remote(10) for _ in range(workers * 2)], timeout=60)
    except Exception as error:
        ray.shutdown()
        raise MissingPeerError(f"ray does not start here: {type(error).__name__}: {str(error)[:80]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def dask_here(workers: int = WORKERS) -> Iterator[Any]:
    """A dask.distributed client with worker processes of one thread each, warm."""
    need("distributed")
    import logging

    import distributed as untyped

    distributed: Any = untyped
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        cluster = distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        )
        client = distributed.Client(cluster)
    except Exception as error:
        raise MissingPeerError(f"dask does not start here: {type(error).__name__}: {str(error)[:80]}") from None
    try:
        client.gather(client.map(burn, range(10, 10 + workers * 2), pure=False))
        yield client
    finally:
        client.close()
        cluster.close()


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("stageflow-core", "wfcommons"):
        found = list((APART / name).glob(f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info"))
        if found:
            versions[name] = found[0].name.removesuffix(".dist-info").rsplit("-", 1)[1]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": list(os.getloadavg()),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
