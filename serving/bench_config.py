"""Options of the load generator.

Owns: `BenchConfig`, its ranges and defaults, and the readers of its list-like options.
Must not know: HTTP clients, the command line (it only shares the names), how a run is driven.
Source: names and defaults of `vllm bench serve`; cancellation from aiperf's --request-cancellation-*.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from serving.errors import ConfigError, shown
from serving.records import Goodput
from serving.report import SELECTABLE_METRICS, reserved_keys
from serving.timings import Metric
from serving.workloads.arrivals import Arrivals, RampUp

Backend = Literal["openai", "openai-chat"]
PromptFormat = Literal["tokens", "text"]
ENDPOINTS: dict[Backend, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """How a workload is sent to an OpenAI-compatible endpoint.

    Arrivals: with `replay` each request is sent at its own arrival time multiplied by `time_factor`. Otherwise
    `request_rate`, `burstiness` and `ramp_up` draw the times; an infinite rate sends everything at once, and with
    `max_concurrency` that is a closed loop of so many clients. `max_concurrency` also holds back an open loop.

    `prompt_format` None is tokens for `openai` and text for `openai-chat`, which takes nothing else.
    `temperature` None leaves it to the server, as does None for the other sampling fields. `cancel_share` of the
    requests, drawn from `seed`, are given up by closing the connection `cancel_delay_s` after sending.
    `disable_tqdm` None shows the progress bar only where stderr is a terminal.
    """

    base_url: str
    backend: Backend = "openai"
    endpoint: str | None = None  # path; None: by backend
    model: str | None = None  # None: the first that the endpoint lists
    tokenizer: str | None = None  # only named in the result
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    request_id_prefix: str = ""
    replay: bool = False
    time_factor: float = 1.0
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up: RampUp | None = None
    max_concurrency: int | None = None
    prompt_format: PromptFormat | None = None
    ignore_eos: bool = True  # as vLLM for random prompts: the workload says how long outputs are
    temperature: float | None = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    num_warmups: int = 0
    ready_check_timeout_s: float = 60.0  # 0 does not wait
    request_timeout_s: float = 6 * 3600.0
    cancel_share: float = 0.0
    cancel_delay_s: float = 1.0
    seed: int = 0
    percentile_metrics: tuple[Metric, ...] = ("ttft", "tpot", "itl")
    metric_percentiles: tuple[float, ...] = (99.0,)
    goodput: Goodput | None = None
    save_detailed: bool = False  # keeps generated texts
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    disable_tqdm: bool | None = None

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"base_url: {shown(self.base_url)} is not http://HOST[:PORT] or https://HOST[:PORT]")
        if self.backend not in ENDPOINTS:
            raise ConfigError(f"backend: {shown(self.backend)} is not one of {', '.join(ENDPOINTS)}")
        if self.prompt_format not in (None, "tokens", "text"):
            raise ConfigError(f"prompt_format: {shown(self.prompt_format)} is not one of tokens, text")
        if self.backend == "openai-chat" and self.prompt_format == "tokens":
            raise ConfigError("prompt_format: 'tokens' cannot be sent by backend openai-chat, which takes text")
        Arrivals.from_request_rate(self.request_rate, burstiness=self.burstiness, ramp_up=self.ramp_up)
        self._check_least("max_concurrency", self.max_concurrency, 1)
        self._check_least("num_warmups", self.num_warmups, 0)
        self._check_least("seed", self.seed, 0)
        for name in ("ready_check_timeout_s", "cancel_delay_s", "temperature"):
            self._check_least(name, getattr(self, name), 0)
        for name in ("time_factor", "request_timeout_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: {value} must be finite and above the limit 0")
        if not 0.0 <= self.cancel_share <= 1.0:
            raise ConfigError(f"cancel_share: {self.cancel_share} is not in [0, 1]")
        if not all(0 <= p <= 100 for p in self.metric_percentiles):
            raise ConfigError(f"metric_percentiles: {self.metric_percentiles} are not all in [0, 100]")
        for metric in self.percentile_metrics:
            _check_metric(metric)
        if self.metadata and (taken := self.metadata.keys() & reserved_keys()):
            raise ConfigError(f"metadata: {', '.join(sorted(taken))}: a key of the result itself")

    @staticmethod
    def _check_least(name: str, value: float | None, least: int) -> None:
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name}: {value} is below the limit {least}, or not finite")

    @property
    def root_url(self) -> str:
        """`base_url` without a trailing slash, and without /v1, which `endpoint` has."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def url(self) -> str:
        """Where requests are posted."""
        return self.root_url + (self.endpoint or ENDPOINTS[self.backend])

    @property
    def arrivals(self) -> Arrivals:
        """The arrival process, unless `replay`."""
        return Arrivals.from_request_rate(self.request_rate, burstiness=self.burstiness, ramp_up=self.ramp_up)

    @property
    def sends_tokens(self) -> bool:
        """Whether prompts go out as lists of token ids."""
        return self.backend == "openai" and self.prompt_format != "text"


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Comma-separated percentiles such as "50,99,99.9"."""
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"metric_percentiles: {shown(text)} is not a list of numbers from 0 to 100")
    return values


def parse_metrics(text: str) -> tuple[Metric, ...]:
    """Comma-separated metrics such as "ttft,tpot,itl,e2el", in the order of the table."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        _check_metric(name)
    return tuple(metric for metric in SELECTABLE_METRICS if metric in names)


def parse_pairs(option: str, pairs: list[str]) -> dict[str, str]:
    """ "KEY=VALUE" strings, as for --header and --metadata."""
    parsed: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"{option}: {shown(pair)} is not KEY=VALUE")
        parsed[key.strip()] = value.strip()
    return parsed


def _check_metric(name: str) -> None:
    if name not in SELECTABLE_METRICS:
        raise ConfigError(f"percentile_metrics: {shown(name)} is not one of {', '.join(SELECTABLE_METRICS)}")
