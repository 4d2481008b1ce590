"""The trained model, served: tokens per second with drafts and without, float and INT8, and training's own speed.

Four launches of `laptop` run side by side and answer the same held-out problems in turns, so that a busy machine slows
all of them; figures are medians over the rounds, as ratios to float without drafts.
"""

import asyncio
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from random import Random

from model.config import ModelConfig
from model.layout import make_layouts
from model.tasks.generator import KINDS, generate
from model.tasks.problem import Problem
from model.tokenizer import Tokenizer
from model.training.settings import TrainingSettings
from model.training.trainer import Trainer
from model.weights import load_rank_weights
from serving.config_file import load_config
from tests.bench.bench_serving import served

NUM_PROBLEMS, ROUNDS = 48, 3
DRAFTS = "speculative.num_speculative_tokens=1"


def tokens_per_s(url: str, problems: list[Problem]) -> float:
    """Reply tokens per second of the endpoint, 16 questions at a time."""
    from openai import AsyncOpenAI

    async def run() -> int:
        free = asyncio.Semaphore(16)
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=600) as client:

            async def ask(problem: Problem) -> int:
                async with free:
                    answer = await client.chat.completions.create(
                        model="mini-r1",
                        messages=[{"role": "user", "content": problem.question}],
                        temperature=0,
                        max_completion_tokens=300,
                    )
                assert answer.usage is not None
                return answer.usage.completion_tokens

            return sum(await asyncio.gather(*map(ask, problems)))

    started = time.perf_counter()
    return asyncio.run(run()) / (time.perf_counter() - started)


def acceptance(url: str) -> float:
    """Share of drafts that were right, from the endpoint's counters."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    found = {
        name: sum(map(float, re.findall(rf"^vllm:spec_decode_num_{name}_tokens_total\S* (\S+)", text, re.MULTILINE)))
        for name in ("draft", "accepted")
    }
    return found["accepted"] / found["draft"]


def serving() -> None:
    rng, kinds = Random(0), list(KINDS)
    rounds = [
        [generate(rng, "test", kinds=[kinds[i % len(kinds)]]) for i in range(NUM_PROBLEMS)] for _ in range(ROUNDS + 1)
    ]
    checkpoint = Path(load_config("laptop").model.checkpoint)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        int8 = Path(folder) / "int8"
        subprocess.run(
            [sys.executable, "-m", "serving.cli", "quantize", str(checkpoint), str(int8)],
            check=True,
            capture_output=True,
        )
        sizes(checkpoint, int8)
        variants = {
            "float": (),
            "float, drafts": (DRAFTS,),
            "int8": (f"model.checkpoint={int8}",),
            "int8, drafts": (f"model.checkpoint={int8}", DRAFTS),
        }
        urls = {
            name: stack.enter_context(served("clock.scale=0", *settings, port=18430 + i))
            for i, (name, settings) in enumerate(variants.items())
        }
        for url in urls.values():
            tokens_per_s(url, rounds[-1])
        speeds: dict[str, list[float]] = {name: [] for name in urls}
        for problems in rounds[:ROUNDS]:
            for name, url in urls.items():
                speeds[name].append(tokens_per_s(url, problems))
        for name, url in urls.items():
            ratios = [ours / plain for ours, plain in zip(speeds[name], speeds["float"], strict=True)]
            drafts = f"   {100 * acceptance(url):.1f} % of drafts accepted" if "drafts" in name else ""
            speed, ratio = statistics.median(speeds[name]), statistics.median(ratios)
            print(f"{name:14} {speed:6.0f} tok/s   ratio {ratio:.2f}{drafts}")


def sizes(checkpoint: Path, int8: Path) -> None:
    """File and memory of the weights: one decode rank of four, MTP module included."""
    for name, directory in (("float", checkpoint), ("int8", int8)):
        config = ModelConfig.from_file(directory / "config.json")
        layout = make_layouts(config, world_size=4, max_num_tokens=64)[0]
        held = load_rank_weights(directory, config, layout, with_mtp=True).num_bytes
        stored = (directory / "model.safetensors").stat().st_size
        print(f"{name:6} file {stored / 1e6:6.2f} MB   weights of one of four decode ranks {held / 1e6:6.2f} MB")


def training() -> None:
    """One process and one thread, the shard of a step."""
    config = load_config("laptop").shape
    tokenizer = Tokenizer.from_file(f"{load_config('laptop').model.checkpoint}/tokenizer.json")
    trainer = Trainer(config, TrainingSettings(num_shards=1), tokenizer)
    trainer.run_step()
    started = time.perf_counter()
    num_tokens = sum(trainer.run_step()[0].num_tokens for _ in range(5))
    print(f"training: {num_tokens / (time.perf_counter() - started):.0f} tokens/s, one process, one thread")


def main() -> None:
    training()
    serving()


if __name__ == "__main__":
    main()
