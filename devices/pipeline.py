"""Time of one engine step: a layer's operators laid on a die's resources, layers and the rest added up.

Owns: the two microbatch pipelines of the paper, what is outside the layers, and who decides (the slowest rank).
Must not know: seconds of an operator (devices/operators.py), clocks, requests.
Source: arXiv 2506.12708v2, section 4.2.3 (decode: two streams), 4.2.4 (MTP) and 4.3.2 (prefill: cube and vector cores,
SDMA).

Decode, two microbatches 0 and 1, attention on one share of the cores and mixture of experts on the other:

    attention stream | A0 | A1 | A0 | A1 | A0 | ...       steady state: each layer takes 2 * max(A, M)
    MoE stream            | M0 | M1 | M0 | M1 | ...       and min(A, M) is left over once, as ramp

The split of the cores is the one that makes the longer stream shortest, as the paper tunes it per workload. A falls
with the attention stream's cores and M rises, so it is found by bisection.

Prefill: cube and vector work of both microbatches, and their collectives, follow each other; the two all-to-alls of
one run on SDMA while the other computes. A layer takes 2 * max(compute, SDMA). Without microbatches a layer is the
plain sum of its operators. A step takes the better of both, unless the split of the cores is given.

Every layer ends in an all-to-all, so the slowest rank sets its time. Ranks stand for those of an instance with
`deployment.ep` dies: tokens per expert follow from the mean over ranks. The longest context and the most tokens count
as if one rank had both.
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
from devices.step_work import IntArray, StepTime, StepWork
from model.config import ModelConfig

__all__ = ["Role", "StepDetail", "StepTime", "StepTimeModel", "StepWork"]

Role = Literal["prefill", "decode", "colocated"]
FEW_RANKS = 16  # up to which a loop over ranks costs less than arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDetail:
    """A step in seconds. `exposed` adds up to the step: operator, or `stream.operator`, to what it adds to it.

    `streams` has the busy time of every operator in one layer, hidden or not, by stream; all microbatches added up.
    """

    exposed: Parts
    layer_s: float  # one mixture layer
    streams: Mapping[str, Parts]
    attention_aic: int | None  # cube cores of the attention stream; None without two streams

    @property
    def seconds(self) -> float:
        return sum(self.exposed.values())


@dataclass(slots=True)
class _Layer:
    """One mixture layer: what it adds to a step, what is left over once per step, what keeps which stream busy."""

    exposed: Parts
    ramp_s: float
    streams: Mapping[str, Parts]
    attention_aic: int | None = None


class _Load:
    """Work of one step as the operators want it."""

    __slots__ = ("context", "kv", "max_tokens", "mean_tokens")

    def __init__(self, work: StepWork, *, is_prefill: bool) -> None:
        self.mean_tokens = _mean(work.num_tokens)
        self.max_tokens = float(work.num_tokens.max())
        self.context: PerRank
        self.kv: PerRank
        if is_prefill:  # heads, not tokens, are split in the middle stage: context and KV are the same on every die
            self.context, self.kv = [_mean(work.num_context_tokens)], [_mean(work.num_kv_tokens)]
        elif work.num_ranks <= FEW_RANKS:
            self.context, self.kv = work.num_context_tokens.tolist(), work.num_kv_tokens.tolist()
        else:
            self.context, self.kv = work.num_context_tokens.astype(np.float64), work.num_kv_tokens.astype(np.float64)

    def halved(self) -> "_Load":
        """One of two microbatches; a batch of one token counts as two halves."""
        half = object.__new__(_Load)
        half.mean_tokens, half.max_tokens = self.mean_tokens / 2, self.max_tokens / 2
        half.context, half.kv = _half(self.context), _half(self.kv)
        return half


class StepTimeModel:
    """What a step of one instance costs."""

    def __init__(
        self,
        model: ModelConfig,
        supernode: SupernodeSpec,
        *,
        role: Role,
        deployment: ExpertDeployment,
        microbatch: bool = True,
        num_speculative_tokens: int = 0,
        mtp_pipelined: bool = True,
        attention_aic: int | None = None,
    ) -> None:
        """`deployment.ep`: dies of the full-size instance whose ranks are described by StepWork's entries.

        `num_speculative_tokens`: passes of the MTP module after each step (0: off). The query tokens that it adds
        to decode steps are in StepWork already. A prefill instance caches the module's latents and drafts nothing.
        `mtp_pipelined`: the graphs of a step follow each other; else each of them waits for its launch.
        `attention_aic`: cube cores of the attention stream with microbatches (and vector cores in proportion); None:
        tuned.
        """
        if num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens: {num_speculative_tokens} must be at least 0")
        die = supernode.npu.die
        if attention_aic is not None and not 0 < attention_aic < die.num_aic:
            raise ValueError(f"attention_aic: {attention_aic} must leave cores of {die.num_aic} to both streams")
        self._model, self._role, self._deployment = model, role, deployment
        self._microbatch, self._attention_aic = microbatch, attention_aic
        self._num_speculative_tokens = num_speculative_tokens
        graphs = 1 if mtp_pipelined else 1 + num_speculative_tokens
        self._launch_s = graphs * supernode.rates.graph_launch_s
        self._die = Cores(aic=die.num_aic, aiv=die.num_aiv)
        self._operators = Operators(model, supernode, deployment)
        self._experts = ExpertParallel(model, supernode, deployment)

    @property
    def role(self) -> Role:
        return self._role

    @property
    def deployment(self) -> ExpertDeployment:
        return self._deployment

    def step(self, work: StepWork) -> StepTime:
        """Time of one step over all ranks; never less for more work."""
        return _to_step_time(self.detail(work).exposed)

    def detail(self, work: StepWork) -> StepDetail:
        """The same in seconds, with what each stream does."""
        load = _Load(work, is_prefill=self._role == "prefill")
        num_moe = self._model.num_moe_layers
        plain = self._plain_layer(load)
        layer = plain
        if self._microbatch:
            overlapped = self._prefill_layer(load) if self._role == "prefill" else self._decode_layer(load)
            overlapped_s = _total(overlapped.exposed) * num_moe + overlapped.ramp_s
            if self._attention_aic is not None or overlapped_s < _total(plain.exposed) * num_moe:
                layer = overlapped
        exposed = {name: seconds * num_moe for name, seconds in layer.exposed.items()}
        if num_moe:
            exposed["pipeline_ramp"] = layer.ramp_s
        self._add_outside_layers(exposed, plain, load, work)
        return StepDetail(
            exposed=exposed,
            layer_s=_total(layer.exposed),
            streams=layer.streams,
            attention_aic=layer.attention_aic,
        )

    def _add_outside_layers(self, exposed: Parts, plain: _Layer, load: _Load, work: StepWork) -> None:
        """Dense layers, head, sampling, MTP module, launch."""
        operators = self._operators
        num_dense = self._model.num_hidden_layers - self._model.num_moe_layers
        attention_s = sum(seconds for name, seconds in plain.exposed.items() if name.startswith("attention."))
        exposed["dense_layers"] = num_dense * (attention_s + operators.dense_mlp(load.max_tokens))
        head_split = self._deployment.ep if self._role == "prefill" else 1
        samples, seqs = float(work.num_samples.max()), float(work.num_seqs.max())
        exposed["lm_head"] = operators.lm_head(samples, split=head_split)
        exposed["sampling"] = operators.sampling(samples)
        if self._num_speculative_tokens:
            block = _total(plain.exposed) + operators.mtp_projection(load.max_tokens)
            draft = 0.0
            if self._role != "prefill":
                draft = operators.lm_head(seqs, split=head_split) + operators.sampling(seqs)
            exposed["mtp"] = self._num_speculative_tokens * (block + draft)
        exposed["launch"] = self._launch_s

    def _plain_layer(self, load: _Load) -> _Layer:
        if self._role == "prefill":
            attention, moe, sdma = self._prefill_parts(load)
            streams = {"attention": attention, "moe": moe, "sdma": sdma}
        else:
            streams = {"attention": self._attention(load, self._die), "moe": self._fused_moe(load, self._die)}
        return _Layer(_named(streams), 0.0, streams)

    def _attention(self, load: _Load, cores: Cores) -> Parts:
        absorbed = self._operators.absorbed_attention(load.max_tokens, load.context, load.kv, aic=cores.aic)
        if self._role == "decode":
            return absorbed
        # Long prompt chunks are cheaper in the multi-head form; an engine picks one for a step.
        naive = self._operators.naive_attention(load.max_tokens, load.context, load.kv, aic=cores.aic)
        return min(absorbed, naive, key=_total)

    def _fused_moe(self, load: _Load, cores: Cores) -> Parts:
        return {
            "gate": self._operators.gate(load.max_tokens, aic=cores.aic),
            "dispatch": self._experts.dispatch(load.max_tokens, aiv=cores.aiv),
            "experts": self._operators.experts(load.mean_tokens, load.max_tokens, aic=cores.aic),
            "combine": self._experts.combine(load.max_tokens, aiv=cores.aiv),
        }

    def _decode_layer(self, load: _Load) -> _Layer:
        """Two streams, split so that the longer one is shortest."""
        half = load.halved()
        if self._attention_aic is not None:
            aic, (attention, moe) = self._attention_aic, self._streams(half, self._attention_aic)
        else:
            low, high = 1, self._die.aic - 1  # the first split in [low, high] whose attention is not the longer stream
            while low < high:
                middle = (low + high) // 2
                attention, moe = self._streams(half, middle)
                low, high = (low, middle) if _total(attention) <= _total(moe) else (middle + 1, high)
            candidates = [(aic, self._streams(half, aic)) for aic in {max(1, low - 1), low}]
            aic, (attention, moe) = min(candidates, key=lambda item: (max(map(_total, item[1])), item[0]))
        streams = {"attention": _scaled(attention, 2), "moe": _scaled(moe, 2)}
        longer, shorter = ("attention", "moe") if _total(attention) >= _total(moe) else ("moe", "attention")
        return _Layer(_named({longer: streams[longer]}), _total(streams[shorter]) / 2, streams, aic)

    def _streams(self, half: _Load, attention_aic: int) -> tuple[Parts, Parts]:
        """Both halves of a layer for one microbatch, vector cores in proportion to cube cores."""
        die = self._die
        aiv = min(max(1, round(die.aiv * attention_aic / die.aic)), die.aiv - 1)
        attention = self._attention(half, Cores(aic=attention_aic, aiv=aiv))
        return attention, self._fused_moe(half, Cores(aic=die.aic - attention_aic, aiv=die.aiv - aiv))

    def _prefill_parts(self, load: _Load) -> tuple[Parts, Parts, Parts]:
        """Attention, mixture and all-to-alls of one batch or microbatch."""
        operators, experts = self._operators, self._experts
        (context,), (kv,) = load.context, load.kv
        attention = operators.split_attention(load.max_tokens, context, kv)
        copies, hottest = experts.num_copies(load.max_tokens), experts.hottest_copies(load.max_tokens)
        is_parallel = self._deployment.ep > 1
        moe = {
            "gate": operators.gate(load.max_tokens, aic=self._die.aic),
            "dispatch_compute": operators.dispatch_compute(copies, hottest) if is_parallel else 0.0,
            "experts": operators.experts(load.mean_tokens, load.max_tokens, aic=self._die.aic),
            "expert_activations": operators.expert_activations(load.mean_tokens, load.max_tokens),
            "combine_compute": operators.combine_compute(copies, hottest) if is_parallel else 0.0,
        }
        sdma = {"dispatch": experts.bulk_dispatch(load.max_tokens), "combine": experts.bulk_combine(load.max_tokens)}
        return attention, moe, sdma

    def _prefill_layer(self, load: _Load) -> _Layer:
        """All-to-alls of one microbatch under the compute of the other."""
        parts = self._prefill_parts(load.halved())
        attention, moe, sdma = (_scaled(part, 2) for part in parts)
        streams = {"attention": attention, "moe": moe, "sdma": sdma}
        compute_s, sdma_s = _total(attention) + _total(moe), _total(sdma)
        if compute_s >= sdma_s:
            return _Layer(_named({"attention": attention, "moe": moe}), sdma_s / 2, streams)
        return _Layer(_named({"sdma": sdma}), compute_s / 2, streams)


def _mean(values: IntArray) -> float:
    """`ndarray.mean` costs four times as much on so few ranks."""
    return int(values.sum()) / len(values)


def _half(values: PerRank) -> PerRank:
    return values / 2 if isinstance(values, np.ndarray) else [value / 2 for value in values]


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _scaled(parts: Parts, factor: float) -> Parts:
    return {name: seconds * factor for name, seconds in parts.items()}


def _named(streams: Mapping[str, Parts]) -> Parts:
    return {f"{stream}.{name}": seconds for stream, parts in streams.items() for name, seconds in parts.items()}


def _to_step_time(parts: Parts) -> StepTime:
    """Integer nanoseconds: the total is rounded once, and the longest part takes what rounding the parts leaves."""
    total_ns = round(_total(parts) * 1e9)
    breakdown = {name: int(seconds * 1e9) for name, seconds in parts.items() if seconds > 0}
    if breakdown:
        breakdown[max(breakdown, key=breakdown.__getitem__)] += total_ns - sum(breakdown.values())
    return StepTime(ns=total_ns, breakdown=breakdown)
