"""Tables from files: the rows that count, the meaning of columns, both layouts, and what is said when one lacks."""

from pathlib import Path
from statistics import median

import pyarrow
import pytest
from pyarrow import parquet

from devices.measured_tables import MeasuredTables, OutOfGrid, TableError, TablesUnavailable, UnknownEntry
from devices.table_files import OPERATORS

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "aiconfigurator"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of measured tables is not beside the project")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def gemm(m, n, k, latency, dtype="fp8_block"):
    return {"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency": latency}


def moe(ep, global_tokens, latency, distribution="uniform", experts=256):
    shape = {"moe_dtype": "fp8_block", "hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": experts}
    return {**shape, "num_tokens": global_tokens, "moe_ep_size": ep, "distribution": distribution, "latency": latency}


def low_latency(nodes, tokens, dispatch_us, combine_us):
    times = {"dispatch_avg_t_us": dispatch_us, "combine_avg_t_us": combine_us}
    return {"node_num": nodes, "hidden_size": 7168, "num_token": tokens, "num_topk": 8, "num_experts": 256, **times}


@pytest.fixture
def folder(tmp_path):
    """A folder of extracts with three tables."""
    rows = [gemm(1, 512, 512, 1.0), gemm(4, 512, 512, 3.0), gemm(4, 512, 512, 5.0), gemm(1, 512, 512, 9.0, "fp8")]
    write(tmp_path / "aic_dsv3_h100_gemm_fp8.parquet", rows)
    rows = [moe(8, 8, 0.5), moe(8, 64, 1.0), moe(8, 64, 7.0, "power_law_1.2"), moe(8, 64, 9.0, experts=128)]
    write(tmp_path / "aic_dsv3_h100_moe_decode_deepep.parquet", rows)
    write(tmp_path / "aic_dsv3_h100_deepep_ll_1to8nodes.parquet", [low_latency(1, 8, 16.0, 14.0)])
    return tmp_path


def test_latencies_are_seconds_and_repeated_measurements_are_averaged(folder):
    tables = MeasuredTables.from_directory(folder, gpu="h100")
    assert tables.seconds("gemm_fp8", m=1, n=512, k=512) == 1e-3
    assert tables.seconds("gemm_fp8", m=4, n=512, k=512) == 4e-3
    assert tables.seconds("gemm_fp8", m=2, n=512, k=512) == pytest.approx(2e-3, rel=1e-12)


def test_deepep_columns_are_microseconds(folder):
    tables = MeasuredTables.from_directory(folder, gpu="h100")
    assert tables.seconds("dispatch_low_latency", nodes=1, tokens=8, experts=256) == pytest.approx(16e-6)
    assert tables.seconds("combine_low_latency", nodes=1, tokens=8, experts=256) == pytest.approx(14e-6)


def test_expert_tables_count_global_tokens_and_are_asked_per_rank(folder):
    tables = MeasuredTables.from_directory(folder, gpu="h100")
    assert tables.limits("moe_decode", "tokens", distribution="uniform") == (1.0, 8.0)
    assert tables.seconds("moe_decode", ep=8, tokens=8, distribution="uniform") == 1e-3
    assert tables.seconds("moe_decode", ep=8, tokens=8, distribution="power_law_1.2") == 7e-3


def test_the_kernel_counts_the_history_and_the_module_the_new_token_too(tmp_path):
    common = {"kv_cache_dtype": "fp8", "num_heads": 128, "batch_size": 1, "mla_dtype": "bfloat16", "tp_size": 1}
    write(tmp_path / "aic_dsv3_h200_mla_decode_kernel.parquet", [{**common, "step": 4095, "latency": 2.0}])
    module = {**common, "model": "deepseek-ai/DeepSeek-V3", "gemm_type": "fp8_block", "step": 4096, "latency": 3.0}
    write(tmp_path / "aic_dsv3_h200_mla_decode_module.parquet", [module])
    tables = MeasuredTables.from_directory(tmp_path, gpu="h200")
    at = {"batch": 1, "kv_len": 4096, "kv_dtype": "fp8"}
    assert tables.seconds("mla_decode_kernel", **at) == 2e-3
    assert tables.seconds("mla_decode_module", **at, heads=128, gemm_dtype="fp8_block") == 3e-3


def test_the_package_has_the_same_tables_with_more_rows_elsewhere(tmp_path):
    path = tmp_path / "h100_sxm" / "comm" / "nccl" / "2.29.2" / "nccl_perf.parquet"
    row = {"op_name": "all_gather", "nccl_dtype": "half", "num_gpus": 8, "message_size": 1024, "latency": 0.01}
    write(path, [row, {**row, "op_name": "all_reduce", "latency": 0.02}])
    tables = MeasuredTables.from_directory(tmp_path, gpu="h100")
    at = {"dtype": "half", "gpus": 8, "elements": 1024}
    assert tables.seconds("nccl", collective="all_gather", **at) == pytest.approx(10e-6)
    assert tables.seconds("nccl", collective="all_reduce", **at) == pytest.approx(20e-6)


def test_a_column_that_lacks_is_named_with_its_file(tmp_path):
    path = tmp_path / "aic_dsv3_h100_nccl.parquet"
    write(path, [{"nccl_dtype": "half", "num_gpus": 8, "message_size": 1024, "latency": 0.01}])
    tables = MeasuredTables.from_directory(tmp_path, gpu="h100")
    with pytest.raises(TablesUnavailable, match=rf"nccl: .*{path.name} has no column 'op_name'"):
        tables.seconds("nccl", collective="all_gather", dtype="half", gpus=8, elements=1024)


