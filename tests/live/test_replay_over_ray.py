"""`replay` over real actors takes the decisions of `simulate`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def digest(verb: str, folder: Path) -> str:
    """Event digest of a small laptop workload; without drafts, whose acceptance `simulate` assumes."""
    result = folder / f"{verb}.json"
    command = [sys.executable, "-m", "serving.cli", verb, "laptop", "--set", "workload.num_requests=6"]
    command += ["--set", "speculative.num_speculative_tokens=0"]
    subprocess.run([*command, "--json", str(result)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    values = json.loads(result.read_text())
    assert values["completed"] == 6
    assert set(values["held_at_rest"].values()) == {0}
    return str(values["cluster"]["digest"])


def test_replay_and_simulate_give_the_same_digest(tmp_path: Path):
    assert digest("replay", tmp_path) == digest("simulate", tmp_path)
