"""The limit of `first_result_ours.py`: two interpreters that import what an engine on msgspec and uvloop cannot do
without, at once, one of which answers the other. Nothing of ours is in it, and there is no fork.

With the argument `built` the other one begins when a graph has been built by ours: only that says that there is work
for a worker. There is no engine in it even so, and nothing of ours in the other.
"""

import subprocess
import sys

WORKER = "import ctypes, logging, pickle, threading, typing, msgspec; print(2 * int(input()), flush=True)"


def double(number: int) -> int:
    """The least a stage can do."""
    return 2 * number


def main() -> None:
    """Exec the other interpreter before anything else is imported, but for what builds a graph."""
    if sys.argv[1:] == ["built"]:
        from stageflow import PipelineBuilder, StageKind

        PipelineBuilder("first").stage("double", double, kind=StageKind.TRANSFORM).build()
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    import asyncio

    import msgspec  # noqa: F401
    import uvloop

    async def answer() -> bytes:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(b"21\n")
        worker.stdin.close()
        heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        stdout = worker.stdout
        asyncio.get_running_loop().add_reader(stdout.fileno(), lambda: heard.set_result(stdout.readline()))
        line = await heard
        asyncio.get_running_loop().remove_reader(stdout.fileno())
        return line

    print(uvloop.run(answer()).decode().strip())
    worker.wait()


if __name__ == "__main__":
    main()
