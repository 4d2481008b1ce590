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
with the attention stream's cores and M rises, so it is found by bisection.

Decode that shares communication (`decode_overlap: communication`): all cores compute, C for one microbatch, while the
NIC moves the other's copies, N, without a core's help. A layer takes 2 * max(C, N): cores are busy for 2 C, the NIC for
2 N, and the chain of one microbatch, C + N, is never the longest of the three. It is a lower bound, which needs
operators that interleave well (DeepSeek cuts attention in two for that).

Prefill: compute of both microbatches, and collectives inside attention, follow each other; the two all-to-alls of one
run while the other computes, on SDMA or on `bulk_cores` of the cores, which compute then lacks throughout (SGLang's
two-batch overlap gives DeepGEMM the other SMs). A layer takes 2 * max(compute, all-to-alls). Without microbatches a
layer is the plain sum of its operators, each on all cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.operators import Operators, Parts, PerRank
from devices.rates import Cores
from devices.spec import SupernodeSpec
from devices.step_work import IntArray, StepWork

Role = Literal["prefill", "decode", "colocated"]
FEW_RANKS = 16  # up to which a loop over ranks costs less than arrays


@dataclass(slots=True)
class Layer:
    """What a layer adds to a step, what is left over once per step, what keeps which stream busy."""

    exposed: Parts
    ramp_s: float
    streams: Mapping[str, Parts]
    num_microbatches: int = 1
    attention_aic: int | None = None


