"""What a placed request holds, and who gives it back: the last one who needs it.

Owns: the counting of those who use a request's blocks at an instance.
Must not know: how blocks move, what is routed where.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from serving.core.ids import BlockIds
from serving.core.request import Request
from serving.core.router import Placement
from serving.engine import Engine


class Hold:
    """What a request holds at one instance, shared by its life and by the movements of its blocks.

    The last `release` gives it back: blocks may not be reused while bytes are still on their way into or out of them.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._count = 1
        self.released = asyncio.Event()

    def share(self) -> None:
        """One more user."""
        assert self._count, "held by nobody any more"
        self._count += 1

    def release(self) -> None:
        """One user less."""
        assert self._count, "released too often"
        self._count -= 1
        if not self._count:
            self._give_back()
            self.released.set()


@dataclass(slots=True, kw_only=True, eq=False)
class Placed:
    """A request with a place: instances, and what it holds there."""

    request: Request
    placement: Placement
    prefill: Engine
    prefill_hold: Hold
    decode: Engine | None = None  # None: colocated
    decode_hold: Hold | None = None
    decode_blocks: BlockIds | None = None
    needs_prefill: bool = True  # its blocks at the prefill instance, for itself

    @property
    def is_disaggregated(self) -> bool:
        """Whether another instance decodes."""
        return self.decode is not None

    def leave_prefill(self) -> None:
        """The request itself needs its blocks at the prefill instance no longer; movements may. Once is enough."""
        if self.needs_prefill:
            self.needs_prefill = False
            self.prefill_hold.release()

    async def released(self) -> None:
        """Wait until nothing of it is held."""
        await self.prefill_hold.released.wait()
        if self.decode_hold is not None:
            await self.decode_hold.released.wait()
