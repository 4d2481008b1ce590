"""Public traces: lengths, times and hash structure survive, and errors say file, line and field."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from serving.errors import ConfigError
from serving.workloads.azure import load_azure
from serving.workloads.mooncake import load_mooncake
from serving.workloads.servegen import load_servegen
from serving.workloads.traces import TraceError, TraceOptions, load_trace

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of public traces is not beside the project")


def mooncake_line(timestamp=9, input_length=700, output_length=5, hash_ids=(0, 1)):
    return json.dumps(
        {
            "timestamp": timestamp,
            "input_length": input_length,
            "output_length": output_length,
            "hash_ids": list(hash_ids),
        }
    )


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


# Mooncake traces


def test_equal_hash_ids_give_equal_blocks_of_tokens(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        mooncake_line(input_length=1024, hash_ids=[0, 1]),
        mooncake_line(input_length=1030, hash_ids=[0, 2, 3]),
        mooncake_line(input_length=700, hash_ids=[0, 1]),
    )
    workload = load_mooncake(path)
    first, second, third = (workload.prompt_token_ids(r).tolist() for r in workload.requests)
    assert workload.hash_block_size == 512
    assert [len(first), len(second), len(third)] == [1024, 1030, 700]
    assert first[:512] == second[:512] == third[:512]
    assert first[512:] != second[512:1024]
    assert third == first[:700]


def test_lengths_and_blocks_are_divided_alike_so_the_hash_structure_stays(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        mooncake_line(input_length=1030, output_length=100, hash_ids=[0, 1, 2]),
        mooncake_line(input_length=1, output_length=0, hash_ids=[9]),
        mooncake_line(input_length=2048, output_length=999, hash_ids=[0, 1, 3, 4]),
    )
    options = TraceOptions(length_divisor=32, max_input_tokens=40, max_output_tokens=20)
    workload = load_trace(path, options)
    assert workload.hash_block_size == 16
    assert [(r.num_prompt_tokens, r.max_tokens, r.hash_ids) for r in workload.requests] == [
        (33, 4, (0, 1, 2)),
        (1, 1, (9,)),
        (40, 20, (0, 1, 3)),
    ]
    assert workload.requests[0].request_id == "mooncake-0"


def test_equal_timestamps_are_spread_evenly_up_to_the_next_one(tmp_path):
    lines = [mooncake_line(timestamp=1000) for _ in range(400)] + [mooncake_line(timestamp=2500) for _ in range(400)]
    workload = load_mooncake(write(tmp_path / "t.jsonl", *lines))
    times = np.array([r.arrival_ns for r in workload.requests]) / 1e6
    assert times[0] >= 0  # from the first timestamp on
    assert times[399] < 1500 <= times[400]
    assert times[799] < 4500
    assert times[:400].mean() == pytest.approx(750, abs=90)  # 4 standard errors of a uniform mean
    assert times[400:].mean() == pytest.approx(3000, abs=180)
    unspread = load_mooncake(tmp_path / "t.jsonl", TraceOptions(spread_ms=0))
    assert {r.arrival_ns for r in unspread.requests} == {0, 1_500_000_000}


def test_spreading_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "t.jsonl", mooncake_line(), mooncake_line(), mooncake_line())
    assert load_mooncake(path) == load_mooncake(path)
    assert load_mooncake(path).digest != load_mooncake(path, TraceOptions(seed=1)).digest


def test_a_compressed_trace_reads_like_a_plain_one(tmp_path):
    plain = write(tmp_path / "t.jsonl", mooncake_line(), "", mooncake_line(timestamp=12))
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_trace(packed).requests == load_trace(plain).requests


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        (mooncake_line()[:-20], None, "not a complete JSON object (truncated?)"),
        ("[1, 2]", None, "not a JSON object: [1, 2]"),
        ('{"timestamp": 0, "input_length": 1, "hash_ids": [1]}', "output_length", "missing field"),
        (mooncake_line(input_length=-5), "input_length", "-5 is below the limit 1"),
        (mooncake_line(input_length=0, hash_ids=[]), "input_length", "0 is below the limit 1"),
        (mooncake_line(output_length=-1), "output_length", "-1 is below the limit 0"),
        (mooncake_line(output_length=1.5), "output_length", "1.5 is not an integer"),
        (mooncake_line(timestamp=-1), "timestamp", "-1 is below the limit 0"),
        (mooncake_line(timestamp="soon"), "timestamp", "'soon' is not a number"),
        (mooncake_line(timestamp=float("nan")), "timestamp", "nan is not a number"),
        (mooncake_line(timestamp=True), "timestamp", "True is not a number"),
        (mooncake_line(timestamp=1), "timestamp", "is earlier than that of the request before it"),
        (mooncake_line(timestamp=9, hash_ids=[0]), "hash_ids", "1 ids, input_length 700 has 2 blocks of 512"),
        (mooncake_line(timestamp=9, hash_ids=[0, -1]), "hash_ids", "-1 is below the limit 0"),
        (mooncake_line(timestamp=9, hash_ids=[0, "x"]), "hash_ids", "'x' is not an integer"),
        (mooncake_line(timestamp=9, hash_ids=[0, True]), "hash_ids", "True is not an integer"),
        (mooncake_line(timestamp=9, hash_ids=[0, 2**80]), "hash_ids", "is above the limit"),
        (mooncake_line(timestamp=9).replace("[0, 1]", "7"), "hash_ids", "7 is not a list"),
        (mooncake_line(output_length=10**30), "output_length", "is above the limit"),
        (mooncake_line(timestamp=1e300), "timestamp", "1e+300 is above the limit 1e12"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path, line, field, message):
    path = write(tmp_path / "bad.jsonl", mooncake_line(timestamp=9), "", line)
    with pytest.raises(TraceError) as caught:
        load_mooncake(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert (caught.value.line, caught.value.field) == (3, field)


def test_damaged_files_are_named(tmp_path):
    packed = gzip.compress(("\n".join([mooncake_line()] * 2000)).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(TraceError, match="compressed file is damaged or truncated"):
        load_trace(cut)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not UTF-8 text"):
        load_trace(binary)
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(TraceError, match="holds no request"):
        load_trace(empty)
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "missing.csv")
    with pytest.raises(TraceError, match="unknown format"):
        load_trace(tmp_path / "trace.orc")
    with pytest.raises(TraceError, match="cannot be read"):
        load_trace(tmp_path.joinpath("folder.csv").mkdir() or tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TraceOptions(length_divisor=0), "length_divisor: 0 is below the limit 1"),
        (lambda: TraceOptions(max_input_tokens=0), "max_input_tokens: 0 is below the limit 1"),
        (lambda: TraceOptions(spread_ms=-1), "spread_ms: -1 must be finite and at least"),
        (
            lambda: load_mooncake("any.jsonl", TraceOptions(length_divisor=3)),
            "length_divisor: 3 does not divide the trace's block of 512 tokens",
        ),
    ],
)
def test_trace_options_out_of_range_are_named(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


# Azure traces


def test_an_azure_trace_keeps_its_times_to_the_tenth_of_a_microsecond(tmp_path):
    path = write(
        tmp_path / "t.csv",
        AZURE_HEADER,
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:15:51,16,1",
    )
    workload = load_trace(path, TraceOptions(length_divisor=10, max_output_tokens=5))
    assert [(r.arrival_ns, r.num_prompt_tokens, r.max_tokens) for r in workload.requests] == [
        (0, 38, 5),
        (4_314_579_000, 40, 5),
        (4_319_410_000, 2, 1),
    ]
    first, second, _ = (workload.prompt_token_ids(r).tolist() for r in workload.requests)
    assert first[:4] != second[:4]


def test_the_later_azure_format_is_read_too(tmp_path):
    path = write(tmp_path / "t.csv", AZURE_HEADER, "2024-05-10 00:00:00.009930+00:00,2162,5")
    assert load_azure(path).requests[0].num_prompt_tokens == 2162


@pytest.mark.parametrize(
    ("header", "line", "number", "field", "message"),
    [
        ("TIMESTAMP,ContextTokens", "x", 1, "GeneratedTokens", "missing column"),
        (AZURE_HEADER, "2023-11-16 18:15:46.68,374", 3, None, "2 fields, the header has 3 (truncated?)"),
        (AZURE_HEADER, "2023-11-16 18:15:46.68,-3,4", 3, "ContextTokens", "-3 is below the limit 1"),
        (AZURE_HEADER, "2023-11-16 18:15:46.68,3,", 3, "GeneratedTokens", "'' is not an integer"),
        (AZURE_HEADER, "yesterday,3,4", 3, "TIMESTAMP", "'yesterday' is not a date and time"),
        (AZURE_HEADER, "2023-13-45 18:15:46,3,4", 3, "TIMESTAMP", "is not a date and time"),
        (AZURE_HEADER, "2023-11-16 18:15:40,3,4", 3, "TIMESTAMP", "is earlier than that of the request before it"),
    ],
)
def test_a_bad_azure_line_is_named_by_file_line_and_field(tmp_path, header, line, number, field, message):
    path = write(tmp_path / "bad.csv", header, "2023-11-16 18:15:45,3,4", line)
    with pytest.raises(TraceError) as caught:
        load_azure(path)
    assert (caught.value.line, caught.value.field) == (number, field)
    assert f"{path}:{number}: " in str(caught.value)
    assert message in str(caught.value)


# Samples of ServeGen


def write_parquet(path, **changes):
    columns = {"t_s": [0.5, 0.5, 2.0], "client": [1, 2, 1], "input_tokens": [7, 8, 9], "output_tokens": [3, 0, 5]}
    columns = {name: values for name, values in (columns | changes).items() if values is not None}
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_sample_of_servegen_has_its_times_and_lengths(tmp_path):
    workload = load_trace(write_parquet(tmp_path / "t.parquet"), TraceOptions(length_divisor=2))
    assert [(r.request_id, r.arrival_ns, r.num_prompt_tokens, r.max_tokens) for r in workload.requests] == [
        ("servegen-0", 0, 4, 2),
        ("servegen-1", 0, 4, 1),
        ("servegen-2", 1_500_000_000, 5, 3),
    ]
    first, second = (workload.prompt_token_ids(workload.requests[i]).tolist() for i in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("changes", "row", "field", "message"),
    [
        ({"output_tokens": None}, None, "output_tokens", "missing column; the columns are t_s, client, input_tokens"),
        ({"input_tokens": [1, -2, 3]}, 1, "input_tokens", "-2 is below the limit 1"),
        ({"output_tokens": [1, 2, -1]}, 2, "output_tokens", "-1 is below the limit 0"),
        ({"input_tokens": [1.0, 2.0, 2.5]}, 2, "input_tokens", "2.5 is not an integer"),
        ({"input_tokens": [1, None, 3]}, 1, "input_tokens", "no value"),
        ({"t_s": [0.0, float("nan"), 1.0]}, 1, "t_s", "nan is not a number"),
        ({"t_s": [0.0, 2.0, 1.0]}, 2, "t_s", "1.0 is earlier than that of the request before it"),
        ({"t_s": [-1.0, 2.0, 3.0]}, 0, "t_s", "-1.0 is below the limit 0"),
        ({"t_s": ["a", "b", "c"]}, None, "t_s", "a column of type string, not of numbers"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(tmp_path, changes, row, field, message):
    path = write_parquet(tmp_path / "bad.parquet", **changes)
    with pytest.raises(TraceError) as caught:
        load_servegen(path)
    assert (caught.value.line, caught.value.field) == (row, field)
    assert str(caught.value) == f"{path}: {'' if row is None else f'row {row}: '}{field}: {message}"


def test_damaged_tables_are_named(tmp_path):
    whole = write_parquet(tmp_path / "t.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(TraceError, match=r"cut.parquet: cannot be read as parquet \(truncated\?\)"):
        load_trace(cut)
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "missing.parquet")
    empty = write_parquet(tmp_path / "empty.parquet", t_s=[], client=None, input_tokens=[], output_tokens=[])
    with pytest.raises(TraceError, match=r"a column of type null|holds no request"):
        load_trace(empty)


# The public traces themselves


@needs_data
def test_the_mooncake_trace_scales_down_with_its_hash_structure():
    path = DATA / "mooncake_conversation_trace.jsonl.gz"
    full, small = load_trace(path), load_trace(path, TraceOptions(length_divisor=32))
    assert len(full) == 12_031
    assert np.mean([r.num_prompt_tokens for r in full.requests]) == pytest.approx(12_035, abs=1)
    assert [r.hash_ids for r in small.requests] == [r.hash_ids for r in full.requests]
    assert small.hash_block_size == 16
    gaps = np.diff([r.arrival_ns for r in full.requests])
    assert gaps.mean() / 1e9 == pytest.approx(1 / 3.4, rel=0.01)
    # Spread out, arrivals inside a step are those of a Poisson process; in steps the variation is above 5.
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)


@needs_data
def test_the_sample_of_servegen_has_the_published_shape():
    workload = load_trace(DATA / "servegen_r1_sample_1h_8rps.parquet")
    assert len(workload) == 28_724
    assert len(workload) / (workload.arrival_ns[-1] / 1e9) == pytest.approx(8, rel=0.01)


@needs_data
def test_the_azure_trace_has_the_published_means():
    workload = load_trace(DATA / "azure2023_conv.csv.gz")
    assert len(workload) == 19_366
    assert np.mean([r.num_prompt_tokens for r in workload.requests]) == pytest.approx(1155, abs=1)
    assert np.mean([r.max_tokens for r in workload.requests]) == pytest.approx(211, abs=1)
    gaps = np.diff([r.arrival_ns for r in workload.requests])
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)
