"""Errors keep their fields and their message across processes."""

import pickle

import pytest

from devices.faults import (
    BlockNotStored,
    CollectiveTimeout,
    DeviceError,
    LinkDown,
    NpuLost,
    OutOfDeviceMemory,
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OutOfDeviceMemory("npu 1 die 0 HBM", 5, 3), "npu 1 die 0 HBM: wanted 5 bytes, 3 bytes are free"),
        (NpuLost("npu 1"), "npu 1 is lost: failed"),
        (NpuLost("npu 1", "power"), "npu 1 is lost: power"),
        (LinkDown("ub", "npu 1 die 0", "host 2"), "plane ub: npu 1 die 0 cannot reach host 2: link down"),
        (CollectiveTimeout("AllToAll", (3,), 1.5), "AllToAll: rank 3 missing after 1.5 s"),
        (CollectiveTimeout("AllToAll", (3, 5), 10.0), "AllToAll: ranks 3, 5 missing after 10 s"),
        (BlockNotStored("host 2", 7), "host 2: handle 7 holds no bytes: never written, or freed"),
    ],
)
def test_message_and_pickling(error: DeviceError, message: str) -> None:
    assert str(error) == message
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), message, vars(error))
