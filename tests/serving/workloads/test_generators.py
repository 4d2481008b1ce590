"""Built-in workloads have the lengths, the sharing and the rate of the traces they were fitted to."""

import collections
from pathlib import Path

import numpy as np
import pytest

from serving.errors import ConfigError
from serving.workloads import fit
from serving.workloads.generators import GENERATORS, generate, load_generator
from serving.workloads.quantiles import Quantiles, correlated_scores
from serving.workloads.requests import Piece
from serving.workloads.servegen import read_columns
from serving.workloads.traces import load_trace

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of public traces is not beside the project")
FULL = 131_072  # a context that cuts nothing


def assert_alike(generated, measured, *, mean=0.05, quantiles=0.10):
    """`measured` is an array, or (mean, p50, p90, p99)."""
    if isinstance(measured, np.ndarray):
        measured = (measured.mean(), *np.percentile(measured, [50, 90, 99]))
    assert generated.mean() == pytest.approx(measured[0], rel=mean)
    assert np.percentile(generated, [50, 90, 99]).tolist() == pytest.approx(list(measured[1:]), rel=quantiles)


# Fits


def test_reasoning_has_the_published_lengths():
    """Figures of ServeGen's DeepSeek-R1, all clients weighted by their rates."""
    workload = generate("r1-reasoning", num_requests=100_000, max_model_len=FULL, seed=1)
    prompts, outputs = workload.num_prompt_tokens, workload.max_tokens
    assert prompts.mean() == pytest.approx(1268, rel=0.05)
    assert np.percentile(prompts, [50, 99]).tolist() == pytest.approx([208, 23_423], rel=0.10)
    assert_alike(outputs, (1527, 792, 3432, 12_607))
    assert len(workload) / (workload.arrival_ns[-1] / 1e9) == pytest.approx(16.0, rel=0.02)


def test_code_has_the_published_medians_and_means():
    workload = generate("code", num_requests=100_000, max_model_len=FULL, seed=1)
    assert np.median(workload.num_prompt_tokens) == pytest.approx(1500, rel=0.02)
    assert workload.num_prompt_tokens.mean() == pytest.approx(2048, rel=0.02)
    assert np.median(workload.max_tokens) == 13
    assert workload.max_tokens.mean() == pytest.approx(28, rel=0.03)
    assert workload.num_prompt_tokens.max() == 7437


@needs_data
def test_chat_has_the_lengths_and_the_arrivals_of_its_trace():
    trace = load_trace(DATA / "azure2023_conv.csv.gz")
    workload = generate("chat", num_requests=100_000, max_model_len=FULL, seed=1)
    assert_alike(workload.num_prompt_tokens, trace.num_prompt_tokens)
    assert_alike(workload.max_tokens, trace.max_tokens)
    gaps = np.diff(workload.arrival_ns)
    assert 1e9 / gaps.mean() == pytest.approx(len(trace) / (trace.arrival_ns[-1] / 1e9), rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, rel=0.02)


@needs_data
def test_conversation_has_the_lengths_of_its_trace():
    trace = load_trace(DATA / "mooncake_conversation_trace.jsonl.gz")
    workload = generate("conversation", num_requests=100_000, max_model_len=FULL, seed=1)
    assert_alike(workload.num_prompt_tokens, trace.num_prompt_tokens)
    assert_alike(workload.max_tokens, trace.max_tokens)


@needs_data
def test_conversation_shares_what_its_trace_shares():
    """Hits of caches without end and with LRU, over as many requests as the trace has."""
    trace = load_trace(DATA / "mooncake_conversation_trace.jsonl.gz")
    capacities = (1_000, 5_000, 10_000, 30_000, None)
    measured = [hit_share(trace, capacity) for capacity in capacities]
    assert measured[-1] == pytest.approx(0.374, abs=0.001)  # the bound that all requests together allow
    shares = [
        [hit_share(generate("conversation", num_requests=12_031, max_model_len=FULL, seed=seed), c) for c in capacities]
        for seed in range(3)
    ]
    assert np.mean(shares, axis=0).tolist() == pytest.approx(measured, abs=0.02)  # one seed differs by up to 0.025


def hit_share(workload, capacity):
    """Share of the prompt tokens that an LRU cache of `capacity` blocks of 512 tokens has when they come."""
    cache, num_hits = collections.OrderedDict(), 0
    for i in range(len(workload)):
        names = workload.block_hashes(i, 512)
        found = next((k for k, name in enumerate(names) if name not in cache), len(names))
        num_hits += found
        for name in names:
            cache[name] = None
            cache.move_to_end(name)
        while capacity is not None and len(cache) > capacity:
            cache.popitem(last=False)
    return 512 * num_hits / workload.num_prompt_tokens.sum()


@needs_data
def test_shipped_parameters_are_those_that_the_traces_give(tmp_path):
    fit.main(DATA, tmp_path)
    for name in GENERATORS:
        shipped = Path(fit.__file__).parents[2] / "configs" / "workload" / f"{name}.yaml"
        assert (tmp_path / f"{name}.yaml").read_text() == shipped.read_text()


