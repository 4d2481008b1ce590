"""A sweep whose points are Ray tasks gives the rows that it gives in one process."""

import pytest

from serving.simulation.sweep_rows import read_rows

pytestmark = pytest.mark.ray

SMALL = "workload={num_requests: 4, input_len: 40, output_len: 5, prefix_len: 16, request_rate: 50}"


def test_points_run_as_tasks_of_a_private_cluster(launch, tmp_path):
    """One of them crashes the plan's check, so that a mistake comes back as well."""
    rows = {}
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.parquet"
        sweep = launch(
            *("sweep", "laptop", "--set", SMALL, "--set-grid", "instances.prefill.count=1,2,400", "--seed", "0,1"),
            *("--out", str(out), "--jobs", str(jobs)),
        )
        assert sweep.process.wait(timeout=200) == 0, sweep.stderr
        assert "Traceback" not in sweep.stderr
        rows[jobs] = sorted(
            [{k: v for k, v in row.items() if not k.startswith("machine.")} for row in read_rows(out)],
            key=lambda row: row["key"],
        )
    assert len(rows[1]) == 6
    assert rows[1] == rows[2]
