"""Windows in shared memory: what is left behind, what is borrowed, who died."""

import contextlib
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import serving
from devices.faults import CollectiveTimeout
from serving.exchange import CollectiveError, GroupUnusable, RanksLost, RanksOutOfStep, WindowOverflow
from serving.shared_memory import SharedMemoryExchange, WindowGroupSpec, remove_windows

Join = Callable[..., list[SharedMemoryExchange]]

MEMBER = """
import sys, time
from types import SimpleNamespace
import numpy as np
from serving.shared_memory import SharedMemoryExchange, WindowGroupSpec
assert "torch" not in sys.modules  # it would cost every process 175 MB
path, process, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
spec = WindowGroupSpec(
    path=path, world_size=world_size, ranks_by_process=tuple((r,) for r in range(world_size)),
    window_bytes=1024, timeout_s=30.0, epoch=0,
)
print("joining", flush=True)
exchange = SharedMemoryExchange(spec, process)
print("joined", flush=True)
try:
    while True:
        exchange.exchange([SimpleNamespace(rows=np.zeros((1, 1)))])
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A launch's private folder, where windows really live."""
    parent = Path("/dev/shm") / f"supernode-test-{os.getpid()}-{time.monotonic_ns()}"
    parent.mkdir(mode=0o700)
    yield parent
    for group in parent.iterdir() if parent.exists() else ():
        remove_windows(group)
    with contextlib.suppress(FileNotFoundError):
        parent.rmdir()


@pytest.fixture
def members() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end when the test does."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start_member(members: list[subprocess.Popen[str]], path: Path, process: int, world_size: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(serving.__path__[0]).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMBER, str(path), str(process), str(world_size)]
    members.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))


def line_of(member: subprocess.Popen[str]) -> str:
    assert member.stdout is not None
    return member.stdout.readline().strip()


def make_spec(folder: Path, *parts: tuple[int, ...], **changes: Any) -> WindowGroupSpec:
    ranks_by_process = parts or ((0,), (1,))
    fields = {
        "path": str(folder / "group-0"),
        "world_size": sum(map(len, ranks_by_process)),
        "ranks_by_process": ranks_by_process,
        "window_bytes": 1024,
        "timeout_s": 20.0,
        "epoch": 0,
    }
    return WindowGroupSpec(**{**fields, **changes})


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Results of all; an exception of the exchange is a result."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures: list[Future[Any]] = [pool.submit(function) for function in functions]
        return [future.exception() or future.result() for future in futures]


@pytest.fixture
def join() -> Iterator[Callable[..., list[SharedMemoryExchange]]]:
    """Makes all members of a group, as threads would, and closes them when the test ends."""
    made: list[SharedMemoryExchange] = []

    def join_all(spec: WindowGroupSpec, **options: Any) -> list[SharedMemoryExchange]:
        processes = range(len(spec.ranks_by_process))
        exchanges = in_threads(*(lambda p=p: SharedMemoryExchange(spec, p, **options) for p in processes))
        made.extend(exchanges)
        return exchanges

    yield join_all
    for exchange in made:
        exchange.close()
        assert exchange.num_open_windows == 0


GATHER = SimpleNamespace(rows=np.zeros((1, 1)))


def exchange_often(exchange: SharedMemoryExchange) -> None:
    """A peer that was just killed may have sent its part of one exchange more."""
    for _ in range(10):
        exchange.exchange([GATHER])


def all_to_all(*rows: Any) -> SimpleNamespace:
    return SimpleNamespace(rows=[np.asarray(block, np.float32).reshape(-1, 1) for block in rows])


def test_nothing_is_left_once_all_have_joined(folder: Path, join: Join) -> None:
    exchanges = join(make_spec(folder))
    assert not folder.exists()  # the last group takes its launch's empty, private folder with it
    assert [exchange.num_open_windows for exchange in exchanges] == [2, 2]
    for exchange in exchanges:
        exchange.close()
    assert [exchange.num_open_windows for exchange in exchanges] == [0, 0]


def test_a_folder_that_others_use_stays(folder: Path, join: Join) -> None:
    (folder / "other").mkdir()
    for exchange in join(make_spec(folder)):
        exchange.close()
    assert [entry.name for entry in folder.iterdir()] == ["other"]
    (folder / "other").rmdir()
    folder.chmod(0o755)
    for exchange in join(make_spec(folder)):
        exchange.close()
    assert list(folder.iterdir()) == []


def test_members_killed_after_joining_leave_nothing(folder: Path, members: list[subprocess.Popen[str]]) -> None:
    before = set(os.listdir("/dev/shm"))
    for process in range(2):
        start_member(members, folder / "group-0", process, 2)
    for member in members:
        assert [line_of(member), line_of(member)] == ["joining", "joined"]
    for member in members:
        os.kill(member.pid, signal.SIGKILL)
        member.wait()
    assert set(os.listdir("/dev/shm")) <= before - {folder.name}


