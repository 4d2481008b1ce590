"""Ledger of one device memory: who reserved how much.

Owns: the sum that may not exceed the capacity.
Must not know: addresses, bytes, what the names mean.
"""

from collections.abc import Mapping
from types import MappingProxyType

from devices.faults import OutOfDeviceMemory


class MemoryLedger:
    """Named reservations in one memory. A refused call changes nothing."""

    def __init__(self, device: str, *, capacity_bytes: int) -> None:
        """`device` is the name that errors show."""
        if capacity_bytes < 0:
            raise ValueError(f"{device}: capacity of {capacity_bytes} bytes is negative")
        self._device = device
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._peak_bytes = 0
        self._bytes_by_name: dict[str | int, int] = {}

    @property
    def device(self) -> str:
        return self._device

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was ever in use."""
        return self._peak_bytes

    @property
    def free_bytes(self) -> int:
        return self._capacity_bytes - self._used_bytes

    @property
    def reservations(self) -> Mapping[str | int, int]:
        """Bytes by name, in the order of reservation; a live read-only view."""
        return MappingProxyType(self._bytes_by_name)

    def check(self, num_bytes: int) -> None:
        """Raise OutOfDeviceMemory if `num_bytes` do not fit now, ValueError if they are negative."""
        if num_bytes < 0:
            raise ValueError(f"{self._device}: a reservation of {num_bytes} bytes is negative")
        if num_bytes > self.free_bytes:
            raise OutOfDeviceMemory(self._device, num_bytes, self.free_bytes)

    def reserve(self, name: str | int, num_bytes: int) -> None:
        """Raises as `check` does, and ValueError if `name` holds something already."""
        if name in self._bytes_by_name:
            raise ValueError(f"{self._device}: {name!r} is reserved already")
        self.check(num_bytes)
        self._bytes_by_name[name] = num_bytes
        self._used_bytes += num_bytes
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)

    def release(self, name: str | int) -> int:
        """Give a reservation back and return its bytes. Raises ValueError if `name` holds nothing."""
        if name not in self._bytes_by_name:
            raise ValueError(f"{self._device}: {name!r} is not reserved")
        num_bytes = self._bytes_by_name.pop(name)
        self._used_bytes -= num_bytes
        return num_bytes

    def check_invariants(self) -> None:
        assert self._used_bytes == sum(self._bytes_by_name.values())
        assert 0 <= self._used_bytes <= self._peak_bytes <= self._capacity_bytes
        assert all(num_bytes >= 0 for num_bytes in self._bytes_by_name.values())
