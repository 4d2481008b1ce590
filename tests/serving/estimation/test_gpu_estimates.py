"""Estimates about GPUs: the published comparisons come out, what does not fit or is not there is refused."""

import pytest

from serving.errors import ConfigError
from serving.estimation.estimates import ESTIMATES, combine, decode, dispatch, prefill
from serving.estimation.evaluation import evaluate_rows
from serving.estimation.published import load_published, published_of


@pytest.mark.parametrize("hardware", ["h800", "h100", "h200"])
def test_a_gpu_counts_as_an_npu(hardware):
    step = decode(hardware=hardware, ep=128, batch_per_npu=128, mtp=0, balance="balanced")
    assert step["tokens_per_s_per_npu"] == pytest.approx(128 / step["tpot_ms"] * 1e3)
    assert step["tokens_per_s_per_tflops"] == pytest.approx(step["tokens_per_s_per_npu"] / 1979)
    assert sum(step["breakdown"].values()) == pytest.approx(step["iteration_ms"])
    assert step["attention_aic"] is None
    batch = prefill(hardware=hardware, ep=32)
    assert sum(batch["breakdown"].values()) == pytest.approx(batch["ttft_ms"])
    assert batch["tokens_per_s_per_npu"] == pytest.approx(16384 / batch["ttft_ms"] * 1e3)


def test_streams_of_one_microbatch():
    """Half of what both take together; without microbatches, the whole batch."""
    overlapped = decode(hardware="h800", ep=128, batch_per_npu=128, mtp=0, balance="balanced")
    plain = decode(hardware="h800", ep=128, batch_per_npu=128, mtp=0, balance="balanced", microbatch="off")
    compute_us = 2 * (overlapped["attention_stream_us"] + overlapped["moe_stream_us"])
    assert overlapped["layer_us"] == pytest.approx(compute_us)  # communication is hidden
    assert plain["layer_us"] == pytest.approx(plain["attention_stream_us"] + plain["moe_stream_us"])
    assert plain["layer_us"] > overlapped["layer_us"]


def test_balanced_runs_of_deepseek_are_predicted():
    """deepseek-ai/profile-data: no constant was fitted to these. arXiv 2506.12708v2, tables 3 and 4."""
    assert decode(hardware="h800", ep=128, batch_per_npu=128, mtp=0, balance="balanced")["tpot_ms"] == pytest.approx(
        50.2, rel=0.1
    )
    throughput = prefill(hardware="h800", ep=32, balance="balanced")["tokens_per_s_per_npu"]
    assert throughput == pytest.approx(7839, rel=0.12)


def test_all_published_comparisons_can_be_made():
    shipped = load_published(published_of("cloudmatrix384"))
    others = [row for row in shipped.rows if row.hardware]
    evaluated = evaluate_rows(others, ESTIMATES, hardware="cloudmatrix384")
    assert len(evaluated) == len(others) == 53
    worst = max(abs(row.error) for row in evaluated if row.row.role == "input")
    assert worst < 0.04  # entered the description, so they come out


def test_nvlink_helps_only_inside_a_node():
    for estimate in (dispatch, combine):
        small, large = (
            [estimate(hardware="h800", ep=ep, near=near)["latency_us"] for near in ("package", "node")]
            for ep in (8, 256)
        )
        assert small[1] < 0.5 * small[0]
        assert 0.95 * large[0] < large[1] < large[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode(hardware="h800", ep=128, batch_per_npu=600, mtp=0), r"does not fit in HBM: .* = 190\.4 GiB"),
        (lambda: decode(hardware="h800", ep=4096), "ep: 4096, h800 has 2048 dies"),
        (lambda: prefill(hardware="h800", reuse=0.5, pool_plane="ub"), "pool_plane: ub of h800 has no path"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_data_parallel_gpu_holds_all_heads_and_its_own_latents():
    """187 MB per layer in place of 1/32 of the up-projections; 2**20 tokens of 70,272 B, not those of 32 GPUs."""
    with pytest.raises(ConfigError, match=r"39\.2 GiB of weights \+ .* \+ 68\.6 GiB of latent cache"):
        prefill(hardware="h800", ep=32, prompt_len=131072, tokens_per_npu=2**20)
