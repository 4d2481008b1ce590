"""Fits the built-in workloads to public traces: `python -m serving.workloads.fit FOLDER_OF_TRACES OUTPUT_FOLDER`.

Owns: what is measured in the traces, and the parameters' files that follow (configs/workload/*.yaml).
Must not know: how the parameters are drawn from (serving/workloads/generators.py).
Source: the traces; each file says which. Where a distribution is not public, what is assumed is said there too.
"""

import math
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.workloads.mooncake import MOONCAKE_BLOCK_SIZE
from serving.workloads.requests import Ints
from serving.workloads.servegen import read_columns
from serving.workloads.traces import load_trace
from serving.workloads.workload import Workload

Floats = NDArray[np.float64]

# Dense at the ends: the longest few requests in a thousand hold a large share of the tokens.
PROBABILITIES = (
    *(0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07),
    *(round(0.1 + 0.025 * i, 3) for i in range(33)),
    *(0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999, 0.9995, 0.9999),
)
SYSTEM_PROMPT_TOKENS = MOONCAKE_BLOCK_SIZE  # all requests share the first hash id and no two share more by it alone
BOUNDS_TOKENS = (1000, 3000, 7000, 15_000, 30_000, 60_000)  # hardly more than the system prompt, ..., very long
LARGE_GROWTH_TOKENS = 1500  # above it turns are followed by another half as often as below
_PDF_WINDOW_S, _RATE_WINDOW_S = 21_600, 600  # ServeGen's distributions are of six hours, its rates of ten minutes
_DAY_S = 86_400
_NUM_SCORES = 20_000  # points of a distribution whose mean is taken: it changes by less than a token with more
_SIGMAS = 0.1, 3.0  # of log-normals, between which one is looked for: mean over median from 1.005 to 90
_NUM_HALVINGS = 60  # of that interval: to the last bit of a double


def main(traces: Path, output: Path) -> None:
    """Write one file per generator."""
    output.mkdir(parents=True, exist_ok=True)
    fits = {"r1-reasoning": fit_reasoning, "conversation": fit_conversation, "chat": fit_chat}
    for name, fit in fits.items():
        (output / f"{name}.yaml").write_text(fit(traces))
    (output / "code.yaml").write_text(fit_code())


def fit_reasoning(traces: Path) -> str:
    """DeepSeek-R1 of a cloud: all clients of ServeGen's day, each weighted by its rate."""
    rates = read_columns(traces / "servegen_r1_rates.parquet", ("client", "window_s", "rate"))
    pdf_path = traces / "servegen_r1_pdfs_q2pct.parquet"
    tables = {field: _pdf_rows(pdf_path, field) for field in ("input_tokens", "output_tokens")}
    windows = rates["window_s"] // _PDF_WINDOW_S
    keys = (rates["client"].astype(np.int64) * 4 + windows).astype(np.int64)
    weights = np.bincount(keys, rates["rate"], minlength=int(max(t["key"].max() for t in tables.values())) + 1)
    scores_of_key: list[Floats] = []
    quantiles: list[Floats] = []
    for table in tables.values():
        share = weights[table["key"]] * table["p"]
        quantiles.append(quantiles_at(table["bin"], share))
        scores = _weighted_scores(table["bin"], share)
        scores_of_key.append(np.bincount(table["key"], table["p"] * scores, minlength=len(weights)).astype(np.float64))
    correlation = float((weights * scores_of_key[0] * scores_of_key[1]).sum() / weights.sum())
    gaps = np.diff(_arrivals_ns(load_trace(traces / "servegen_r1_sample_1h_8rps.parquet")))
    return _document(
        """DeepSeek-R1 as a cloud serves it: ServeGen data/reason/deepseek-r1 (alibaba/ServeGen, arXiv:2505.09999,
Apache-2.0), 73 clients over 24 h. Lengths: the mixture of all clients' distributions, each weighted by its rate.
Correlation: what follows from clients that differ; inside a client input and output were published apart.
Burstiness: of all clients together in a sampled hour (single clients are burstier: coefficient of variation 2.28).
Prompts have no published content: none is shared.""",
        arrivals=_arrivals("gamma", rates["rate"].sum() * _RATE_WINDOW_S / _DAY_S, gaps),
        input_output_correlation=correlation,
        input_tokens=quantiles[0],
        output_tokens=quantiles[1],
    )


