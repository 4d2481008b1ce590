"""What a run in virtual time is called in its result.

Owns: how a configuration and a workload become the head of a result.
Must not know: how the run is driven. It is apart from what drives runs, so that figures do not import that.
"""

import math
from datetime import datetime

from serving.config import RunConfig
from serving.report import RunInfo
from serving.workloads.workload import Workload


def run_info(config: RunConfig, workload: Workload) -> RunInfo:
    """The head of a result; its date is now."""
    section = config.workload
    return RunInfo(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        backend="simulated",
        model_id=config.model.served_model_name,
        num_prompts=len(workload),
        request_rate=math.inf if section.request_rate == "inf" else section.request_rate,
        burstiness=section.burstiness,
        max_concurrency=section.max_concurrency,
        workload=workload.name,
        workload_digest=workload.digest,
    )
