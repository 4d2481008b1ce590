"""The full-size presets: published layouts and memory, what fits and what does not, and that they are simulated."""

import subprocess
import sys

import pytest

from serving.config_file import load_config
from serving.errors import ConfigError
from serving.plan import check_plan, die_plan, format_plan, requests_that_fit
from serving.ray_devices import check_random_weights
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload

FULL_SIZE = ["cloudmatrix384", "cloudmatrix384-full", "h800-ep144"]
MIB = 2**20


@pytest.mark.parametrize(
    ("name", "num_npus", "num_nodes", "instances"),
    [
        # arXiv 2506.12708v2, section 5.1: 1 x 160 NPUs = 320 dies, 6 x 16 = 32 dies each
        ("cloudmatrix384", 256, 32, {"prefill": (6, 32), "decode": (1, 320)}),
        ("cloudmatrix384-full", 384, 48, {"prefill": (4, 32), "decode": (2, 320)}),
        # deepseek-ai/open-infra-index, day 6: units of 4 and of 18 nodes
        ("h800-ep144", 240, 30, {"prefill": (3, 32), "decode": (1, 144)}),
    ],
)
def test_the_published_instances(name, num_npus, num_nodes, instances):
    config = load_config(name)
    assert config.total_npus == num_npus
    assert {role: (s.count, config.world_size(role)) for role, s in config.instances.items()} == instances
    assert f"on {num_nodes} of {config.hardware.num_nodes} nodes" in format_plan(config)
    assert config.shape == config.charged_shape
    assert not config.timing.represents  # every rank is charged as what it is


@pytest.mark.parametrize(
    ("name", "role", "line"),
    [
        # 8 routed, 1 redundant and 1 shared expert; one expert of 256 + 32 + 32; 2 routed and 1 shared
        ("cloudmatrix384", "prefill", "10 per rank: 256 routed + 32 redundant over 32 ranks, shared expert on every"),
        (
            "cloudmatrix384",
            "decode",
            "1 per rank: 256 routed + 32 redundant over 320 ranks, shared expert in 32 copies",
        ),
        ("h800-ep144", "prefill", "10 per rank: 256 routed + 32 redundant over 32 ranks, shared expert on every rank"),
        ("h800-ep144", "decode", "3 per rank: 256 routed + 32 redundant over 144 ranks, shared expert on every rank"),
    ],
)
def test_the_published_experts_per_die(name, role, line):
    _, _, text = format_plan(load_config(name)).partition(f"\n{role}: ")
    experts = text.splitlines()[1]
    assert experts.startswith(f"  experts    {line}")
    assert experts.endswith(f"; charged {line.split()[0]} per die")


def test_the_published_buffers_of_a_decode_die():
    """arXiv 2506.12708v2, section 4.2.1: local batch 96 over 320 ranks, 225 + 420 MB; section 5.1: 48 requests."""
    memory = die_plan(load_config("cloudmatrix384"), "decode").memory
    assert memory.buffer_bytes == (225 + 420) * MIB


def test_the_weights_of_a_die():
    """By hand, 10^9 parameters, INT8 but for BF16 embedding and head: attention of 61 layers 11.41, three dense layers
    1.19, one expert of 58 layers 2.55, gates 0.11 x 2, embedding and head 0.93 x 2 x 2; then the MTP module.
    """
    memory = die_plan(load_config("cloudmatrix384", ["speculative.num_speculative_tokens=0"]), "decode").memory
    assert memory.weight_bytes / 1e9 == pytest.approx(11.41 + 1.19 + 2.55 + 0.21 + 3.71, rel=0.002)
    with_mtp = die_plan(load_config("cloudmatrix384"), "decode").memory
    # attention 0.187, an expert 0.044, 2 x 7,168^2 of the projection
    assert (with_mtp.weight_bytes - memory.weight_bytes) / 1e9 == pytest.approx(0.187 + 0.044 + 0.103 + 0.004, rel=0.01)


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_kv_space_is_near_the_most_that_fits(name, role):
    config = load_config(name)
    section = config.instances[role]
    plan = die_plan(config, role)
    assert 0.94 * plan.hbm_bytes < plan.memory.used_bytes < plan.hbm_bytes
    with pytest.raises(ConfigError, match=rf"instances\.{role}\.num_blocks: {section.num_blocks * 2} blocks") as error:
        load_config(name, [f"instances.{role}.num_blocks={section.num_blocks * 2}"])
    most = int(str(error.value).split()[-3])
    assert str(error.value).endswith(f"GiB of HBM; {most} blocks fit")
    assert section.num_blocks < most < 1.12 * section.num_blocks
    step = config.world_size(role) if (name, role) == ("h800-ep144", "prefill") else 1  # one more on each GPU
    assert load_config(name, [f"instances.{role}.num_blocks={most}"])
    with pytest.raises(ConfigError, match=r"blocks fit$"):
        load_config(name, [f"instances.{role}.num_blocks={most + step}"])


