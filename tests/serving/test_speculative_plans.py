"""Speculative decoding off the devices: configuration, memory, bytes, charged time, drawn acceptance, decisions."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from model.config import ModelConfig
from serving.config_file import load_config
from serving.drafting import DraftState, draft_of
from serving.errors import ConfigError
from serving.local_devices import local_transport
from serving.plan import block_bytes, die_plan
from serving.report import to_json
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload
from tests.drafted import write_drafted_checkpoint

ON = "speculative.num_speculative_tokens=1"
FEW = "workload={num_requests: 8, input_len: 24, output_len: 12, num_prefixes: 2, prefix_len: 16, request_rate: 40}"
ROOT = Path(__file__).parents[2]


def test_a_model_without_an_mtp_module_is_refused_by_name(config_folder):
    values = yaml.safe_load((config_folder / "small.yaml").read_text())
    plain = config_folder / "plain.yaml"
    plain.write_text(yaml.safe_dump(values | {"num_nextn_predict_layers": 0}))
    run = str(config_folder / "colocated.yaml")
    for field in ("model.config", "timing.model"):
        assert load_config(run, (f"{field}={plain}",))
        with pytest.raises(ConfigError, match="num_speculative_tokens: 1 needs an MTP module") as error:
            load_config(run, (f"{field}={plain}", ON))
        source = f"timing.model {plain}" if field == "timing.model" else str(plain)
        assert f"; {source} has num_nextn_predict_layers 0" in str(error.value)


def test_a_checkpoint_without_an_mtp_module_is_refused_by_its_own_file(config_folder, checkpoint, tmp_path):
    values = json.loads((checkpoint / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    run, overrides = config_folder / "bare.yaml", (f"model.checkpoint={tmp_path}", ON)
    content = yaml.safe_load((config_folder / "colocated.yaml").read_text())
    del content["model"]["config"]
    run.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        load_config(str(run), overrides)
    assert f"; {tmp_path}/config.json has num_nextn_predict_layers 0" in str(error.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("speculative.num_speculative_tokens=2", "speculative.num_speculative_tokens"),
        ("speculative.method=ngram", "speculative.method"),
        ("speculative.acceptance=1.5", "speculative.acceptance"),
        ("speculative.k=1", "speculative.k"),
    ],
)
def test_what_is_not_offered_is_refused(override, text):
    with pytest.raises(ConfigError, match=text):
        load_config("laptop", (override,))


def test_every_request_of_a_batch_has_room_for_a_draft():
    sizes = ("instances.decode.max_num_seqs=33", "instances.decode.max_num_batched_tokens=64")
    assert load_config("laptop", sizes)
    with pytest.raises(ConfigError, match=r"decode\.max_num_seqs: 33 requests with a draft each exceed .* 64"):
        load_config("laptop", (*sizes, ON))
    prefill = ("instances.prefill.max_num_seqs=33", "instances.prefill.max_num_batched_tokens=33")
    assert load_config("laptop", (*prefill, ON)).max_step_tokens("prefill") == 33
    assert load_config("laptop", (ON,)).max_step_tokens("decode") == 64  # two rows each, of both model and module
    assert load_config("colocated", (ON,)).max_step_tokens("colocated") == 256 + 16


def test_memory_and_blocks_hold_one_more_layer():
    off, on = load_config("laptop"), load_config("laptop", (ON,))
    assert block_bytes(on) * 61 == block_bytes(off) * 62
    for role in ("prefill", "decode"):
        plans = [die_plan(config, role) for config in (off, on)]
        assert plans[1].memory.cache_bytes * 61 == plans[0].memory.cache_bytes * 62
        more = plans[1].memory.weight_bytes - plans[0].memory.weight_bytes
        # A module is one more mixture block beside 58 of them and 3 dense ones, and a projection.
        assert plans[0].memory.weight_bytes / 62 < more < plans[0].memory.weight_bytes / 20
    for role in ("prefill", "decode"):
        assert die_plan(on, role).memory.buffer_bytes == die_plan(off, role).memory.buffer_bytes


def test_the_hand_over_carries_the_modules_latents_and_one_hidden_state(make_config):
    config = make_config("laptop", "timing.model=model/deepseek-r1.yaml", FEW)
    on = make_config("laptop", "timing.model=model/deepseek-r1.yaml", FEW, ON)
    sizes = []
    for run in (config, on):
        events = run_in_virtual_time(run, load_workload(run), keep_events=True).log.events
        sizes.append({e.subject: dict(e.details)["bytes"] for e in events if e.kind == "kv_transfer"})
    assert len(sizes[0]) == 8
    for request_id, num_bytes in sizes[0].items():
        assert sizes[1][request_id] == num_bytes // 61 * 62 + 4 * 7168


def test_figures_of_a_simulated_run_follow_the_assumed_acceptance(make_config):
    workload = (
        "workload={num_requests: 60, input_len: 24, output_len: 60, num_prefixes: 0, prefix_len: 0, request_rate: 40}"
    )
    tpots = []
    for acceptance in (0.0, 0.7, 1.0):
        config = make_config("laptop", workload, ON, f"speculative.acceptance={acceptance}")
        result = run_in_virtual_time(config, load_workload(config)).bench
        assert result.exit_code == 0
        stats = result.spec_decode
        assert stats.acceptance_rate / 100 == pytest.approx(acceptance, abs=0.05)
        assert to_json(result)["spec_decode_num_drafts"] == stats.num_drafts
        tpots.append(result.summary.simulated["tpot"].mean_ms)
    assert tpots[0] > 1.4 * tpots[1] > 1.5 * tpots[2]
    off = make_config("laptop", workload)
    plain = run_in_virtual_time(off, load_workload(off)).bench
    assert plain.spec_decode is None
    assert tpots[0] > plain.summary.simulated["tpot"].mean_ms > tpots[1]  # a module that guesses nothing costs time


def test_acceptance_is_drawn_by_request(make_config):
    """Not by the batch, nor by the scheduler: the same drafts are right in a crowd and alone."""
    config = make_config("colocated", FEW, ON)
    crowded = run_in_virtual_time(config, load_workload(config)).bench.records
    alone = make_config("colocated", FEW, ON, "workload.max_concurrency=1")
    one_by_one = run_in_virtual_time(alone, load_workload(alone)).bench.records
    chunks = [[len(record.simulated.itl_ns) for record in records] for records in (crowded, one_by_one)]
    assert chunks[0] == chunks[1]
    assert len(set(chunks[0])) > 1


def test_no_draw_depends_on_the_seed_of_pythons_hashes():
    script = (
        "from serving.config_file import load_config\n"
        "from serving.simulator import run_in_virtual_time\n"
        "from serving.workloads.load import load_workload\n"
        f"config = load_config('laptop', ['workload.num_requests=20', '{ON}'])\n"
        "print(run_in_virtual_time(config, load_workload(config)).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4242")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["laptop", "laptop-2p2d", "colocated"])
def test_simulate_and_replay_decide_alike_if_all_drafts_are_right(make_config, checkpoint, tmp_path, name):
    """Acceptance is the model's own in `replay`, and assumed in `simulate`; where both are 1, so are the decisions."""
    write_drafted_checkpoint(tmp_path, ModelConfig.from_file(checkpoint / "config.json"))
    config = make_config(name, FEW, ON, "speculative.acceptance=1")
    workload = load_workload(config)
    simulated = run_in_virtual_time(config, workload, keep_events=True)
    replayed = run_in_virtual_time(
        config, workload, open_transport=lambda: local_transport(config, tmp_path), keep_events=True
    )
    assert simulated.log.events == replayed.log.events
    assert simulated.digest == replayed.digest
    assert simulated.bench.spec_decode == replayed.bench.spec_decode
    assert simulated.bench.spec_decode.acceptance_rate == 100


def test_an_outdated_draft_is_not_verified():
    class Row:
        request_id = "r0"
        drafting = DraftState(num_computed_tokens=7, draft=42, hidden=None)

    assert draft_of(Row, 7) == 42
    with pytest.raises(AssertionError, match="outdated"):
        draft_of(Row, 8)
    Row.drafting = dataclasses.replace(Row.drafting, draft=None, hidden=np.zeros(4, np.float32))
    with pytest.raises(AssertionError, match="no draft was made"):
        draft_of(Row, 7)
    Row.drafting = None
    with pytest.raises(AssertionError, match="never made"):
        draft_of(Row, 7)
