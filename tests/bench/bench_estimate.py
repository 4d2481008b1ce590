"""What estimates of steps cost, and a whole calibration: `python -m tests.bench.bench_estimate`."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from devices.pipeline import Role, StepLoad, StepTimeModel, StepWork
from serving.config_file import load_part
from serving.estimation.calibration_run import calibrate_constants
from serving.estimation.estimate_inputs import hardware_of, layout_of, model_of
from serving.estimation.estimates import ESTIMATES
from serving.estimation.fitted_section import read_fitted
from serving.estimation.published import load_published, published_of
from serving.expert_balance import with_imbalance

RANKS = 320
PREFILL_RANKS = 32
CALLS = 600


def time_model(role: Role, ep: int) -> StepTimeModel:
    spec, shape = hardware_of("cloudmatrix384"), model_of("deepseek-r1")
    deployment = with_imbalance(layout_of(shape, ep), shape, spec.fitted, role=role, balance="eplb")
    return StepTimeModel(shape, spec, role=role, deployment=deployment, num_speculative_tokens=1)


def decode_works(*, joins: bool) -> list[StepWork]:
    """Steps over 320 ranks whose requests differ, batch 96 per NPU, one draft, KV from 4,096 on: context moves on.

    With `joins` a request joins before each step: numbers of tokens that the model has not seen.
    """
    rng = np.random.default_rng(0)
    seqs = rng.integers(40, 49, RANKS)
    works = []
    for step in range(CALLS):
        if joins:
            seqs = seqs.copy()
            seqs[step % RANKS] += 1
            seqs[0] = seqs.max() + 1
        kv = seqs * (4096 + 2 * step) + rng.integers(0, 1000, RANKS)
        works.append(
            StepWork(
                num_tokens=2 * seqs, num_context_tokens=2 * kv, num_kv_tokens=kv, num_seqs=seqs, num_samples=2 * seqs
            )
        )
    return works


def prefill_loads(*, full: bool) -> list[StepLoad]:
    """Batches of 30 prompts on 32 dies: all of 131,072 tokens, or each of another number."""
    return [
        StepLoad.of_sequence(
            PREFILL_RANKS,
            num_tokens=131_072 - (0 if full else 17 * i),
            num_context_tokens=131_072 * (2000 + i),
            num_kv_tokens=131_072 + i,
            num_seqs=30,
            num_samples=30,
            is_split=True,
        )
        for i in range(CALLS)
    ]


def median_us(call: Callable[[Any], object], arguments: Iterable[object]) -> float:
    microseconds = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        microseconds.append((time.perf_counter() - start) * 1e6)
    return statistics.median(microseconds)


def print_steps() -> None:
    """Medians of single calls, in microseconds."""
    for joins in (False, True):
        works = decode_works(joins=joins)
        loads = [StepLoad.of(work, is_split=False) for work in works]
        step_us = median_us(time_model("decode", RANKS).step, works)
        decided_us = median_us(time_model("decode", RANKS).decided, loads)
        case = "unseen numbers of tokens" if joins else "only context grows"
        print(f"decode, {RANKS} ranks, {case}: step {step_us:.1f} us, decided {decided_us:.1f} us")
    for full in (True, False):
        decided_us = median_us(time_model("prefill", PREFILL_RANKS).decided, prefill_loads(full=full))
        print(f"prefill, {PREFILL_RANKS} ranks, {'full' if full else 'unseen'} batches: decided {decided_us:.1f} us")


def main() -> None:
    """Print all of it."""
    print_steps()
    description = load_part("hardware/cloudmatrix384.yaml")
    start = time.perf_counter()
    told = load_published(published_of("cloudmatrix384"))
    result = calibrate_constants(told, description, read_fitted(description), ESTIMATES)
    moved = max(abs(constant.value / constant.bounds.start - 1) for constant in result.fit.constants)
    print(f"calibration from the shipped values: {time.perf_counter() - start:.1f} s, largest change {moved:.2%}")


if __name__ == "__main__":
    main()
