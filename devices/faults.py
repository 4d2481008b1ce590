"""What a device can do wrong.

DeviceError
  OutOfDeviceMemory    a reservation does not fit                 .device .wanted_bytes .free_bytes
  NpuLost              the NPU is gone                            .npu .reason
  LinkDown             no path between two endpoints of a plane   .plane .src .dst .reason
  CollectiveTimeout    a rank did not come                        .collective .missing_ranks .waited_s
  BlockNotStored       a handle that holds no bytes               .host .handle

Owns: the tree and its messages.
Must not know: who handles them.

Arguments are positional and equal to `args`, so that every error survives pickling between processes.
"""


class DeviceError(RuntimeError):
    """Base of all device errors."""


class OutOfDeviceMemory(DeviceError):
    """A reservation does not fit; nothing was reserved."""

    def __init__(self, device: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(device, wanted_bytes, free_bytes)
        self.device = device
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes

    def __str__(self) -> str:
        return f"{self.device}: wanted {self.wanted_bytes} bytes, {self.free_bytes} bytes are free"


class NpuLost(DeviceError):
    """The NPU is gone, and whatever was on it."""

    def __init__(self, npu: str, reason: str = "failed") -> None:
        super().__init__(npu, reason)
        self.npu = npu
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.npu} is lost: {self.reason}"


class LinkDown(DeviceError):
    """Two endpoints cannot reach each other on a plane."""

    def __init__(self, plane: str, src: str, dst: str, reason: str = "link down") -> None:
        super().__init__(plane, src, dst, reason)
        self.plane = plane
        self.src = src
        self.dst = dst
        self.reason = reason

    def __str__(self) -> str:
        return f"plane {self.plane}: {self.src} cannot reach {self.dst}: {self.reason}"


class CollectiveTimeout(DeviceError):
    """Some ranks did not come to a collective in time."""

    def __init__(self, collective: str, missing_ranks: tuple[int, ...], waited_s: float) -> None:
        super().__init__(collective, missing_ranks, waited_s)
        self.collective = collective
        self.missing_ranks = missing_ranks
        self.waited_s = waited_s

    def __str__(self) -> str:
        ranks = ", ".join(str(rank) for rank in self.missing_ranks)
        noun = "rank" if len(self.missing_ranks) == 1 else "ranks"
        return f"{self.collective}: {noun} {ranks} missing after {self.waited_s:g} s"


class BlockNotStored(DeviceError):
    """A pool handle was never written, or has been freed."""

    def __init__(self, host: str, handle: int) -> None:
        super().__init__(host, handle)
        self.host = host
        self.handle = handle

    def __str__(self) -> str:
        return f"{self.host}: handle {self.handle} holds no bytes: never written, or freed"
