"""Sweeps: the grid as it is written, rows that survive, points that fail, the search against the whole grid."""

import json
import signal
import subprocess
import sys
import time

import pytest

from serving.errors import ConfigError, EngineFailure
from serving.simulation import sweep as sweep_module
from serving.simulation.run_source import WorkloadSource
from serving.simulation.sweep import Objective, Sweep, best_row, parse_objective, run_here
from serving.simulation.sweep_points import Axis, Point, grid_points, parse_axis, parse_values, point_key, run_point
from serving.simulation.sweep_rows import RowStore, read_rows

SMALL = "workload={num_requests: 4, input_len: 40, output_len: 5, prefix_len: 16, range_ratio: 0.0, request_rate: 50}"
BASE = Point(config="laptop", overrides=(SMALL,), workload=WorkloadSource(), varied={})


@pytest.fixture
def counted():
    """A runner that does not simulate: the row has `value`, 10 * prefill + decode NPUs; counts its points."""
    ran = []

    def run(points):
        for index, point in enumerate(points):
            ran.append(point)
            varied = point.varied
            yield index, dict(varied) | {"status": "ok", "error": None, "value": 10 * varied["a"] + varied["b"]}

    run.ran = ran
    return run


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ("1", "2")),
        ("2:8:2", ("2", "4", "6", "8")),
        ("2:7:2,9", ("2", "4", "6", "9")),
        ("1:3", ("1", "2", "3")),
        ("0.5:1:0.25", ("0.50", "0.75", "1.00")),
        ("8:2:-3", ("8", "5", "2")),
        ("fcfs, priority", ("fcfs", "priority")),
        ("{ep: 32}, {ep: 64}", ("{ep: 32}", "{ep: 64}")),
        ("[1, 2]", ("[1, 2]",)),
        ("'1:2'", ("'1:2'",)),
    ],
)
def test_values_are_yaml_and_ranges_include_their_end(text, values):
    assert parse_values(text, option="--set-grid k") == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.b", ("--set-grid 'a.b'", "KEY=V1,V2")),
        ("=1", ("KEY=V1,V2",)),
        ("k=", ("--set-grid k", "at least one value")),
        ("k=1,1", ("'1' is given twice",)),
        ("k=1:9:0", ("'1:9:0'", "range")),
        ("k=9:1:1", ("'9:1:1'", "a step that gets there")),
        ("k=1:1000000", ("fewer than 100000",)),
        ("k=a:b", ("'a:b'", "range first:last:step of numbers")),
        ("k=1:2:3:4", ("'1:2:3:4'",)),
        ("k=[1", ("'[1'", "list of YAML values")),
        ("k=1], [2", ("list of YAML values",)),
    ],
)
def test_a_mistake_in_an_axis_is_named(text, words):
    with pytest.raises(ConfigError) as mistake:
        parse_axis(text)
    assert all(word in str(mistake.value) for word in words), mistake.value


def test_the_grid_is_the_product_with_the_last_axis_fastest():
    axes = [
        Axis(key="instances.prefill.count", values=("1", "2")),
        Axis(key="rate", values=("4", "8")),
        Axis(key="seed", values=("7",)),
    ]
    points = grid_points(BASE, axes)
    assert [tuple(point.varied.values()) for point in points] == [(1, 4, 7), (1, 8, 7), (2, 4, 7), (2, 8, 7)]
    assert points[1].overrides == (SMALL, "instances.prefill.count=1", "seed=7")
    assert points[1].workload == WorkloadSource(rate=8.0)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ([Axis(key="seed", values=("1",)), Axis(key="seed", values=("2",))], ("seed: two axes",)),
        ([Axis(key="workload", values=("1",))], ("workload: is both set and varied",)),
        ([Axis(key="rate", values=("0",))], ("--rate: 0", "above 0")),
        ([Axis(key="rate", values=("inf",))], ("--rate: 'inf'",)),
        ([Axis(key=k, values=tuple(map(str, range(400)))) for k in "ab"], ("160000 points exceed the limit 100000",)),
    ],
)
def test_a_grid_that_cannot_be_is_refused(axes, words):
    with pytest.raises(ConfigError) as mistake:
        grid_points(BASE, axes)
    assert all(word in str(mistake.value) for word in words)


