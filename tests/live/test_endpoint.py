"""What a client sees of `supernode serve laptop`: real tokens from real processes, and numbers that add up."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.live.launches import PATIENCE_S, complete, metrics, tokens_of

pytestmark = pytest.mark.ray
PROMPTS = [tuple(range(40 + i, 40 + i + length)) for i, length in enumerate((1, 15, 16, 17, 70, 140))]


@pytest.fixture
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def test_greedy_tokens_are_those_of_one_process(url, reference):
    """Twice, at the same time: cold, and with prefixes from the pool."""
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        for _ in range(2):
            answers = list(clients.map(lambda prompt: complete(url, prompt, 24), PROMPTS))
            assert [tokens_of(answer) for answer in answers] == [reference(prompt, 24) for prompt in PROMPTS]
    cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, 0, 0, 16, 64, 128]  # whole blocks, but never all: the last token has to be computed


def test_a_seed_gives_the_same_tokens_in_every_batch(url, reference):
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    wanted = reference(PROMPTS[3], 20, **sampling)
    assert tokens_of(complete(url, PROMPTS[3], 20, **sampling)) == wanted
    others = [{"prompt": PROMPTS[i], "seed": i} for i in (1, 2, 4)]
    with ThreadPoolExecutor(len(others) + 1) as clients:
        busy = [
            clients.submit(complete, url, other["prompt"], 40, temperature=1, seed=other["seed"]) for other in others
        ]
        assert tokens_of(complete(url, PROMPTS[3], 20, **sampling)) == wanted
        assert all(answer.result().status_code == 200 for answer in busy)


def test_a_completion_by_the_openai_client(api):
    answer = api.completions.create(model="mini-r1", prompt="Once upon", max_tokens=12, n=3, seed=1, temperature=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    again = api.completions.create(model="mini-r1", prompt="Once upon", max_tokens=12, n=3, seed=1, temperature=2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert answer.usage.completion_tokens <= 36
    for clock in ("simulated", "wall"):
        times = answer.usage.model_extra[clock]
        assert 0 <= times["queue_ms"] <= times["ttft_ms"] <= times["e2el_ms"]


def test_a_streamed_completion_is_the_whole_one(api):
    request = {"model": "mini-r1", "prompt": "Once upon", "max_tokens": 30, "seed": 3, "temperature": 1.0}
    whole = api.completions.create(**request)
    with api.completions.create(**request, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_with_logprobs(api):
    request = {"model": "mini-r1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    whole = api.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    with api.chat.completions.create(**request, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert entry.logprob <= 0


def test_a_stop_string_ends_the_text_before_it(api):
    request = {"model": "mini-r1", "prompt": "Once upon", "max_tokens": 40, "temperature": 0}
    text = api.completions.create(**request).choices[0].text
    stop = text[6:9]
    answer = api.completions.create(**request, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]


def test_metrics_add_up(url):
    """Two requests of 40 prompt and 10 output tokens, of which the second finds two blocks in the pool."""
    before = metrics(url)
    prompt = [99, 98, 97, 96] * 10
    answers = [complete(url, prompt, 10).json() for _ in range(2)]
    grown = {name: value - before.get(name, 0) for name, value in metrics(url).items()}
    assert grown['vllm:prompt_tokens_total{engine="decode-0"}'] == 80
    assert grown['vllm:prompt_tokens_by_source_total{engine="decode-0",source="external_kv_transfer"}'] == 32
    assert grown['vllm:prompt_tokens_by_source_total{engine="decode-0",source="local_compute"}'] == 48
    assert grown['vllm:external_prefix_cache_hits_total{engine="decode-0"}'] == 32
    assert grown['vllm:generation_tokens_total{engine="prefill-0"}'] == 2  # the first of each
    assert grown['vllm:generation_tokens_total{engine="decode-0"}'] == 18
    assert grown['vllm:request_success_total{engine="decode-0",finished_reason="length"}'] == 2
    assert grown['supernode:step_seconds_count{clock="simulated",engine="prefill-0"}'] == 2
    assert grown['supernode:step_seconds_count{clock="simulated",engine="decode-0"}'] == 18
    assert grown['vllm:nixl_bytes_transferred_count{engine="decode-0"}'] == 2
    assert grown['vllm:time_to_first_token_seconds_count{engine="decode-0"}'] == 2
    ttft_s = sum(answer["usage"]["simulated"]["ttft_ms"] for answer in answers) / 1e3
    simulated = grown['supernode:simulated_time_to_first_token_seconds_sum{engine="decode-0"}']
    assert simulated == pytest.approx(ttft_s, abs=1e-6)
    assert grown['supernode:plane_bytes_total{plane="rdma"}'] > 0
    assert grown['supernode:plane_bytes_total{plane="ub"}'] > 0
    now = metrics(url)
    assert now["supernode:clock_lag_seconds"] >= 0
    for engine in ("prefill-0", "decode-0"):
        for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            assert now[f'{gauge}{{engine="{engine}"}}'] == 0


def test_what_stands_beside_the_completions(url):
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 1024
    assert httpx.get(f"{url}/health").status_code == 200
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": "grüße 北京 🚀"}).json()["tokens"]
    text = httpx.post(f"{url}/detokenize", json={"tokens": tokens[1:]}).json()["prompt"]  # without its beginning
    assert text == "grüße 北京 🚀"


@pytest.mark.parametrize(
    ("change", "status", "field", "limit"),
    [
        ({"prompt": [7] * 1024}, 400, "prompt", "1024"),
        ({"prompt": "x" * 5000}, 400, "prompt", "1024"),
        ({"prompt": ""}, 400, "prompt", "at least 1"),
        ({"prompt": [100_000]}, 400, "prompt", "2048"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": -3}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": 2000}, 400, "max_tokens", "1024"),
        ({"max_tokens": 10**12}, 400, "max_tokens", "2147483647"),
        ({"max_tokens": "many"}, 400, "max_tokens", "integer"),
        ({"temperature": -1}, 400, "temperature", "0"),
        ({"n": 0}, 400, "n", "equal to 1"),
        ({"model": "gpt-4"}, 404, "model", "mini-r1"),
    ],
)
def test_bad_fields_are_named_with_their_limit(url, change, status, field, limit):
    body = {"model": "mini-r1", "prompt": "hi", "max_tokens": 4} | change
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, field)
    assert limit in error["message"]
    assert len(complete(url, "hi", 2).json()["choices"]) == 1


@pytest.mark.parametrize(
    ("content", "status"),
    [(b'{"prompt": "hi"', 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413)],
    ids=["cut", "list", "binary", "10 MB"],
)
def test_bad_bodies_are_refused(url, content, status):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


def test_the_load_generator_measures_it(url, tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "serving.cli", "bench", url, "--json", str(result), "--disable-tqdm"]
    command += ["--num-prompts", "12", "--max-concurrency", "6"]
    command += ["--random-input-len", "24", "--random-output-len", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Successful requests:                     12" in done.stdout
    measured = json.loads(result.read_text())
    assert (measured["completed"], measured["total_output_tokens"]) == (12, 72)
    assert measured["simulated"]["p99_ttft_ms"] > 0
