"""Saturated instances against `supernode estimate`: the same throughput within 3 %, and where the rest comes from.

A run differs from a steady state in what these tests name and bound, one by one:

- fill: a decode slot is taken when a request is placed, before its prompt is computed, so it is empty for a while;
- drafts: acceptance is drawn, and a request's last step may have no room for a draft;
- contexts: a step is charged for the rank whose contexts are longest, an estimate for all alike;
- prefill steps: a step is planned before the blocks of the one before it are given back, so that full steps alternate
  with steps of what fits beside them.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from serving.charge import step_charge
from serving.config_file import load_config
from serving.core.scheduled_batch import BatchDrafts, ScheduledBatch
from serving.estimation.what_if import estimate
from serving.simulation.run import simulate
from serving.workloads.load import load_workload

PROMPT_LEN = 4096
BATCH_PER_NPU = 96
ACCEPTANCE = 0.7
NO_POOL = "kv_pool.enabled=false"
NO_DRAFTS = "speculative.num_speculative_tokens=0"


def saturating(num_requests, output_len):
    """All at once, so that nobody waits for an arrival."""
    return (
        f"workload={{num_requests: {num_requests}, request_rate: inf, input_len: {PROMPT_LEN}, "
        f"output_len: {output_len}, range_ratio: 0.0, num_prefixes: 0, prefix_len: 0}}"
    )


def full_batch(num_ranks, num_seqs, kv_len, num_drafts):
    """A decode step with `num_seqs` requests on every rank, of which each has `kv_len` tokens after it."""
    rows = num_ranks * num_seqs
    drafts = None
    if num_drafts:
        drafts = BatchDrafts(
            num_drafts=np.ones(rows, np.int32), makes_draft=np.ones(rows, bool), is_behind=np.zeros(rows, bool)
        )
    return ScheduledBatch(
        slots=np.arange(rows),
        ranks=np.repeat(np.arange(num_ranks, dtype=np.int32), num_seqs),
        num_scheduled_tokens=np.full(rows, 1 + num_drafts, np.int32),
        num_computed_tokens=np.full(rows, kv_len - 1 - num_drafts, np.int32),
        samples=np.ones(rows, bool),
        request_ids=np.full(rows, "r", dtype=object),
        rank_starts=np.arange(num_ranks + 1) * num_seqs,
        drafts=drafts,
    )


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What an instance does between its ramps. Rates are per NPU, times in seconds."""

    tokens_per_s: float
    step_s: float  # mean
    fill: float  # mean share of the slots
    tokens_per_row: float
    idle: float  # share of the time


def steady(columns, role, *, num_tokens, slots, first, last):
    """The steps [first, last) of the only instance of `role`; `num_tokens` names the column that counts."""
    (instance,) = (instance for instance in columns.instances if instance.role == role)
    steps = slice(first, last)
    start, charged = instance.start_ns[steps], instance.charged_ns[steps]
    span_ns = int(start[-1] + charged[-1] - start[0])
    tokens = int(getattr(instance, num_tokens)[steps].sum())
    return Steady(
        tokens_per_s=tokens / (span_ns / 1e9) / instance.num_npus,
        step_s=float(charged.mean()) / 1e9,
        fill=float(instance.num_seqs[steps].mean()) / slots,
        tokens_per_row=tokens / int(instance.num_seqs[steps].sum()),
        idle=1 - int(charged.sum()) / span_ns,
    )


