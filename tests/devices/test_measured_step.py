"""A step is the sum of its measured operators, and two microbatches hide what the rules say."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from devices.measured_step import decode_step, nodes_of, prefill_step
from devices.measured_tables import MeasuredTables, OutOfGrid, UnknownEntry

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "aiconfigurator"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of measured tables is not beside the project")

US = 1e-6
# Milliseconds of every operator of one microbatch, whatever its size.
GEMM_MS, ATTENTION_MS, EXPERTS_MS = 0.001, 0.100, 0.040
NUM_LM_HEAD_PIECES = 16  # 2 * 129,280 columns, at most 16,384 at a time


def write(folder, name, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"aic_dsv3_h100_{name}.parquet")


def write_tables(folder, *, dispatch_us, combine_us):
    """Tables in which sizes do not matter, so that sums can be written down."""
    write(
        folder,
        "gemm_fp8",
        [
            {"gemm_dtype": "fp8_block", "m": m, "n": n, "k": k, "latency": GEMM_MS}
            for m in (1, 16384)
            for n in (512, 16384)
            for k in (512, 16384)
        ],
    )
    module = {"mla_dtype": "bfloat16", "model": "deepseek-ai/DeepSeek-V3", "kv_cache_dtype": "bfloat16"}
    module |= {"gemm_type": "fp8_block", "num_heads": 128, "latency": ATTENTION_MS}
    batches, lengths = (1, 256), (128, 8192)
    write(folder, "mla_decode_module", [{**module, "batch_size": b, "step": s} for b in batches for s in lengths])
    rows = [{**module, "batch_size": b, "isl": s, "step": 0} for b in batches for s in lengths]
    write(folder, "mla_prefill_module", rows)
    shape = {"moe_dtype": "fp8_block", "hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": 256}
    skews = {"uniform": 1.0, "power_law_0.6": 2.0, "power_law_1.01": 3.0}
    for name in ("decode", "prefill"):
        rows = [
            {**shape, "num_tokens": ep * t, "moe_ep_size": ep, "distribution": d, "latency": skew * EXPERTS_MS}
            for ep in (8, 64)
            for t in (1, 16384)
            for d, skew in skews.items()
        ]
        write(folder, f"moe_{name}_deepep", rows)
    common = {"hidden_size": 7168, "num_topk": 8, "num_experts": 256}
    at = [{**common, "node_num": n, "num_token": t} for n in (1, 8) for t in (1, 16384)]
    low_latency = {"dispatch_avg_t_us": dispatch_us, "combine_avg_t_us": combine_us}
    write(folder, "deepep_ll_1to8nodes", [{**row, **low_latency} for row in at])
    normal = {"dispatch_sms": 20, "dispatch_transmit_us": dispatch_us - 1, "dispatch_notify_us": 1.0}
    normal |= {"combine_sms": 20, "combine_transmit_us": combine_us - 2, "combine_notify_us": 2.0}
    write(folder, "deepep_normal_1to8nodes", [{**row, **normal} for row in at])
    return MeasuredTables.from_directory(folder, gpu="h100")


# gate, shared expert up and down, experts, attention
COMPUTE_US = 3 * 1000 * GEMM_MS + 1000 * (ATTENTION_MS + EXPERTS_MS)
DECODE = {"batch_per_gpu": 64, "kv_len": 4096, "ep": 32, "mtp": False, "overlap": False, "balance": "balanced"}
PREFILL = {"prompt_len": 1024, "tokens_per_gpu": 8192, "ep": 32, "overlap": False, "balance": "balanced"}


def test_without_overlap_a_layer_is_the_sum_of_its_operators(tmp_path):
    tables = write_tables(tmp_path, dispatch_us=30.0, combine_us=50.0)
    for step in (decode_step(tables, **DECODE), prefill_step(tables, **PREFILL)):
        assert step.moe_layer_s == pytest.approx((COMPUTE_US + 80) * US)
        # The dense gate-and-up product is cut in 3, the down product in 2.
        dense_us = 3 * (1000 * ATTENTION_MS + 5 * 1000 * GEMM_MS)
        head_us = NUM_LM_HEAD_PIECES * 1000 * GEMM_MS
        assert step.seconds == pytest.approx((58 * (COMPUTE_US + 80) + dense_us + head_us) * US)
        assert step.breakdown_s["hidden_by_overlap"] == 0
        assert step.breakdown_s["dispatch"] == pytest.approx(58 * 30 * US)


@pytest.mark.parametrize(("dispatch_us", "combine_us"), [(30.0, 50.0), (200.0, 300.0)])
def test_decode_overlap_takes_the_longer_of_compute_and_communication(tmp_path, dispatch_us, combine_us):
    tables = write_tables(tmp_path, dispatch_us=dispatch_us, combine_us=combine_us)
    step = decode_step(tables, **{**DECODE, "overlap": True})
    assert step.moe_layer_s == pytest.approx(2 * max(COMPUTE_US, dispatch_us + combine_us) * US)
    assert step.breakdown_s["hidden_by_overlap"] == pytest.approx(
        -58 * 2 * min(COMPUTE_US, dispatch_us + combine_us) * US
    )


@pytest.mark.parametrize(
    ("dispatch_us", "combine_us", "layer_us"),
    [
        (30.0, 50.0, 2 * (COMPUTE_US + 80 * 20 / 132)),
        (200.0, 300.0, 2 * 500),
        (65.0, 70.0, 2 * (COMPUTE_US + 135 * 20 / 132)),
    ],
)
def test_prefill_overlap_pays_for_the_sms_that_communication_holds(tmp_path, dispatch_us, combine_us, layer_us):
    tables = write_tables(tmp_path, dispatch_us=dispatch_us, combine_us=combine_us)
    assert prefill_step(tables, **{**PREFILL, "overlap": True}).moe_layer_s == pytest.approx(layer_us * US)


def test_mtp_adds_a_layer_a_projection_and_a_head(tmp_path):
    tables = write_tables(tmp_path, dispatch_us=30.0, combine_us=50.0)
    plain, mtp = decode_step(tables, **DECODE), decode_step(tables, **{**DECODE, "mtp": True})
    added_us = COMPUTE_US + 80 + (1 + NUM_LM_HEAD_PIECES) * 1000 * GEMM_MS
    assert mtp.seconds - plain.seconds == pytest.approx(added_us * US)


def test_imbalance_comes_from_the_skewed_tables(tmp_path):
    tables = write_tables(tmp_path, dispatch_us=30.0, combine_us=50.0)
    for balance, skew in (("balanced", 1), ("eplb", 2), ("none", 3)):
        assert decode_step(tables, **{**DECODE, "balance": balance}).breakdown_s["experts"] == pytest.approx(
            58 * 40 * skew * US
        )
        assert prefill_step(tables, **{**PREFILL, "balance": balance}).breakdown_s["experts"] == pytest.approx(
            58 * 40 * skew * US
        )
    with pytest.raises(UnknownEntry, match="balance 'perfect' is not among 'balanced', 'eplb', 'none'"):
        decode_step(tables, **{**DECODE, "balance": "perfect"})


def test_partial_nodes_are_refused():
    assert nodes_of(64) == 8
    for ep in (0, -8, 12):
        with pytest.raises(ValueError, match=f"ep {ep} is not a multiple of the 8 GPUs"):
            nodes_of(ep)


# The public tables


@pytest.fixture(scope="module")
def h100():
    return MeasuredTables.from_directory(DATA, gpu="h100")


@needs_data
@pytest.mark.parametrize("overlap", [False, True])
def test_breakdowns_add_up(h100, overlap):
    decode = decode_step(h100, **{**DECODE, "overlap": overlap, "mtp": True, "kv_len": 3000})
    prefill = prefill_step(h100, **{**PREFILL, "overlap": overlap})
    for step in (decode, prefill):
        assert sum(step.breakdown_s.values()) == pytest.approx(step.seconds, rel=1e-12)
        assert step.seconds > 58 * step.moe_layer_s


@needs_data
def test_longer_context_more_requests_and_worse_balance_take_longer(h100):
    def ms(**changes):
        return decode_step(h100, **{**DECODE, **changes}).seconds

    times = [ms(kv_len=kv) for kv in (1000, 2000, 4000, 8000)]
    assert times == sorted(times)
    times = [ms(batch_per_gpu=batch) for batch in (8, 20, 64, 100, 128)]
    assert times == sorted(times)
    times = [ms(ep=64, balance=balance, batch_per_gpu=128) for balance in ("balanced", "eplb", "none")]
    assert times == sorted(times)


@needs_data
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep": 72}, "dispatch_low_latency: nodes 9 is outside the measured 1 to 8"),
        ({"batch_per_gpu": 256}, "moe_decode: tokens 256 is outside the measured 1 to 128 at ep 32"),
        ({"kv_len": 200_000}, "mla_decode_module: kv_len 200000 is outside"),
    ],
)
def test_what_was_not_measured_is_refused(h100, changes, message):
    with pytest.raises(OutOfGrid, match=message):
        decode_step(h100, **{**DECODE, **changes})


@needs_data
def test_a_microbatch_of_half_a_prompt_is_refused(h100):
    with pytest.raises(OutOfGrid, match=r"mla_prefill_module: batch 0\.5 is outside the measured 1 to 256"):
        prefill_step(h100, **{**PREFILL, "prompt_len": 8192, "overlap": True})