def fit_conversation(traces: Path) -> str:
    """Mooncake's conversations: later turns are requests that share more than the system prompt with an earlier one."""
    workload = load_trace(traces / "mooncake_conversation_trace.jsonl.gz")
    source, num_shared = _sources(workload)
    times_s = _arrivals_ns(workload) / 1e9
    lengths = workload.num_prompt_tokens
    classes = np.searchsorted(BOUNDS_TOKENS, lengths, side="right")
    later = np.flatnonzero(source >= 0)
    turn, has_next = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.bool_)
    for i in later.tolist():
        turn[i] = turn[source[i]] + 1
        has_next[source[i]] = True
    growth = lengths - lengths[source]
    blocks = np.diff(workload.columns.offsets)
    is_branch = (source >= 0) & (num_shared < blocks[source] - 1)  # else all but the last block, which was not full
    is_large = ~is_branch & (growth >= LARGE_GROWTH_TOKENS)
    settled = times_s < times_s[-1] / 2  # of the others the next turn may lie behind the end of the trace
    usual = settled & ~is_large
    straight, branches = later[~is_branch[later]], later[is_branch[later]]
    of_class = [later[classes[source[later]] == which] for which in range(1, len(BOUNDS_TOKENS) + 1)]
    return _document(
        """Multi-turn chat over long documents: the conversation trace of kvcache-ai/Mooncake (FAST25-release/traces,
arXiv:2407.00079, Apache-2.0), 12,031 requests in 59 min. Turns are told by hash ids: a request that shares more
than the first block goes on from the last one that held what it shares. Its blocks are of 512 tokens, so the
system prompt is known to be at least one block and less than two: taken as one.
Arrivals: the trace's timestamps are in steps of 3 s; taken as Poisson.""",
        arrivals={"kind": "poisson", "rate_per_s": len(lengths) / times_s[-1]},
        max_input_tokens=int(lengths.max()),
        output_tokens=_quantiles(workload.max_tokens),
        sessions={
            "system_prompt_tokens": SYSTEM_PROMPT_TOKENS,
            "bounds_tokens": BOUNDS_TOKENS,
            "first_go_on": [
                has_next[settled & (turn == 0) & (classes == which)].mean() for which in range(len(BOUNDS_TOKENS) + 1)
            ],
            "go_on": [
                *(has_next[usual & (turn == t)].mean() for t in range(1, 4)),
                has_next[usual & (turn > 3)].mean(),
            ],
            "large_growth_tokens": LARGE_GROWTH_TOKENS,
            "go_on_after_large": has_next[settled & (turn > 0) & is_large].mean(),
            "branch": [0.0, *(is_branch[requests].mean() for requests in of_class)],
            "first_tokens": _quantiles(lengths[source < 0]),
            "gap_s": _quantiles(np.maximum(times_s[later] - times_s[source[later]], 1.0)),
            "growth_tokens": _quantiles(np.maximum(growth[straight], 1)),
            "branch_kept": _quantiles(num_shared[branches] * MOONCAKE_BLOCK_SIZE / lengths[source[branches]]),
            "branch_length": _quantiles(lengths[branches] / lengths[source[branches]]),
        },
    )


def fit_chat(traces: Path) -> str:
    """Azure's chat service."""
    workload = load_trace(traces / "azure2023_conv.csv.gz")
    times_ns = _arrivals_ns(workload)
    lengths = np.argsort(np.argsort(np.stack([workload.num_prompt_tokens, workload.max_tokens]), axis=1), axis=1)
    scores = np.array([NormalDist().inv_cdf((rank + 0.5) / len(workload)) for rank in range(len(workload))])[lengths]
    return _document(
        """Short chat: Azure LLM inference trace 2023, conversation (Azure/AzurePublicDataset, CC-BY 4.0; Patel et al.,
Splitwise, arXiv:2311.18677), 19,366 requests in 58 min. The trace has no content: no prompt is shared.""",
        arrivals=_arrivals("gamma", len(workload) / (times_ns[-1] / 1e9), np.diff(times_ns)),
        input_output_correlation=float((scores[0] * scores[1]).mean()),
        input_tokens=_quantiles(workload.num_prompt_tokens),
        output_tokens=_quantiles(workload.max_tokens),
    )


