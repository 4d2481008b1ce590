"""A decode step whose token counts were seen before: only attention's core is new.

Owns: the sums of devices/pipeline.py for two streams on shared cores, with all that token counts decide taken out.
Must not know: how those parts come about.

A simulation charges hundreds of thousands of decode steps in a row that differ in nothing but context and KV. Every sum
here is added up in the order in which the parts of `StepTimeModel.detail` are, so both give the same bits
(tests/devices/test_step_load.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from devices.operators import Parts
from devices.step_work import StepTime

Around = tuple[float, float, float, Parts, float]  # prolog, O_proj, activations; the MoE stream and its total


Streams = tuple[float, float, float, Around]  # seconds of attention's stream and of the other, the core, what is around
S = TypeVar("S", bound=tuple[Any, ...])


def best_split(streams: Callable[[int], S], *, start: int, last: int) -> tuple[int, int, S]:
    """The split of the cores that makes the longer of two streams shortest.

    `streams(aic)` begins with the seconds of attention's stream on `aic` cube cores, in [1, last], and of the other one
    on the rest: the first falls with `aic` and the second rises. So the best split is the first whose attention is not
    the longer one, or the one before it. Returns where that first one is, from which the next search may start; the
    best; and its streams.
    """
    first, here = start, streams(start)
    while first < last and here[0] > here[1]:
        first += 1
        here = streams(first)
    before = None
    while first > 1:
        before = streams(first - 1)
        if before[0] > before[1]:
            break
        first, here, before = first - 1, before, None
    if before is not None and max(before[:2]) <= max(here[:2]):
        return first, first - 1, before
    return first, first, here


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedStep:
    """Step times for one combination of token counts.

    `whole()` and `half(aic)` give what surrounds attention's core for the batch on all cores, and for one of two
    microbatches with `aic` cube cores for attention; `core(context, kv, aic)` is the core's time.
    """

    whole: Around
    half: Callable[[int], Around]
    core: Callable[[Sequence[float], Sequence[float], int], float]
    num_aic: int
    num_moe: int
    num_dense: int
    dense_mlp_s: float
    mtp_s: tuple[int, float, float] | None  # passes, projection, draft
    rest: Parts  # head and sampling
    launch_s: float

    def time(self, context: Sequence[float], kv: Sequence[float], *, start: int) -> tuple[StepTime, int]:
        """Of a step with these contexts on the ranks that may be the slowest; where the next search may start."""
        prolog, o_proj, activations, moe, _ = self.whole
        core = self.core(context, kv, self.num_aic)
        attention_s = prolog + core + o_proj + activations
        plain_s = sum(moe.values(), attention_s)
        halves = [value / 2 for value in context], [value / 2 for value in kv]
        first, _, (half_attention_s, moe_s, half_core, around) = best_split(
            partial(self._streams, *halves), start=start, last=self.num_aic - 1
        )
        stream_s, other_s = (half_attention_s, moe_s) if half_attention_s >= moe_s else (moe_s, half_attention_s)
        num_moe = self.num_moe
        if stream_s * 2 * num_moe + other_s < plain_s * num_moe:
            factor = num_moe * 2
            if half_attention_s >= moe_s:
                exposed = {
                    "attention.mla_prolog": around[0] * factor,
                    "attention.attention": half_core * factor,
                    "attention.o_proj": around[1] * factor,
                    "attention.activations": around[2] * factor,
                }
            else:
                exposed = {f"moe.{name}": seconds * factor for name, seconds in around[3].items()}
            exposed["pipeline_ramp"] = other_s
        else:
            exposed = {
                "attention.mla_prolog": prolog * num_moe,
                "attention.attention": core * num_moe,
                "attention.o_proj": o_proj * num_moe,
                "attention.activations": activations * num_moe,
            }
            for name, seconds in moe.items():
                exposed[f"moe.{name}"] = seconds * num_moe
            exposed["pipeline_ramp"] = 0.0
        exposed["dense_layers"] = self.num_dense * (attention_s + self.dense_mlp_s)
        exposed.update(self.rest)
        if self.mtp_s is not None:
            passes, projection_s, draft_s = self.mtp_s
            exposed["mtp"] = passes * (plain_s + projection_s + draft_s)
        exposed["launch"] = self.launch_s
        return StepTime.of_seconds(exposed), first

    def _streams(self, context: Sequence[float], kv: Sequence[float], aic: int) -> Streams:
        around = self.half(aic)
        core = self.core(context, kv, aic)
        return around[0] + core + around[1] + around[2], around[4], core, around
