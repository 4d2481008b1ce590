"""What the shared pool is worth on a trace: hit rates, latency and load of prefill under other caches and routers.

`python -m tests.bench.pool_study TRACE [--rate R] [--sizes]`, TRACE being Mooncake's conversation trace
(FAST25-release/traces/conversation_trace.jsonl, plain or gzip). Prints a Markdown table, and above it the bound: what
a cache that never evicts, and has a prompt's blocks the instant it arrives, would find.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from serving.config import RunConfig
from serving.config_file import load_config
from serving.simulation.run_source import WorkloadSource, load_source, run_figures
from serving.workloads.workload import Workload

CONFIG = "cloudmatrix384"
NO_POOL = ("kv_pool.enabled=false",)
OWN_CACHES = ("instances.prefill.prefix_caching=true",)
ROUTERS = (
    ("shared pool, least loaded", ("router.policy=least_loaded",)),
    ("shared pool, round robin", ("router.policy=round_robin",)),
    ("shared pool and own caches, prefix affinity", (*OWN_CACHES, "router.policy=prefix_affinity")),
    ("own caches, prefix affinity", (*NO_POOL, *OWN_CACHES, "router.policy=prefix_affinity")),
    ("own caches, round robin", (*NO_POOL, *OWN_CACHES, "router.policy=round_robin")),
    ("own caches, least loaded", (*NO_POOL, *OWN_CACHES, "router.policy=least_loaded")),
    ("no cache, least loaded", NO_POOL),
)
NUM_HOSTS = (1, 2, 4, 8, 16, 32, 64, 128)


def bound(workload: Workload, block_size: int) -> float:
    """Share of all prompt tokens that lie in full blocks which an earlier prompt had."""
    seen: set[int] = set()
    num_found = 0
    for index in range(len(workload)):
        hashes = workload.block_hashes(index, block_size)
        # The last token of a prompt is always computed, since its output is the first answer.
        usable = (int(workload.num_prompt_tokens[index]) - 1) // block_size
        num_found += next((i for i, name in enumerate(hashes[:usable]) if name not in seen), min(usable, len(hashes)))
        seen.update(hashes)
    return num_found * block_size / int(workload.num_prompt_tokens.sum())


def equal_pool(config: RunConfig, block_bytes: int) -> tuple[str, ...]:
    """A pool as large as the caches of all prefill instances together."""
    prefill = config.instances["prefill"]
    return ("kv_pool.hosts=1", f"kv_pool.dram_bytes_per_host={prefill.count * prefill.num_blocks * block_bytes}")


def cells(name: str, figures: dict[str, Any]) -> list[str]:
    busy = [instance["busy_share"] for instance in figures["instances"] if instance["role"] == "prefill"]
    planes, pool = figures["planes"], figures["pool"]
    return [
        name,
        "-" if pool is None else f"{pool['capacity_bytes'] // pool['block_bytes']:,}",
        f"{figures['cache']['hit_rate_tokens']:.3f}",
        f"{figures['mean_ttft_ms']:.0f}",
        f"{figures['p50_ttft_ms']:.0f}",
        f"{figures['p99_ttft_ms']:.0f}",
        f"{100 * statistics.fmean(busy):.1f}",
        f"{max(busy) / statistics.fmean(busy):.2f}",
        f"{planes['ub']['bytes'] / 1e12:.2f}",
        "-" if pool is None else f"{pool['evicted']:,}",
    ]


HEADINGS = (
    "caches and router",
    "blocks of the pool",
    "hit rate",
    "TTFT mean, ms",
    "p50",
    "p99",
    "prefill busy, %",
    "busiest / mean",
    "UB, TB",
    "evicted",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--rate", type=float, help="requests per second in place of the trace's own")
    parser.add_argument("--sizes", action="store_true", help="vary the pool's size in place of caches and routers")
    parser.add_argument("--num-requests", type=int, default=1_000_000)
    options = parser.parse_args()
    source = WorkloadSource.of(trace=options.trace, rate=options.rate, num_requests=options.num_requests)
    base = load_config(CONFIG)
    workload = load_source(base, source)
    block_size = base.cache.block_size
    prompt_tokens = workload.num_prompt_tokens
    print(
        f"{len(workload):,} requests, {prompt_tokens.sum():,} prompt tokens, the longest {prompt_tokens.max():,}; "
        f"a cache of blocks of {block_size} that never evicts finds {bound(workload, block_size):.4f} of them\n"
    )
    variants: list[tuple[str, tuple[str, ...]]] = list(ROUTERS)
    if options.sizes:
        block_bytes = run_figures(base, WorkloadSource(num_requests=1), goodput=None)["pool"]["block_bytes"]
        count = base.instances["prefill"].count
        variants = [(f"pool of {count} x own caches", equal_pool(base, block_bytes))]
        variants += [(f"pool of {hosts} hosts", (f"kv_pool.hosts={hosts}",)) for hosts in NUM_HOSTS]
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    for name, overrides in variants:
        config = load_config(CONFIG, overrides)
        print("| " + " | ".join(cells(name, run_figures(config, source, goodput=None))) + " |", flush=True)


if __name__ == "__main__":
    main()
