"""`supernode verify` over real actors: both sides have the same figures to compare, and the reasons are measured."""

import json
from pathlib import Path

import pytest

from tests.live.launches import SMALL, noise, settings

pytestmark = pytest.mark.ray
FEW = "workload={num_requests: 6, input_len: 40, output_len: 8, prefix_len: 16, request_rate: 8}"


def test_predicted_and_observed_stand_side_by_side(launch, tmp_path: Path):
    result = tmp_path / "result.json"
    verify = launch("verify", "laptop", "--scale", "2", "--json", str(result), *settings(*SMALL, FEW))
    assert verify.wait() == 0, verify.stderr
    assert noise(verify.stderr) == []
    assert "0 of 6 other than predicted" in verify.stdout
    values = json.loads(result.read_text())
    reasons = values["reasons"]
    assert values["failures"] == []
    assert values["num_within"] <= values["num_figures"] == len(values["figures"]) == 20
    figures = {figure["name"]: figure for figure in values["figures"]}
    assert figures["preemptions"]["observed"] == 0
    for name in ("TTFT mean (ms)", "TPOT mean (ms)", "ITL mean (ms)", "E2EL mean (ms)", "decode-0 mean batch"):
        assert figures[name]["predicted"] > 0
        assert figures[name]["observed"] > 0
    # Whatever the machine did: a decode step never lasts less than that of the smallest batch.
    assert figures["TPOT mean (ms)"]["observed"] > 0.9 * figures["TPOT mean (ms)"]["predicted"]
    assert (reasons["num_requests"], reasons["num_other_lengths"]) == (6, 0)
    assert 0 <= reasons["hold_lag_s"] <= reasons["lag_s"] < reasons["wall_s"]
    assert reasons["http_ttft_s"] > 0
    if (
        reasons["num_same_events"] == reasons["num_events"]
    ):  # nearly always: see tests/serving/simulation/test_verify.py
        assert all(figure["rest"] == pytest.approx(0, abs=1e-5) for figure in values["figures"])
