"""A decode step whose token counts were seen before: only attention's core is new.

Owns: the sums of devices/pipeline.py for two streams on shared cores, with all that token counts decide taken out.
Must not know: how those parts come about.

A simulation charges hundreds of thousands of decode steps in a row that differ in nothing but context and KV. Every sum
here is added up in the order in which the parts of `StepTimeModel.detail` are, so both give the same bits
(tests/devices/test_step_load.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from devices.operators import Parts
from devices.step_work import StepTime

Around = tuple[float, float, float, Parts, float]  # prolog, O_proj, activations; the MoE stream and its total


@dataclass(slots=True, kw_only=True)
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
    first_aic: int  # where the search for a split starts; afterwards, where it ended

    def time(self, context: Sequence[float], kv: Sequence[float]) -> StepTime:
        """Of a step with these contexts on the ranks that may be the slowest."""
        prolog, o_proj, activations, moe, _ = self.whole
        core = self.core(context, kv, self.num_aic)
        attention_s = prolog + core + o_proj + activations
        plain_s = sum(moe.values(), attention_s)
        halves = [value / 2 for value in context], [value / 2 for value in kv]
        (stream_s, other_s), half_core, around = self._split(*halves)
        num_moe, half_attention_s = self.num_moe, around[0] + half_core + around[1] + around[2]
        if stream_s * 2 * num_moe + other_s < plain_s * num_moe:
            factor = num_moe * 2
            if half_attention_s >= around[4]:
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
        return StepTime.of_seconds(exposed)

    def _split(self, context: Sequence[float], kv: Sequence[float]) -> tuple[tuple[float, float], float, Around]:
        """Longer and shorter stream of the best split of the cores, attention's core there, and what surrounds it.

        The rule is that of LayerModel: attention's stream gets shorter with more cores and the other one longer, so
        the best split is the first whose attention is not the longer one, or the one before it.
        """
        aic, last = self.first_aic, self.num_aic - 1
        here = self._streams(context, kv, aic)
        while aic < last and here[0] > here[1]:
            aic += 1
            here = self._streams(context, kv, aic)
        before = None
        while aic > 1:
            before = self._streams(context, kv, aic - 1)
            if before[0] > before[1]:
                break
            aic, here, before = aic - 1, before, None
        self.first_aic = aic
        if before is not None and max(before[:2]) <= max(here[:2]):
            here = before
        attention_s, moe_s, core, around = here
        longest = (attention_s, moe_s) if attention_s >= moe_s else (moe_s, attention_s)
        return longest, core, around

    def _streams(self, context: Sequence[float], kv: Sequence[float], aic: int) -> tuple[float, float, float, Around]:
        around = self.half(aic)
        core = self.core(context, kv, aic)
        return around[0] + core + around[1] + around[2], around[4], core, around
