"""One launch on this machine: its private folders and its processes, and the promise that neither outlives it.

Owns: `/tmp/supernode-<id>` (Ray's files, sockets, generated weights), `/dev/shm/supernode-<id>` (shared-memory
windows), the mark in the environment by which every process that this launch started can be found again, and the
reaper (serving/reaper.py) that removes all of them.
Must not know: Ray, instances, requests.

A signal may come at any moment, while Ray is half started too. So processes are not tracked as they are made, they are
looked up at the end: whoever carries the mark was started by this launch.
"""

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from serving import reaper

MARK = "SUPERNODE_SESSION"
# Ray's processes change their titles, and would do so in the memory that holds their environment, mark included.
KEEP_ENVIRONMENT = "SPT_NOENV"
SHARED_MEMORY = Path("/dev/shm")


class Session:
    """Folders and processes of one launch. A context manager; `close` leaves nothing behind."""

    def __init__(self) -> None:
        self.session_id = secrets.token_hex(4)
        self.authkey = secrets.token_bytes(32)
        # Short, because a Unix socket's path has at most 107 bytes and Ray nests its own deep.
        self.folder = Path(tempfile.gettempdir()) / f"supernode-{self.session_id}"
        self.windows = SHARED_MEMORY / f"supernode-{self.session_id}"
        self._folders = [str(self.folder), str(self.windows)]
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, MARK, self.session_id, *self._folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # or whoever reads this launch's output would wait for the reaper too
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
        self._outer = {name: os.environ.get(name) for name in (MARK, KEEP_ENVIRONMENT)}
        os.environ |= {MARK: self.session_id, KEEP_ENVIRONMENT: "1"}
        for folder in (self.folder, self.windows):
            folder.mkdir(mode=0o700)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of this launch and remove its folders. Closing twice is harmless."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        if self._reaper.wait() != 0:  # killed by somebody, or a process would not die
            reaper.reap(MARK, self.session_id, self._folders)
        for name, value in self._outer.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    @property
    def num_processes(self) -> int:
        """Processes that this launch started and that still live."""
        return len(reaper.marked_processes(MARK, self.session_id))

    @property
    def num_windows(self) -> int:
        """Files in shared memory. An exchange group removes its own as soon as all have joined."""
        return sum(not path.is_dir() for path in self.windows.rglob("*"))
