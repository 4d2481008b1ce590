"""Errors of the core.

CoreError
  IllegalCall     unknown or repeated id, double release, transition that does not exist (a ValueError)
  UnfitRequest    a request or block that could never be served: says the value and the limit (a ValueError)
  OutOfBlocks     too few free blocks now; the caller queues, preempts or goes elsewhere
  NoSlot          the rank runs as many requests as it may
  LeaseLost       the lease expired or was released before; what was read under it must be thrown away

Owns: the exception classes. An error means that the call changed nothing.
Must not know: who handles them.
"""


class CoreError(Exception):
    """Base class of everything that the core raises."""


class IllegalCall(CoreError, ValueError):
    """The call does not make sense in the present state."""


class UnfitRequest(CoreError, ValueError):
    """The request could not be served even by an empty machine."""


class OutOfBlocks(CoreError):
    """`num_needed` blocks were asked for, `num_free` are free."""

    def __init__(self, *, num_needed: int, num_free: int, where: str = "block pool") -> None:
        super().__init__(f"{where}: {num_needed} blocks needed, {num_free} free")
        self.num_needed = num_needed
        self.num_free = num_free


class NoSlot(CoreError):
    """The rank holds `max_num_seqs` requests already."""

    def __init__(self, *, rank: int, max_num_seqs: int) -> None:
        super().__init__(f"rank {rank}: all {max_num_seqs} slots are taken (max_num_seqs)")
        self.rank = rank
        self.max_num_seqs = max_num_seqs


class LeaseLost(CoreError):
    """The lease is not held any more."""

    def __init__(self, *, lease_id: int) -> None:
        super().__init__(f"lease {lease_id} is not held: it expired or was released before")
        self.lease_id = lease_id
