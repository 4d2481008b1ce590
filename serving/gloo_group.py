"""A raw gloo group of processes, and what can be said of it when it breaks.

Owns: the group's membership and last words in a store, its connections.
Must not know: collectives, tensors' meaning, how the store's address became known.
Source: torch.distributed's ProcessGroupGloo over a PrefixStore of a TCPStore, without the default group, so that a
process may belong to many groups and a broken one is replaced by one of the next epoch.

Gloo itself knows only that a connection broke or a time ran out. So processes leave their names in the store when they
join, when they close and when an exchange breaks under them; who stays silent then is named in the error.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from devices.faults import CollectiveTimeout
from serving.exchange import CollectiveError, GroupUnusable, RanksLost, failure_of, failure_text, named

_GRACE_S = 1.0  # how long a process whose exchange broke listens who else is still there
_POLL_S = 0.01


def start_store(host: str, *, timeout_s: float = 30.0) -> TCPStore:
    """Serve a store on a free port of this host, its `.port`, for as long as the object lives."""
    return TCPStore(host, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)


class GlooGroup:
    """One process's membership. The constructor returns when all have joined.

    Raises CollectiveTimeout, RanksLost or GroupUnusable wherever it waits.
    """

    def __init__(
        self,
        store_host: str,
        store_port: int,
        *,
        name: str,
        ranks_by_process: tuple[tuple[int, ...], ...],
        process: int,
        timeout_s: float,
    ) -> None:
        self.name = name
        self._ranks_by_process = ranks_by_process
        self._process = process
        self._others = [p for p in range(len(ranks_by_process)) if p != process]
        self._timeout_s = timeout_s
        self._is_closed = False
        self._is_broken = False
        timeout = timedelta(seconds=timeout_s)
        try:
            store = TCPStore(store_host, store_port, None, False, timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise GroupUnusable(f"{name}: no store at {store_host}:{store_port}: {error}") from error
        self._store = PrefixStore(name, store)
        self._join()
        # The only reference: the connections break, and so tell the peers, when it goes.
        self._gloo: Any = ProcessGroupGloo(PrefixStore("gloo", self._store), process, len(ranks_by_process), timeout)

    def check_usable(self) -> None:
        """Raise GroupUnusable if this process has closed the group or given it up."""
        if self._is_closed:
            raise GroupUnusable(f"{self.name} is closed")
        if self._is_broken:
            self._gloo = None
            raise GroupUnusable(f"{self.name} was given up: {self._published() or 'its store is gone, too'}")

    def run(self, start: Callable[[Any], Any], what: str) -> None:
        """Run one operation of gloo to its end; `what` it is for stands in the error."""
        self.check_usable()
        begun = time.monotonic()
        try:
            start(self._gloo).wait()
        except RuntimeError as error:
            text = str(error).partition(" This is typically")[0]
            raise self._explain(what, text.rpartition("] ")[2] or text, time.monotonic() - begun) from error

    def give_up(self, error: BaseException) -> None:
        """Break the group: peers raise with this error's text. Harmless if it is broken or closed."""
        if not self._is_broken and not self._is_closed:
            self._is_broken = True
            self._publish(error)
            self._gloo = None

    def abort(self, error: BaseException) -> None:
        """The same from any thread; one that is blocked in gloo learns it when a connection ends its wait."""
        if not self._is_broken and not self._is_closed:
            self._is_broken = True
            self._publish(error)

    def close(self) -> None:
        """Leave the group and close its connections. Closing twice is harmless."""
        if not self._is_broken and not self._is_closed:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"closed/{self._process}", "")
        self._is_closed = True
        self._gloo = None

    def _join(self) -> None:
        """Wait for everybody in the store first: unlike gloo, it can say who is missing."""
        self._store.set(f"joined/{self._process}", "")
        deadline = time.monotonic() + self._timeout_s
        while missing := self._without("joined", self._others):
            if time.monotonic() > deadline:
                raise CollectiveTimeout(f"{self.name}: joining", self._ranks_of(missing), self._timeout_s)
            time.sleep(_POLL_S)

    def _explain(self, what: str, text: str, waited_s: float) -> CollectiveError | CollectiveTimeout:
        """What is known of a failure that gloo reports as `text`."""
        self._gloo = None  # our connections break now, so that peers which still wait speak up, too
        what = f"{self.name}: {what}"
        deadline = time.monotonic() + min(_GRACE_S, self._timeout_s)
        try:
            self._store.set(f"stuck/{self._process}", "")
            while silent := self._without("stuck", self._others):
                failure = self._published()
                if failure is not None:
                    return failure
                closed = set(self._others) - set(self._without("closed", self._others))
                if closed:
                    return GroupUnusable(f"{what}: {named(self._ranks_of(sorted(closed)))} closed the group")
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
        except RuntimeError as error:
            return GroupUnusable(f"{what}: {text}; the store is gone, too: {error}")
        if not silent:
            return self._published() or GroupUnusable(f"{what}: all processes wait, but gloo reports: {text}")
        ranks = self._ranks_of(silent)
        if "imed out" in text or "imeout" in text:
            return CollectiveTimeout(what, ranks, round(waited_s, 1))
        return RanksLost(f"{what}: no word from {named(ranks)} since gloo reported: {text}", ranks)

    def _publish(self, error: BaseException) -> None:
        """Leave the reason in the store, where peers look when their connections break. The first one stays."""
        text = failure_text(error, self._ranks_by_process[self._process]).decode()
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failure", "", text)

    def _published(self) -> CollectiveError | CollectiveTimeout | None:
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failure"]):
                return failure_of(self._store.get("failure"))
        return None

    def _without(self, word: str, processes: Sequence[int]) -> list[int]:
        """Those of `processes` that have not left `word` in the store."""
        if not processes or self._store.check([f"{word}/{p}" for p in processes]):
            return []
        return [p for p in processes if not self._store.check([f"{word}/{p}"])]

    def _ranks_of(self, processes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(rank for process in processes for rank in self._ranks_by_process[process]))
