"""Entry of a worker that was started by exec instead of by the fork server: where there is no fork server, or on request.

    python spawned.py NUMBER SETTINGS_FD CHANNEL_FD PAGE_FD OUTPUT_FD

Executed by path; imports the package only after `sys.path` is the parent's.
"""

import marshal
import os
import sys


def main() -> None:
    """Read the settings, become a worker."""
    number, settings_fd, *fds = map(int, sys.argv[1:])
    with open(settings_fd, "rb") as pipe:
        settings = marshal.load(pipe)
    os.dup2(fds[2], 2)
    sys.path[:] = settings["sys_path"]
    os.chdir(settings["cwd"])
    from stageflow_executors.processes import worker_main

    worker_main.main(number, settings, fds)


if __name__ == "__main__":
    main()
