"""How good the drafts of a run were: counts of an endpoint's metrics or of engines, and the figures made of them.

Owns: vLLM's figures of speculative decoding, its names for them, and the reading of its counters.
Must not know: HTTP, how drafts are made.
Source: `vllm bench serve`, which reads /metrics before and after a run, prints a section behind the latencies and
writes keys `spec_decode_*`; vLLM's counters `vllm:spec_decode_*`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SAMPLE = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(\{[^}]*\})? (\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecDecodeStats:
    """Counts of a run. Entry p of `accepted_by_position` counts drafts of which token p was accepted."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_by_position: tuple[int, ...]

    @classmethod
    def of_single_drafts(cls, num_drafts: int, num_accepted: int) -> "SpecDecodeStats | None":
        """Where every draft is one token; None if there was none."""
        if not num_drafts:
            return None
        return cls(
            num_drafts=num_drafts,
            num_draft_tokens=num_drafts,
            num_accepted_tokens=num_accepted,
            accepted_by_position=(num_accepted,),
        )

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens in percent of the drafted ones."""
        return 100 * self.num_accepted_tokens / self.num_draft_tokens

    @property
    def acceptance_length(self) -> float:
        """Tokens that a step with a draft gives, the one that needs no draft among them."""
        return 1 + self.num_accepted_tokens / self.num_drafts

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts whose token at each position was accepted."""
        return [count / self.num_drafts for count in self.accepted_by_position]

    def rows(self) -> list[tuple[str, float | int | None]]:
        """Labels and values of vLLM's section; None: a heading."""
        by_position = [(f"  Position {p}:", 100 * share) for p, share in enumerate(self.acceptance_by_position)]
        return [
            ("Acceptance rate (%):", self.acceptance_rate),
            ("Acceptance length:", self.acceptance_length),
            ("Drafts:", self.num_drafts),
            ("Draft tokens:", self.num_draft_tokens),
            ("Accepted tokens:", self.num_accepted_tokens),
            *([("Per-position acceptance (%):", None), *by_position] if by_position else []),
        ]

    def to_json(self) -> dict[str, float | int | list[float]]:
        """vLLM's keys."""
        return {
            "spec_decode_acceptance_rate": self.acceptance_rate,
            "spec_decode_acceptance_length": self.acceptance_length,
            "spec_decode_num_drafts": self.num_drafts,
            "spec_decode_draft_tokens": self.num_draft_tokens,
            "spec_decode_accepted_tokens": self.num_accepted_tokens,
            "spec_decode_per_position_acceptance_rates": self.acceptance_by_position,
        }


Counters = Mapping[str, float]
"""Sums of an endpoint's counters over its engines, by "drafts", "accepted_tokens_per_pos/0" and so on."""


def parse_counters(exposition: str) -> Counters:
    """The counters of speculative decoding in a Prometheus exposition; empty if it has none."""
    counters: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(exposition):
        if name.endswith("_created"):  # a companion of a counter that some clients write: an instant
            continue
        position = _POSITION.search(labels)
        key = f"{name}/{position.group(1)}" if position else name
        counters[key] = counters.get(key, 0.0) + float(value)
    return counters


def stats_between(before: Counters, after: Counters) -> SpecDecodeStats | None:
    """What was counted between two readings; None if nothing was drafted."""

    def count(key: str) -> int:
        return round(after.get(key, 0.0) - before.get(key, 0.0))

    if count("drafts") <= 0 or count("draft_tokens") <= 0:  # below: the endpoint was started anew
        return None
    positions = sorted(int(key.rpartition("/")[2]) for key in after if key.startswith("accepted_tokens_per_pos/"))
    return SpecDecodeStats(
        num_drafts=count("drafts"),
        num_draft_tokens=count("draft_tokens"),
        num_accepted_tokens=count("accepted_tokens"),
        accepted_by_position=tuple(count(f"accepted_tokens_per_pos/{p}") for p in positions),
    )