def test_what_is_not_there_is_named(folder, tmp_path_factory):
    with pytest.raises(TablesUnavailable, match=r"neither aic_dsv3_h100_\*\.parquet nor a folder h100_sxm"):
        MeasuredTables.from_directory(tmp_path_factory.mktemp("empty"), gpu="h100")
    with pytest.raises(UnknownEntry, match="gpu 'h800' is not among 'h100', 'h200'"):
        MeasuredTables.from_directory(folder, gpu="h800")
    tables = MeasuredTables.from_directory(folder, gpu="h100")
    with pytest.raises(TablesUnavailable, match=r"aic_dsv3_h100_moe_fused\.parquet is not there"):
        tables.grids("moe_fused")
    with pytest.raises(UnknownEntry, match="operator 'softmax' is not among 'gemm_fp8', "):
        tables.seconds("softmax")
    with pytest.raises(UnknownEntry, match="gemm_fp8: field 'batch' is not among 'm', 'n', 'k'"):
        tables.seconds("gemm_fp8", m=1, n=512, k=512, batch=1)
    with pytest.raises(TableError, match="gemm_fp8: k is not given; it takes m, n, k"):
        tables.seconds("gemm_fp8", m=1, n=512)
    with pytest.raises(UnknownEntry, match=r"distribution 'zipf' is not among 'power_law_1\.2', 'uniform'"):
        tables.seconds("moe_decode", ep=8, tokens=8, distribution="zipf")
    with pytest.raises(OutOfGrid, match="gemm_fp8: m 5 is outside the measured 1 to 4"):
        tables.seconds("gemm_fp8", m=5, n=512, k=512)
    with pytest.raises(TableError, match="must be finite"):
        tables.seconds("gemm_fp8", m=float("inf"), n=512, k=512)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("devices.measured_tables.PACKAGE", "no_such_package_of_tables")
    with pytest.raises(TablesUnavailable, match=r"supernode-infer\[tables-package\]"):
        MeasuredTables.from_package(gpu="h100")


def test_an_installed_package_is_found_without_being_imported(folder, monkeypatch):
    package = folder / "packaged_tables"
    write(
        package / "systems" / "data" / "h100_sxm" / "gemm" / "sglang" / "0.5.14" / "gemm_perf.parquet",
        [gemm(1, 2, 3, 1.0)],
    )
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("devices.measured_tables.PACKAGE", "packaged_tables")
    assert MeasuredTables.from_package(gpu="h100").seconds("gemm_fp8", m=1, n=2, k=3) == 1e-3


# The public tables


@pytest.fixture(scope="module", params=["h100", "h200"])
def public(request):
    return MeasuredTables.from_directory(DATA, gpu=request.param)


@needs_data
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "nccl"])
def test_the_logarithm_interpolates_every_public_table_better(public, operator):
    def median_error(log_value):
        grids = public.grids(operator).values()
        return median(e for g in grids for f in g.fields for e in g.leave_one_out(f, log_value=log_value))

    assert median_error(True) < median_error(False)
    assert median_error(True) < 0.09


@needs_data
def test_the_public_extract_of_nccl_does_not_tell_collectives_apart(public):
    with pytest.raises(TablesUnavailable, match="no column 'op_name'"):
        public.grids("nccl")


@needs_data
def test_the_attention_kernel_stays_below_the_chip_s_peaks(public):
    """128 requests at 4,096: 2 * 128 heads * (576 + 512) flops and 1,152 bytes of cache per context token."""
    seconds = public.seconds("mla_decode_kernel", batch=128, kv_len=4096, kv_dtype="bfloat16")
    assert 400e12 < 128 * 4096 * 2 * 128 * (576 + 512) / seconds < 989e12
    assert 128 * 4096 * 1152 / seconds < 3.35e12


@needs_data
def test_dispatch_bandwidth_confirms_that_tokens_are_per_rank(public):
    """The table states 45.04 GB/s at 8 nodes and 128 tokens: 128 tokens * 8 copies of 7,408 bytes, less 10 masked."""
    seconds = public.seconds("dispatch_low_latency", nodes=8, tokens=128, experts=256)
    assert (128 * 8 - 10) * 7408 / seconds / 1e9 == pytest.approx(45.04, rel=0.01)


@needs_data
def test_decode_experts_confirm_that_the_column_counts_global_tokens(public):
    """One expert on each of 256 ranks: reading its 44 MB of weights decides at small batches."""
    seconds = public.seconds("moe_decode", ep=256, tokens=1, distribution="uniform")
    assert 44.04e6 / 4.8e12 < seconds < 3 * 44.04e6 / 3.35e12


@needs_data
def test_hottest_ranks_of_the_skewed_tables_bracket_the_published_imbalance():
    tables = MeasuredTables.from_directory(DATA, gpu="h100")

    def load(distribution):
        at = {"ep": 32, "tokens": 16384}
        uniform = tables.seconds("moe_prefill", **at, distribution="uniform")
        return tables.seconds("moe_prefill", **at, distribution=distribution) / uniform

    assert load("power_law_1.01") == pytest.approx(2.56, abs=0.01)
    assert load("power_law_0.6") == pytest.approx(1.68, abs=0.01)
