"""Metrics of a running system: what its events add up to."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from devices.clock import run_virtual
from serving.build import build_cluster
from serving.core.event_log import EventLog
from serving.frontend import Frontend
from serving.messages import GenerateRequest, SamplingParams
from serving.metrics import Metrics
from serving.observer import Observer


@pytest.fixture
def observe(make_config, fake_devices):
    """A function: run `program(submit, clock)` on an observed system; a function that reads its metrics, and the log.

    `submit(name, prompt, max_tokens)` gives a stream.
    """

    def run(program, *overrides):
        config = make_config("disaggregated", *overrides)
        metrics = Metrics(model_name="mini-r1", max_model_len=config.model.max_model_len)
        observer = Observer(metrics, config=config)
        log = EventLog(keep=True)

        def read(name, **labels):
            """Sum of the samples of that name and those labels."""
            return sum(
                sample.value
                for family in text_string_to_metric_families(metrics.render().decode())
                for sample in family.samples
                if sample.name == name and labels.items() <= sample.labels.items()
            )

        async def main(clock):
            devices = fake_devices(config)
            cluster = build_cluster(config, clock=clock, log=log, transport=devices, on_step=observer.on_step)
            frontend = Frontend(cluster, tokenizer=None, on_outcome=observer.on_outcome)
            observer.watch(cluster, frontend)
            cluster.start()

            def submit(name, prompt, max_tokens):
                sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
                return frontend.submit(GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))

            await program(submit, read, clock)
            await frontend.abort_all()
            await cluster.stop()
            assert not any(cluster.held().values())

        run_virtual(main)
        return read, log

    return run


async def read_out(stream):
    return [delta async for delta in stream]


def test_counters_are_the_sums_of_the_events(observe, prompt):
    async def program(submit, read, clock):
        await read_out(submit("r0", prompt(13), 4))
        await clock.sleep_until(10**9)
        await asyncio.gather(*(read_out(submit(f"r{i}", prompt(13), 6)) for i in range(1, 4)))
        stream = submit("r4", prompt(9), 50)
        await anext(stream)
        await stream.aclose()

    read, log = observe(program)
    assert read("vllm:request_success_total", finished_reason="length") == 4
    assert read("vllm:request_success_total", finished_reason="abort") == 1
    assert read("vllm:prompt_tokens_total") == 4 * 13 + 9
    assert read("vllm:external_prefix_cache_hits_total") == 3 * 12 + 8
    assert read("vllm:generation_tokens_total") >= 4 + 3 * 6 + 1
    carried = sum(dict(event.details)["bytes"] for event in log.events if event.kind == "kv_transfer")
    assert read("supernode:plane_bytes_total", plane="rdma") == carried
    num_gaps = read("supernode:simulated_inter_token_latency_seconds_count")
    assert num_gaps >= 3 + 3 * 5
    assert read("vllm:inter_token_latency_seconds_count") == num_gaps  # the gap of a hand-over among them


def test_gauges_show_who_runs_and_who_waits_for_a_place(observe, prompt):
    async def program(submit, read, clock):
        streams = [submit(f"r{i}", prompt(9, seed=i), 20) for i in range(5)]
        assert read("vllm:num_requests_waiting", engine="frontend") == 3
        await anext(streams[0])
        await clock.sleep_until(clock.now_ns() + 10**6)
        assert read("vllm:num_requests_running", engine="decode-0") == 2
        assert 0 < read("vllm:kv_cache_usage_perc", engine="decode-0") < 1
        for stream in streams:
            await read_out(stream)

    read, _ = observe(program, "instances.decode.npus=1", "instances.decode.max_num_seqs=2")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert read(name) == 0


def test_tokens_are_counted_by_layer_and_expert_however_often_they_are_read(observe, prompt):
    async def program(submit, read, clock):
        await read_out(submit("r0", prompt(13), 4))
        assert read("supernode:expert_tokens_total", engine="decode-0") == 3 * 4 * 2
        await read_out(submit("r1", prompt(11, seed=1), 6))

    read, _ = observe(program)
    assert read("supernode:expert_tokens_total", engine="prefill-0") == (13 + 11) * 4 * 2  # top 4 of 2 layers
    assert read("supernode:expert_tokens_total", engine="decode-0") == (3 + 5) * 4 * 2
    assert read("supernode:expert_tokens_total", engine="decode-0", layer="1", expert="0") == 3 + 5
    assert read("supernode:expert_tokens_total", expert="4") == 0
