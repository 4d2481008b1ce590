"""What one estimate of a step costs, and a whole calibration: `python -m tests.bench.bench_estimate`."""

import statistics
import time

import numpy as np

from devices.pipeline import StepTimeModel
from devices.step_work import StepWork
from serving.config_file import load_part
from serving.estimation.calibration_run import calibrate_constants
from serving.estimation.estimate_inputs import hardware_of, layout_of, model_of
from serving.estimation.estimates import ESTIMATES
from serving.estimation.fitted_section import read_fitted
from serving.estimation.published import load_published, published_of
from serving.expert_balance import with_imbalance

RANKS = 320
CALLS = 500


def step_seconds() -> float:
    """Median of one decode step over 320 ranks whose requests differ: batch 96 per NPU, one draft, KV about 4,096."""
    spec, shape = hardware_of("cloudmatrix384"), model_of("deepseek-r1")
    deployment = with_imbalance(layout_of(shape, RANKS), shape, spec.fitted, role="decode", balance="eplb")
    model = StepTimeModel(shape, spec, role="decode", deployment=deployment, num_speculative_tokens=1)
    rng = np.random.default_rng(0)
    seqs = rng.integers(40, 49, RANKS)
    kv = seqs * rng.integers(3800, 4400, RANKS)
    work = StepWork(
        num_tokens=2 * seqs, num_context_tokens=2 * kv, num_kv_tokens=kv, num_seqs=seqs, num_samples=2 * seqs
    )
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        model.step(work)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Print both."""
    print(f"one decode step over {RANKS} ranks: {step_seconds() * 1e3:.3f} ms, median of {CALLS} (bar 0.5)")
    description = load_part("hardware/cloudmatrix384.yaml")
    start = time.perf_counter()
    told = load_published(published_of("cloudmatrix384"))
    result = calibrate_constants(told, description, read_fitted(description), ESTIMATES)
    moved = max(abs(constant.value / constant.bounds.start - 1) for constant in result.fit.constants)
    print(f"calibration from the shipped values: {time.perf_counter() - start:.1f} s, largest change {moved:.2%}")


if __name__ == "__main__":
    main()
