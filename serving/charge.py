"""What a step costs: from a scheduled batch to the time model's units of work.

Owns: how rows become tokens, context and samples per rank.
Must not know: operators, seconds (devices/pipeline.py), clocks.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from devices.deployment import ExpertDeployment, Imbalance
from devices.pipeline import StepLoad, StepTime, StepTimeModel, StepWork
from serving.config import Role, RunConfig
from serving.core.scheduled_batch import ScheduledBatch
from serving.expert_balance import with_imbalance
from serving.placement import measured_imbalance


def deployment_of(config: RunConfig, role: Role) -> ExpertDeployment:
    """The charged instance of `role`, with the imbalance that `timing.balance` asks for."""
    layout, balance = config.charged_layout(role), config.timing.balance
    if balance != "measured":
        return with_imbalance(layout, config.charged_shape, config.hardware.fitted, role=role, balance=balance)
    return replace(layout, imbalance=Imbalance.constant(measured_imbalance(config, role)))


def step_time_model(config: RunConfig, role: Role) -> StepTimeModel:
    """The time model of an instance of `role`."""
    return StepTimeModel(
        config.charged_shape,
        config.hardware,
        role=role,
        deployment=deployment_of(config, role),
        microbatch=config.timing.microbatch,
        num_speculative_tokens=config.speculative.num_speculative_tokens,
    )


def step_charge(config: RunConfig, role: Role) -> Callable[[ScheduledBatch], StepTime]:
    """The time of a step of one instance of `role`."""
    model = step_time_model(config, role)
    world_size = config.world_size(role)

    def charge(batch: ScheduledBatch) -> StepTime:
        scheduled = batch.num_scheduled_tokens.astype(np.int64)
        end = batch.num_computed_tokens + scheduled
        # Query token i of a row attends to the tokens before it in the row's context, and to itself.
        context = scheduled * batch.num_computed_tokens + scheduled * (scheduled + 1) // 2
        if role == "prefill":
            return model.decided(
                StepLoad.of_sequence(
                    world_size,
                    num_tokens=int(scheduled.sum()),
                    num_context_tokens=int(context.sum()),
                    num_kv_tokens=int(end.sum()),
                    num_seqs=batch.num_rows,
                    num_samples=int(batch.num_samples.sum()),
                    is_split=model.is_split,
                )
            )
        num_tokens, num_context_tokens, num_kv_tokens, num_samples = batch.sums_by_rank(
            scheduled, context, end, batch.num_samples
        )
        return model.step(
            StepWork(
                num_tokens=num_tokens,
                num_context_tokens=num_context_tokens,
                num_kv_tokens=num_kv_tokens,
                num_seqs=batch.rank_starts[1:] - batch.rank_starts[:-1],
                num_samples=num_samples,
            )
        )

    return charge
