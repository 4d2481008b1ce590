"""What happened, and a digest of it.

Owns: the canonical form of an event, and the digest by which two runs are compared.
Must not know: who reports, what the events mean.
Source: event-log tests of SimPy; the digest makes a million events comparable by 32 bytes. It is the multiset hash
AdHash (Bellare and Micciancio 1997): the sum of the events' hashes modulo 2**256.

A sum does not depend on the order of its terms, so two drivers that note the same events in another order of calls have
the same digest. What it no longer sees is the order in which events of one instant were noted, since an event names
its instant: of two requests placed at one instant, which came first shows only by what each of them got. Kept events
stay in the order of their calls.
"""

from hashlib import sha256
from operator import index
from typing import NamedTuple

from serving.core.errors import IllegalCall

_MODULUS = 1 << 256


class Event(NamedTuple):
    """One event: an instant, a kind, whom it concerns, and details in the order of their names."""

    now_ns: int
    kind: str
    subject: str
    details: tuple[tuple[str, int | str], ...]


class EventLog:
    """A digest that changes with every event; the events themselves are there only with `keep`.

    Their instants need not ascend: an event may be noted before it is due.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._sum = 0
        self._events: list[Event] | None = [] if keep else None
        self._num_events = 0

    @property
    def num_events(self) -> int:
        """Events so far, kept or not."""
        return self._num_events

    @property
    def events(self) -> list[Event]:
        """The events so far, in the order of the calls; empty unless they are kept."""
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
        self._sum = (self._sum + _hash(event)) % _MODULUS
        self._num_events += 1
        if self._events is not None:
            self._events.append(event)

    def digest(self) -> str:
        """Hexadecimal digest of all events so far, in whatever order they came: 64 digits."""
        return f"{self._sum:064x}"

    def check_invariants(self) -> None:
        """Raise AssertionError unless the kept events, if any are, give the digest."""
        if self._events is not None:
            assert len(self._events) == self._num_events
            assert sum(map(_hash, self._events)) % _MODULUS == self._sum


class NullLog(EventLog):
    """Notes nothing, at next to no cost: for a run whose digest nobody asks for."""

    def append(self, now_ns: int, kind: str, subject: str, **details: int | str) -> None:
        """Do nothing, whatever the details are."""

    def digest(self) -> str:
        """Raises IllegalCall: a digest of nothing would look like one of a run."""
        raise IllegalCall("no event was noted, so there is no digest")


def _hash(event: Event) -> int:
    """The hash of bytes that no other event has: strings are quoted, so no choice of names can imitate a delimiter."""
    return int.from_bytes(sha256(repr(tuple(event)).encode("utf-8", "backslashreplace")).digest(), "little")