class Load:
    """Work of one step as the operators want it."""

    __slots__ = ("context", "kv", "max_tokens", "mean_tokens")

    def __init__(self, work: StepWork, *, is_split: bool) -> None:
        """`is_split`: attention's heads are, so that context and KV are the same on every die."""
        self.mean_tokens = mean(work.num_tokens)
        self.max_tokens = float(work.num_tokens.max())
        self.context: PerRank
        self.kv: PerRank
        if is_split:
            self.context, self.kv = [mean(work.num_context_tokens)], [mean(work.num_kv_tokens)]
        elif work.num_ranks <= FEW_RANKS:
            self.context, self.kv = work.num_context_tokens.tolist(), work.num_kv_tokens.tolist()
        else:
            self.context, self.kv = work.num_context_tokens.astype(np.float64), work.num_kv_tokens.astype(np.float64)

    def halved(self) -> "Load":
        """One of two microbatches; a batch of one token counts as two halves."""
        half = object.__new__(Load)
        half.mean_tokens, half.max_tokens = self.mean_tokens / 2, self.max_tokens / 2
        half.context, half.kv = _half(self.context), _half(self.kv)
        return half


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
        self._bulk_cores = rates.bulk_cores
        self._bulk_stream = "communication" if rates.bulk_cores else "sdma"
        self.is_split = role == "prefill" and rates.prefill_attention == "split"

    def plain(self, load: Load) -> Layer:
        """One batch, operator by operator."""
        if self._role == "prefill":
            streams = self._prefill_streams(load, self._die)
        else:
            streams = {"attention": self._attention(load, self._die), "moe": self._fused_moe(load, self._die)}
        return Layer(_named(streams), 0.0, streams)

    def overlapped(self, load: Load) -> Layer:
        """Two microbatches."""
        if self._role == "prefill":
            return self._prefill_layer(load)
        return self._two_streams(load) if self._overlap == "cores" else self._all_cores(load)

    def _attention(self, load: Load, cores: Cores) -> Parts:
        absorbed = self._operators.absorbed_attention(load.max_tokens, load.context, load.kv, aic=cores.aic)
        if self._role == "decode":
            return absorbed
        # Long prompt chunks are cheaper in the multi-head form; an engine picks one for a step.
        naive = self._operators.naive_attention(load.max_tokens, load.context, load.kv, aic=cores.aic)
        return min(absorbed, naive, key=total)

    def _fused_moe(self, load: Load, cores: Cores) -> Parts:
        return {
            "gate": self._operators.gate(load.max_tokens, aic=cores.aic),
            "dispatch": self._experts.dispatch(load.max_tokens, aiv=cores.aiv, mean_tokens=load.mean_tokens),
            "experts": self._operators.experts(load.mean_tokens, load.max_tokens, aic=cores.aic),
            "combine": self._experts.combine(load.max_tokens, aiv=cores.aiv, mean_tokens=load.mean_tokens),
        }

    def _two_streams(self, load: Load) -> Layer:
        """Cores split so that the longer stream is shortest."""
        half = load.halved()
        tried: dict[int, tuple[Parts, Parts]] = {}

        def split(attention_aic: int) -> tuple[Parts, Parts]:
            if attention_aic not in tried:
                tried[attention_aic] = self._streams(half, attention_aic)
            return tried[attention_aic]

        if self._attention_aic is not None:
            aic = self._attention_aic
        else:
            low, high = 1, self._die.aic - 1  # the first split in [low, high] whose attention is not the longer stream
            while low < high:
                middle = (low + high) // 2
                attention, moe = split(middle)
                low, high = (low, middle) if total(attention) <= total(moe) else (middle + 1, high)
            aic = min((max(1, low - 1), low), key=lambda cores: max(map(total, split(cores))))
        attention, moe = split(aic)
        streams = {"attention": _doubled(attention), "moe": _doubled(moe)}
        longer, shorter = ("attention", "moe") if total(attention) >= total(moe) else ("moe", "attention")
        return Layer(_named({longer: streams[longer]}), total(streams[shorter]) / 2, streams, 2, aic)

    def _streams(self, half: Load, attention_aic: int) -> tuple[Parts, Parts]:
        """Both halves of a layer for one microbatch, vector cores in proportion to cube cores."""
        die = self._die
        aiv = min(max(1, round(die.aiv * attention_aic / die.aic)), die.aiv - 1)
        attention = self._attention(half, Cores(aic=attention_aic, aiv=aiv))
        return attention, self._fused_moe(half, Cores(aic=die.aic - attention_aic, aiv=die.aiv - aiv))

    def _all_cores(self, load: Load) -> Layer:
        """Copies of one microbatch travel while the other computes."""
        half = load.halved()
        moe = _doubled(self._fused_moe(half, self._die))
        communication = {name: moe.pop(name) for name in ("dispatch", "combine")}
        return _hidden(
            {"attention": _doubled(self._attention(half, self._die)), "moe": moe, "communication": communication},
            "communication",
        )

    def _prefill_layer(self, load: Load) -> Layer:
        """All-to-alls of one microbatch under the compute of the other."""
        cores = Cores(aic=self._die.aic - self._bulk_cores, aiv=self._die.aiv)
        streams = self._prefill_streams(load.halved(), cores)
        return _hidden({name: _doubled(parts) for name, parts in streams.items()}, self._bulk_stream)

    def _prefill_streams(self, load: Load, cores: Cores) -> dict[str, Parts]:
        """Attention, mixture and all-to-alls of one batch or microbatch."""
        operators, experts = self._operators, self._experts
        if self.is_split:
            (context,), (kv,) = load.context, load.kv
            attention = operators.split_attention(load.max_tokens, context, kv)
        else:
            attention = self._attention(load, cores)
        copies, hottest = experts.num_copies(load.max_tokens), experts.hottest_copies(load.mean_tokens)
        # Engines move blocks that vector cores laid out, copy by copy, and add up. Kernels on cores read a token where
        # it is, and add while they receive: their measured bandwidth has that work in it.
        sent, added = (load.max_tokens, 0.0) if self._bulk_cores else (copies, copies)
        is_parallel = self._deployment.ep > 1
        moe = {
            "gate": operators.gate(load.max_tokens, aic=cores.aic),
            "dispatch_compute": operators.dispatch_compute(sent, hottest) if is_parallel else 0.0,
            "experts": operators.experts(load.mean_tokens, load.max_tokens, aic=cores.aic),
            "expert_activations": operators.expert_activations(load.mean_tokens, load.max_tokens),
            "combine_compute": operators.combine_compute(added, hottest) if is_parallel else 0.0,
        }
        bulk = {
            "dispatch": experts.bulk_dispatch(load.max_tokens, mean_tokens=load.mean_tokens),
            "combine": experts.bulk_combine(load.max_tokens, mean_tokens=load.mean_tokens),
        }
        return {"attention": attention, "moe": moe, self._bulk_stream: bulk}


def total(parts: Parts) -> float:
    """Seconds of all of them."""
    return sum(parts.values())


def _hidden(streams: Mapping[str, Parts], communication: str) -> Layer:
    """The longer of communication and all other streams together; half of the shorter is left over, as ramp."""
    compute = {name: parts for name, parts in streams.items() if name != communication}
    compute_s, communication_s = sum(map(total, compute.values())), total(streams[communication])
    if compute_s >= communication_s:
        return Layer(_named(compute), communication_s / 2, streams, 2)
    return Layer(_named({communication: streams[communication]}), compute_s / 2, streams, 2)


def mean(values: IntArray) -> float:
    """`ndarray.mean` costs four times as much on so few ranks."""
    return int(values.sum()) / len(values)


def _half(values: PerRank) -> PerRank:
    return values / 2 if isinstance(values, np.ndarray) else [value / 2 for value in values]


def _doubled(parts: Parts) -> Parts:
    return {name: seconds * 2 for name, seconds in parts.items()}


def _named(streams: Mapping[str, Parts]) -> Parts:
    return {f"{stream}.{name}": seconds for stream, parts in streams.items() for name, seconds in parts.items()}