def test_a_key_is_what_is_simulated_not_how_it_was_said(tmp_path):
    def key(*overrides, **source):
        return point_key(Point(config="laptop", overrides=overrides, workload=WorkloadSource(**source), varied={}))

    assert key("instances.prefill.count=1") == key() == key("server.port=9")
    assert key("workload.request_rate=9.0") == key("workload.request_rate=9.0", rate=None)
    different = [
        key(),
        key("seed=1"),
        key("instances.prefill.count=2"),
        key(rate=9.0),
        key(trace="/x", trace_digest="aa"),
        key(trace="/x", trace_digest="bb"),
        key(name="chat"),
        key(num_requests=3),
    ]
    assert len(set(different)) == len(different)
    assert key(trace="/x", trace_digest="aa") == key(trace="/y", trace_digest="aa")


def test_a_row_has_the_varied_keys_and_the_scalars_of_the_figures():
    (point,) = grid_points(BASE, [Axis(key="instances.prefill.count", values=("2",))])
    row = run_point(point)
    assert (row["instances.prefill.count"], row["status"], row["error"]) == (2, "ok", None)
    assert (row["completed"], row["total_output_tokens"], row["num_npus"]) == (4, 20, 8)
    assert row["throughput.output.num_npus"] == 8
    assert row["mean_tpot_ms"] > 0
    assert all(value is None or isinstance(value, str | int | float) for value in row.values())
    again = run_point(point)
    assert {k: v for k, v in row.items() if not k.startswith("machine.")} == {
        k: v for k, v in again.items() if not k.startswith("machine.")
    }


def test_a_second_sweep_runs_nothing_and_has_the_same_rows(tmp_path):
    out, axes = tmp_path / "f.parquet", [parse_axis("instances.prefill.count=1,2")]
    results = []
    for _ in range(2):
        with RowStore(out) as store:
            run = Sweep(store)
            run.grid(BASE, axes)
        results.append(run.result)
    first, second = results
    assert (first.num_run, first.num_known, second.num_run, second.num_known) == (2, 0, 0, 2)
    written = [{k: v for k, v in row.items() if v is not None} for row in first.rows]
    assert [{k: v for k, v in row.items() if v is not None} for row in second.rows] == written == read_rows(out)
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]


def test_a_point_found_by_another_sweep_has_this_ones_columns(tmp_path):
    out = tmp_path / "f.parquet"
    with RowStore(out) as store:
        Sweep(store).grid(BASE, [parse_axis("instances.prefill.count=1")])
    with RowStore(out) as store:
        run = Sweep(store)
        run.grid(BASE, [parse_axis("router.policy=least_loaded,round_robin")])
    assert (run.result.num_run, run.result.num_known) == (1, 1)
    assert [row["router.policy"] for row in run.result.rows] == ["least_loaded", "round_robin"]


def test_invalid_points_are_rows_and_the_others_run(tmp_path):
    with RowStore(tmp_path / "f.parquet") as store:
        run = Sweep(store)
        run.grid(BASE, [parse_axis("instances.prefill.count=1,400")])
    good, bad = run.result.rows
    assert good["status"] == "ok"
    assert (bad["status"], bad["instances.prefill.count"]) == ("invalid", 400)
    assert "804 NPUs, cloudmatrix384 has 384" in bad["error"]
    assert {row["status"] for row in read_rows(tmp_path / "f.parquet")} == {"ok", "invalid"}


def test_a_mistake_of_all_points_stops_the_sweep_before_it_runs(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"instances\.prefill\.counts: unknown key"),
        RowStore(tmp_path / "f.parquet") as store,
    ):
        Sweep(store).grid(BASE, [parse_axis("instances.prefill.counts=1,2")])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_is_a_row_too(tmp_path, monkeypatch):
    def crash(point):
        raise EngineFailure("lost") if point.varied["seed"] == 2 else AssertionError("a bug")

    monkeypatch.setattr(sweep_module, "run_point", crash)
    with RowStore(tmp_path / "f.parquet") as store:
        run = Sweep(store, run=run_here)
        run.grid(BASE, [parse_axis("seed=1,2")])
    assert [(row["status"], row["error"]) for row in run.result.rows] == [
        ("crashed", "AssertionError: a bug"),
        ("crashed", "lost"),
    ]


