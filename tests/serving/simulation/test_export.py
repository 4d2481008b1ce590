"""The table of requests: what is read back is what the run had."""

import csv
import dataclasses

import numpy as np
import pytest
from pyarrow import parquet

from serving.errors import ConfigError
from serving.simulation import export
from serving.simulation.columns import NEVER
from serving.simulation.export import check_export, write_requests


def test_a_csv_has_every_request_and_empty_fields_for_what_never_was(made_run, tmp_path):
    run = made_run(40, num_unfinished=5)
    write_requests(run, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    requests = run.requests
    assert [row["request_id"] for row in rows] == list(requests.request_ids)
    assert [row["outcome"] for row in rows].count("finished") == 35
    first, last = rows[0], rows[-1]
    assert int(first["first_token_ns"]) == requests.first_token_ns[0]
    assert float(first["ttft_ms"]) == (requests.first_token_ns[0] - requests.arrival_ns[0]) / 1e6
    assert first["prefill_instance"] == run.instances[requests.prefill_instance[0]].instance_id
    assert requests.last_token_ns[-1] == NEVER
    assert last["last_token_ns"] == last["e2el_ms"] == last["tpot_ms"] == ""


def test_parquet_holds_the_same_in_groups_of_rows(made_run, tmp_path, monkeypatch):
    run = made_run(100, num_unfinished=3)
    monkeypatch.setattr(export, "ROWS_AT_ONCE", 32)
    write_requests(run, tmp_path / "r.parquet")
    assert parquet.ParquetFile(tmp_path / "r.parquet").num_row_groups == 4
    table = parquet.read_table(tmp_path / "r.parquet")
    requests = run.requests
    for name in ("num_prompt_tokens", "num_output_tokens", "num_cached_tokens", "arrival_ns"):
        assert table[name].to_pylist() == getattr(requests, name).tolist()
    known = [None if when == NEVER else when for when in requests.decode_start_ns.tolist()]
    assert table["decode_start_ns"].to_pylist() == known
    later = requests.num_output_tokens > 1
    tpot_ms = (requests.last_token_ns - requests.first_token_ns)[later] / (requests.num_output_tokens[later] - 1) / 1e6
    assert np.array([t for t in table["tpot_ms"].to_pylist() if t is not None]) == pytest.approx(tpot_ms)
    assert table["decode_instance"].null_count == int((requests.decode_instance == NEVER).sum())


def test_no_request_gives_a_file_with_names_only(made_run, tmp_path):
    run = made_run(1)
    none = {name: getattr(run.requests, name) for name in type(run.requests).__dataclass_fields__}
    none = {name: values if name == "reasons" else values[:0] for name, values in none.items()}

    write_requests(dataclasses.replace(run, requests=type(run.requests)(**none)), tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().count("\n") == 1


def test_what_cannot_be_written_is_told_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"r\.txt: the suffix must be one of \.parquet, \.csv"):
        check_export(tmp_path / "r.txt")
    check_export(tmp_path / "r.csv")
    check_export(tmp_path / "r.parquet")
