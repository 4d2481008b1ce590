"""One mixture layer of a step: its operators laid on a die's resources, with two microbatches or one.

Owns: which parts of a layer run at the same time, on which cores, and what that leaves visible.
Must not know: seconds of an operator (devices/operators.py), what is outside the layers, how many there are.
Source: arXiv 2506.12708v2, section 4.2.3 (decode: two streams) and 4.3.2 (prefill: cube and vector cores, SDMA);
deepseek-ai/profile-data README and open-infra-index, day 6 (both phases on GPUs).

Decode that shares cores (`decode_overlap: cores`), microbatches 0 and 1, attention on one share of the cores and
mixture of experts, all-to-alls included, on the other:

    attention stream | A0 | A1 | A0 | A1 | A0 | ...       steady state: each layer takes 2 * max(A, M)
    MoE stream            | M0 | M1 | M0 | M1 | ...       and min(A, M) is left over once, as ramp

The split of the cores is the one that makes the longer stream shortest, as the paper tunes it per workload. A falls
with the attention stream's cores and M rises: they cross once, and the search may start at the split of the step
before, which is nearly always the same.

Decode that shares communication (`decode_overlap: communication`): all cores compute, C for one microbatch, while the
NIC moves the other's copies, N, without a core's help. A layer takes 2 * max(C, N): cores are busy for 2 C, the NIC for
2 N, and the chain of one microbatch, C + N, is never the longest of the three. It is a lower bound, which needs
operators that interleave well (DeepSeek cuts attention in two for that).

Prefill: compute of both microbatches, and collectives inside attention, follow each other; the two all-to-alls of one
run while the other computes, on SDMA or on `bulk_cores` of the cores, which compute then lacks throughout (SGLang's
two-batch overlap gives DeepGEMM the other SMs). A layer takes 2 * max(compute, all-to-alls). Without microbatches a
layer is the plain sum of its operators, each on all cores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from devices.counted_step import Around, best_split
from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.operators import REMEMBERED, Operators, Parts, PerRank
from devices.rates import Cores
from devices.spec import SupernodeSpec
from devices.step_load import StepLoad

Role = Literal["prefill", "decode", "colocated"]
Split: TypeAlias = tuple[float, float, Parts, Parts]  # seconds of the attention and the MoE stream, and their operators


@dataclass(slots=True)
class Layer:
    """What a layer adds to a step, what is left over once per step, what keeps which stream busy."""

    streams: Mapping[str, Parts]  # one microbatch
    exposed: tuple[str, ...]  # the streams that others do not hide
    exposed_s: float  # of all microbatches
    ramp_s: float = 0.0
    num_microbatches: int = 1
    attention_aic: int | None = None

    def exposed_parts(self, times: int) -> Parts:
        """`stream.operator` to seconds that so many such layers add to a step."""
        factor = times * self.num_microbatches
        return {
            f"{stream}.{name}": seconds * factor
            for stream in self.exposed
            for name, seconds in self.streams[stream].items()
        }

    def busy_parts(self) -> dict[str, Parts]:
        """What every stream does in one layer, all microbatches added up."""
        return {
            stream: {name: seconds * self.num_microbatches for name, seconds in parts.items()}
            for stream, parts in self.streams.items()
        }


class Load:
    """What one batch or microbatch asks of a layer."""

    __slots__ = ("context", "kv", "max_tokens", "mean_tokens")

    def __init__(self, max_tokens: float, mean_tokens: float, context: PerRank, kv: PerRank) -> None:
        self.max_tokens, self.mean_tokens, self.context, self.kv = max_tokens, mean_tokens, context, kv

    @classmethod
    def whole(cls, load: StepLoad) -> "Load":
        return cls(float(load.max_tokens), load.mean_tokens, load.context, load.kv)

    @classmethod
    def half(cls, load: StepLoad) -> "Load":
        """One of two microbatches; a batch of one token counts as two halves."""
        context, kv = [value / 2 for value in load.context], [value / 2 for value in load.kv]
        return cls(load.max_tokens / 2, load.mean_tokens / 2, context, kv)


class LayerModel:
    """What a mixture layer of one instance costs."""

    def __init__(
        self,
        supernode: SupernodeSpec,
        operators: Operators,
        experts: ExpertParallel,
        deployment: ExpertDeployment,
        *,
        role: Role,
        attention_aic: int | None,
    ) -> None:
        """`attention_aic`: see StepTimeModel. ValueError if it does not fit the machine."""
        die, rates = supernode.npu.die, supernode.rates
        if attention_aic is not None and rates.decode_overlap != "cores":
            raise ValueError(f"attention_aic: {attention_aic}, but microbatches on {supernode.name} share all cores")
        if attention_aic is not None and not 0 < attention_aic < die.num_aic:
            raise ValueError(f"attention_aic: {attention_aic} must leave cores of {die.num_aic} to both streams")
        self._operators, self._experts, self._deployment = operators, experts, deployment
        self._role, self._attention_aic, self._overlap = role, attention_aic, rates.decode_overlap
        self._die = Cores(aic=die.num_aic, aiv=die.num_aiv)
        self._first_aic = max(1, die.num_aic // 2)  # where the search for a split starts
        # Cores of the other stream, by cube cores of the attention stream.
        self._moe_cores = {aic: _rest(self._die, aic) for aic in range(1, die.num_aic)}
        self._bulk_cores = rates.bulk_cores
        self._bulk_stream = "communication" if rates.bulk_cores else "sdma"
        self.is_split = role == "prefill" and rates.prefill_attention == "split"
        self._fused_moe = lru_cache(REMEMBERED)(self._make_fused_moe)
        self._around = lru_cache(REMEMBERED)(self._make_around)
        self._prefill_moe = lru_cache(REMEMBERED)(self._make_prefill_moe)

    def plain(self, load: StepLoad) -> Layer:
        """One batch, operator by operator."""
        whole = Load.whole(load)
        if self._role == "prefill":
            streams = self._prefill_streams(whole, self._die.aic)
            return Layer(streams, tuple(streams), total(*streams.values()))
        _, _, attention, moe = self._split(whole, self._die.aic, self._die)
        return Layer({"attention": attention, "moe": moe}, ("attention", "moe"), total(attention, moe))

    def overlapped(self, load: StepLoad) -> Layer:
        """Two microbatches."""
        half = Load.half(load)
        if self._role == "prefill":
            return self._prefill_layer(half)
        return self._two_streams(half) if self._overlap == "cores" else self._all_cores(half)

    def _attention(self, load: Load, aic: int) -> Parts:
        absorbed = self._operators.absorbed_attention(load.max_tokens, load.context, load.kv, aic=aic)
        if self._role == "decode":
            return absorbed
        # Long prompt chunks are cheaper in the multi-head form; an engine picks one for a step.
        naive = self._operators.naive_attention(load.max_tokens, load.context, load.kv, aic=aic)
        return min(absorbed, naive, key=total)

    def _moe(self, load: Load, cores: Cores) -> tuple[Parts, float]:
        return self._fused_moe(load.max_tokens, load.mean_tokens, cores.aic, cores.aiv)

    def _make_fused_moe(self, max_tokens: float, mean_tokens: float, aic: int, aiv: int) -> tuple[Parts, float]:
        """Mixture and its all-to-alls, and their total."""
        parts = {
            "gate": self._operators.gate(max_tokens, aic=aic),
            "dispatch": self._experts.dispatch(max_tokens, aiv=aiv, mean_tokens=mean_tokens),
            "experts": self._operators.experts(mean_tokens, max_tokens, aic=aic),
            "combine": self._experts.combine(max_tokens, aiv=aiv, mean_tokens=mean_tokens),
        }
        return parts, total(parts)

    def _two_streams(self, half: Load) -> Layer:
        """Cores split so that the longer stream is shortest."""

        def split(attention_aic: int) -> Split:
            return self._split(half, attention_aic, self._moe_cores[attention_aic])

        if self._attention_aic is not None:
            aic = self._attention_aic
            streams = split(aic)
        else:
            last = self._die.aic - 1
            self._first_aic, aic, streams = best_split(split, start=self._first_aic, last=last)
        attention_s, moe_s, attention, moe = streams
        longer, longer_s, shorter_s = "attention", attention_s, moe_s
        if attention_s < moe_s:
            longer, longer_s, shorter_s = "moe", moe_s, attention_s
        return Layer({"attention": attention, "moe": moe}, (longer,), longer_s * 2, shorter_s, 2, aic)

    def _split(self, load: Load, attention_aic: int, moe_cores: Cores) -> Split:
        """Both streams of one batch or microbatch, on their cores."""
        if self._role != "decode":
            attention, (moe, moe_s) = self._attention(load, attention_aic), self._moe(load, moe_cores)
            return total(attention), moe_s, attention, moe
        core = self._operators.absorbed_core(load.context, load.kv, attention_aic)
        prolog, o_proj, activations, moe, moe_s = self._around(
            load.max_tokens, load.mean_tokens, attention_aic, moe_cores.aic, moe_cores.aiv
        )
        attention = {"mla_prolog": prolog, "attention": core, "o_proj": o_proj, "activations": activations}
        return prolog + core + o_proj + activations, moe_s, attention, moe

    def around_whole(self, load: StepLoad) -> Around:
        """What surrounds attention's core in a decode step of one batch, and the MoE stream."""
        return self._around(float(load.max_tokens), load.mean_tokens, self._die.aic, self._die.aic, self._die.aiv)

    def around_half(self, load: StepLoad) -> Callable[[int], Around]:
        """The same of one of two microbatches, by the attention stream's cube cores."""
        max_tokens, mean_tokens = load.max_tokens / 2, load.mean_tokens / 2
        known: dict[int, Around] = {}

        def around(attention_aic: int) -> Around:
            found = known.get(attention_aic)
            if found is None:
                cores = self._moe_cores[attention_aic]
                found = known[attention_aic] = self._around(
                    max_tokens, mean_tokens, attention_aic, cores.aic, cores.aiv
                )
            return found

        return around

    def _make_around(
        self, max_tokens: float, mean_tokens: float, attention_aic: int, moe_aic: int, moe_aiv: int
    ) -> Around:
        """All that a decode step's token counts decide of both streams: attention but its core, and the other one."""
        around = self._operators.around_absorbed(max_tokens, attention_aic)
        return *around, *self._fused_moe(max_tokens, mean_tokens, moe_aic, moe_aiv)

    def _all_cores(self, half: Load) -> Layer:
        """Copies of one microbatch travel while the other computes."""
        parts, _ = self._moe(half, self._die)
        communication = {name: parts[name] for name in ("dispatch", "combine")}
        moe = {name: seconds for name, seconds in parts.items() if name not in communication}
        attention = self._attention(half, self._die.aic)
        return _hidden({"attention": attention, "moe": moe, "communication": communication}, "communication")

    def _prefill_layer(self, half: Load) -> Layer:
        """All-to-alls of one microbatch under the compute of the other."""
        return _hidden(self._prefill_streams(half, self._die.aic - self._bulk_cores), self._bulk_stream)

    def _prefill_streams(self, load: Load, aic: int) -> dict[str, Parts]:
        """Attention, mixture and all-to-alls of one batch or microbatch."""
        if self.is_split:
            (context,), (kv,) = load.context, load.kv
            attention = self._operators.split_attention(load.max_tokens, context, kv)
        else:
            attention = self._attention(load, aic)
        moe, bulk = self._prefill_moe(load.max_tokens, load.mean_tokens, aic)
        return {"attention": attention, "moe": moe, self._bulk_stream: bulk}

    def _make_prefill_moe(self, max_tokens: float, mean_tokens: float, aic: int) -> tuple[Parts, Parts]:
        operators, experts = self._operators, self._experts
        copies, hottest = experts.num_copies(max_tokens), experts.hottest_copies(mean_tokens)
        # Engines move blocks that vector cores laid out, copy by copy, and add up. Kernels on cores read a token where
        # it is, and add while they receive: their measured bandwidth has that work in it.
        sent, added = (max_tokens, 0.0) if self._bulk_cores else (copies, copies)
        is_parallel = self._deployment.ep > 1
        moe = {
            "gate": operators.gate(max_tokens, aic=aic),
            "dispatch_compute": operators.dispatch_compute(sent, hottest) if is_parallel else 0.0,
            "experts": operators.experts(mean_tokens, max_tokens, aic=aic),
            "expert_activations": operators.expert_activations(mean_tokens, max_tokens),
            "combine_compute": operators.combine_compute(added, hottest) if is_parallel else 0.0,
        }
        bulk = {
            "dispatch": experts.bulk_dispatch(max_tokens, mean_tokens=mean_tokens),
            "combine": experts.bulk_combine(max_tokens, mean_tokens=mean_tokens),
        }
        return moe, bulk


def total(*streams: Parts) -> float:
    """Seconds of all operators, one after the other."""
    seconds = 0.0
    for parts in streams:
        seconds = sum(parts.values(), seconds)
    return seconds


def _hidden(streams: Mapping[str, Parts], communication: str) -> Layer:
    """The longer of communication and all other streams together; half of the shorter is left over, as ramp."""
    compute = tuple(name for name in streams if name != communication)
    compute_s, communication_s = sum(total(streams[name]) for name in compute), total(streams[communication])
    if compute_s >= communication_s:
        exposed_s = total(*(streams[name] for name in compute))
        return Layer(streams, compute, exposed_s * 2, communication_s, 2)
    return Layer(streams, (communication,), communication_s * 2, compute_s, 2)


def _rest(die: Cores, aic: int) -> Cores:
    """Cores that a stream with `aic` cube cores, and vector cores in proportion, leaves of a die."""
    aiv = min(max(1, round(die.aiv * aic / die.aic)), die.aiv - 1)
    return Cores(aic=die.aic - aic, aiv=die.aiv - aiv)
