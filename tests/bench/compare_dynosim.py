"""DynoSim's offline replay and ours on the same requests, taking turns: `python -m tests.bench.compare_dynosim`.

Options: --trace F (Mooncake's conversation trace, FAST25-release/traces; skipped without), --rounds N,
--python PATH (of Python 3.10 to 3.12 for DynoSim), --venv FOLDER (kept and used again; without it a temporary one).

Makes a virtual environment of its own and installs ai-dynamo there from the package index that pip is configured
for. What the two do is not the same: DynoSim's time of a step is a fixed polynomial for one GPU per worker, ours is
made of operators, expert parallelism, transfers and a pool; see the lines it prints.

Owns: the environment, the commands of both, the table.
Must not know: how a process is measured (tests/bench/measured.py).
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.bench_simulation import REQUESTS, commanded
from tests.bench.measured import Cost, cost_of

PACKAGES = ("ai-dynamo==1.4.2", "ai-dynamo-runtime==1.4.2")
PYTHONS = ("python3.12", "python3.11", "python3.10")  # those that ai-dynamo-runtime 1.4.2 has wheels for
WORKERS = {"block_size": 64, "num_gpu_blocks": 16384, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
TRACE_WORKERS = WORKERS | {"block_size": 512, "num_gpu_blocks": 2048}  # the same KV space
# Of DynoSim's eight GPUs 20 requests per second are what ours at 100 is of 256 NPUs: busy, with no growing queue.
SYNTHETIC = (
    *("--input-tokens", "4096", "--output-tokens", "256", "--request-count", "2000", "--request-rate", "20"),
    *("--num-workers", "8", "--router-mode", "round_robin", "--extra-engine-args", json.dumps(WORKERS)),
)
MODELS = """what each models:
  DynoSim   one GPU per worker, no prefill/decode split, step time a polynomial of the batch; vLLM-like scheduler,
            block manager and prefix cache per worker, router by cached blocks (trace) or round robin
  ours      256 NPUs, prefill and decode apart: operators of MLA and MoE on two streams, EP320 dispatch and combine,
            the slowest of 320 ranks, drafts, KV over RDMA links that transfers share, a pool over UB, expert load"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One run of either: what the process cost, and how long it says that the simulation took."""

    cost: Cost
    simulation_s: float
    reuse: float
    num_requests: int


def installed(folder: Path, python: str | None) -> Path:
    """The interpreter of an environment in `folder` that has DynoSim; exits with what is missing."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        chosen = python or next((found for name in PYTHONS if (found := usable(name))), None)
        if chosen is None:
            sys.exit(f"needs one of {', '.join(PYTHONS)}: name it with --python (with pyenv: ~/.pyenv/versions/3.12.*)")
        subprocess.run([chosen, "-m", "venv", str(folder)], check=True)
        print(f"installing {' '.join(PACKAGES)} with {chosen}", flush=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return interpreter


def usable(name: str) -> str | None:
    """Path of an interpreter that starts: a pyenv shim may name a version that is not chosen."""
    candidates = [
        shutil.which(name),
        *sorted(Path.home().glob(f".pyenv/versions/{name[6:]}.*/bin/python"), reverse=True),
    ]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def dynosim(interpreter: Path, *arguments: str) -> Turn:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(interpreter), "-m", "dynamo.replay", "--replay-mode", "offline", *arguments]
        cost = cost_of([*command, "--report-json", str(report)], env={"DYN_LOG": "error"})
        figures: dict[str, Any] = json.loads(report.read_text())
    return Turn(
        cost=cost,
        simulation_s=figures["wall_time_ms"] / 1e3,
        reuse=figures["prefix_cache_reused_ratio"],
        num_requests=figures["completed_requests"],
    )


def ours(*arguments: str) -> Turn:
    cost, figures = commanded(*arguments)
    return Turn(
        cost=cost,
        simulation_s=figures["machine"]["wall_s"],
        reuse=figures["cache"]["hit_rate_tokens"],
        num_requests=figures["completed"],
    )


def compare(title: str, rounds: int, sides: dict[str, Callable[[], Turn]]) -> None:
    """Medians of `rounds` turns each, the sides alternating."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, take in sides.items():
            turns[name].append(take())
    print(f"\n{title} (medians of {rounds} turns each)")
    print(f"  {'':<16}{'requests':>9}{'simulation s':>14}{'command s':>11}{'CPU s':>8}{'MB':>7}{'reuse':>8}")
    for name, taken in turns.items():
        seconds = statistics.median(turn.simulation_s for turn in taken)
        wall_s = statistics.median(turn.cost.wall_s for turn in taken)
        cpu_s = statistics.median(turn.cost.cpu_s for turn in taken)
        rss_mb = max(turn.cost.peak_rss_bytes for turn in taken) / 1e6
        print(
            f"  {name:<16}{taken[0].num_requests:>9}{seconds:>14.3f}{wall_s:>11.2f}{cpu_s:>8.2f}{rss_mb:>7.0f}"
            f"{taken[0].reuse:>8.3f}",
            flush=True,
        )
    first, second = (statistics.median(turn.simulation_s for turn in taken) for taken in turns.values())
    print(f"  simulation, ours over DynoSim: {second / first:.2f}")


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=os.environ.get("MOONCAKE_TRACE"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python")
    parser.add_argument("--venv", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        interpreter = installed(options.venv or Path(folder) / "venv", options.python)
        version = subprocess.run([interpreter, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        print(f"DynoSim: {' '.join(PACKAGES)}, {version}; ours: Python {sys.version.split()[0]}, numpy")
        print(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n{MODELS}")
        compare(
            "2,000 requests of 4,096 + 256 tokens, Poisson",
            options.rounds,
            {"DynoSim": lambda: dynosim(interpreter, *SYNTHETIC), "ours": lambda: ours(*REQUESTS)},
        )
        if options.trace is None or not Path(options.trace).exists():
            print(f"\nMooncake conversation trace: skipped, {options.trace or 'no file given'} (--trace)")
            return
        trace = Path(options.trace).absolute()
        plain = trace  # DynoSim reads plain files
        if trace.suffix == ".gz":
            plain = Path(folder) / "trace.jsonl"
            plain.write_bytes(gzip.decompress(trace.read_bytes()))
        theirs: tuple[str, ...] = (
            str(plain),
            "--trace-format",
            "mooncake",
            "--trace-block-size",
            "512",
            "--num-workers",
            "16",
        )
        theirs += ("--extra-engine-args", json.dumps(TRACE_WORKERS), "--router-mode")
        mine = ("cloudmatrix384", "--trace", str(trace))
        compare(
            "Mooncake conversation trace; DynoSim: 16 workers, KV router",
            options.rounds,
            {"DynoSim": lambda: dynosim(interpreter, *theirs, "kv_router"), "ours": lambda: ours(*mine)},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
