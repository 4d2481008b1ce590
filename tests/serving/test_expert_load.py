"""The measured load of experts: its file, the placement made by it, and what a run exports."""

import json

import numpy as np
import pytest

from serving.build import rank_layouts
from serving.errors import ConfigError
from serving.expert_load import ExpertLoad, read_total_load
from serving.local_devices import local_transport
from serving.placement import place_experts, rank_imbalance
from serving.plan import format_plan
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload

LAYERS, EXPERTS = 2, 16  # of the tests' small model
BUSY = ((3, 7, 11, 15), (0, 1, 2, 4))  # in each layer
REDUNDANT = "instances.decode.num_redundant_experts=4"


@pytest.fixture
def skewed(tmp_path):
    """A load file in which four experts of each layer get ten times the others' tokens."""
    load = np.full((LAYERS, EXPERTS), 10)
    for layer, experts in enumerate(BUSY):
        load[layer, list(experts)] = 100
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"total": load.tolist()}))
    return path


def placed_by(path):
    return f"model.expert_load={path}"


def test_the_redundant_experts_are_the_busiest(make_config, skewed):
    config = make_config("disaggregated", REDUNDANT, placed_by(skewed))
    for layout in rank_layouts(config, "decode"):
        copies = np.array([np.bincount(row, minlength=EXPERTS) for row in layout.physical_to_logical])
        assert [tuple(np.flatnonzero(row == 2)) for row in copies] == list(BUSY)
        assert copies.sum() == LAYERS * (EXPERTS + 4)


def test_without_a_file_the_load_is_taken_as_uniform(make_config):
    config = make_config("disaggregated", REDUNDANT)
    copies = place_experts(config, "decode").num_copies
    assert [tuple(np.flatnonzero(row == 2)) for row in copies] == [(0, 1, 2, 3)] * LAYERS
    assert rank_imbalance(config, "decode") is None
    assert "imbalance" not in format_plan(config)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (REDUNDANT,),
        ("instances.prefill.num_redundant_experts=2", "instances.decode.npus=4", REDUNDANT),
        (
            "instances.decode.shared_expert=dispatched",
            "instances.decode.num_shared_expert_copies=2",
            "instances.decode.num_redundant_experts=2",
        ),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_placement(make_config, checkpoint, skewed, overrides):
    def tokens(*more):
        config = make_config("disaggregated", *overrides, *more, "workload.num_requests=5")
        transport = local_transport(config, checkpoint)
        return run_in_virtual_time(config, load_workload(config), open_transport=lambda: transport).token_ids

    assert tokens(placed_by(skewed)) == tokens()


def test_the_plan_tells_what_the_measured_load_is_good_for(make_config, skewed):
    config = make_config("disaggregated", REDUNDANT, "instances.decode.npus=4", placed_by(skewed))
    imbalance = rank_imbalance(config, "decode")
    assert imbalance is not None
    assert 1 <= imbalance.measured < imbalance.uniform
    assert (
        f"busiest rank {imbalance.uniform:.2f} x the mean under the measured expert load with a uniform placement, "
        f"{imbalance.measured:.2f} x with this one"
    ) in format_plan(config)


def test_shared_copies_count_as_load_of_their_ranks(make_config, skewed):
    shared = ("instances.decode.shared_expert=dispatched", "instances.decode.num_shared_expert_copies=2")
    config = make_config("disaggregated", *shared, "instances.decode.num_redundant_experts=6", placed_by(skewed))
    imbalance = rank_imbalance(config, "decode")
    assert imbalance is not None
    assert 1 <= imbalance.measured <= imbalance.uniform


def test_a_file_next_to_the_configuration_is_found(config_folder, skewed, tmp_path):
    from serving.config_file import load_config

    text = (config_folder / "disaggregated.yaml").read_text().replace("config: small.yaml", "expert_load: load.json")
    text = text.replace("model:\n", f"model:\n  config: {config_folder / 'small.yaml'}\n", 1)
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(str(tmp_path / "run.yaml")).expert_load.sum() == 2 * (4 * 100 + 12 * 10)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("No such file",)),
        ("{", ("not valid JSON",)),
        ("[]", ("total", "found list")),
        ('{"kinds": {}}', ("total", "found keys kinds")),
        ('{"total": [[1, 2], [3]]}', ("total", "rows of numbers")),
        ('{"total": 5}', ("total", "expected 2 x 16", "found a single value")),
        (json.dumps({"total": np.ones((4, 16)).tolist()}), ("expected 2 x 16", "small.yaml", "found 4 x 16")),
        (json.dumps({"total": np.full((2, 16), -1).tolist()}), ("total", "negative")),
        (json.dumps({"total": np.full((2, 16), np.nan).tolist()}), ("total", "no number")),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_was_expected(make_config, tmp_path, content, words):
    path = tmp_path / "load.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        make_config("disaggregated", placed_by(path))
    assert all(word in str(refusal.value) for word in (f"model.expert_load: {path}: ", *words))


def test_a_run_exports_the_load_of_every_instance_and_can_be_placed_by_it(make_config, checkpoint, tmp_path):
    config = make_config("disaggregated", "workload.num_requests=4", "kv_pool.enabled=false")
    workload = load_workload(config)
    transport = local_transport(config, checkpoint)
    bench = run_in_virtual_time(config, workload, open_transport=lambda: transport).bench
    assert bench.expert_load is not None
    top_k = config.shape.num_experts_per_tok
    num_prompt = sum(request.num_prompt_tokens for request in workload.requests)
    num_decoded = sum(request.max_tokens - 1 for request in workload.requests)  # prefill gives the first
    for instance_id, num_tokens in (("prefill-0", num_prompt), ("decode-0", num_decoded)):
        load = np.array(bench.expert_load["instances"][instance_id])
        assert load.sum(axis=1).tolist() == [num_tokens * top_k] * LAYERS
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"expert_load": bench.expert_load}))
    total = read_total_load(str(path), config.shape, model_name="small.yaml")
    assert total.sum() == (num_prompt + num_decoded) * top_k * LAYERS


def test_timing_shards_have_no_load(make_config):
    config = make_config("disaggregated", "workload.num_requests=2")
    assert run_in_virtual_time(config, load_workload(config)).bench.expert_load is None


def test_the_file_has_every_part_and_their_sum(make_config):
    shape = make_config("disaggregated").shape
    parts = {"clock": np.full((LAYERS, EXPERTS), 2), "story": np.full((LAYERS, EXPERTS), 3)}
    values = json.loads(json.dumps(ExpertLoad(shape=shape, divided_by="kinds", parts=parts).as_json()))
    assert list(values) == ["num_layers", "num_experts", "top_k", "first_layer", "kinds", "total"]
    assert (values["num_layers"], values["num_experts"], values["top_k"], values["first_layer"]) == (2, 16, 4, 1)
    assert values["total"] == np.full((LAYERS, EXPERTS), 5).tolist()
