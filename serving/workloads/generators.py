"""Built-in workloads: lengths, sharing and arrivals fitted to public production traces.

Owns: which generators there are, their parameters' file, and how a workload is drawn from them.
Must not know: the traces (serving/workloads/fit.py wrote the parameters), how requests are sent.
Source: of each generator, in its file configs/workload/NAME.yaml.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from serving.config import GeneratorName
from serving.config_file import load_part
from serving.errors import ConfigError
from serving.workloads.arrivals import Arrivals, generator_for
from serving.workloads.quantiles import Quantiles, correlated_scores
from serving.workloads.requests import Ints, RequestTable, offsets_of
from serving.workloads.sessions import SessionModel, SessionPrompts, draw_sessions
from serving.workloads.workload import DEFAULT_VOCABULARY, Workload, to_ns

GENERATORS: tuple[GeneratorName, ...] = get_args(GeneratorName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """Parameters of one workload. Prompts come from `sessions`, or have `input_tokens` and nothing in common."""

    arrivals: Arrivals
    output_tokens: Quantiles
    input_tokens: Quantiles | None = None
    input_output_correlation: float = 0.0  # of the normal scores
    sessions: SessionModel | None = None
    max_input_tokens: int | None = None  # the longest there is

    def __post_init__(self) -> None:
        if (self.input_tokens is None) == (self.sessions is None):
            raise ConfigError("needs input_tokens or sessions, and not both")
        if not -1 <= self.input_output_correlation <= 1:
            raise ConfigError(f"input_output_correlation: {self.input_output_correlation} is not in [-1, 1]")


def load_generator(name: str) -> Generator:
    """The shipped parameters of a generator. Raises ConfigError for a name that there is not."""
    if name not in GENERATORS:
        raise ConfigError(f"workload {name!r}: is none of {', '.join(GENERATORS)}")
    return _parse(load_part(f"workload/{name}.yaml"))


def generate(
    name: str,
    *,
    max_model_len: int,
    num_requests: int | None = None,
    duration_s: float | None = None,
    rate: float | None = None,
    seed: int = 0,
    arrivals: Arrivals | None = None,
    length_divisor: int = 1,
    vocabulary: range = DEFAULT_VOCABULARY,
) -> Workload:
    """Draw a workload: `num_requests`, or what arrives in `duration_s`; of both, what is less.

    `rate` is in requests per second and `arrivals` takes the place of the fitted process; by default both are those of
    the trace. Lengths are divided by `length_divisor`. A request that exceeds `max_model_len` then is cut: its output
    to a half of it, its prompt to the rest. Equal arguments give equal workloads.
    """
    generator = load_generator(name)
    process = generator.arrivals if arrivals is None else arrivals
    if rate is not None:
        process = dataclasses.replace(process, rate_per_s=rate)
    rng = generator_for(seed, "arrivals")
    if duration_s is not None:
        times_s = process.times_before_s(rng, duration_s)
        times_s = times_s if num_requests is None else times_s[:num_requests]
    elif num_requests is not None:
        times_s = process.times_s(rng, num_requests)
    else:
        raise ConfigError(f"workload {name}: needs num_requests or duration_s")
    if not len(times_s):
        raise ConfigError(f"workload {name}: no request arrives within duration_s {duration_s}")
    if length_divisor < 1 or max_model_len < 2:
        raise ConfigError(f"length_divisor {length_divisor} is below 1, or max_model_len {max_model_len} below 2")
    return Workload(
        name=name,
        requests=_requests(generator, name, to_ns(times_s), seed, length_divisor, max_model_len),
        seed=seed,
        vocabulary=vocabulary,
    )


def _requests(
    generator: Generator,
    name: str,
    arrival_ns: Ints,
    seed: int,
    length_divisor: int,
    max_model_len: int,
) -> RequestTable:
    count = len(arrival_ns)
    rng = generator_for(seed, "lengths")
    scores = rng.standard_normal(count)
    prompts: SessionPrompts | None = None
    if generator.sessions is not None:
        rate_per_s = count / (arrival_ns[-1] / 1e9) if arrival_ns[-1] else generator.arrivals.rate_per_s
        prompts = draw_sessions(generator.sessions, generator_for(seed, "sessions"), count, rate_per_s=rate_per_s)
        num_input = prompts.num_tokens
    else:
        assert generator.input_tokens is not None
        num_input = np.rint(generator.input_tokens.at_scores(scores)).astype(np.int64)
    scores = correlated_scores(rng, scores, generator.input_output_correlation)
    num_output = np.rint(generator.output_tokens.at_scores(scores)).astype(np.int64)
    if generator.max_input_tokens is not None:
        num_input = np.minimum(num_input, generator.max_input_tokens)
    num_input = np.maximum(-(-num_input // length_divisor), 1)
    num_output = np.maximum(-(-num_output // length_divisor), 1)
    num_output = np.where(
        num_input + num_output > max_model_len, np.minimum(num_output, max_model_len // 2), num_output
    )
    num_input = np.minimum(num_input, max_model_len - num_output)
    seeds = generator_for(seed, "sampling").integers(2**31, size=count)
    columns: dict[str, Any] = {} if prompts is None else _pieces(generator, prompts, num_input, length_divisor)
    return RequestTable.of_pieces(
        name, num_prompt_tokens=num_input, max_tokens=num_output, arrival_ns=arrival_ns, seeds=seeds, **columns
    )


def _pieces(generator: Generator, prompts: SessionPrompts, num_input: Ints, length_divisor: int) -> dict[str, Ints]:
    """The system prompt, the session's tokens, the request's own: those of the three that a prompt has any of."""
    assert generator.sessions is not None
    count = len(num_input)
    num_system = np.minimum(-(-generator.sessions.system_prompt_tokens // length_divisor), num_input)
    num_shared = np.clip(-(-prompts.num_session_tokens // length_divisor), num_system, num_input)
    tokens = np.stack([num_system, num_shared - num_system, num_input - num_shared], axis=1)
    is_there = tokens > 0
    columns = {"offsets": offsets_of(is_there.sum(axis=1)), "stream_tokens": tokens[is_there]}
    del tokens  # of a million requests not both at once
    streams = np.stack([np.zeros(count, np.int64), 2 * prompts.session + 2, 2 * np.arange(count) + 1], axis=1)
    return columns | {"streams": streams[is_there]}


def _parse(data: dict[str, Any]) -> Generator:
    """The parameters of a file; it is ours, and what is wrong in it raises."""
    data = dict(data)
    probabilities = tuple(data.pop("probabilities"))

    def quantiles(values: list[float]) -> Quantiles:
        return Quantiles(probabilities=probabilities, values=tuple(values))

    sessions = data.pop("sessions", None)
    if sessions is not None:
        plain = ("bounds_tokens", "first_go_on", "go_on", "branch")
        fields: dict[str, Any] = {
            key: value if not isinstance(value, list) else tuple(value) if key in plain else quantiles(value)
            for key, value in sessions.items()
        }
        sessions = SessionModel(**fields)
    data |= {key: quantiles(data[key]) for key in ("input_tokens", "output_tokens") if key in data}
    return Generator(arrivals=Arrivals(**data.pop("arrivals")), sessions=sessions, **data)
