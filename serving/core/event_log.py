"""What happened, in order, and a digest of it.

Owns: the canonical form of an event, and the digest by which two runs are compared.
Must not know: who reports, what the events mean.
Source: event-log tests of SimPy; the digest makes a million events comparable by 32 bytes.
"""

import hashlib
from operator import index
from typing import NamedTuple

from serving.core.errors import IllegalCall


class Event(NamedTuple):
    """One event: an instant, a kind, whom it concerns, and details in the order of their names."""

    now_ns: int
    kind: str
    subject: str
    details: tuple[tuple[str, int | str], ...]


class EventLog:
    """A digest that grows with every event; the events themselves only with `keep`.

    Events are in the order of their calls. Their instants need not ascend: an event may be noted before it is due.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._digest = hashlib.sha256()
        self._events: list[Event] | None = [] if keep else None
        self._num_events = 0

    @property
    def num_events(self) -> int:
        """Events so far, kept or not."""
        return self._num_events

    @property
    def events(self) -> list[Event]:
        """The events so far; empty unless they are kept."""
        return list(self._events or ())

    def append(self, now_ns: int, kind: str, subject: str, **details: int | str) -> None:
        """Note one event. Raises IllegalCall unless `details` are integers (numpy's too) and strings.

        Floats are refused: a difference in the last bit would change the digest.
        """
        try:
            plain = [(name, str(x) if isinstance(x, str) else index(x)) for name, x in sorted(details.items())]
            event = Event(index(now_ns), str(kind), str(subject), tuple(plain))
        except TypeError as error:
            raise IllegalCall(f"event {kind} of {subject}: {error}") from None
        self._digest.update(_canonical(event))
        self._num_events += 1
        if self._events is not None:
            self._events.append(event)

    def digest(self) -> str:
        """Hexadecimal digest of all events so far, in order."""
        return self._digest.hexdigest()

    def check_invariants(self) -> None:
        """Raise AssertionError unless the kept events, if any are, give the digest."""
        if self._events is not None:
            assert len(self._events) == self._num_events
            assert hashlib.sha256(b"".join(map(_canonical, self._events))).hexdigest() == self.digest()


def _canonical(event: Event) -> bytes:
    """Bytes that no other event has: strings are quoted, so no choice of names can imitate a delimiter."""
    return repr(tuple(event)).encode("utf-8", "backslashreplace") + b"\n"
