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
from functools import lru_cache

from devices.counted_step import CountedStep
from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.layer_overlap import Layer, LayerModel, Role, total
from devices.operators import REMEMBERED, Operators, Parts
from devices.spec import SupernodeSpec
from devices.step_load import StepLoad
from devices.step_work import StepTime, StepWork
from model.config import ModelConfig

__all__ = ["Role", "StepDetail", "StepLoad", "StepTime", "StepTimeModel", "StepWork"]


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
        self._operators = operators = Operators(model, supernode, deployment)
        remember = lru_cache(REMEMBERED)
        self._dense_mlp, self._mtp_projection = remember(operators.dense_mlp), remember(operators.mtp_projection)
        self._lm_head = remember(operators.lm_head)
        experts = ExpertParallel(model, supernode, deployment)
        self._layers = LayerModel(supernode, operators, experts, deployment, role=role, attention_aic=attention_aic)
        # Where two streams share the cores, what token counts decide is kept for the next step with these counts.
        has_streams = supernode.rates.decode_overlap == "cores" and microbatch and attention_aic is None
        self._is_counted = role == "decode" and has_streams and model.num_moe_layers > 0
        self._counted: dict[tuple[int, ...], CountedStep] = {}
        self._num_aic = supernode.npu.die.num_aic
        self._first_aic = max(1, self._num_aic // 2)  # where the next search for a split starts

    @property
    def is_split(self) -> bool:
        """Whether all dies share attention's heads, so that context and KV are the same on every one of them."""
        return self._layers.is_split

    def step(self, work: StepWork) -> StepTime:
        """Time of one step over all ranks; never less for more work."""
        return self.decided(StepLoad.of(work, is_split=self.is_split))

    def decided(self, load: StepLoad) -> StepTime:
        """The same, from what decides it."""
        if self._is_counted:
            counts = (load.num_ranks, load.max_tokens, load.total_tokens, load.max_samples, load.max_seqs)
            counted = self._counted.get(counts)
            if counted is None:
                if len(self._counted) == REMEMBERED:
                    self._counted.clear()
                counted = self._counted[counts] = self._count(load)
            time, self._first_aic = counted.time(load.context, load.kv, start=self._first_aic)
            return time
        layer, plain = self._choose(load)
        return StepTime.of_seconds(self._exposed(layer, plain, load))

    def detail(self, work: StepWork) -> StepDetail:
        """The same in seconds, with what each stream does."""
        load = StepLoad.of(work, is_split=self.is_split)
        layer, plain = self._choose(load)
        return StepDetail(
            exposed=self._exposed(layer, plain, load),
            layer_s=layer.exposed_s,
            streams=layer.busy_parts(),
            num_microbatches=layer.num_microbatches,
            attention_aic=layer.attention_aic,
        )

    def _count(self, load: StepLoad) -> CountedStep:
        """All that the token counts of a decode step decide."""
        samples, mtp = float(load.max_samples), None
        if self._num_speculative_tokens:
            draft_s = self._lm_head(load.max_seqs, 1) + self._operators.sampling(load.max_seqs)
            mtp = self._num_speculative_tokens, self._mtp_projection(load.max_tokens), draft_s
        return CountedStep(
            whole=self._layers.around_whole(load),
            half=self._layers.around_half(load),
            core=self._operators.absorbed_core,
            num_aic=self._num_aic,
            num_moe=self._model.num_moe_layers,
            num_dense=self._model.num_hidden_layers - self._model.num_moe_layers,
            dense_mlp_s=self._dense_mlp(load.max_tokens),
            mtp_s=mtp,
            rest={"lm_head": self._lm_head(samples, 1), "sampling": self._operators.sampling(samples)},
            launch_s=self._launch_s,
        )

    def _choose(self, load: StepLoad) -> tuple[Layer, Layer]:
        """The better of one batch and two microbatches; and one batch, which layers without experts always are."""
        plain = self._layers.plain(load)
        if not self._microbatch:
            return plain, plain
        num_moe = self._model.num_moe_layers
        overlapped = self._layers.overlapped(load)
        is_better = overlapped.exposed_s * num_moe + overlapped.ramp_s < plain.exposed_s * num_moe
        return (overlapped if is_better or self._is_split_given else plain), plain

    def _exposed(self, layer: Layer, plain: Layer, load: StepLoad) -> Parts:
        """What each operator adds to the step: mixture layers, dense layers, head, sampling, MTP module, launch."""
        num_moe = self._model.num_moe_layers
        exposed = layer.exposed_parts(num_moe)
        if num_moe:
            exposed["pipeline_ramp"] = layer.ramp_s
        num_dense = self._model.num_hidden_layers - num_moe
        exposed["dense_layers"] = num_dense * (total(plain.streams["attention"]) + self._dense_mlp(load.max_tokens))
        samples = float(load.max_samples)
        # Split over the dies, the head has the rows of all of them.
        head_split = self._deployment.ep if self.is_split else 1
        head_rows = load.total_samples / load.num_ranks * head_split if self.is_split else samples
        exposed["lm_head"] = self._lm_head(head_rows, head_split)
        exposed["sampling"] = self._operators.sampling(samples)
        if self._num_speculative_tokens:
            block = plain.exposed_s + self._mtp_projection(load.max_tokens)
            draft = 0.0
            if self._role != "prefill":
                draft = self._lm_head(load.max_seqs, 1) + self._operators.sampling(load.max_seqs)
            exposed["mtp"] = self._num_speculative_tokens * (block + draft)
        exposed["launch"] = self._launch_s
        return exposed
