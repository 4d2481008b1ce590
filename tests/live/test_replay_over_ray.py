"""`replay` over real actors takes the decisions of `simulate`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray


def result_of(verb: str, folder: Path, *options: str) -> dict[str, Any]:
    """Of a small laptop workload; without drafts, whose acceptance `simulate` assumes."""
    result = folder / f"{verb}.json"
    command = [sys.executable, "-m", "serving.cli", verb, "laptop", "--set", "workload.num_requests=6"]
    command += ["--set", "speculative.num_speculative_tokens=0"]
    subprocess.run([*command, "--json", str(result), *options], check=True, stdout=subprocess.DEVNULL, timeout=120)
    values: dict[str, Any] = json.loads(result.read_text())
    assert values["completed"] == 6
    assert set(values["held_at_rest"].values()) == {0}
    return values


def test_replay_and_simulate_give_the_same_digest(tmp_path: Path):
    replayed, simulated = result_of("replay", tmp_path), result_of("simulate", tmp_path, "--digest")
    assert replayed["cluster"]["digest"] == simulated["digest"]