def test_what_limits_a_batch():
    config = load_config("cloudmatrix384", ["workload.range_ratio=0.0"])
    # 64 prompts of 4,096 are 16,384 tokens for each of 16 NPUs; 8 blocks hold a prompt, 9 one with 256 tokens more
    assert requests_that_fit(config, "prefill") == {
        "num_blocks": 560 // 8,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 1024,
    }
    assert requests_that_fit(config, "decode") == {"num_blocks": 1150 // 9, "max_num_seqs": 48}
    text = format_plan(config)
    assert "64 of 4096 tokens a step, by max_num_batched_tokens" in text
    assert "48 of 4096 + 256 tokens per rank, by max_num_seqs (others allow: num_blocks 127)" in text
    long = format_plan(load_config("cloudmatrix384", ["workload.input_len=16384", "workload.output_len=4096"]))
    assert "16 of 16384 tokens a step, by max_num_batched_tokens (others allow: num_blocks 17," in long
    assert "28 of 16384 + 4096 tokens per rank, by num_blocks (others allow: max_num_seqs 48)" in long


def test_the_pool_is_on_the_hosts_of_the_nodes_in_use():
    """256 GB for blocks of 512 tokens x 62 layers x 576 x 2 bytes."""
    blocks = 256_000_000_000 // (512 * 62 * 576 * 2)
    assert blocks == 7000
    for name, num_nodes in (("cloudmatrix384", 32), ("cloudmatrix384-full", 48)):
        hosts = num_nodes * 4
        line = f"pool: {hosts} hosts x 238.4 GiB = {hosts * 7000} blocks of 34.88 MiB, {hosts * 7000 * 512} tokens, "
        assert line in format_plan(load_config(name))
    assert "pool: none" in format_plan(load_config("h800-ep144"))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "h800-ep144",
            "kv_pool.enabled=true",
            "kv_pool.enabled: true, but plane ub of h800 does not reach the hosts of other nodes",
        ),
        (
            "h800-ep144",
            "instances.prefill.num_blocks=80000",
            "instances.prefill.num_blocks: 80000 blocks over 32 dies, each with prompts of its own, leave one 160000 "
            "tokens, less than model.max_model_len 163840",
        ),
        ("cloudmatrix384-full", "instances.prefill.count=5", "instances: 400 NPUs, cloudmatrix384 has 384"),
        (
            "cloudmatrix384",
            "instances.decode.num_redundant_experts=31",
            "instances.decode.num_redundant_experts: 31 makes 319 physical experts, which do not divide by 320 ranks",
        ),
        (
            "cloudmatrix384",
            "model.max_model_len=163841",
            "model.max_model_len: 163841 exceeds max_position_embeddings 163840 of model/deepseek-r1.yaml",
        ),
        (
            "cloudmatrix384",
            "instances.decode.max_num_seqs=49",
            "instances.decode.max_num_seqs: 49 requests with a draft each exceed max_num_batched_tokens 96",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(name, [override])
    assert str(error.value) == f"{name}: {message}"


def test_one_prefill_instance_and_fourteen_fit_too():
    """The other split of 48 nodes, which the file names."""
    other = ["instances.decode.count=1", "instances.prefill.count=14"]
    assert load_config("cloudmatrix384-full", other).total_npus == 384
    average = load_config("h800-ep144", ["instances.prefill.count=24", "instances.decode.count=7"])
    assert average.total_npus == 222 * 8
    assert check_plan(average)


@pytest.mark.parametrize(
    ("name", "num_npus", "num_hosts"), [("cloudmatrix384", 256, 128), ("h800-ep144", 240, 0)], ids=["cm384", "h800"]
)
def test_weights_too_large_to_make_up_are_refused(name, num_npus, num_hosts, monkeypatch):
    """A copy in float32 is 2,684 GB; nothing of the kind is written or started."""
    config = load_config(name)
    monkeypatch.setattr("serving.ray_devices.machine_memory_bytes", lambda: 2_684_000_000_000)
    with pytest.raises(ConfigError) as error:
        check_random_weights(config)
    assert str(error.value) == (
        "model.checkpoint: random weights of 671 G parameters, 2,684 GB in float32, exceed this machine's memory of "
        f"2,684 GB; they would be computed by actors for {num_npus} NPUs, beside {num_hosts} hosts. `supernode "
        "simulate`, or `serve --shards timing`, needs no weights"
    )
    monkeypatch.setattr("serving.ray_devices.machine_memory_bytes", lambda: 2_685_000_000_000)
    check_random_weights(config)


def test_weights_that_are_there_are_not_judged(monkeypatch):
    monkeypatch.setattr("serving.ray_devices.machine_memory_bytes", lambda: 0)
    check_random_weights(load_config("laptop"))  # mini-r1, shipped
    with pytest.raises(ConfigError, match=r"random weights of 0 G parameters, 0 GB"):
        check_random_weights(load_config("laptop", ["model.checkpoint=random"]))


def test_a_plan_needs_neither_torch_nor_ray():
    script = (
        "import sys\n"
        "from serving.config_file import load_config\n"
        "from serving.plan import format_plan\n"
        "format_plan(load_config('cloudmatrix384-full'))\n"
        "print(sorted({'torch', 'ray', 'scipy', 'pandas', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SHORT = "workload={num_requests: 20, request_rate: 10.0, input_len: 4096, output_len: 64, range_ratio: 0.0, "
SHORT += "num_prefixes: 2, prefix_len: 2048}"


@pytest.mark.parametrize(("name", "hit_share"), [("cloudmatrix384", 0.45), ("h800-ep144", 0.4)])
def test_a_few_requests_take_what_the_estimate_says(name, hit_share):
    """Lightly loaded, next to `supernode estimate` at that batch; all but the first of each prefix find it."""
    from serving.estimation.what_if import estimate

    config = load_config(name, [SHORT])
    result = run_in_virtual_time(config, load_workload(config))
    assert result.bench.exit_code == 0
    records = result.bench.records
    assert {(record.outcome, record.num_output_tokens) for record in records} == {("finished", 64)}
    assert sum(record.num_cached_tokens for record in records) / (20 * 4096) >= hit_share
    at_one = estimate(
        "decode",
        hardware=config.hardware.name,
        ep=config.world_size("decode"),
        batch_per_npu=1,
        kv_len=4096 + 64,
        mtp=config.speculative.num_speculative_tokens,
    )
    gaps_ms = sorted(gap_ns / 1e6 for record in records for gap_ns in record.simulated.itl_ns[1:])
    # Of 20 requests no rank has more than one; most have none, so that experts are sent fewer tokens.
    assert 0.85 * at_one["iteration_ms"] < gaps_ms[len(gaps_ms) // 2] < at_one["iteration_ms"]
    assert gaps_ms[-1] < 1.01 * at_one["iteration_ms"]


@pytest.mark.parametrize(("name", "published"), [("cloudmatrix384", 5655), ("h800-ep144", None)])
def test_prefill_under_load_reaches_its_estimate(name, published):
    """640 prompts of 4,096 at once for one prefill instance: ten full batches or five, with their beginning and end."""
    from serving.estimation.what_if import estimate

    workload = SHORT.replace("20", "640", 1).replace("10.0", "inf").replace("64,", "1,").replace("s: 2, ", "s: 0, ")
    config = load_config(name, [workload.replace("2048", "0"), "instances.prefill.count=1"])
    result = run_in_virtual_time(config, load_workload(config))
    npus = config.instances["prefill"].npus
    rate = 640 * 4096 / result.simulated_s / npus
    expected = estimate("prefill", hardware=config.hardware.name)["tokens_per_s_per_npu"]
    assert rate == pytest.approx(expected, rel=0.05)  # the MTP module's layer alone takes 2 %
    if published is not None:
        assert rate == pytest.approx(published, rel=0.05)