@needs_data
def test_the_rates_of_the_day_have_the_mean_that_reasoning_has():
    rates = read_columns(DATA / "servegen_r1_rates.parquet", ("rate",))["rate"]
    assert load_generator("r1-reasoning").arrivals.rate_per_s == pytest.approx(rates.sum() * 600 / 86_400, rel=1e-3)


# What is drawn


@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_arguments_give_the_same_workload_and_another_seed_another(name):
    first, again, other = (generate(name, num_requests=200, max_model_len=FULL, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.digest != other.digest
    assert first.max_tokens.tolist() != other.max_tokens.tolist()
    assert first.requests[0].request_id == f"{name}-0"


@pytest.mark.parametrize("name", GENERATORS)
def test_requests_that_do_not_fit_are_cut_and_no_others(name):
    full = generate(name, num_requests=2000, max_model_len=FULL)
    cut = generate(name, num_requests=2000, max_model_len=1024)
    fits = full.num_prompt_tokens + full.max_tokens <= 1024
    assert not fits.all()
    assert (cut.num_prompt_tokens + cut.max_tokens <= 1024).all()
    assert (cut.num_prompt_tokens[fits] == full.num_prompt_tokens[fits]).all()
    assert (cut.max_tokens[fits] == full.max_tokens[fits]).all()
    assert (cut.max_tokens[~fits] == np.minimum(full.max_tokens[~fits], 512)).all()


def test_a_rate_and_a_duration_say_how_many_there_are():
    workload = generate("r1-reasoning", duration_s=100.0, rate=50.0, max_model_len=FULL)
    assert len(workload) == pytest.approx(5000, rel=0.1)
    assert 99e9 < workload.arrival_ns[-1] < 100e9
    assert len(generate("r1-reasoning", duration_s=100.0, rate=50.0, num_requests=70, max_model_len=FULL)) == 70


def test_turns_of_a_session_are_prefixes_of_one_another_after_the_system_prompt():
    workload = generate("conversation", num_requests=3000, max_model_len=FULL)
    num_grown = num_cut = 0
    longest = {}
    for request in workload.requests:
        system, session = request.pieces[:2]
        assert system == Piece(0, 512)
        if len(request.pieces) == 3:
            assert request.pieces[2].stream % 2 == 1  # what follows a branch is the request's own
        elif session.stream in longest:
            num_grown += session.num_tokens > longest[session.stream]
            num_cut += session.num_tokens <= longest[session.stream]  # a branch that adds nothing
        longest[session.stream] = max(session.num_tokens, longest.get(session.stream, 0))
    assert num_grown > 500
    assert num_cut < 0.05 * num_grown


def test_a_divisor_keeps_what_is_shared():
    full = generate("conversation", num_requests=500, max_model_len=FULL)
    small = generate("conversation", num_requests=500, max_model_len=FULL, length_divisor=32)
    assert small.num_prompt_tokens.tolist() == (-(-full.num_prompt_tokens // 32)).tolist()
    for i in range(500):
        assert [piece.stream for piece in small.requests[i].pieces] == [p.stream for p in full.requests[i].pieces][
            : len(small.requests[i].pieces)
        ]
    assert hit_share(full, None) > 0.1
    shared = {name for i in range(250) for name in small.block_hashes(i, 16)}
    assert any(set(small.block_hashes(i, 16)[1:]) & shared for i in range(250, 500))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "poetry", "num_requests": 1}, "workload 'poetry': is none of r1-reasoning, conversation, chat, code"),
        ({"num_requests": None}, "workload chat: needs num_requests or duration_s"),
        ({"num_requests": 1, "rate": -1.0}, "arrivals.rate_per_s: -1.0"),
        ({"duration_s": 1e-9}, "no request arrives within duration_s 1e-09"),
        ({"num_requests": 1, "max_model_len": 1}, "max_model_len 1 below 2"),
    ],
)
def test_arguments_that_make_no_workload_are_named(arguments, message):
    with pytest.raises(ConfigError) as caught:
        generate(**{"name": "chat", "max_model_len": 1024} | arguments)
    assert message in str(caught.value)


# Tables of quantiles


def test_a_table_of_quantiles_gives_them_back():
    table = Quantiles(probabilities=(0.1, 0.5, 0.9), values=(10.0, 20.0, 80.0))
    drawn = table.draw(np.random.default_rng(0), 200_000)
    assert np.quantile(drawn, [0.3, 0.5, 0.7]) == pytest.approx([15.06, 20.0, 35.26], rel=0.01)
    assert (drawn.min(), drawn.max()) == pytest.approx((10.0, 80.0))


def test_scores_have_the_correlation_asked_for():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(100_000)
    other = correlated_scores(rng, scores, -0.3)
    assert np.corrcoef(scores, other)[0, 1] == pytest.approx(-0.3, abs=0.01)
    assert other.std() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("probabilities", "values"),
    [
        ((0.1,), (1.0,)),
        ((0.1, 0.5), (1.0,)),
        ((0.5, 0.1), (1.0, 2.0)),
        ((0.1, 1.0), (1.0, 2.0)),
        ((0.1, 0.5), (2.0, 1.0)),
    ],
)
def test_a_table_that_is_none_is_refused(probabilities, values):
    with pytest.raises(ConfigError):
        Quantiles(probabilities=probabilities, values=values)
