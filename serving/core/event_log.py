"""What happened, in order, and a digest of it.

Owns: the canonical form of an event, and the digest by which two runs are compared.
Must not know: who reports, what the events mean.
Source: event-log tests of SimPy; the digest makes a million events comparable by 32 bytes.
"""

import hashlib
from typing import NamedTuple


class Event(NamedTuple):
    """One event: an instant, a kind, whom it concerns, and details in the order of their names."""

    now_ns: int
    kind: str
    subject: str
    details: tuple[tuple[str, int | str], ...]


class EventLog:
    """A digest that grows with every event; the events themselves only with `keep`."""

    def __init__(self, *, keep: bool = False) -> None:
        self._digest = hashlib.sha256()
        self._events: list[Event] | None = [] if keep else None
        self._num_events = 0

    @property
    def num_events(self) -> int:
        return self._num_events

    @property
    def events(self) -> list[Event]:
        """The events so far; empty unless they are kept."""
        return list(self._events or ())

    def append(self, now_ns: int, kind: str, subject: str, **details: int | str) -> None:
        """Note one event. `details` may hold integers and strings only: what prints the same everywhere."""
        event = Event(now_ns, kind, subject, tuple(sorted(details.items())))
        self._digest.update(repr(event).encode())
        self._num_events += 1
        if self._events is not None:
            self._events.append(event)

    def digest(self) -> str:
        """Hexadecimal digest of all events so far, in order."""
        return self._digest.hexdigest()