def test_members_killed_while_joining_leave_what_the_launcher_removes(
    folder: Path, members: list[subprocess.Popen[str]]
) -> None:
    path = folder / "group-0"
    for process in range(2):
        start_member(members, path, process, 3)  # the third never comes
    for member in members:
        assert line_of(member) == "joining"
    deadline = time.monotonic() + 20
    while not (path / "windows").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for member in members:
        os.kill(member.pid, signal.SIGKILL)
        member.wait()
    assert path.exists()
    assert remove_windows(str(path))
    assert not folder.exists()
    assert not remove_windows(str(path))


def test_a_killed_member_is_noticed_long_before_the_timeout(folder: Path, members: list[subprocess.Popen[str]]) -> None:
    """By the root, which waits for everybody, and through it by the others; and nothing works any more."""
    for process in (1, 2):
        start_member(members, folder / "group-0", process, 3)
    exchange = SharedMemoryExchange(make_spec(folder, (0,), (1,), (2,), timeout_s=30.0), 0)
    exchange.exchange([GATHER])
    os.kill(members[1].pid, signal.SIGKILL)  # stays a zombie until the fixture reaps it
    start = time.monotonic()
    with pytest.raises(RanksLost, match="process of rank 2 ended; the group cannot be used again") as caught:
        exchange_often(exchange)
    assert caught.value.ranks == (2,)
    assert [line_of(members[0]) for _ in range(3)][2].startswith("RanksLost group group-0, epoch 0: the process of")
    assert time.monotonic() - start < 5
    with pytest.raises(GroupUnusable, match=r"was given up: .* process of rank 2 ended"):
        exchange.exchange([GATHER])
    exchange.close()


def test_a_killed_root_is_noticed_too(folder: Path, members: list[subprocess.Popen[str]]) -> None:
    start_member(members, folder / "group-0", 0, 2)
    with SharedMemoryExchange(make_spec(folder), 1) as exchange:
        os.kill(members[0].pid, signal.SIGKILL)
        with pytest.raises(RanksLost, match="process of rank 0 ended"):
            exchange_often(exchange)


def test_a_killed_root_is_noticed_by_those_who_join(folder: Path, members: list[subprocess.Popen[str]]) -> None:
    path = folder / "group-0"
    start_member(members, path, 0, 3)
    spec = make_spec(folder, (0,), (1,), (2,))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(SharedMemoryExchange, spec, 1)
        while not (path / "windows").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(members[0].pid, signal.SIGKILL)
        assert isinstance(future.exception(timeout=10), RanksLost | CollectiveTimeout)


def test_too_many_bytes_are_refused_and_the_peers_hear_it_at_once(folder: Path, join: Join) -> None:
    exchanges = join(make_spec(folder, (0,), (1,), (2,)))
    fits, too_long = np.zeros(256), np.zeros(257)
    exchange_each = [
        lambda: exchanges[0].exchange([all_to_all(fits, fits, fits)]),
        lambda: exchanges[1].exchange([all_to_all(fits, fits, fits)]),
        lambda: exchanges[2].exchange([all_to_all(fits, fits, fits)]),
    ]
    assert not any(isinstance(result, Exception) for result in in_threads(*exchange_each))
    exchange_each[1] = lambda: exchanges[1].exchange([all_to_all(fits, fits, too_long)])
    start = time.monotonic()
    errors = in_threads(*exchange_each)
    assert time.monotonic() - start < 2
    assert isinstance(errors[1], WindowOverflow)
    assert str(errors[1]) == "group group-0, epoch 0: rank 1 sends 1028 bytes to rank 2, window_bytes is 1024"
    assert [type(errors[0]), type(errors[2])] == [GroupUnusable] * 2
    assert str(errors[0]).endswith(str(errors[1]))


def test_local_rows_and_rows_to_itself_need_no_window(folder: Path, join: Join) -> None:
    exchanges = join(make_spec(folder, (0, 1), (2,)))
    large, small = np.zeros(5000), np.ones(3)
    replies = in_threads(
        lambda: exchanges[0].exchange([all_to_all(large, large, small), all_to_all(large, large, small)]),
        lambda: exchanges[1].exchange([all_to_all(small, small, large)]),
    )
    assert [[len(rows) for rows in reply] for reply in replies[0]] == [[5000, 5000, 3], [5000, 5000, 3]]
    assert [len(rows) for rows in replies[1][0]] == [3, 3, 5000]


