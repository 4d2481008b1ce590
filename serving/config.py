"""Configuration of a run: frozen, validated sections and the checks that cross them.

Owns: the names and ranges of every configuration key, and what no single section can check (experts divide by the
ranks, contexts fit, roles have instances).
Must not know: YAML (serving/config_file.py), Ray, clocks, tensors. Nothing changes after loading; derived values are
properties.
"""

from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from devices.deployment import ExpertDeployment
from devices.spec import SupernodeSpec
from model.config import ModelConfig
from serving.config_checks import check_parts

Role = Literal["prefill", "decode", "colocated"]
GeneratorName = Literal["r1-reasoning", "conversation", "chat", "code"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


DEFAULT_SHAPE = "model/mini-r1.yaml"


class Section(BaseModel):
    """Base of every section: unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """What is computed: the live model, and where its weights come from.

    `checkpoint` is a directory in the hub's layout, the name of a shipped one, or "random": weights of the shape
    `config`, from the seed. A directory brings its own config.json; `config` may say the same, not something else.
    """

    config: str | None = None  # None: the checkpoint's, or model/mini-r1.yaml
    checkpoint: str = "random"
    expert_load: str | None = None  # file of `supernode expert-load`, or a run's result; None: taken as uniform
    served_model_name: str = "mini-r1"
    max_model_len: PositiveInt = 1024
    dispatch_dtype: Literal["float32", "int8"] = "float32"
    quantization: Literal["int8"] | None = None  # of the checkpoint; None: whatever it says of itself

    @property
    def shape_source(self) -> str:
        """The file that the shape of the weights comes from."""
        if self.config is None and self.checkpoint != "random":
            return f"{self.checkpoint}/config.json"
        return self.config or DEFAULT_SHAPE


class RepresentedInstance(Section):
    """A full-size instance. One live rank stands for, and is charged as, one of its `ep` dies."""

    ep: PositiveInt
    num_redundant_experts: NonNegativeInt = 0
    num_shared_expert_copies: NonNegativeInt = 0  # 0: every die has the shared expert


class TimingSection(Section):
    """What is charged: model shape, hardware, and per role the full-size instance that a live one stands for.

    A role that represents nothing is charged at its live size. `balance` of the experts' load: balanced (an ideal
    balancer), eplb, none (placed without knowing it), each for the shipped load generator; measured (placed by
    `model.expert_load`, the live model's own counts).
    """

    model: str
    hardware: str
    represents: dict[Role, RepresentedInstance] = {}
    microbatch: bool = True
    balance: Literal["balanced", "eplb", "none", "measured"] = "eplb"


class ClockSection(Section):
    """`scale`: wall seconds per simulated second when serving; 0 runs as fast as real compute allows."""

    scale: NonNegativeFloat = 1.0


class CacheSection(Section):
    """Paged latent cache; one size of block everywhere, in HBM and in the pool."""

    block_size: PositiveInt = 16


class InstanceSection(Section):
    """A role's instances: `count` groups of `npus` NPUs, each group one expert-parallel world."""

    count: PositiveInt = 1
    npus: PositiveInt
    dies_per_npu: Annotated[int, Field(ge=1, le=2)] | None = None  # None: the hardware's number
    num_redundant_experts: NonNegativeInt = 0
    shared_expert: Literal["local", "dispatched"] = "local"
    num_shared_expert_copies: PositiveInt = 1  # used with shared_expert: dispatched
    num_blocks: PositiveInt  # per data-parallel rank; a prefill instance has one, replicated on its dies
    max_num_batched_tokens: PositiveInt = 1024  # per data-parallel rank
    max_num_seqs: PositiveInt = 64  # per data-parallel rank
    prefix_caching: bool = False


class PoolSection(Section):
    """Shared KV-cache pool in the hosts' DRAM."""

    enabled: bool = True
    hosts: PositiveInt = 2
    dram_bytes_per_host: PositiveInt = 64 * 2**30
    lease_s: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 10.0  # Mooncake Store's default read lease


class RouterSection(Section):
    """Placement of requests on instances and ranks."""

    policy: Literal["least_loaded", "round_robin", "power_of_two", "prefix_affinity"] = "least_loaded"


class SchedulerSection(Section):
    """Order of waiting requests."""

    policy: Literal["fcfs", "priority"] = "fcfs"
    max_queued_requests: NonNegativeInt = 256  # beyond it a request is refused with 429


class ServerSection(Section):
    """Where the OpenAI-compatible endpoint listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: str | None = None


class SpeculativeSection(Section):
    """Speculative decoding with the model's own multi-token-prediction module; field names are vLLM's."""

    method: Literal["mtp"] = "mtp"
    num_speculative_tokens: Literal[0, 1] = 0  # drafts per step and request; 0: off
    acceptance: Annotated[float, Field(ge=0, le=1)] = 0.7  # share of right drafts that `simulate` assumes


class RaySection(Section):
    """How devices become actors."""

    pack: Literal["npu", "node"] = "npu"
    ranks: Literal["lockstep", "batched"] = "lockstep"  # of one actor: each on its own, or merged into one batch
    startup_timeout_s: PositiveFloat = 120.0
    exchange: Literal["auto", "shared_memory", "gloo"] = "auto"
    exchange_timeout_s: PositiveFloat = 60.0


class RampSection(Section):
    """A rate that moves from `start_rps` to `end_rps`, requests per second, over the requests; names are vLLM's."""

    strategy: Literal["linear", "exponential"] = "linear"
    start_rps: PositiveFloat
    end_rps: PositiveFloat


class BurstSection(Section):
    """Every `period_s` ends with `duration_s` in which the rate is `factor` times what it is otherwise."""

    factor: PositiveFloat
    period_s: PositiveFloat
    duration_s: PositiveFloat


class WorkloadSection(Section):
    """The workload of `run`, `simulate` and `replay`, where no trace is given: that of the generator `name`, or
    synthetic prompts, some with shared prefixes.

    A generator has lengths and arrivals of its own (configs/workload/NAME.yaml): `request_rate`, `arrivals` and
    `burstiness` change them only where they are set.
    """

    name: GeneratorName | None = None
    num_requests: PositiveInt = 48
    duration_s: PositiveFloat | None = None  # set: what arrives before it; num_requests is not used
    request_rate: PositiveFloat | Literal["inf"] = 4.0
    arrivals: Literal["poisson", "gamma", "weibull", "constant"] | None = None  # None: as vLLM, poisson or gamma
    burstiness: PositiveFloat = 1.0  # of gamma and weibull: 1 / square of the gaps' coefficient of variation
    ramp: RampSection | None = None  # in place of request_rate
    bursts: BurstSection | None = None  # on top of request_rate
    max_concurrency: PositiveInt | None = None
    input_len: PositiveInt = 128
    output_len: PositiveInt = 32
    range_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    num_prefixes: NonNegativeInt = 4
    prefix_len: NonNegativeInt = 64

    @model_validator(mode="after")
    def _check_prefix(self) -> "WorkloadSection":
        if self.num_prefixes and self.prefix_len >= self.input_len:
            raise ValueError(f"workload.prefix_len: {self.prefix_len} must be below input_len {self.input_len}")
        if self.bursts is not None and self.bursts.duration_s > self.bursts.period_s:
            raise ValueError(
                f"workload.bursts.duration_s: {self.bursts.duration_s:g} exceeds period_s {self.bursts.period_s:g}"
            )
        if self.bursts is not None and self.ramp is not None:
            raise ValueError("workload.bursts: cannot be had with workload.ramp")
        if (
            self.request_rate == "inf"
            and self.ramp is None
            and (self.bursts is not None or self.duration_s is not None)
        ):
            key = "bursts" if self.bursts is not None else "duration_s"
            raise ValueError(f"workload.{key}: needs a finite request_rate, not inf")
        if self.arrivals in ("poisson", "constant") and self.burstiness != 1.0:
            raise ValueError(f"workload.burstiness: {self.burstiness:g} is used with arrivals gamma and weibull only")
        return self


class RunConfig(Section):
    """Everything about a run. Built by `serving.config_file.load_config`."""

    model: ModelSection
    timing: TimingSection
    clock: ClockSection = ClockSection()
    cache: CacheSection = CacheSection()
    instances: dict[Role, InstanceSection]
    kv_pool: PoolSection = PoolSection()
    router: RouterSection = RouterSection()
    scheduler: SchedulerSection = SchedulerSection()
    server: ServerSection = ServerSection()
    speculative: SpeculativeSection = SpeculativeSection()
    ray: RaySection = RaySection()
    workload: WorkloadSection = WorkloadSection()
    seed: NonNegativeInt = 0

    _parts: "Parts" = PrivateAttr()

    @property
    def shape(self) -> ModelConfig:
        """Shape of the live model."""
        return self._parts.shape

    @property
    def charged_shape(self) -> ModelConfig:
        """Shape whose time and memory are charged."""
        return self._parts.charged_shape

    @property
    def expert_load(self) -> NDArray[np.float64] | None:
        """Measured tokens per expert of the live model, (num_moe_layers, n_routed_experts); None: not measured."""
        load: NDArray[np.float64] | None = self._parts.expert_load
        return load

    @property
    def hardware(self) -> SupernodeSpec:
        """The machine whose time and memory are charged."""
        return self._parts.hardware

    @property
    def disaggregated(self) -> bool:
        """Whether prefill and decode run on different instances."""
        return "colocated" not in self.instances

    @property
    def is_speculative(self) -> bool:
        """Whether the MTP module runs."""
        return self.speculative.num_speculative_tokens > 0

    def max_step_tokens(self, role: Role) -> int:
        """Most rows of one pass of the model or of the MTP module.

        The module adds each request's newest token where prompts are computed and drafts made. A request that only
        decodes has two rows of the module at most, as of the model: its token and a draft (model/speculation.py).
        """
        section = self.instances[role]
        newest = section.max_num_seqs if self.is_speculative and role == "colocated" else 0
        return section.max_num_batched_tokens + newest

    def dies_per_npu(self, role: Role) -> int:
        """Dies, that is ranks, of one NPU of `role`."""
        return self.instances[role].dies_per_npu or self.hardware.npu.num_dies

    def world_size(self, role: Role) -> int:
        """Ranks of one instance of `role`."""
        return self.instances[role].npus * self.dies_per_npu(role)

    def num_scheduling_ranks(self, role: Role) -> int:
        """Ranks with a KV space of their own: all, but for prefill, whose dies all hold the same latent KV."""
        return 1 if role == "prefill" else self.world_size(role)

    def num_physical_experts(self, role: Role) -> int:
        """Expert slots of one instance, over all its ranks."""
        section = self.instances[role]
        shared = section.num_shared_expert_copies if section.shared_expert == "dispatched" else 0
        return self.shape.n_routed_experts + section.num_redundant_experts + shared

    def charged_instance(self, role: Role) -> RepresentedInstance:
        """The instance of the charged model for which one of `role` stands."""
        section = self.instances[role]
        copies = section.num_shared_expert_copies if section.shared_expert == "dispatched" else 0
        return self.timing.represents.get(role) or RepresentedInstance(
            ep=self.world_size(role),
            num_redundant_experts=section.num_redundant_experts,
            num_shared_expert_copies=copies if copies < self.world_size(role) else 0,  # else every die has one
        )

    def charged_layout(self, role: Role) -> ExpertDeployment:
        """Where the experts of that instance sit; evenly used."""
        charged = self.charged_instance(role)
        return ExpertDeployment(
            ep=charged.ep,
            num_router_slots=self.charged_shape.n_routed_experts + charged.num_redundant_experts,
            num_shared_slots=charged.num_shared_expert_copies,
        )

    @cached_property
    def total_npus(self) -> int:
        """NPUs of all instances together."""
        return sum(section.count * section.npus for section in self.instances.values())

    def with_port(self, port: int) -> "RunConfig":
        """The same run on another port."""
        copy = self.model_copy(update={"server": self.server.model_copy(update={"port": port})})
        copy._parts = self._parts
        return copy

    def attach(self, parts: "Parts") -> "RunConfig":
        """Join the included parts and run the checks that need them; called once, by the loader."""
        self._parts = parts
        check_parts(self)
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> "RunConfig":
        if set(self.instances) not in ({"prefill", "decode"}, {"colocated"}):
            roles = ", ".join(sorted(self.instances)) or "none"
            raise ValueError(f"instances: roles are {roles}; needs prefill and decode, or colocated alone")
        for role, instance in self.timing.represents.items():
            if instance.num_shared_expert_copies >= instance.ep:  # copies have dies of their own
                raise ValueError(
                    f"timing.represents.{role}.num_shared_expert_copies: {instance.num_shared_expert_copies} must be "
                    f"below ep {instance.ep}"
                )
        for role, section in self.instances.items():
            if section.max_num_seqs > section.max_num_batched_tokens:
                raise ValueError(
                    f"instances.{role}.max_num_seqs: {section.max_num_seqs} exceeds "
                    f"max_num_batched_tokens {section.max_num_batched_tokens}"
                )
            if self.is_speculative and role != "prefill" and 2 * section.max_num_seqs > section.max_num_batched_tokens:
                raise ValueError(
                    f"instances.{role}.max_num_seqs: {section.max_num_seqs} requests with a draft each exceed "
                    f"max_num_batched_tokens {section.max_num_batched_tokens}"
                )
            capacity = section.num_blocks * self.cache.block_size
            if capacity < self.model.max_model_len:
                raise ValueError(
                    f"instances.{role}.num_blocks: {section.num_blocks} blocks of {self.cache.block_size} tokens hold "
                    f"{capacity}, less than model.max_model_len {self.model.max_model_len}"
                )
        return self


class Parts(BaseModel):
    """The included parts, loaded."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    shape: ModelConfig
    charged_shape: ModelConfig
    hardware: SupernodeSpec
    expert_load: Any = None  # an array, or None: of `model.expert_load`
