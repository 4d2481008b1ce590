"""Answers of the time model: published figures, identities, directions, and what is refused."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config_file import load_part
from serving.errors import ConfigError
from serving.estimation.estimates import ESTIMATES, attention, combine, decode, dispatch, gemm, prefill

TFLOPS_PER_NPU = 1504  # INT8, arXiv 2506.12708v2: 1,943 tokens/s are 1.29 per TFLOPS
EPS = st.sampled_from([32, 64, 128, 144, 256, 288, 320])
DECODE_EPS = st.sampled_from([64, 144, 256, 288, 320])
BALANCES = st.sampled_from(["balanced", "eplb", "none"])
SWITCHES = st.sampled_from(["on", "off"])
WORKLOADS = {
    "batch_per_npu": st.integers(2, 96),
    "kv_len": st.integers(64, 4096),
    "ep": DECODE_EPS,
    "mtp": st.integers(0, 1),
    "microbatch": SWITCHES,
    "balance": BALANCES,
}
PROMPTS = {
    "prompt_len": st.sampled_from([512, 1024, 4096]),
    "tokens_per_npu": st.sampled_from([4096, 8192, 16384]),
    "ep": st.sampled_from([24, 32]),
    "microbatch": SWITCHES,
    "balance": BALANCES,
}
quick = settings(deadline=None, max_examples=25)
ROUNDING = 1 + 1e-12


def test_table_4_and_its_layer():
    """arXiv 2506.12708v2, tables 4 and 5 and figure 22: batch 96 with 4,096 tokens each."""
    ours = decode(batch_per_npu=96, kv_len=4096)
    assert ours["tpot_ms"] == pytest.approx(49.4, rel=0.03)
    assert ours["tokens_per_s_per_npu"] == pytest.approx(1943, rel=0.03)
    assert ours["tokens_per_s_per_tflops"] == pytest.approx(1.29, rel=0.03)
    assert ours["iteration_ms"] == pytest.approx(49.4 * 1.7, rel=0.03)
    assert ours["layer_us"] == pytest.approx(1260, rel=0.06)


@pytest.mark.parametrize(("balance", "tokens_per_s"), [("eplb", 5655), ("balanced", 6688)])
def test_table_3(balance, tokens_per_s):
    ours = prefill(prompt_len=4096, tokens_per_npu=16384, balance=balance)
    assert ours["tokens_per_s_per_npu"] == pytest.approx(tokens_per_s, rel=0.06)
    assert ours["ttft_ms"] == pytest.approx(16384e3 / tokens_per_s, rel=0.06)
    assert ours["pool_load_ms"] == 0


def test_the_module_s_latents_cost_a_layer_more_to_compute_and_to_load():
    plain, filling = (prefill(prompt_len=4096, tokens_per_npu=16384, mtp=mtp, reuse=0.5) for mtp in (0, 1))
    more = {name for name, ms in filling["breakdown"].items() if ms != plain["breakdown"].get(name)}
    assert more == {"mtp", "pool_load"}
    assert 1 < filling["breakdown"]["mtp"] / (plain["layer_us"] / 1e3) < 2  # a layer in one batch, and its projection
    assert filling["pool_load_ms"] / plain["pool_load_ms"] == pytest.approx(62 / 61, rel=1e-3)  # layers


def test_tables_7_and_10():
    """arXiv 2506.12708v2: the payload of table 7 is latency times bandwidth; table 10 counts naive bytes."""
    for exchange, megabytes in ((dispatch, 8.2), (combine, 15.4)):
        ours = exchange(ep=64, tokens=128)
        assert ours["latency_us"] * ours["bandwidth_gb_per_s"] * 1e-3 == pytest.approx(megabytes, rel=0.02)
    ours = gemm(groups=4, m=7168, n=4096, k=4096)
    assert ours["utilization"] == pytest.approx(0.794, rel=0.02)
    assert ours["bandwidth_gb_per_s"] == pytest.approx(260, rel=0.02)
    assert ours["tops"] == pytest.approx(597, rel=0.02)  # 79.4 % of the 752 TOPS of a die


@quick
@given(**WORKLOADS, acceptance=st.floats(0, 1))
def test_decode_adds_up(acceptance, **workload):
    ours = decode(**workload, acceptance=acceptance)
    tokens = 1 + acceptance * workload["mtp"]
    assert ours["tokens_per_s_per_npu"] == pytest.approx(workload["batch_per_npu"] / ours["tpot_ms"] * 1e3)
    assert ours["tokens_per_s_per_tflops"] == pytest.approx(ours["tokens_per_s_per_npu"] / TFLOPS_PER_NPU)
    assert ours["tpot_ms"] * tokens == pytest.approx(ours["iteration_ms"])
    assert sum(ours["breakdown"].values()) == pytest.approx(ours["iteration_ms"])
    assert min(ours["breakdown"].values()) > 0
    in_layers = sum(ms for name, ms in ours["breakdown"].items() if "." in name)
    assert in_layers == pytest.approx(58 * ours["layer_us"] * 1e-3)
    halves = 1 if ours["attention_aic"] is None else 2
    for stream in ("attention", "moe"):
        assert sum(ours["streams"][stream].values()) == pytest.approx(halves * ours[f"{stream}_stream_us"])


@quick
@given(**PROMPTS, reuse=st.floats(0, 1), pool_plane=st.sampled_from(["ub", "vpc", "none"]))
def test_prefill_adds_up(**batch):
    ours = prefill(**batch)
    assert ours["tokens_per_s_per_npu"] == pytest.approx(batch["tokens_per_npu"] / ours["ttft_ms"] * 1e3)
    assert ours["tokens_per_s_per_tflops"] == pytest.approx(ours["tokens_per_s_per_npu"] / TFLOPS_PER_NPU)
    assert sum(ours["breakdown"].values()) == pytest.approx(ours["ttft_ms"])
    assert ours["breakdown"].get("pool_load", 0) == ours["pool_load_ms"]
    assert bool(ours["pool_load_ms"]) == (batch["pool_plane"] != "none" and batch["reuse"] * batch["prompt_len"] >= 0.5)


@quick
@given(**WORKLOADS, more=st.integers(1, 30))
def test_a_larger_batch_or_a_longer_context_never_lowers_tpot(more, **workload):
    tpot_ms = decode(**workload)["tpot_ms"]
    assert decode(**workload | {"batch_per_npu": workload["batch_per_npu"] + more})["tpot_ms"] * ROUNDING >= tpot_ms
    assert decode(**workload | {"kv_len": workload["kv_len"] + 32 * more})["tpot_ms"] * ROUNDING >= tpot_ms


@quick
@given(**WORKLOADS)
def test_imbalance_and_drafts_never_shorten_an_iteration(**workload):
    even, placed, raw = (decode(**workload | {"balance": b})["iteration_ms"] for b in ("balanced", "eplb", "none"))
    assert even <= placed * ROUNDING <= raw * ROUNDING**2
    without, drafted = (decode(**workload | {"mtp": mtp})["iteration_ms"] for mtp in (0, 1))
    assert without < drafted
    assert drafted <= decode(**workload | {"mtp": 1, "mtp_pipelined": "off"})["iteration_ms"]


def test_a_certain_draft_doubles_the_tokens():
    never, always = (decode(acceptance=acceptance) for acceptance in (0.0, 1.0))
    assert always["iteration_ms"] == never["iteration_ms"]
    assert always["tokens_per_s_per_npu"] == pytest.approx(2 * never["tokens_per_s_per_npu"])
    assert decode(mtp=2, acceptance=0.5)["tpot_ms"] * 1.75 == pytest.approx(decode(mtp=2)["iteration_ms"])


@quick
@given(**PROMPTS, reuse=st.floats(0, 0.99), more=st.floats(0.01, 0.99))
def test_reuse_never_delays_the_first_token_over_ub_nor_does_vpc_beat_it(reuse, more, **batch):
    more = min(1.0, reuse + more)
    ub, vpc = (prefill(**batch, reuse=more, pool_plane=plane)["ttft_ms"] for plane in ("ub", "vpc"))
    assert ub <= prefill(**batch, reuse=reuse, pool_plane="ub")["ttft_ms"] * ROUNDING
    assert ub <= vpc
    without = prefill(**batch, reuse=more, pool_plane="none")["ttft_ms"]
    assert without == prefill(**batch)["ttft_ms"] >= ub


@quick
@given(**PROMPTS)
def test_more_tokens_never_arrive_sooner(**batch):
    ttft_ms = prefill(**batch)["ttft_ms"]
    assert ttft_ms * ROUNDING >= prefill(**batch | {"tokens_per_npu": batch["tokens_per_npu"] // 2})["ttft_ms"]
    assert ttft_ms <= prefill(**batch | {"prompt_len": 2 * batch["prompt_len"]})["ttft_ms"] * ROUNDING


@quick
@given(ep=EPS, tokens=st.integers(1, 512), more=st.integers(1, 512))
def test_more_tokens_take_no_less_to_exchange(ep, tokens, more):
    for exchange in (dispatch, combine):
        assert exchange(ep=ep, tokens=tokens)["latency_us"] <= exchange(ep=ep, tokens=tokens + more)["latency_us"]


@quick
@given(st.integers(1, 8), *[st.integers(1, 9000)] * 3, st.sampled_from(["groups", "m", "n", "k"]), st.integers(1, 500))
def test_a_larger_product_takes_no_less_and_none_beats_the_machine(groups, m, n, k, grown, more):
    sizes = {"groups": groups, "m": m, "n": n, "k": k}
    ours = gemm(**sizes)
    assert ours["time_us"] <= gemm(**sizes | {grown: sizes[grown] + more})["time_us"] * ROUNDING
    assert ours["utilization"] <= 1
    assert ours["bandwidth_gb_per_s"] <= 1600


@quick
@given(st.integers(1, 96), st.integers(1, 8192), st.integers(1, 4), st.sampled_from([16, 128]))
def test_attention_stays_below_both_roofs(requests, kv_len, query_tokens, num_heads):
    ours = attention(requests_per_die=requests, kv_len=kv_len, query_tokens=query_tokens, num_heads=num_heads)
    assert ours["utilization"] <= 0.654 * ROUNDING  # arXiv 2506.12708v2, table 8
    assert ours["memory_utilization"] <= 0.841 * ROUNDING  # arXiv 2506.12708v2, table 9


def test_an_odd_batch_lies_between_its_neighbors():
    tpots = [decode(batch_per_npu=batch)["tpot_ms"] for batch in (94, 95, 96)]
    assert tpots == sorted(tpots)
    assert decode(batch_per_npu=1)["tokens_per_s_per_npu"] > 0  # the other die is idle


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("decode", {"batch_per_npu": 0}, "batch_per_npu: 0 must be at least 1"),
        ("decode", {"batch_per_npu": 10**18}, "batch_per_npu: 1000000000000000000 must be at most 10^15"),
        ("decode", {"kv_len": 4096.5}, "kv_len: 4096.5 must be a whole number"),
        ("decode", {"kv_len": "4096"}, "kv_len: '4096' must be a whole number"),
        ("decode", {"mtp": -1}, "mtp: -1 must be at least 0"),
        ("decode", {"acceptance": float("nan")}, "acceptance: nan must be from 0 to 1"),
        ("decode", {"ep": 769}, "ep: 769, cloudmatrix384 has 768 dies"),
        ("decode", {"balance": "fair"}, "balance: 'fair' is not one of balanced, eplb, none"),
        ("decode", {"microbatch": True}, "microbatch: True is not one of on, off"),
        ("decode", {"attention_aic": 24}, "attention_aic: 24 must leave some of the 24 cube cores of a die"),
        (
            "decode",
            {"attention_aic": 16, "microbatch": "off"},
            "attention_aic: 16 needs streams with cores of their own",
        ),
        (
            "decode",
            {"attention_aic": 16, "hardware": "h800", "ep": 128},
            "attention_aic: 16 needs streams with cores of their own",
        ),
        (
            "prefill",
            {"hardware": "h800", "prompt_len": 20000},
            "prompt_len: 20000 exceeds the batch of 16384 tokens: tokens_per_npu 16384 on a rank",
        ),
        ("decode", {"hardware": "h900"}, "hardware: 'h900' is not shipped, only cloudmatrix384"),
        ("decode", {"hardware": {}}, "hardware: npu: missing"),
        ("decode", {"hardware": "no.yaml"}, "hardware: no part 'no.yaml'"),
        ("decode", {"model": "gpt"}, "model: 'gpt' is not shipped, only deepseek-r1, mini-r1"),
        ("prefill", {"mtp": 2}, "mtp: 2 must be at most 1 in prefill"),
        ("prefill", {"model": "mini-r1", "ep": 8, "mtp": -1}, "mtp: -1 must be at least 0"),
        ("prefill", {"reuse": 1.01}, "reuse: 1.01 must be from 0 to 1"),
        ("prefill", {"pool_plane": "rdma"}, "pool_plane: 'rdma' is not one of ub, vpc, none"),
        ("prefill", {"prompt_len": 10**7}, "prompt_len: 10000000 exceeds the batch of 262144 tokens"),
        ("dispatch", {"ep": 1}, "ep: 1 must be at least 2"),
        ("combine", {"tokens": 0}, "tokens: 0 must be at least 1"),
        ("gemm", {"m": 10**400, "n": 1, "k": 1}, "m: an integer of 1329 bits must be at most 10^15"),
        ("attention", {"num_heads": 0}, "num_heads: 0 must be at least 1"),
        ("load_model", {"model_bytes": float("inf")}, "model_bytes: inf must be above 0, and at most 10^15"),
    ],
)
def test_a_mistake_names_field_value_and_limit(name, arguments, message):
    with pytest.raises(ConfigError) as error:
        ESTIMATES[name](**arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("decode", {"batch_per_npu": 2000}, ("weights", "buffers", "latent cache")),
        ("decode", {"ep": 7}, ("weights", "buffers", "latent cache")),
        ("decode", {"mtp": 10**9, "batch_per_npu": 1}, ("weights", "buffers", "latent cache")),
        ("prefill", {"tokens_per_npu": 10**6}, ("weights", "buffers", "latent cache")),
        ("gemm", {"m": 10**15, "n": 10**15, "k": 10**15}, ("inputs", "output")),
        ("attention", {"kv_len": 10**7}, ("latent cache", "queries and outputs")),
        ("dispatch", {"tokens": 10**12}, ("messages",)),
    ],
)
def test_what_does_not_fit_in_hbm_is_refused_with_the_sum(name, arguments, parts):
    with pytest.raises(ConfigError) as error:
        ESTIMATES[name](**arguments)
    told = str(error.value)
    sizes = [float(size.replace(",", "")) for size in re.findall(r"([\d,.]+) GiB", told)]
    assert [f"GiB of {part}" in told for part in parts] == [True] * len(parts)
    assert sizes[-1] == 59.6  # 64 GB
    if len(parts) > 1:
        assert sum(sizes[:-2]) == pytest.approx(sizes[-2], rel=1e-9, abs=0.2)
    assert sizes[-2] > sizes[-1]


def test_a_plane_without_hosts_has_no_pool():
    description = load_part("hardware/cloudmatrix384.yaml")
    del description["planes"]["vpc"]["paths"]["npu_host"]
    assert prefill(hardware=description, reuse=0.5)["pool_load_ms"] > 0
    with pytest.raises(ConfigError, match="pool_plane: vpc of cloudmatrix384 has no path from a host's memory"):
        prefill(hardware=description, reuse=0.5, pool_plane="vpc")
