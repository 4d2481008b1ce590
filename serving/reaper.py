"""The end of a launch: every process that it started is killed and its folders are removed, however it ended.

Owns: how processes of a launch are found (they carry a mark in their environment) and removed.
Must not know: anything else of this project. It runs as a script of its own, on the standard library alone, so that it
is there within milliseconds.

A launch starts it first of all, with a pipe as its standard input. The kernel closes the pipe when the launch's own
process ends, by `kill -9` too; that is when it works.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

TIMEOUT_S = 10.0


def marked_processes(variable: str, value: str) -> list[int]:
    """Ids of the living processes that were started with `variable=value` in their environment."""
    mark = f"{variable}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):
        try:
            # A zombie's environment reads as empty: it only waits for its parent.
            if entry.isdecimal() and mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                found.append(int(entry))
        except OSError:  # gone meanwhile, or another user's
            continue
    return [process for process in found if process != os.getpid()]


def reap(variable: str, value: str, folders: list[str]) -> bool:
    """Kill every marked process and remove the folders; False if a process would not die."""
    deadline = time.monotonic() + TIMEOUT_S
    while processes := marked_processes(variable, value):  # again: a dying parent may just have started another
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return not processes


def main() -> None:
    """`reaper.py VARIABLE VALUE FOLDER...`: wait for the end of standard input, then reap."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    variable, value, *folders = sys.argv[1:]
    sys.exit(0 if reap(variable, value, folders) else 1)


if __name__ == "__main__":
    main()
