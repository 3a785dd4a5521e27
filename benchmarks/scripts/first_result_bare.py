"""The limit of `first_result_ours.py`: two interpreters that import what an engine on msgspec and uvloop cannot do
without, at once, one of which answers the other. Nothing of ours is in it, and there is no fork."""

import subprocess
import sys

WORKER = "import ctypes, logging, pickle, threading, typing, msgspec; print(2 * int(input()), flush=True)"


def main() -> None:
    """Exec the other interpreter before anything else is imported."""
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
