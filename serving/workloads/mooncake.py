"""Mooncake's request traces: jsonl with hash ids, plain or gzip.

Owns: the format, and how requests that carry one timestamp are spread over its step.
Must not know: how requests are sent or served.
Source: kvcache-ai/Mooncake FAST25-release/traces (timestamp in ms, input_length, output_length, hash_ids of chained
512-token blocks; timestamps come in steps of about 3 s).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError, shown
from serving.workloads.arrivals import generator_for
from serving.workloads.requests import HASH_IDS, Ints, RequestTable, offsets_of
from serving.workloads.traces import TraceError, TraceOptions, check_not_empty, check_order, integer, lines_of
from serving.workloads.workload import Workload

MOONCAKE_BLOCK_SIZE = 512
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
_INT = {int}


def load_mooncake(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read a Mooncake trace. Equal hash ids become equal blocks of tokens."""
    path, options = Path(path), options or TraceOptions()
    if MOONCAKE_BLOCK_SIZE % options.length_divisor:
        raise ConfigError(
            f"length_divisor: {options.length_divisor} does not divide the trace's block "
            f"of {MOONCAKE_BLOCK_SIZE} tokens"
        )
    block_size = MOONCAKE_BLOCK_SIZE // options.length_divisor
    lines: list[int] = []
    times_ms: list[float] = []
    lengths: list[list[int]] = []
    ids: list[int] = []
    for line, text in lines_of(path):
        if text.isspace():
            continue
        when, *lengths_of_line, ids_of_line = _record(path, line, text)
        lines.append(line)
        times_ms.append(when)
        lengths.append(lengths_of_line)
        ids += ids_of_line
    check_not_empty(path, lines)
    times = np.array(times_ms)
    check_order(path, lines, "timestamp", times)
    num_input, num_output = np.array(lengths, dtype=np.int64).T
    num_prompt_tokens = options.input_tokens(num_input)
    offsets, hash_ids = _kept_blocks(
        np.array(ids, dtype=np.int64), -(-num_input // MOONCAKE_BLOCK_SIZE), -(-num_prompt_tokens // block_size)
    )
    stream_tokens = np.full(len(hash_ids), block_size)
    stream_tokens[offsets[1:] - 1] = num_prompt_tokens - block_size * (np.diff(offsets) - 1)
    table = RequestTable.of_pieces(
        "mooncake",
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=options.output_tokens(num_output),
        arrival_ns=_spread(times - times[0], options),
        offsets=offsets,
        streams=hash_ids,
        stream_tokens=stream_tokens,
        kind=HASH_IDS,
    )
    return Workload(
        name=path.name,
        requests=table,
        seed=options.seed,
        vocabulary=options.vocabulary,
        hash_block_size=block_size,
    )


def _kept_blocks(ids: Ints, counts: Ints, kept: Ints) -> tuple[Ints, Ints]:
    """Offsets and ids of the first `kept` of the `counts` ids of each request: a clipped prompt has fewer."""
    if (kept < counts).any():
        places = np.arange(len(ids)) - np.repeat(offsets_of(counts)[:-1], counts)
        ids = ids[places < np.repeat(kept, counts)]
    return offsets_of(kept), ids


def _spread(times_ms: NDArray[np.float64], options: TraceOptions) -> Ints:
    """Arrival times in ns: each batch of equal timestamps uniform over its window, in the file's order."""
    starts, batch_of = np.unique(times_ms, return_inverse=True)
    widths = np.minimum(np.diff(starts, append=np.inf), options.spread_ms)
    offsets = generator_for(options.seed, "spread").random(len(times_ms))
    offsets = offsets[np.lexsort((offsets, batch_of))]  # times do not decrease, so batches stay in place
    return np.rint((times_ms + offsets * widths[batch_of]) * 1e6).astype(np.int64)


def _record(path: Path, line: int, text: str) -> tuple[float, int, int, list[int]]:
    """timestamp, input_length, output_length, hash_ids of one line."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(path, line, None, f"not a complete JSON object (truncated?): {error}") from None
    if not isinstance(record, dict):
        raise TraceError(path, line, None, f"not a JSON object: {shown(record)}")
    for field in _FIELDS:
        if field not in record:
            raise TraceError(path, line, field, "missing field")
    when = _time_ms(path, line, record)
    num_input = integer(path, line, "input_length", record["input_length"], least=1)
    num_output = integer(path, line, "output_length", record["output_length"], least=0)
    hash_ids: list[int] = record["hash_ids"]
    num_blocks = -(-num_input // MOONCAKE_BLOCK_SIZE)
    if not isinstance(hash_ids, list):
        raise TraceError(path, line, "hash_ids", f"{shown(hash_ids)} is not a list")
    if not _INT.issuperset(map(type, hash_ids)) or (hash_ids and not 0 <= min(hash_ids) <= max(hash_ids) < 2**62):
        for value in hash_ids:  # to say which; otherwise one look at all is much faster
            integer(path, line, "hash_ids", value, least=0)
    if len(hash_ids) != num_blocks:
        problem = f"{len(hash_ids)} ids, input_length {num_input} has {num_blocks} blocks of {MOONCAKE_BLOCK_SIZE}"
        raise TraceError(path, line, "hash_ids", problem)
    return when, num_input, num_output, hash_ids


def _time_ms(path: Path, line: int, record: dict[str, Any]) -> float:
    value = record["timestamp"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise TraceError(path, line, "timestamp", f"{shown(value)} is not a number")
    if not 0 <= value <= 1e12:  # in ns it has to fit in 64 bits
        limit = "below the limit 0" if value < 0 else "above the limit 1e12"
        raise TraceError(path, line, "timestamp", f"{shown(value)} is {limit}")
    return float(value)
