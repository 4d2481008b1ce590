"""The memory that processes of one host share: a file in a private directory, mapped by all and unlinked early.

Owns: that directory and its removal; the words in which each process says that it is here, how far it came, that it
closed or gave up; the lock that tells whether it still lives. The bytes behind are the caller's.
Must not know: how processes wait for one another, what the caller's bytes mean.
Source: fcntl(2): a record lock ends with the process that holds it, however it ends, and is not inherited by a child.

    [0, 1024)                      identity of the group, process that gave up
    [1024 (1 + p), 1024 (2 + p))   words of process p, then the text of its failure
    [offset, offset + num_bytes)   the caller's
"""

import contextlib
import fcntl
import mmap
import os
import stat
import struct
import time
from pathlib import Path

from serving.exchange import CollectiveError, GroupUnusable, RanksOutOfStep

_SLOT_BYTES = 1024
_IDENTITY_BYTES = 16
_GIVEN_UP = struct.Struct("=I")  # 1 + the process that gave up, or 0
_WORDS = struct.Struct("=QQI")  # pid, number of the last barrier it came to, is closed
_NUMBER = struct.Struct("=Q")
_CLOSED = struct.Struct("=I")
_TEXT_LENGTH = struct.Struct("=I")
_TEXT_OFFSET = _WORDS.size + _TEXT_LENGTH.size
MAX_TEXT_BYTES = _SLOT_BYTES - _TEXT_OFFSET
_NAME = "windows"
FIFO_PREFIX = "fifo-"


class SharedMapping:
    """One process's place in the mapping. A process maps a file once: closing any descriptor of it drops its lock."""

    def __init__(self, file: int, *, process: int, num_processes: int, num_bytes: int) -> None:
        self.offset = _SLOT_BYTES * (1 + num_processes)
        self.memory = mmap.mmap(file, self.offset + num_bytes)
        self._file = file
        self._process = process

    @classmethod
    def create(cls, path: Path, *, num_processes: int, num_bytes: int, identity: bytes) -> "SharedMapping":
        """Make the file, all zero, in the existing directory `path`, as process 0; others see it once published."""
        file = os.open(path / f"{_NAME}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        total_bytes = _SLOT_BYTES * (1 + num_processes) + num_bytes
        try:
            # Reserve the memory now: a store to a page that no longer fits would end the process with SIGBUS.
            os.posix_fallocate(file, 0, total_bytes)
            mapping = cls(file, process=0, num_processes=num_processes, num_bytes=num_bytes)
        except OSError as error:
            os.close(file)
            raise CollectiveError(f"{path}: {total_bytes} bytes of windows do not fit: {error.strerror}") from error
        mapping.memory[:_IDENTITY_BYTES] = identity
        mapping._enter()
        return mapping

    @classmethod
    def open(
        cls, path: Path, *, process: int, num_processes: int, num_bytes: int, identity: bytes, timeout_s: float
    ) -> "SharedMapping":
        """Map the file once it is published. Raises TimeoutError, or RanksOutOfStep if its group is another one."""
        deadline = time.monotonic() + timeout_s
        pause_s = 0.001
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = os.open(path / _NAME, os.O_RDWR)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path / _NAME} did not appear")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        total_bytes = _SLOT_BYTES * (1 + num_processes) + num_bytes
        if os.fstat(file).st_size != total_bytes or os.pread(file, _IDENTITY_BYTES, 0) != identity:
            os.close(file)
            raise RanksOutOfStep(f"{path}: process 0 made this group with another specification than this process has")
        mapping = cls(file, process=process, num_processes=num_processes, num_bytes=num_bytes)
        mapping._enter()
        return mapping

    def _enter(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._process)
        _WORDS.pack_into(self.memory, self._slot(self._process), os.getpid(), 0, 0)

    def publish(self, path: Path) -> None:
        os.rename(path / f"{_NAME}.new", path / _NAME)

    def close(self) -> None:
        """Let go. The memory is unmapped with the last array that shows it.

        Not by mmap.close(): numpy arrays refer to the mapping but do not count as exports of it, so that would
        leave them dangling.
        """
        del self.memory
        os.close(self._file)

    def arrive(self, number: int) -> None:
        """Say that this process has come to barrier `number`."""
        _NUMBER.pack_into(self.memory, self._slot(self._process) + 8, number)

    def leave(self) -> None:
        """Say that this process has closed the group."""
        _CLOSED.pack_into(self.memory, self._slot(self._process) + 16, 1)

    def has_arrived(self, process: int, number: int) -> bool:
        pid, latest, _ = _WORDS.unpack_from(self.memory, self._slot(process))
        return bool(pid) and int(latest) >= number

    def has_left(self, process: int) -> bool:
        _, _, is_closed = _WORDS.unpack_from(self.memory, self._slot(process))
        return bool(is_closed)

    def is_dead(self, process: int) -> bool:
        """True if it entered and its lock is free. Never true between two members (threads) of one process."""
        pid = _WORDS.unpack_from(self.memory, self._slot(process))[0]
        if pid in (0, os.getpid()):
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, process)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, process)
        return True

    def give_up(self, text: bytes) -> None:
        """Say that the group is broken, and why; at most MAX_TEXT_BYTES count."""
        start = self._slot(self._process) + _WORDS.size
        text = text[:MAX_TEXT_BYTES]
        _TEXT_LENGTH.pack_into(self.memory, start, len(text))
        self.memory[start + _TEXT_LENGTH.size : start + _TEXT_LENGTH.size + len(text)] = text
        _GIVEN_UP.pack_into(self.memory, _IDENTITY_BYTES, 1 + self._process)

    def failure(self) -> bytes | None:
        """Why a process gave the group up, or None if none has."""
        given_up = _GIVEN_UP.unpack_from(self.memory, _IDENTITY_BYTES)[0]
        if not given_up:
            return None
        start = self._slot(given_up - 1) + _WORDS.size
        (length,) = _TEXT_LENGTH.unpack_from(self.memory, start)
        return self.memory[start + _TEXT_LENGTH.size : start + _TEXT_LENGTH.size + length]

    def _slot(self, process: int) -> int:
        return _SLOT_BYTES * (1 + process)


def make_directory(path: Path) -> None:
    """Make the private directory of a group, and its parents. Raises GroupUnusable if it exists."""
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
            return
        except FileExistsError:
            raise GroupUnusable(f"{path} exists: another group's, or left by one that was killed") from None
        except FileNotFoundError:  # another group was the parent's last and has just removed it
            continue


def remove_windows(path: str | Path) -> bool:
    """Remove a group's directory, for a launcher whose processes died before all had joined; True if it was there.

    The parent goes too if that leaves it empty and it is private (mode 0700), as a launch's folder is and /dev/shm is
    not. Harmless once all have joined: they use no name in it any more.
    """
    path = Path(path)
    if not path.is_dir():
        return False
    for entry in path.iterdir():
        if entry.name.startswith((_NAME, FIFO_PREFIX)):
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()
        if stat.S_IMODE(path.parent.stat().st_mode) == 0o700:
            path.parent.rmdir()
    return True