def test_an_interrupt_keeps_what_is_done(tmp_path, monkeypatch):
    def interrupted(points):
        yield 0, dict(points[0].varied) | {"status": "ok", "error": None}
        raise KeyboardInterrupt

    out = tmp_path / "f.parquet"
    store = RowStore(out)
    run = Sweep(store, run=interrupted)
    with pytest.raises(KeyboardInterrupt), store:
        run.grid(BASE, [parse_axis("seed=1,2")])
    assert [row["seed"] for row in run.result.rows] == [row["seed"] for row in read_rows(out)] == [1]


def test_a_journal_of_a_killed_sweep_is_read_but_for_half_a_line(tmp_path):
    out = tmp_path / "f.parquet"
    journal = tmp_path / "f.parquet.journal"
    journal.write_text('{"key": "a", "x": 1}\n{"key": "b", "x"')
    with RowStore(out) as store:
        assert "a" in store
        assert "b" not in store
        store.add("c", {"x": "mixed"})
    assert read_rows(out) == [{"key": "a", "x": "1"}, {"key": "c", "x": "mixed"}]


def test_one_file_is_written_by_one_sweep(tmp_path):
    with RowStore(tmp_path / "f.parquet"):
        with pytest.raises(ConfigError, match=r"f\.parquet: another sweep is writing to it"):
            RowStore(tmp_path / "f.parquet").__enter__()


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    out = tmp_path / "f.parquet"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"f\.parquet cannot be read"):
        RowStore(out).__enter__()
    assert out.read_text() == "mine"


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path):
    out = tmp_path / "f.parquet"
    command = [
        *(sys.executable, "-m", "serving.cli", "sweep", "laptop", "--set", SMALL, "--seed", "0:19"),
        *("--out", str(out)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "f.parquet.journal"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    num_kept = journal.read_bytes().count(b"\n")
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"{20 - num_kept} points simulated, {num_kept} known before" in done.stderr
    assert sorted(row["seed"] for row in read_rows(out)) == list(range(20))
    assert not journal.exists()


def test_the_search_finds_the_best_of_the_grid_with_fewer_points(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(sweep_module, "point_key", lambda point: json.dumps(dict(point.varied)))
    axes = [Axis(key=key, values=tuple(map(str, range(6)))) for key in "ab"]
    objective = parse_objective("max:value", ["a<=4", "b>=1"])
    with RowStore(tmp_path / "f.parquet") as store:
        run = Sweep(store, run=counted)
        run.search(BASE, axes, objective)
    best = best_row(run.result.rows, objective)
    assert (best["a"], best["b"]) == (4, 5)
    assert len(counted.ran) < 36
    assert len({tuple(point.varied.values()) for point in counted.ran}) == len(counted.ran) == run.result.num_run


def test_the_search_of_a_real_grid_agrees_with_the_grid(tmp_path):
    axes = [parse_axis("instances.prefill.count=1,2,3"), parse_axis("instances.decode.max_num_seqs=2,4,8")]
    objective = parse_objective("max:throughput.output.tokens_per_s_per_npu", ["p99_ttft_ms<=150"])
    with RowStore(tmp_path / "grid.parquet") as store:
        grid = Sweep(store)
        grid.grid(BASE, axes)
    with RowStore(tmp_path / "search.parquet") as store:
        search = Sweep(store)
        search.search(BASE, axes, objective)
    expected, found = best_row(grid.result.rows, objective), best_row(search.result.rows, objective)
    assert objective.score(found) == objective.score(expected)
    assert search.result.num_run < grid.result.num_run == 9


@pytest.mark.parametrize(
    ("target", "limits", "words"),
    [
        ("value", [], ("--search: 'value'", "max:COLUMN")),
        ("most:value", [], ("'most:value'",)),
        ("max:value", ["a<4"], ("--where: 'a<4'", "COLUMN<=NUMBER")),
        ("max:value", ["a<=x"], ("--where: 'a<=x'",)),
    ],
)
def test_a_mistake_in_an_objective_is_named(target, limits, words):
    with pytest.raises(ConfigError) as mistake:
        parse_objective(target, limits)
    assert all(word in str(mistake.value) for word in words)


def test_a_column_that_no_row_has_is_named_with_those_there_are():
    row = {"status": "ok", "value": 1.0, "name": "x"}
    with pytest.raises(ConfigError, match=r"'valu' is no number of a row; there are value"):
        Objective(column="valu", sense="max").check_columns([row])
