"""A client in a process of its own ends with its caller, however often that is interrupted."""

import asyncio
import functools
import importlib
import multiprocessing

import pytest

from serving import client_process
from serving.client_process import run_in_process
from serving.errors import ServingError

# A module on its own: the client's process imports it anew.
STUBBORN = """
import asyncio, pathlib

async def work(path, *, stop):
    pathlib.Path(path).touch()
    await asyncio.sleep(0 if path.endswith("quick") else 600)
    return path
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Makes work that touches a file, then ignores being stopped unless the file is called quick."""
    (tmp_path / "stubborn_client.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("stubborn_client").work


class Started:
    """A call of `work` in a process; `wait` returns when the process is at work."""

    def __init__(self, work, path):
        self.path, self.task = path, asyncio.ensure_future(run_in_process(functools.partial(work, str(path))))

    async def wait(self):
        while not self.path.exists():
            assert not self.task.done(), self.task.exception()
            await asyncio.sleep(0.02)


def clients():
    return [process for process in multiprocessing.active_children() if process.name == "client"]


@pytest.mark.asyncio
async def test_what_the_client_returns_is_returned(work, tmp_path):
    started = Started(work, tmp_path / "quick")
    assert await started.task == str(tmp_path / "quick")
    assert clients() == []


@pytest.mark.asyncio
async def test_a_second_cancellation_kills_a_client_that_does_not_stop(work, tmp_path):
    started = Started(work, tmp_path / "begun")
    await started.wait()
    (process,) = clients()
    started.task.cancel()
    await asyncio.sleep(0.05)
    assert not started.task.done()
    started.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await started.task
    assert not process.is_alive()
    assert clients() == []


@pytest.mark.asyncio
async def test_a_client_that_does_not_stop_in_time_is_killed(work, tmp_path, monkeypatch):
    monkeypatch.setattr(client_process, "INTERRUPT_TIMEOUT_S", 0.1)
    started = Started(work, tmp_path / "begun")
    await started.wait()
    started.task.cancel()
    with pytest.raises(ServingError, match="it ended without a result"):
        await started.task
    assert clients() == []


@pytest.mark.asyncio
async def test_a_client_that_dies_is_told(work, tmp_path):
    started = Started(work, tmp_path / "begun")
    await started.wait()
    (process,) = clients()
    process.kill()
    with pytest.raises(ServingError, match="it ended without a result"):
        await started.task