def fit_code() -> str:
    """Azure's code completion, of which only single figures are taken; the shapes between them are assumed."""
    # Splitwise, arXiv:2311.18677, and its published trace: 8,819 requests in about an hour, in tokens.
    median_input, mean_input, longest_input = 1500, 2048, 7437
    median_output, mean_output, longest_output = 13, 28, 1899
    num_requests, duration_s = 8819, 3600
    burstiness = 0.25  # assumed: a coefficient of variation of 2, squared and inverted
    scores = np.array([NormalDist().inv_cdf(p) for p in PROBABILITIES])

    def log_normal(median: float, mean: float, longest: float) -> Floats:
        """The cut log-normal of that median whose table of quantiles has that mean."""
        low, high = _SIGMAS
        for _ in range(_NUM_HALVINGS):
            sigma = (low + high) / 2
            grid = np.minimum(median * np.exp(sigma * _even_scores()), longest)
            low, high = (sigma, high) if grid.mean() < mean else (low, sigma)
        return np.minimum(median * np.exp(sigma * scores), longest)

    return _document(
        """Code completion: figures of the Azure LLM inference trace 2023, code (Patel et al., Splitwise,
arXiv:2311.18677): 8,819 requests in about an hour; input median 1,500, mean 2,048, longest 7,437; output median 13,
mean 28, longest 1,899 tokens. ASSUMED: log-normal shapes cut at the longest, input and output independent, gamma
arrivals of coefficient of variation 2 (the trace comes in clusters), no shared prompts.""",
        arrivals={"kind": "gamma", "rate_per_s": num_requests / duration_s, "burstiness": burstiness},
        input_tokens=np.maximum(log_normal(median_input, mean_input, longest_input), 1),
        output_tokens=np.maximum(log_normal(median_output, mean_output, longest_output), 1),
    )


def quantiles_at(values: Floats, weights: Floats) -> Floats:
    """The least values up to which PROBABILITIES of all weights lie: of binned values none is interpolated."""
    order = np.argsort(values, kind="stable")
    shares = np.cumsum(weights[order]) / weights.sum()
    return np.asarray(values[order][np.minimum(np.searchsorted(shares, PROBABILITIES), len(values) - 1)], np.float64)


def _weighted_scores(values: Floats, weights: Floats) -> Floats:
    """The normal score of each value in the distribution that all make up."""
    _, places = np.unique(values, return_inverse=True)
    totals = np.bincount(places, weights) / weights.sum()
    middles = np.clip(np.cumsum(totals) - totals / 2, 1e-9, 1 - 1e-9)
    return np.array([NormalDist().inv_cdf(p) for p in middles])[places]


def _pdf_rows(path: Path, field: str) -> dict[str, NDArray[Any]]:
    import pyarrow.parquet as parquet

    is_field = np.array(parquet.read_table(path, columns=["field"])["field"].to_pylist()) == field
    columns = read_columns(path, ("client", "window_s", "bin", "p"))
    rows = {name: column[is_field].astype(np.float64) for name, column in columns.items()}
    return {"key": (rows["client"] * 4 + rows["window_s"] // _PDF_WINDOW_S).astype(np.int64)} | rows


def _sources(workload: Workload) -> tuple[Ints, Ints]:
    """Of each request, the last one before it that holds all that the two share, and how many blocks that is; -1 where
    it is the system prompt alone.
    """
    last_of_block: dict[int, int] = {}
    source, num_shared = np.full(len(workload), -1), np.zeros(len(workload), np.int64)
    table = workload.columns
    for i in range(len(workload)):
        blocks = table.streams[table.offsets[i] : table.offsets[i + 1]].tolist()
        while num_shared[i] < len(blocks) and blocks[num_shared[i]] in last_of_block:
            num_shared[i] += 1
        if num_shared[i] > 1:
            source[i] = last_of_block[blocks[num_shared[i] - 1]]
        last_of_block.update(dict.fromkeys(blocks, i))
    return source, num_shared


def _quantiles(values: NDArray[Any]) -> Floats:
    return np.asarray(np.quantile(values, PROBABILITIES))


def _arrivals_ns(workload: Workload) -> Ints:
    assert workload.arrival_ns is not None
    return workload.arrival_ns


def _even_scores() -> Floats:
    return np.array([NormalDist().inv_cdf((i + 0.5) / _NUM_SCORES) for i in range(_NUM_SCORES)])


def _arrivals(kind: str, rate_per_s: float, gaps: NDArray[Any]) -> dict[str, Any]:
    return {"kind": kind, "rate_per_s": float(rate_per_s), "burstiness": float((gaps.mean() / gaps.std()) ** 2)}


def _document(comment: str, **keys: Any) -> str:
    """A file of parameters, lists wrapped."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines.append(
        "# Long lists are quantiles at `probabilities`, in tokens (gap_s: seconds; branch_*: prompts before it)."
    )
    lines.append("# Written by `python -m serving.workloads.fit`.")
    lines += _lines({"probabilities": PROBABILITIES, **keys}, "")
    return "\n".join(lines) + "\n"


def _lines(keys: dict[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, value in keys.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list | tuple | np.ndarray):
            numbers = [_number(number) for number in value]
            lines.append(f"{indent}{key}: [")
            lines += [f"{indent}  {', '.join(numbers[i : i + 12])}," for i in range(0, len(numbers), 12)]
            lines.append(f"{indent}]")
        else:
            lines.append(f"{indent}{key}: {value if isinstance(value, str) else _number(value)}")
    return lines


def _number(value: float) -> str:
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else str(round(value))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
