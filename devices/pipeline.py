"""Time of one engine step: a layer's operators laid on a die's resources, layers and the rest added up.

Owns: the two microbatch pipelines of the paper, what is outside the layers, and who decides (the slowest rank).
Must not know: seconds of an operator (devices/operators.py), clocks, requests.
Source: arXiv 2506.12708, section 4.2.3 (decode: two streams) and 4.3.2 (prefill: compute, vector cores, SDMA).

Decode, two microbatches 0 and 1, attention on one share of the cores and mixture of experts on the other:

    attention stream | A0 | A1 | A0 | A1 | A0 | ...       steady state: each layer takes 2 * max(A, M)
    MoE stream            | M0 | M1 | M0 | M1 | ...       and min(A, M) is left over once, as ramp

Prefill, three resources, each microbatch goes attention, dispatch compute, all-to-all, experts, all-to-all, combine
compute. Each layer takes the busiest resource's time for both microbatches, or one microbatch's whole chain if
that is longer. Cube work needs the vector cores too (softmax, SwiGLU, dequantization), so vector work keeps compute
waiting by `rates.vector_contention` of its own time. Without microbatches a layer is the plain sum. A step takes the
better of both, as the paper tunes its split.

Every layer ends in an all-to-all, so the slowest rank sets its time. Ranks stand for those of an instance with
`deployment.ep` dies: tokens per expert follow from the mean over ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from devices.operators import Operators, Seconds
from devices.rates import ATTENTION_STREAM, MOE_STREAM, WHOLE_DIE, ExpertDeployment, Rates, Share
from devices.spec import SupernodeSpec
from devices.step_work import IntArray, StepTime, StepWork
from model.config import ModelConfig

__all__ = ["DEFAULT_IMBALANCE", "Role", "StepTime", "StepTimeModel", "StepWork"]

Role = Literal["prefill", "decode", "colocated"]
Parts: TypeAlias = dict[str, float]  # operator -> exposed seconds
AttentionForm: TypeAlias = Callable[..., dict[str, Any]]  # a method of Operators
FEW_RANKS = 16  # up to which ranks are estimated one by one, without arrays

# Load of the hottest die over the mean.
DEFAULT_IMBALANCE: Mapping[Role, float] = {
    "prefill": 1.66,  # fitted: arXiv 2506.12708 table 3, 6,688 / 5,655 = 1.18 between perfect and default balance
    "decode": 1.1,  # TensorRT-LLM tech blog 4, table 1: DeepSeek-R1 with EPLB, rank imbalance 0.11
    "colocated": 1.1,
}


class StepTimeModel:
    """What a step of one instance costs."""

    def __init__(
        self,
        model: ModelConfig,
        supernode: SupernodeSpec,
        *,
        role: Role,
        represents_ep: int,
        microbatch: bool = True,
        num_speculative_tokens: int = 0,
        deployment: ExpertDeployment | None = None,
        rates: Rates | None = None,
    ) -> None:
        """`represents_ep`: dies of the full-size instance whose ranks are described by StepWork's entries.

        `num_speculative_tokens`: passes of the MTP module after each step (0: off). The query tokens that it adds
        to decode steps are in StepWork already. A prefill instance caches the module's latents and drafts nothing.
        `deployment` and `rates` default to the published ones.
        """
        if represents_ep < 1 or num_speculative_tokens < 0:
            raise ValueError(
                f"represents_ep {represents_ep} must be at least 1, num_speculative_tokens {num_speculative_tokens} 0"
            )
        if deployment is None:
            deployment = ExpertDeployment.published(model, ep=represents_ep, imbalance=DEFAULT_IMBALANCE[role])
        elif deployment.ep != represents_ep:
            raise ValueError(f"deployment has ep {deployment.ep}, represents_ep is {represents_ep}")
        self._model = model
        self._role = role
        self._microbatch = microbatch
        self._num_speculative_tokens = num_speculative_tokens
        self._deployment = deployment
        self._rates = rates if rates is not None else Rates()
        self._operators = Operators(model, supernode, deployment, self._rates)

    @property
    def role(self) -> Role:
        return self._role

    @property
    def deployment(self) -> ExpertDeployment:
        return self._deployment

    def step(self, work: StepWork) -> StepTime:
        """Time of one step over all ranks; never less for more work."""
        max_tokens = float(work.num_tokens.max())
        num_layers, num_moe = self._model.num_hidden_layers, self._model.num_moe_layers
        plain_layer = self._plain_layer(work)
        parts = _scaled(plain_layer, num_moe)
        if self._microbatch:  # a batch of one token counts as two halves
            overlapped = self._prefill_layers(work) if self._role == "prefill" else self._decode_layers(work)
            parts = min(parts, overlapped, key=_total)
        attention = _total({name: plain_layer[name] for name in plain_layer if name not in _MOE_NAMES})
        parts["dense_layers"] = (num_layers - num_moe) * (attention + self._operators.dense_mlp(max_tokens))
        head_split = self._deployment.ep if self._role == "prefill" else 1
        samples, seqs = float(work.num_samples.max()), float(work.num_seqs.max())
        parts["lm_head"] = self._operators.lm_head(samples, split=head_split)
        parts["sampling"] = self._operators.sampling(samples)
        if self._num_speculative_tokens:
            block = _total(plain_layer) + self._operators.mtp_projection(max_tokens)
            draft = 0.0
            if self._role != "prefill":
                draft = self._operators.lm_head(seqs, split=head_split) + self._operators.sampling(seqs)
            parts["mtp"] = self._num_speculative_tokens * (block + draft)
        parts["launch"] = (1 + self._num_speculative_tokens) * self._rates.graph_launch_s
        return _to_step_time(parts)

    def _plain_layer(self, work: StepWork) -> Parts:
        mean_tokens, max_tokens = _mean_and_max(work)
        attention = self._attention(work, WHOLE_DIE, fraction=1.0)
        if self._role == "prefill":
            return attention | self._bulk_moe(mean_tokens, max_tokens)
        return attention | self._fused_moe(mean_tokens, max_tokens, WHOLE_DIE)

    def _attention(self, work: StepWork, share: Share, *, fraction: float) -> Parts:
        """Operators of the attention half of a layer on the slowest rank, for `fraction` of the step's work."""
        if self._role == "prefill":
            # Heads, not tokens, are split in the middle stage: context and KV are the same on every die.
            tokens = float(work.num_tokens.max()) * fraction
            context, kv = _mean(work.num_context_tokens) * fraction, _mean(work.num_kv_tokens) * fraction
            return self._operators.split_attention(tokens, context, kv)
        absorbed = self._of_slowest_rank(self._operators.absorbed_attention, work, share, fraction)
        if self._role == "decode":
            return absorbed
        # Long prompt chunks are cheaper in the multi-head form; an engine picks one for a step.
        naive = self._of_slowest_rank(self._operators.naive_attention, work, share, fraction)
        return min(absorbed, naive, key=_total)

    def _of_slowest_rank(self, form: AttentionForm, work: StepWork, share: Share, fraction: float) -> Parts:
        """The operators of the rank with the largest sum."""
        amounts = (work.num_tokens, work.num_context_tokens, work.num_kv_tokens)
        if work.num_ranks <= FEW_RANKS:
            ranks = zip(*(values.tolist() for values in amounts), strict=True)
            return max((form(t * fraction, c * fraction, k * fraction, share) for t, c, k in ranks), key=_total)
        operators: dict[str, Seconds] = form(*(values * fraction for values in amounts), share)
        slowest = int(np.argmax(sum(operators.values())))
        return {name: float(seconds[slowest]) for name, seconds in operators.items()}

    def _fused_moe(self, mean_tokens: float, max_tokens: float, share: Share) -> Parts:
        return {
            "gate": self._operators.gate(max_tokens, share),
            "dispatch": self._operators.dispatch(max_tokens, share),
            "experts": self._operators.experts(mean_tokens, max_tokens, share),
            "combine": self._operators.combine(max_tokens, share),
        }

    def _bulk_moe(self, mean_tokens: float, max_tokens: float) -> Parts:
        return {
            "gate": self._operators.gate(max_tokens, WHOLE_DIE),
            "dispatch_compute": self._operators.dispatch_compute(max_tokens),
            "dispatch": self._operators.bulk_dispatch(max_tokens),
            "experts": self._operators.experts(mean_tokens, max_tokens, WHOLE_DIE),
            "combine": self._operators.bulk_combine(max_tokens),
            "combine_compute": self._operators.combine_compute(max_tokens),
        }

    def _decode_layers(self, work: StepWork) -> Parts:
        """All mixture layers, two streams."""
        attention = self._attention(work, ATTENTION_STREAM, fraction=0.5)
        mean_tokens, max_tokens = _mean_and_max(work)
        moe = self._fused_moe(mean_tokens / 2, max_tokens / 2, MOE_STREAM)
        longer, shorter = (attention, moe) if _total(attention) >= _total(moe) else (moe, attention)
        parts = _scaled(longer, 2 * self._model.num_moe_layers)
        parts["pipeline_ramp"] = _total(shorter) if self._model.num_moe_layers else 0.0
        return parts

    def _prefill_layers(self, work: StepWork) -> Parts:
        """All mixture layers, three resources."""
        num_moe = self._model.num_moe_layers
        mean_tokens, max_tokens = _mean_and_max(work)
        moe = self._bulk_moe(mean_tokens / 2, max_tokens / 2)
        vector = {name: moe.pop(name) for name in ("dispatch_compute", "combine_compute")}
        sdma = {name: moe.pop(name) for name in ("dispatch", "combine")}
        compute = self._attention(work, WHOLE_DIE, fraction=0.5) | moe
        chain = compute | vector | sdma
        contended = compute | _scaled(vector, self._rates.vector_contention)
        bounds = [_scaled(part, 2 * num_moe) for part in (contended, vector, sdma)] + [_scaled(chain, num_moe)]
        parts = max(bounds, key=_total)
        # The first microbatch starts and the second one ends alone, outside the busiest resource.
        parts["pipeline_ramp"] = (_total(vector) + _total(sdma)) if num_moe else 0.0
        return parts


_MOE_NAMES = frozenset({"gate", "dispatch_compute", "dispatch", "experts", "combine", "combine_compute"})


def _mean(values: IntArray) -> float:
    """`ndarray.mean` costs four times as much on so few ranks."""
    return int(values.sum()) / len(values)


def _mean_and_max(work: StepWork) -> tuple[float, float]:
    """Of the tokens per rank."""
    return _mean(work.num_tokens), float(work.num_tokens.max())


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _scaled(parts: Parts, factor: float) -> Parts:
    return {name: seconds * factor for name, seconds in parts.items()}


def _to_step_time(parts: Parts) -> StepTime:
    """Integer nanoseconds: the total is rounded once, and the longest part takes what rounding the parts leaves."""
    total_ns = round(_total(parts) * 1e9)
    breakdown = {name: int(seconds * 1e9) for name, seconds in parts.items() if seconds > 0}
    if breakdown:
        breakdown[max(breakdown, key=breakdown.__getitem__)] += total_ns - sum(breakdown.values())
    return StepTime(ns=total_ns, breakdown=breakdown)
