"""Joining a Ray cluster that runs already, and leaving it as it was."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.live.launches import PATIENCE_S, SMALL, eventually, settings

pytestmark = pytest.mark.ray
# What a user's script would do; the cluster's own answer, not ours.
FREE = """
import json, logging, ray
ray.init(address="{}", logging_level=logging.ERROR, log_to_driver=False)
print(json.dumps({{name: ray.available_resources().get(name, 0) for name in ("NPU", "CPU_HOST")}}))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with 3 NPUs and 2 hosts."""
    folder = Path(tempfile.mkdtemp(prefix="sn-", dir="/tmp"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "SPT_NOENV": "1",
        "CLUSTER_OF_A_TEST": folder.name,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=1"]
    command += ["--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=80000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--resources", '{"NPU": 3, "CPU_HOST": 2}']
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=PATIENCE_S)
        yield f"127.0.0.1:{port}"
    finally:
        while processes := [p for p in psutil.process_iter() if is_marked(p, folder.name)]:
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=1)
        shutil.rmtree(folder)


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("CLUSTER_OF_A_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def free(address: str) -> str:
    command = [sys.executable, "-c", FREE.format(address)]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_a_cluster_without_enough_npus_is_refused_with_the_numbers(launch, cluster):
    serve = launch("serve", "laptop", "--port", "0", environment={"RAY_ADDRESS": cluster})
    assert serve.wait() == 2
    assert "has 3 free NPU, 6 are needed" in serve.stderr
    assert "Traceback" not in serve.stderr


def test_a_joined_cluster_is_left_as_it_was(launch, cluster):
    small = settings(*SMALL, "workload.num_requests=3", "workload.output_len=4")
    run = launch("run", "laptop", "--address", cluster, *small)
    assert run.wait() == 0, run.stderr
    assert "Successful requests:                     3" in run.stdout
    eventually(lambda: free(cluster), lambda answer: answer == '{"NPU": 3.0, "CPU_HOST": 2.0}')


def test_nobody_at_the_address(launch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve = launch("serve", "laptop", "--port", "0", "--address", f"127.0.0.1:{port}")
    assert serve.wait() == 2
    assert f"--address: no Ray cluster at '127.0.0.1:{port}'" in serve.stderr
    assert "Traceback" not in serve.stderr
