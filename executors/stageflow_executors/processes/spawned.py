"""Entry of a worker that was started by exec instead of by the fork server: where there is no fork server, or on
request.

    python spawned.py NUMBER SETTINGS_FD CHANNEL_FD PAGE_FD OUTPUT_FD

Executed by path; imports the package only after `sys.path` is the parent's.
"""

import marshal
import os
import select
import signal
import sys
import threading
import time
import traceback


def descendants() -> list[int]:
    """Pids of every process below this one, where the kernel lists children; empty elsewhere."""
    found: list[int] = []
    pending = [os.getpid()]
    while pending:
        pid = pending.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as listed:
                    below = [int(child) for child in listed.read().split()]
                found.extend(below)
                pending.extend(below)
        except OSError:
            continue
    return found


def end_with(parent: int) -> None:
    """Wait for the parent's death, however it comes, then end this process and all it started."""
    try:
        pidfd = os.pidfd_open(parent)
        if os.getppid() == parent:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        os.close(pidfd)
    except (AttributeError, OSError):
        while os.getppid() == parent:
            time.sleep(0.2)
    for pid in descendants():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Read the settings, become a worker."""
    number, settings_fd, *fds = map(int, sys.argv[1:])
    with open(settings_fd, "rb") as pipe:
        settings = marshal.load(pipe)
    os.dup2(fds[2], 2)
    sys.path[:] = settings["sys_path"]
    os.chdir(settings["cwd"])
    # The one thread that a worker of the fork server does not need: that one has PDEATHSIG and the server's sweep.
    threading.Thread(target=end_with, args=(settings["engine_pid"],), name="stageflow-parent", daemon=True).start()
    try:
        from stageflow_executors.processes import worker_main

        if sys.platform == "linux":
            from stageflow_executors.processes.forkserver import PR_SET_CHILD_SUBREAPER, prctl

            prctl(PR_SET_CHILD_SUBREAPER, 1)
        worker_main.main(number, settings, fds)
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        os._exit(1)


if __name__ == "__main__":
    main()