def test_a_borrowed_reply_shows_the_window_and_a_fast_peer_does_not_touch_it(folder: Path, join: Join) -> None:
    slow, fast = join(make_spec(folder), borrow=True)
    first = all_to_all([1, 2], [3, 4])
    (reply,), _ = in_threads(lambda: slow.exchange([first]), lambda: fast.exchange([first]))
    assert not reply[1].flags.owndata
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fast.exchange, [all_to_all([9, 9], [9, 9])])
        mapping = slow._group.mapping
        while not mapping.has_arrived(1, 2):  # it has written its next rows and waits in the barrier
            time.sleep(0.001)
        assert reply[1].tolist() == [[1], [2]]
        (reply,) = slow.exchange([all_to_all([5], [6])])
        assert reply[1].tolist() == [[9], [9]]
        assert ahead.result()[0][0].tolist() == [[6]]


def test_a_borrowed_reply_that_a_rank_sends_on_to_a_local_rank_is_copied(folder: Path, join: Join) -> None:
    near, far = join(make_spec(folder, (0, 1), (2,)), borrow=True)

    def echo(exchange: Any, num_local: int) -> list[Any]:
        replies = exchange.exchange([all_to_all(*[[r], [r], [r]]) for r in range(num_local)])
        for turn in range(4):
            sent_on = [SimpleNamespace(rows=[reply[2], reply[2], reply[2]]) for reply in replies]
            if num_local == 1:
                sent_on = [all_to_all([turn], [turn], [turn])]
            replies = exchange.exchange(sent_on)
            if num_local == 2:
                time.sleep(0.01)  # the peer goes on to write its next rows
        return [[rows.tolist() for rows in reply] for reply in replies]

    replies, _ = in_threads(lambda: echo(near, 2), lambda: echo(far, 1))
    assert replies == [[[[2.0]], [[2.0]], [[3.0]]]] * 2


def test_a_borrowed_reply_outlives_the_group(folder: Path, join: Join) -> None:
    exchanges = join(make_spec(folder), borrow=True)
    call = all_to_all([1], [2])
    (reply,), _ = in_threads(*(lambda e=e: e.exchange([call]) for e in exchanges))
    for exchange in exchanges:
        exchange.close()
    assert reply[1].tolist() == [[1.0]]


def test_abort_ends_a_wait_from_another_thread(folder: Path, join: Join) -> None:
    first, second = join(make_spec(folder))
    timer = threading.Timer(0.1, lambda: first.abort("the launcher lost rank 1"))
    timer.start()
    start = time.monotonic()
    with pytest.raises(GroupUnusable, match="rank 0: the launcher lost rank 1"):
        first.barrier()
    assert time.monotonic() - start < 2
    timer.join()
    with pytest.raises(GroupUnusable, match="was given up: rank 0: the launcher lost rank 1"):
        second.barrier()


def test_an_existing_path_is_refused_and_left_alone(folder: Path) -> None:
    (folder / "group-0").mkdir()
    (folder / "group-0" / "theirs").touch()
    with pytest.raises(GroupUnusable, match="group-0 exists"):
        SharedMemoryExchange(make_spec(folder), 0)
    (folder / "group-0" / "theirs").unlink()


def test_another_specification_is_refused(folder: Path) -> None:
    spec, other = make_spec(folder, timeout_s=5.0), make_spec(folder, timeout_s=5.0, epoch=1)
    errors = in_threads(lambda: SharedMemoryExchange(spec, 0), lambda: SharedMemoryExchange(other, 1))
    assert isinstance(errors[0], CollectiveTimeout)
    assert isinstance(errors[1], RanksOutOfStep)
    assert not folder.exists()


def test_windows_that_do_not_fit_are_refused_before_anybody_writes(folder: Path) -> None:
    with pytest.raises(CollectiveError, match="bytes of windows do not fit: "):
        SharedMemoryExchange(make_spec(folder, window_bytes=2**44), 0)
    assert not folder.exists()


def test_no_descriptor_is_left_open(folder: Path, join: Join) -> None:
    def num_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = num_descriptors()
    for exchange in join(make_spec(folder)):
        exchange.close()
    with pytest.raises(CollectiveTimeout):
        SharedMemoryExchange(make_spec(folder, timeout_s=0.1), 1)
    with pytest.raises(CollectiveTimeout):
        SharedMemoryExchange(make_spec(folder, timeout_s=0.1), 0)
    assert num_descriptors() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_bytes": 0}, "window_bytes: got 0"),
        ({"timeout_s": 0.0}, "timeout_s: got 0.0"),
        ({"timeout_s": float("inf")}, "timeout_s: got inf"),
        ({"world_size": 3}, "ranks_by_process: "),
        ({"ranks_by_process": ((0,), (0, 1))}, "ranks_by_process: "),
        ({"ranks_by_process": ((0, 1), ())}, "ranks_by_process: "),
    ],
)
def test_a_wrong_specification_names_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_spec(Path("/dev/shm"), **change)


def test_a_process_outside_the_group_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="process_index: got 2"):
        SharedMemoryExchange(make_spec(folder), 2)
