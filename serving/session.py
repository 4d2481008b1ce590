"""One launch on this machine: its private folders and its processes, and the promise that neither outlives it.

Owns: `/tmp/supernode-<id>` (Ray's files, sockets, generated weights), `/dev/shm/supernode-<id>` (shared-memory
windows), and the mark in the environment by which every process that this launch started can be found again.
Must not know: Ray, instances, requests.

A signal may come at any moment, while Ray is half started too. So processes are not tracked as they are made, they are
looked up at the end: whoever carries the mark, and is not this process, was started by it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

MARK = "SUPERNODE_SESSION"
SHARED_MEMORY = Path("/dev/shm")
END_TIMEOUT_S = 5.0


class Session:
    """Folders and processes of one launch. A context manager; `close` leaves nothing behind."""

    def __init__(self) -> None:
        self.session_id = secrets.token_hex(4)
        self.authkey = secrets.token_bytes(32)
        # Short, because a Unix socket's path has at most 107 bytes and Ray nests its own deep.
        self.folder = Path(tempfile.gettempdir()) / f"supernode-{self.session_id}"
        self.windows = SHARED_MEMORY / f"supernode-{self.session_id}"
        self.folder.mkdir(mode=0o700)
        self.windows.mkdir(mode=0o700)
        self._outer_mark = os.environ.get(MARK)
        os.environ[MARK] = self.session_id

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def processes(self) -> list[psutil.Process]:
        """Processes that this launch started and that still live."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == self.session_id:
                    found.append(process)
            except (psutil.Error, OSError):  # gone meanwhile, or another user's
                continue
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        """End every process of this launch and remove its folders. Closing twice is harmless."""
        with signals_deferred():
            deadline = time.monotonic() + END_TIMEOUT_S
            while processes := self.processes():  # again, since a dying parent may just have started another
                for process in processes:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(processes, timeout=1.0)
                if time.monotonic() > deadline:
                    break
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.windows, ignore_errors=True)
            if self._outer_mark is None:
                os.environ.pop(MARK, None)
            else:
                os.environ[MARK] = self._outer_mark

    def held(self) -> dict[str, int]:
        """What of this launch still exists on the machine."""
        return {
            "processes": len(self.processes()),
            "shared_memory_windows": len(list(self.windows.rglob("*"))) if self.windows.exists() else 0,
        }


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, by KeyboardInterrupt, so that `finally` runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM inside the block: a second, impatient one must not cut the clean-up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
