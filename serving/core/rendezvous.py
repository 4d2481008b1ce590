"""Rendezvous hashing: every key prefers the hosts in an order of its own, which does not change when others go.

Owns: the weight of a host for a key.
Must not know: what hosts are, what they hold.
Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 1998 (highest random
weight); the weight is the finalizer of splitmix64 (serving/core/splitmix64.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np

from serving.core.splitmix64 import Words, finalize

_LOW_64 = (1 << 64) - 1
_MAX_KEYS = 64  # at once: their weights stay in the processor's cache


class Rendezvous:
    """Hosts in the order of preference of any key: an integer that is not negative, of which 64 bits count."""

    def __init__(self, host_ids: Iterable[int]) -> None:
        self._host_ids = list(host_ids)
        # A 64-bit number for each host that depends on its id alone.
        digests = [blake2b(str(host_id).encode(), digest_size=8).digest() for host_id in self._host_ids]
        self._seeds = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)

    @property
    def host_ids(self) -> list[int]:
        """All hosts."""
        return list(self._host_ids)

    def first_choices(self, keys: Sequence[int]) -> list[int]:
        """The host that each key likes best. There must be one at least."""
        best: list[int] = []
        for start in range(0, len(keys), _MAX_KEYS):
            best += self._weights(keys[start : start + _MAX_KEYS]).argmax(axis=1).tolist()
        return [self._host_ids[index] for index in best]

    def choices(self, key: int) -> Iterator[int]:
        """All hosts, the best first; the others are sorted only if somebody asks."""
        if not self._host_ids:
            return
        weights = self._weights((key,))[0]
        yield self._host_ids[int(weights.argmax())]
        for index in np.argsort(weights)[-2::-1].tolist():
            yield self._host_ids[index]

    def _weights(self, keys: Sequence[int]) -> Words:
        """Shape (num_keys, num_hosts)."""
        words = np.array([key & _LOW_64 for key in keys], np.uint64)
        return finalize(self._seeds ^ words[:, None])
