"""Time of one engine step: mixture layers, and all that is outside them, added up.

Owns: what is outside the layers, the choice between one batch and two microbatches, and who decides (the slowest rank).
Must not know: seconds of an operator (devices/operators.py), what overlaps in a layer (devices/layer_overlap.py),
clocks, requests.
Source: arXiv 2506.12708v2, section 4.2.4 (MTP).

A step takes the better of one batch and two microbatches, unless the split of the cores is given. Every layer ends in
an all-to-all, so the slowest rank sets its time. Ranks stand for those of an instance with `deployment.ep` dies: tokens
per expert follow from the mean over ranks. The longest context and the most tokens count as if one rank had both.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.layer_overlap import Layer, LayerModel, Load, Role, mean, total
from devices.operators import Operators, Parts
from devices.spec import SupernodeSpec
from devices.step_work import StepTime, StepWork
from model.config import ModelConfig

__all__ = ["Role", "StepDetail", "StepTime", "StepTimeModel", "StepWork"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDetail:
    """A step in seconds. `exposed` adds up to the step: operator, or `stream.operator`, to what it adds to it.

    `streams` has the busy time of every operator in one layer, hidden or not, by stream; all microbatches added up.
    """

    exposed: Parts
    layer_s: float  # one mixture layer
    streams: Mapping[str, Parts]
    num_microbatches: int  # 1 where overlapping two would be slower
    attention_aic: int | None  # cube cores of the attention stream; None where no stream has cores of its own

    @property
    def seconds(self) -> float:
        return sum(self.exposed.values())


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
        tuned. Only where microbatches share the cores (devices/layer_overlap.py).
        """
        if num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens: {num_speculative_tokens} must be at least 0")
        self._model, self._role, self._deployment = model, role, deployment
        self._microbatch, self._is_split_given = microbatch, attention_aic is not None
        self._num_speculative_tokens = num_speculative_tokens
        graphs = 1 if mtp_pipelined else 1 + num_speculative_tokens
        self._launch_s = graphs * supernode.rates.graph_launch_s
        self._operators = Operators(model, supernode, deployment)
        experts = ExpertParallel(model, supernode, deployment)
        self._layers = LayerModel(
            supernode, self._operators, experts, deployment, role=role, attention_aic=attention_aic
        )

    def step(self, work: StepWork) -> StepTime:
        """Time of one step over all ranks; never less for more work."""
        return _to_step_time(self.detail(work).exposed)

    def detail(self, work: StepWork) -> StepDetail:
        """The same in seconds, with what each stream does."""
        load = Load(work, is_split=self._layers.is_split)
        num_moe = self._model.num_moe_layers
        plain = self._layers.plain(load)
        layer = plain
        if self._microbatch:
            overlapped = self._layers.overlapped(load)
            overlapped_s = total(overlapped.exposed) * num_moe + overlapped.ramp_s
            if self._is_split_given or overlapped_s < total(plain.exposed) * num_moe:
                layer = overlapped
        exposed = {name: seconds * num_moe for name, seconds in layer.exposed.items()}
        if num_moe:
            exposed["pipeline_ramp"] = layer.ramp_s
        self._add_outside_layers(exposed, plain, load, work)
        return StepDetail(
            exposed=exposed,
            layer_s=total(layer.exposed),
            streams=layer.streams,
            num_microbatches=layer.num_microbatches,
            attention_aic=layer.attention_aic,
        )

    def _add_outside_layers(self, exposed: Parts, plain: Layer, load: Load, work: StepWork) -> None:
        """Dense layers, head, sampling, MTP module, launch."""
        operators = self._operators
        num_dense = self._model.num_hidden_layers - self._model.num_moe_layers
        attention_s = sum(seconds for name, seconds in plain.exposed.items() if name.startswith("attention."))
        exposed["dense_layers"] = num_dense * (attention_s + operators.dense_mlp(load.max_tokens))
        samples, seqs = float(work.num_samples.max()), float(work.num_seqs.max())
        # Split over the dies, the head has the rows of all of them.
        head_split = self._deployment.ep if self._layers.is_split else 1
        head_rows = mean(work.num_samples) * head_split if self._layers.is_split else samples
        exposed["lm_head"] = operators.lm_head(head_rows, split=head_split)
        exposed["sampling"] = operators.sampling(samples)
        if self._num_speculative_tokens:
            block = total(plain.exposed) + operators.mtp_projection(load.max_tokens)
            draft = 0.0
            if self._role != "prefill":
                draft = operators.lm_head(seqs, split=1) + operators.sampling(seqs)
            exposed["mtp"] = self._num_speculative_tokens * (block + draft)
        exposed["launch"] = self._launch_s


def _to_step_time(parts: Parts) -> StepTime:
    """Integer nanoseconds: the total is rounded once, and the longest part takes what rounding the parts leaves."""
    total_ns = round(total(parts) * 1e9)
    breakdown = {name: int(seconds * 1e9) for name, seconds in parts.items() if seconds > 0}
    if breakdown:
        breakdown[max(breakdown, key=breakdown.__getitem__)] += total_ns - sum(breakdown.values())
    return StepTime(ns=total_ns, breakdown=breakdown)
