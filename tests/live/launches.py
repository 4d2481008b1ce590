"""The real command in a process of its own, and how a test looks at it from outside."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest

PATIENCE_S = 120  # no test may depend on speed
SHARED_MEMORY = Path("/dev/shm")
# 3 NPU workers instead of 6: boots in two thirds of the time, and still has a group that exchanges.
SMALL = ("instances.prefill.npus=1", "instances.decode.npus=2")
PACKED = ("ray.pack=node",)  # 2 NPU workers
OURS = ("Traceback", "never retrieved", "ResourceWarning", "serving.", "asyncio")  # what must not be on stderr
T = TypeVar("T")


def settings(*overrides: str) -> list[str]:
    """`--set` for each."""
    return [part for override in overrides for part in ("--set", override)]


def eventually(read: Callable[[], T], wanted: Callable[[T], bool] = bool) -> T:
    """Ask until the answer is as wanted, and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while not wanted(value := read()):
        if time.monotonic() > deadline:
            pytest.fail(f"still {value!r} after {PATIENCE_S} s")
        time.sleep(0.02)
    return value


class Launch:
    """One `supernode` command: its output, its processes, and what it leaves behind."""

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (sys.executable, "-m", "serving.cli"),
        environment: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sn-", dir="/tmp"))  # short: Unix sockets nest below it
        self._output = (self.folder / "out").open("wb"), (self.folder / "err").open("wb")
        self.temporary = self.folder / "t"
        self.temporary.mkdir()
        self.mark = self.folder.name
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output[0],
            stderr=self._output[1],
            start_new_session=True,  # so that a signal to its group does not reach the tests
            cwd=cwd,
            env=inherited | {"TMPDIR": str(self.temporary), "LAUNCH_OF_A_TEST": self.mark} | (environment or {}),
        )
        self.session_ids: set[str] = set()

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text()

    def wait_for(self, what: Callable[["Launch"], T]) -> T:
        """Wait until `what` is true of this launch, or fail when it ends before."""

        def look() -> T:
            self._note_sessions()
            value = what(self)
            if not value and self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode}: {self.stderr}")
            return value

        return eventually(look)

    def url(self) -> str:
        """Where it serves, once it does."""
        pattern = re.compile(r"^serving (?:\S+ )?on (http://\S+)\n", re.MULTILINE)
        match = self.wait_for(lambda launch: pattern.search(launch.stdout + launch.stderr))
        assert match is not None
        return match[1]

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Its living processes whose command line has `word`, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                is_ours = process.environ().get("LAUNCH_OF_A_TEST") == self.mark
                if is_ours and word in line and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or a zombie
                continue
        return found

    def workers(self, kind: str) -> list[psutil.Process]:
        """Its `NpuWorker` or `HostWorker` processes, in the order in which they were started."""
        return sorted(self.processes(f"ray::{kind}"), key=lambda process: process.create_time())

    def end(self, number: signal.Signals = signal.SIGINT, *, group: bool = False) -> int:
        """Send a signal, to the process or as a terminal does to its group, and wait for the exit code."""
        self.send(number, group=group)
        return self.wait()

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        self._note_sessions()
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self) -> int:
        self._note_sessions()
        return self.process.wait(PATIENCE_S)

    def leftovers(self) -> list[str]:
        """Processes, temporary files and shared memory that are there now."""
        names = [f"process {process.pid} {process.name()}" for process in self.processes()]
        names += [str(path) for path in self.temporary.iterdir()]
        return names + [str(SHARED_MEMORY / i) for i in self.session_ids if (SHARED_MEMORY / i).exists()]

    def close(self) -> None:
        """Kill what is left, and forget it."""
        for process in self.processes():
            process.kill()
        self.process.wait()
        for file in self._output:
            file.close()
        eventually(self.processes, lambda processes: not processes)
        shutil.rmtree(self.folder)

    def _note_sessions(self) -> None:
        self.session_ids |= {path.name for path in self.temporary.glob("supernode-*")}


def metrics(url: str) -> dict[str, float]:
    """Samples of /metrics: `name{labels}` to value, without model_name."""
    samples = {}
    for line in httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[re.sub(r',?model_name="[^"]*"', "", name)] = float(value)
    return samples


def held(url: str) -> dict[str, float]:
    """What requests hold now, of each kind."""
    return {name: value for name, value in metrics(url).items() if name.startswith("supernode:held{")}


def complete(url: str, prompt: Sequence[int] | str, num_tokens: int, **fields: object) -> httpx.Response:
    """One completion, greedy unless `fields` say otherwise, with its token ids."""
    body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": num_tokens}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True} | fields
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)


def tokens_of(response: httpx.Response) -> list[int]:
    """Of a completion's only choice."""
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["token_ids"]


def noise(stderr: str) -> list[str]:
    """Lines on stderr that tell of a defect of ours; Ray may say what it likes of the machine."""
    return [line for line in stderr.splitlines() if any(word in line for word in OURS)]
