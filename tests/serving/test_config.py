"""Configurations: every shipped one loads, and every mistake is told by file, key, value and limit."""

import copy
import json
import math
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.spec import SupernodeSpec
from model.config import ModelConfig
from serving.build import build_cluster, host_plans, npu_worker_plans
from serving.config_file import load_config, load_part, presets, shipped_checkpoints
from serving.core.event_log import EventLog
from serving.errors import ConfigError
from serving.plan import check_plan, format_plan

CONFIGS = Path(str(resources.files("configs")))
PRESETS = ["colocated", "laptop", "laptop-2p2d"]


def refusal(*overrides: str, name: str = "laptop") -> str:
    """What the loader says against a preset with overrides."""
    with pytest.raises(ConfigError) as error:
        load_config(name, overrides)
    prefix = f"{name}: "
    assert str(error.value).startswith(prefix)
    return str(error.value).removeprefix(prefix)


def write(folder: Path, content: object, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


SHIPPED = shipped_checkpoints()["mini-r1"]


def preset(name: str = "laptop") -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_the_presets_that_are_promised_are_there():
    assert presets() == ["cloudmatrix384", "cloudmatrix384-full", "colocated", "h800-ep144", "laptop", "laptop-2p2d"]


@pytest.mark.parametrize("name", presets())
def test_every_shipped_run_loads_and_can_be_built(name):
    config = load_config(name)
    assert check_plan(config)
    assert all(role in format_plan(config) for role in config.instances)
    cluster = build_cluster(config, clock=None, log=EventLog(), transport=None)
    assert len(cluster.all_engines) == sum(section.count for section in config.instances.values())
    workers = [plan for plans in npu_worker_plans(config, Path("weights")).values() for plan in plans]
    assert sum(len(plan.npus) for plan in workers) == config.total_npus
    assert len(host_plans(config)) == (config.kv_pool.hosts if config.kv_pool.enabled else 0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_model_loads(path):
    assert ModelConfig.from_dict(load_part(f"model/{path.name}")).num_hidden_layers


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("hardware/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_machine_loads(path):
    assert SupernodeSpec.from_dict(load_part(f"hardware/{path.name}")).num_npus


def keys_of(content: object, path: tuple = ()) -> list[tuple]:
    """The paths of all keys of nested mappings."""
    if not isinstance(content, dict):
        return []
    return [found for key, value in content.items() for found in ((*path, key), *keys_of(value, (*path, key)))]


@given(data=st.data(), typo=st.sampled_from(["x{}", "{}_", "{}s", "{0}.{0}", ""]))
@settings(max_examples=60, derandomize=True, deadline=None)
@pytest.mark.parametrize("name", PRESETS)
def test_a_typo_in_any_key_is_refused(name, tmp_path_factory, data, typo):
    content = preset(name)
    path = data.draw(st.sampled_from(keys_of(content)))
    target = content
    for key in path[:-1]:
        target = target[key]
    wrong = typo.format(path[-1])
    target[wrong] = target.pop(path[-1])
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path_factory.mktemp("typo"), content))
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # roles
        (
            "instances.decode=null",
            "instances.decode: input should be a valid dictionary or instance of InstanceSection",
        ),
        ("instances={}", "instances: roles are none; needs prefill and decode, or colocated alone"),
        ("instances.worker={npus: 1}", "instances.worker: input should be 'prefill', 'decode' or 'colocated'"),
        ("instances.decode.count=0", "instances.decode.count: input should be greater than 0, got 0"),
        ("instances.prefill.npus=0", "instances.prefill.npus: input should be greater than 0, got 0"),
        # what must divide
        (
            "instances.decode.npus=3",
            "instances.decode.num_redundant_experts: 4 makes 20 physical experts, which do not divide by 3 ranks",
        ),
        (
            "instances.decode.shared_expert=dispatched",
            "instances.decode.num_redundant_experts: 4 makes 21 physical experts, which do not divide by 4 ranks",
        ),
        ("instances.prefill.npus=3", "instances.prefill.npus: 8 attention heads do not divide by 3 ranks"),
        # what must fit
        (
            "instances.decode.num_blocks=100000",
            "instances.decode.num_blocks: 100000 blocks need 104.7 GiB; with 17.8 GiB of weights and 0.4 GiB of "
            "buffers that is 122.9 of 59.6 GiB of HBM; 39552 blocks fit",
        ),
        (
            "instances.decode.num_blocks=8",
            "instances.decode.num_blocks: 8 blocks of 16 tokens hold 128, less than model.max_model_len 1024",
        ),
        ("instances.decode.max_num_seqs=65", "instances.decode.max_num_seqs: 65 exceeds max_num_batched_tokens 64"),
        (
            "workload.output_len=1000",
            "workload.input_len: 128 + output_len 1000, up to 1410 tokens with range_ratio 0.25, exceeds "
            "model.max_model_len 1024",
        ),
        ("workload.prefix_len=128", "workload.prefix_len: 128 must be below input_len 128"),
        ("instances.decode.count=300", "instances: 1202 NPUs, cloudmatrix384 has 384"),
        (
            "instances.decode.count=90",
            "instances: 91 nodes of 8 NPUs, since each instance begins on a node of its own; cloudmatrix384 has 48",
        ),
        ("instances.decode.dies_per_npu=3", "instances.decode.dies_per_npu: input should be less than or equal to 2"),
        ("kv_pool.hosts=193", "kv_pool.hosts: 193, cloudmatrix384 has 192"),
        (
            "kv_pool.dram_bytes_per_host=512000000001",
            "kv_pool.dram_bytes_per_host: 512000000001 exceeds the host's DRAM",
        ),
        ("kv_pool.dram_bytes_per_host=1000", "kv_pool.dram_bytes_per_host: 1000 holds not one block of 1124352 bytes"),
        (
            "timing.represents.decode={ep: 32, num_shared_expert_copies: 32}",
            "timing.represents.decode.num_shared_expert_copies: 32 must be below ep 32",
        ),
        # types and ranges
        ("cache.block_size=true", "cache.block_size: input should be a valid integer, got True"),
        ("cache.block_size=1.5", "cache.block_size: input should be a valid integer, got 1.5"),
        ("cache.block_size='16'", "cache.block_size: input should be a valid integer, got '16'"),
        ("clock.scale=true", "clock.scale: input should be a valid number, got True"),
        ("clock.scale=.nan", "clock.scale: input should be a finite number, got nan"),
        ("clock.scale=.inf", "clock.scale: input should be a finite number, got inf"),
        ("clock.scale=-1", "clock.scale: input should be greater than or equal to 0, got -1"),
        ("workload.range_ratio=.nan", "workload.range_ratio: input should be less than 1, got nan"),
        (
            "workload.request_rate=fast",
            "workload.request_rate: input should be a valid number or input should be 'inf', got 'fast'",
        ),
        ("workload.request_rate=-.inf", "workload.request_rate: input should be a finite number or"),
        ("kv_pool.enabled=1", "kv_pool.enabled: input should be a valid boolean, got 1"),
        ("kv_pool.lease_s=1.0e-12", "kv_pool.lease_s: input should be greater than or equal to 0.000001, got 1e-12"),
        ("model.served_model_name=7", "model.served_model_name: input should be a valid string, got 7"),
        ("server.port=70000", "server.port: input should be less than or equal to 65535, got 70000"),
        ("router.policy=best", "router.policy: input should be 'least_loaded', 'round_robin', 'power_of_two' or"),
        ("scheduler.policy=lifo", "scheduler.policy: input should be 'fcfs' or 'priority', got 'lifo'"),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("seed=", "seed: input should be a valid integer, got None"),
        ("workload=7", "workload: input should be a valid dictionary or instance of WorkloadSection, got 7"),
        # parts
        ("model.config=nowhere.yaml", "no part 'nowhere.yaml': neither a file nor shipped"),
        ("model.checkpoint=nowhere", "model.checkpoint: 'nowhere' is not a directory, nor 'random'"),
        ("timing.hardware=model/mini-r1.yaml", "model/mini-r1.yaml: npu: missing"),
        ("timing.model=hardware/cloudmatrix384.yaml", "hardware/cloudmatrix384.yaml: "),
        # the syntax of an override
        ("seed", "--set 'seed': expected a.b=value"),
        ("=3", "--set '=3': expected a.b=value"),
        ("seed=[", "--set 'seed=[': '[' is not a YAML value"),
        ("model.checkpoint.x=1", "--set 'model.checkpoint.x=1': 'checkpoint' is not a section"),
        ("seed={a: 1, a: 2}", "line 1: duplicate key 'a'"),
        ("seed={[a]: 1}", "line 1: ['a'] cannot be a key"),
        ("nonsense.x=1", "nonsense: unknown key"),
        ("model.color=red", "model.color: unknown key"),
    ],
)
def test_a_mistake_is_told_by_key_value_and_limit(override, message):
    assert refusal(override).startswith(message)


