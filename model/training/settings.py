"""What a training run is made of, and its rates over time.

Owns: the numbers that define a run, and the schedule.
Must not know: tensors, files, processes.
Source: trapezoidal schedule of Muon's speed runs (warm up, hold, decay to zero); balancing by the bias alone as in
DeepSeek-V3 (arXiv 2412.19437 section 4.2).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """One run. Equal settings on one machine give equal weights, in one process or in several."""

    seed: int = 0
    num_steps: int = 2400
    num_shards: int = 2  # batches per step; each is computed by one process
    tokens_per_shard: int = 4096
    max_sample_tokens: int = 1024
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.5  # times the rate; keeps the residual stream from outgrowing the embedding
    warmup_steps: int = 60
    decay_fraction: float = 0.45  # the last part of the run, in which the rates fall to zero
    mtp_weight: float = 0.2
    balance_rate: float = 0.01  # change of a gate's bias per step; a run this short needs more than the paper's 0.001
    gradient_clip: float = 1.0  # global norm

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_shards", "tokens_per_shard", "max_sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: {self.decay_fraction} is outside [0, 1]")

    def rate(self, step: int) -> float:
        """Factor on both rates in `step`, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = max(1.0, self.num_steps * self.decay_fraction)
        return min(warm, max(0.0, (self.num_steps - step) / decay_steps), 1.0)
