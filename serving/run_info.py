"""What a run in virtual time is called in its result.

Owns: how a configuration and a workload become the head of a result.
Must not know: how the run is driven. It is apart from what drives runs, so that figures do not import that.
"""

import math
from datetime import datetime

from serving.config import RunConfig
from serving.report import RunInfo
from serving.workloads.workload import Workload


def mean_rate(workload: Workload) -> float:
    """Requests per second until the last one arrives; infinite if all come at once, or as others end."""
    arrival_ns = workload.arrival_ns
    last_ns = 0 if arrival_ns is None or not len(arrival_ns) else int(arrival_ns[-1])
    return len(workload) / (last_ns / 1e9) if last_ns else math.inf


def run_info(config: RunConfig, workload: Workload) -> RunInfo:
    """The head of a result; its date is now, its rate the workload's own, which no configuration knows of a trace."""
    section = config.workload
    return RunInfo(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        backend="simulated",
        model_id=config.model.served_model_name,
        num_prompts=len(workload),
        request_rate=mean_rate(workload),
        burstiness=section.burstiness,
        max_concurrency=section.max_concurrency,
        workload=workload.name,
        workload_digest=workload.digest,
    )