def test_a_context_beyond_the_models_positions_is_refused():
    blocks = [f"instances.{role}.num_blocks=1024" for role in ("prefill", "decode")]
    message = refusal("model.max_model_len=8192", *blocks)
    assert message == f"model.max_model_len: 8192 exceeds max_position_embeddings 4096 of {SHIPPED}/config.json"


def test_a_die_that_the_machine_does_not_have_is_refused(tmp_path):
    hardware = yaml.safe_load((CONFIGS / "hardware" / "cloudmatrix384.yaml").read_text())
    hardware["npu"]["num_dies"] = 1
    path = write(tmp_path, hardware, "single.yaml")
    message = refusal(
        f"timing.hardware={path}", "instances.decode.dies_per_npu=2", "instances.decode.num_redundant_experts=0"
    )
    assert message == "instances.decode.dies_per_npu: 2, an NPU of cloudmatrix384 has 1"


def test_a_dispatched_shared_expert_needs_exactly_one(tmp_path):
    model = yaml.safe_load((CONFIGS / "model" / "mini-r1.yaml").read_text()) | {"n_shared_experts": 2}
    path = write(tmp_path, model, "two.yaml")
    message = refusal(f"model.config={path}", "instances.decode.shared_expert=dispatched")
    assert message == f"instances.decode.shared_expert: dispatched needs n_shared_experts 1, {path} has 2"


