"""Throughput of the live cluster against `transformers`, in one run, with the same weights on the same machine.

16 requests at a time, 128 prompt and 128 new tokens, greedy. The two take turns, so that a busy machine slows both; the
figure is the median of the ratios. Also prints where a decode step's time goes, and the time from the command to
the first token.
"""

import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from model.checkpoint import write_random_checkpoint
from serving.bench import run_bench
from serving.bench_config import BenchConfig
from serving.config_file import load_config
from serving.workloads.synthetic import synthetic_workload

BATCH, PROMPT, NEW, ROUNDS = 16, 128, 128, 3
PORT = 18427


@contextlib.contextmanager
def served(*settings: str, port: int = PORT) -> Iterator[str]:
    """A `supernode serve laptop` of its own process, ready; prints how long the first token took."""
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    command = [sys.executable, "-m", "serving.cli", "serve", "laptop", "--port", str(port)]
    server = subprocess.Popen([*command, *(part for s in settings for part in ("--set", s))], stderr=subprocess.DEVNULL)
    try:
        body = json.dumps({"model": "mini-r1", "prompt": [40, 41, 42], "max_tokens": 1, "ignore_eos": True}).encode()
        while True:
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(request).read()
                break
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            time.sleep(0.05)
        print(f"first token of the first request after {time.perf_counter() - started:.1f} s (bar: 30 s)")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def cluster_tokens_per_s(url: str, seed: int) -> float:
    """Output tokens per second of the endpoint."""
    workload = synthetic_workload(num_requests=BATCH, input_len=PROMPT, output_len=NEW, seed=seed)
    config = BenchConfig(base_url=url, max_concurrency=BATCH, disable_tqdm=True)
    summary = asyncio.run(run_bench(config, workload)).summary
    assert summary.completed == BATCH, summary.reasons
    return summary.total_output_tokens / summary.duration_s


def transformers_tokens_per_s(model: "torch.nn.Module", seed: int) -> float:
    """Output tokens per second of `generate` at the same batch."""
    prompt = torch.randint(16, 250, (BATCH, PROMPT), generator=torch.Generator().manual_seed(seed))
    started = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert output.shape == (BATCH, PROMPT + NEW)
    return BATCH * NEW / (time.perf_counter() - started)


STEP_TIMES = """
from serving.config_file import load_config
from serving.live import run_once
settings = "clock.scale=0 workload.max_concurrency=16 workload.num_requests=32 workload.input_len=128"
settings += " workload.output_len=128 workload.range_ratio=0 workload.num_prefixes=0"
result = run_once(load_config("laptop", settings.split()), trace=None, trace_divisor=1, shards="torch", address=None)
for name, value in result.cluster.items():
    if "ms/step" in name:
        print(f"  {name:28} {value:6.2f}")
"""


def main() -> None:
    from transformers import AutoModelForCausalLM

    config = load_config("laptop")
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder, config.shape, seed=0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for packing in ("ray.pack=npu", "ray.pack=node", "ray.pack=node ray.ranks=batched"):
            with served("clock.scale=0", f"model.checkpoint={Path(folder)}", *packing.split()) as url:
                cluster_tokens_per_s(url, seed=99)
                transformers_tokens_per_s(model, seed=99)
                ratios = []
                for seed in range(ROUNDS):
                    ours, theirs = cluster_tokens_per_s(url, seed), transformers_tokens_per_s(model, seed)
                    ratios.append(ours / theirs)
                    print(f"cluster {ours:6.0f} tok/s   transformers {theirs:6.0f} tok/s   ratio {ours / theirs:.2f}")
            print(f"{packing}: median ratio {statistics.median(ratios):.2f} (least 1.0, aim 2.0)", flush=True)
        print("where a step's time goes (one closed-loop run, an actor per NPU):", flush=True)
        subprocess.run([sys.executable, "-c", STEP_TIMES], check=True)


if __name__ == "__main__":
    main()