@pytest.mark.parametrize(("num_drafts", "batch_per_npu", "kv_len"), [(1, 96, 4096), (0, 96, 4096), (1, 24, 16384)])
def test_a_full_decode_step_of_the_whole_instance_is_charged_as_it_is_estimated(num_drafts, batch_per_npu, kv_len):
    config = load_config("cloudmatrix384", [f"speculative.num_speculative_tokens={num_drafts}"])
    batch = full_batch(config.world_size("decode"), batch_per_npu // 2, kv_len, num_drafts)
    charged_ms = step_charge(config, "decode")(batch).ns / 1e6
    estimated = estimate("decode", batch_per_npu=batch_per_npu, kv_len=kv_len, mtp=num_drafts, acceptance=ACCEPTANCE)
    # With a draft, the first of a row's two tokens attends to one token less than the second.
    assert charged_ms == pytest.approx(estimated["iteration_ms"], rel=1e-4)


@pytest.mark.parametrize("num_drafts", [1, 0])
def test_decode_saturates_where_it_is_estimated_to(num_drafts):
    """Four dies, each charged as one of the 320 of the published instance, and prompts for four times their slots."""
    npus, output_len = 2, 300
    slots = npus * BATCH_PER_NPU
    config = load_config(
        "cloudmatrix384",
        (
            *(f"instances.decode.npus={npus}", NO_POOL, f"speculative.num_speculative_tokens={num_drafts}"),
            "timing.represents={decode: {ep: 320, num_redundant_experts: 32, num_shared_expert_copies: 32}}",
            saturating(4 * slots, output_len),
        ),
    )
    columns = simulate(config, load_workload(config))
    (instance,) = (instance for instance in columns.instances if instance.role == "decode")
    full = np.flatnonzero(instance.num_seqs >= 0.98 * slots)
    seen = steady(columns, "decode", num_tokens="num_sampled", slots=slots, first=full[0], last=full[-1] + 1)
    # Contexts grow from the prompt's length to that of the whole request, and requests are at all stages of it.
    kv_len = PROMPT_LEN + output_len // 2
    estimated = estimate("decode", batch_per_npu=BATCH_PER_NPU, kv_len=kv_len, mtp=num_drafts, acceptance=ACCEPTANCE)
    per_row = 1 + num_drafts * ACCEPTANCE
    assert seen.tokens_per_s == pytest.approx(estimated["tokens_per_s_per_npu"], rel=0.03)
    assert seen.idle == pytest.approx(0, abs=1e-9)
    assert 0.96 < seen.fill < 1
    assert seen.tokens_per_row == pytest.approx(per_row, rel=0.004)
    if num_drafts:
        assert columns.num_accepted / columns.num_drafts == pytest.approx(ACCEPTANCE, abs=0.003)
    # A step with as many requests as there are on average takes what is estimated for it, and a little more for the
    # rank whose contexts are longest. These three factors are all of the difference.
    batch = round(seen.fill * BATCH_PER_NPU)
    same_batch = estimate("decode", batch_per_npu=batch, kv_len=kv_len, mtp=num_drafts, acceptance=ACCEPTANCE)
    assert 0.99 < seen.step_s * 1e3 / same_batch["iteration_ms"] < 1.02
    assert seen.tokens_per_s == pytest.approx(seen.fill * BATCH_PER_NPU * seen.tokens_per_row / seen.step_s)


def prefill_run(*overrides, output_len=1):
    """Eight batches of prompts at one instance; the columns and the steady part, without the first and last steps."""
    settings = ("instances.prefill.count=1", saturating(8 * 64, output_len), *overrides)
    config = load_config("cloudmatrix384", settings)
    columns = simulate(config, load_workload(config))
    (instance,) = (instance for instance in columns.instances if instance.role == "prefill")
    last = len(instance.start_ns) - 1
    return instance, steady(columns, "prefill", num_tokens="num_tokens", slots=64, first=1, last=last)


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_prefill_saturates_where_it_is_estimated_to(num_drafts):
    """With drafts on, prefill fills the MTP module's cache too."""
    instance, seen = prefill_run(NO_POOL, f"speculative.num_speculative_tokens={num_drafts}")
    estimated = estimate("prefill", prompt_len=PROMPT_LEN, tokens_per_npu=16384, mtp=num_drafts)
    full = instance.num_tokens == 16 * 16384
    assert full.sum() >= 6
    assert instance.charged_ns[full] / 1e6 == pytest.approx(estimated["ttft_ms"], rel=1e-6)
    assert seen.idle == pytest.approx(0, abs=1e-9)
    # 560 blocks: 512 of a full step, whose requests give them back when the next step is planned, and 48 beside them.
    assert set(instance.num_seqs[1:-1].tolist()) == {64, 6}
    assert seen.tokens_per_s == pytest.approx(estimated["tokens_per_s_per_npu"], rel=0.01)
    assert seen.tokens_per_s < estimated["tokens_per_s_per_npu"]


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_prefill_with_hand_overs_and_stores_saturates_within_one_percent(num_drafts):
    """Blocks move while steps run, but are held until they have arrived: a step may be small, or wait for some."""
    _, seen = prefill_run(f"speculative.num_speculative_tokens={num_drafts}", output_len=20)
    estimated = estimate("prefill", prompt_len=PROMPT_LEN, tokens_per_npu=16384, mtp=num_drafts)
    assert seen.tokens_per_s == pytest.approx(estimated["tokens_per_s_per_npu"], rel=0.01)
    assert 0 <= seen.idle < 0.005