def test_all_mistakes_of_one_kind_are_told_at_once():
    message = refusal("seed=-1", "model.color=red", "clock.scale=x")
    assert [part.partition(":")[0] for part in message.split("; ")] == ["model.color", "clock.scale", "seed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping, not NoneType"),
        ("- 1\n- 2\n", "must hold a mapping, not list"),
        ("model: {config: a", "not valid YAML"),
        ("model: *nobody", "not valid YAML"),
        ("seed: !!python/object:os.system {}", "not valid YAML"),
        ("seed: 1\nclock: {scale: 1}\nseed: 2\n", "line 3: duplicate key 'seed'"),
        ("clock:\n  scale: 1\n  scale: 2\n", "line 3: duplicate key 'scale'"),
        ("? [seed]\n: 1\n", "line 1: ['seed'] cannot be a key"),
        ("1: 2\n", "model: field required"),
        ("seed: 2020-13-45\n", "month must be in 1..12"),
        ("\x00", "not valid YAML"),
        ("seed: " + "[" * 5000, "not valid YAML: maximum recursion depth"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path / "folder.yaml"):
        if path.stem == "folder":
            path.mkdir()
        with pytest.raises(ConfigError, match=rf"^{path}: (No such file|Is a directory)"):
            load_config(str(path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml: .*codec can't decode"):
        load_config(str(tmp_path / "binary.yaml"))
    with pytest.raises(ConfigError, match=r"^lap: no such preset; there are .*laptop.*; a file must end in .yaml$"):
        load_config("lap")


def test_a_part_that_cannot_be_read_is_refused(tmp_path):
    path = write(tmp_path, "hidden_size: [", "broken.yaml")
    assert refusal(f"model.config={path}").startswith(f"{path}: not valid YAML")
    model = yaml.safe_load((CONFIGS / "model" / "mini-r1.yaml").read_text())
    for key, value, message in (
        ("hidden_size", None, "hidden_size: None is not an integer"),
        ("hidden_size", -3, "hidden_size: -3 is below 1"),
        ("color", "red", "color: unknown key"),
        (7, "red", ""),
    ):
        path = write(tmp_path, model | {key: value}, "model.yaml")
        assert refusal(f"model.config={path}").startswith(f"{path}: {message}")


def test_parts_are_found_beside_the_file_first_and_then_among_the_shipped(tmp_path):
    folder = tmp_path / "elsewhere"
    (folder / "model").mkdir(parents=True)
    content = preset()
    content["model"] |= {"checkpoint": "random", "config": "model/mini-r1.yaml"}
    path = write(folder, content)
    assert load_config(path).shape.num_hidden_layers == 5
    model = yaml.safe_load((CONFIGS / "model" / "mini-r1.yaml").read_text())
    write(folder / "model", model | {"num_hidden_layers": 4}, "mini-r1.yaml")
    config = load_config(path)
    assert (config.shape.num_hidden_layers, config.charged_shape.num_hidden_layers) == (4, 61)
    assert load_config(path, ["model.config=model/deepseek-r1.yaml"]).shape.num_hidden_layers == 61
    # The same from another working directory: paths are the file's, not the shell's.
    script = f"from serving.config_file import load_config; print(load_config({path!r}).shape.num_hidden_layers)"
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "4"


def test_a_checkpoint_is_found_beside_the_file(tmp_path):
    (tmp_path / "weights").mkdir()
    content = preset()
    content["model"]["checkpoint"] = "weights"
    assert load_config(write(tmp_path, content)).model.checkpoint == str(tmp_path / "weights")


def test_a_checkpoint_brings_its_shape_and_a_shipped_one_has_a_name(tmp_path):
    config = load_config("laptop")
    assert config.model.checkpoint == str(SHIPPED)
    assert config.shape == ModelConfig.from_file(SHIPPED / "config.json")
    shape = json.loads((SHIPPED / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert load_config("laptop", [f"model.checkpoint={tmp_path}"]).shape.num_hidden_layers == 3
    assert "nor shipped (mini-r1)" in refusal("model.checkpoint=mini-r2")


def test_overrides_are_applied_in_order_and_before_the_checks():
    config = load_config("laptop", ["seed=3", "seed=4", "instances.decode.npus=2", "workload.request_rate=inf"])
    assert (config.seed, config.world_size("decode"), config.workload.request_rate) == (4, 2, "inf")


def test_nothing_changes_after_loading():
    config = load_config("laptop")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        config.instances["decode"].count = 2
    other = config.with_port(1234)
    assert (config.server.port, other.server.port, other.shape) == (8000, 1234, config.shape)


COUNTS = st.sampled_from([1, 2, 3, 4, 8, 16, 31])


@given(
    role=st.sampled_from(["prefill", "decode"]),
    section=st.fixed_dictionaries(
        {},
        optional={
            "count": COUNTS,
            "npus": COUNTS,
            "dies_per_npu": st.sampled_from([1, 2, 3]),
            "num_redundant_experts": st.integers(0, 40),
            "shared_expert": st.sampled_from(["local", "dispatched"]),
            "num_shared_expert_copies": st.integers(1, 40),
            "max_num_seqs": st.integers(1, 64),
            "max_num_batched_tokens": st.integers(1, 64),
        },
    ),
    is_scaled=st.booleans(),
)
@settings(max_examples=80, derandomize=True, deadline=None)
def test_whatever_loads_can_be_built_and_charged(role, section, is_scaled, tmp_path_factory):
    """No mistake is left for the boot to find: a configuration is refused when it is loaded, or it works."""
    content = copy.deepcopy(preset())
    content["instances"][role] |= section
    if not is_scaled:  # charged at the live size, for a model that fits
        content["timing"] |= {"represents": {}, "model": "model/mini-r1.yaml"}
    try:
        config = load_config(write(tmp_path_factory.mktemp("any"), content))
    except ConfigError:
        return
    cluster = build_cluster(config, clock=None, log=EventLog(), transport=None)
    npu_worker_plans(config, Path("weights"))
    for name, engines in cluster.engines.items():
        scheduler = engines[0].scheduler
        scheduler.add(request_id="r", rank=0, num_tokens=5, total_limit=7, priority=0, order=0)
        cost = engines[0]._charge(scheduler.schedule())
        assert 0 < cost.ns < 10**10, name
        assert math.isfinite(cost.ns)
