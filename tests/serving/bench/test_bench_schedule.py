"""When requests are sent and given up, and what comes before the first."""

import asyncio
import math
import socket

import pytest

from serving.bench import run_bench, send_times_ns
from serving.bench_client import EndpointNotReady
from serving.bench_config import BenchConfig
from serving.errors import ConfigError
from serving.report import to_json
from serving.workloads.arrivals import Arrivals, RampUp


@pytest.mark.asyncio
async def test_concurrency_is_bounded_and_used(serve, tokens):
    full = asyncio.Event()

    async def script(exchange):
        if endpoint.in_flight == 3:
            full.set()
        await full.wait()  # three must be in flight before anyone is answered
        await exchange.answer()

    async with serve(script) as endpoint:
        result = await run_bench(endpoint.config(max_concurrency=3), tokens(9))
    assert endpoint.max_in_flight == 3
    assert result.summary.completed == 9
    assert result.summary.max_concurrent_requests == 3
    assert "queue" not in result.summary.wall  # a closed loop has no due times to be late for


@pytest.mark.asyncio
async def test_without_a_bound_everything_is_in_flight_at_once(serve, tokens):
    everyone = asyncio.Event()

    async def script(exchange):
        if endpoint.in_flight == 12:
            everyone.set()
        await everyone.wait()
        await exchange.answer()

    async with serve(script) as endpoint:
        result = await run_bench(endpoint.config(), tokens(12))
    assert endpoint.max_in_flight == 12
    assert result.summary.completed == 12


@pytest.mark.asyncio
async def test_a_trace_is_replayed_at_its_times_and_never_early(measure, answer, tokens):
    workload = tokens(3, arrivals=Arrivals(kind="constant", rate_per_s=50.0))
    result, endpoint = await measure(answer, workload, replay=True, time_factor=2.0)
    due = [record.wall.start_ns - record.wall.queue_ns for record in result.records]
    assert [when - due[0] for when in due] == [0, 40_000_000, 80_000_000]
    assert min(record.wall.queue_ns for record in result.records) > 0
    assert endpoint.order == ["w-0", "w-1", "w-2"]
    assert to_json(result)["request_rate"] == "inf"


@pytest.mark.asyncio
async def test_a_full_house_holds_back_an_open_loop_and_shows_it(measure, tokens):
    async def script(exchange):
        await asyncio.sleep(0.05)
        await exchange.answer()

    workload = tokens(4, arrivals=Arrivals(kind="inf"))
    result, endpoint = await measure(script, workload, replay=True, max_concurrency=1)
    waits = [record.wall.queue_ns for record in result.records]
    assert endpoint.max_in_flight == 1
    assert waits == sorted(waits)
    assert waits[3] > 100_000_000  # at least the service times before it, less one


def test_send_times_follow_the_rate_the_seed_and_the_ramp(tokens):
    def times(**options):
        return send_times_ns(BenchConfig(base_url="http://h", **options), tokens(400))

    assert times() == [0] * 400
    assert times(max_concurrency=4) is None
    assert times(request_rate=10.0) == times(request_rate=10.0, max_concurrency=4)
    assert times(request_rate=10.0)[-1] == pytest.approx(40e9, rel=0.2)
    assert times(request_rate=10.0) != times(request_rate=10.0, seed=1)
    assert times(request_rate=2.0, burstiness=math.inf)[:3] == [500_000_000, 1_000_000_000, 1_500_000_000]
    ramp = RampUp(strategy="linear", start_rps=1.0, end_rps=399.0)
    assert times(burstiness=math.inf, ramp_up=ramp)[0] == 1_000_000_000
    with pytest.raises(ConfigError, match="replay: workload w has no arrival times"):
        times(replay=True)


@pytest.mark.asyncio
async def test_a_ramp_up_reports_when_it_reached_each_rate(measure, answer, tokens):
    ramp = RampUp(strategy="linear", start_rps=100.0, end_rps=102.0)
    result, _ = await measure(answer, tokens(5), ramp_up=ramp)
    values = to_json(result)
    assert [event["rps"] for event in values["rps_change_events"]] == [100, 101, 102]
    assert values["ramp_up_end_rps"] == 102.0


@pytest.mark.asyncio
async def test_a_share_of_the_requests_is_given_up_and_the_server_hears_it(measure, tokens):
    async def script(exchange):
        if exchange.id in expected:
            await exchange.token()
            await asyncio.Event().wait()
        await exchange.answer()

    async def chosen():
        """Which requests are cancelled, from a run in which nobody is answered."""

        async def never(exchange):
            await asyncio.Event().wait()

        probe, _ = await measure(never, tokens(8), cancel_share=0.25, cancel_delay_s=0.05, request_timeout_s=0.3)
        return {record.request_id for record in probe.records if record.outcome == "aborted"}

    expected = await chosen()
    assert len(expected) == 2
    result, endpoint = await measure(script, tokens(8), cancel_share=0.25, cancel_delay_s=0.5)
    assert {r.request_id for r in result.records if r.outcome == "aborted"} == expected
    assert result.summary.outcomes == {"finished": 6, "rejected": 0, "aborted": 2, "failed": 0}
    assert result.exit_code == 0
    assert endpoint.num_disconnects == len(expected.intersection(endpoint.order))


@pytest.mark.asyncio
async def test_a_request_that_finishes_before_its_cancellation_is_finished(measure, answer):
    result, _ = await measure(answer, cancel_share=1.0, cancel_delay_s=100.0)
    assert result.summary.completed == 4


@pytest.mark.asyncio
async def test_warm_up_requests_are_sent_first_and_not_counted(measure, answer, tokens):
    workload = tokens(2, range_ratio=0.5)
    result, endpoint = await measure(answer, workload, num_warmups=3, max_concurrency=1)
    assert endpoint.order == ["warmup-0", "warmup-1", "warmup-2", "w-0", "w-1"]
    assert endpoint.max_in_flight == 1
    assert len(endpoint.bodies["warmup-0"]["prompt"]) == len(endpoint.bodies["w-0"]["prompt"])
    prompts = [endpoint.bodies[name]["prompt"][:5] for name in endpoint.order]
    assert len({tuple(prompt) for prompt in prompts}) == 5
    assert [record.request_id for record in result.records] == ["w-0", "w-1"]


@pytest.mark.asyncio
async def test_failing_warm_ups_are_told_and_do_not_stop_the_run(measure, caplog):
    async def script(exchange):
        if exchange.id.startswith("warmup"):
            return exchange.error(500, "cold")
        await exchange.answer()

    result, _ = await measure(script, num_warmups=1)
    assert result.summary.completed == 4
    assert "1 of 1 warm-up requests failed: HTTP 500: cold" in caplog.text


@pytest.mark.asyncio
async def test_an_endpoint_that_is_still_starting_is_waited_for(serve, answer, tokens, caplog):
    async with serve(answer, not_ready=2) as endpoint:
        result = await run_bench(endpoint.config(), tokens(1))
    assert result.summary.completed == 1
    assert result.info.model_id == "mini"
    assert caplog.text.count("waiting up to 20 s") == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (401, {}, "HTTP 401: no; is the API key right?"),
        (404, {}, "HTTP 404, lists no model: no; give the model's name"),
        ((), {}, "lists no model"),
        (503, {"ready_check_timeout_s": 0.3}, "not ready after 0.3 s: HTTP 503"),
        (503, {"ready_check_timeout_s": 0.0}, "not ready after 0 s: HTTP 503"),
    ],
)
async def test_an_endpoint_that_cannot_be_measured_is_named(serve, answer, tokens, models, options, message):
    async with serve(answer, models=models) as endpoint:
        with pytest.raises(EndpointNotReady) as caught:
            await run_bench(endpoint.config(**options), tokens(1))
    assert message in str(caught.value)
    assert endpoint.url in str(caught.value)


@pytest.mark.asyncio
async def test_nobody_listening_is_named(tokens):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EndpointNotReady, match=r"not ready after 0.1 s: ClientConnectorError"):
            await run_bench(BenchConfig(base_url=url, ready_check_timeout_s=0.1), tokens(1))


@pytest.mark.asyncio
async def test_a_named_model_needs_no_list(serve, answer, tokens):
    async with serve(answer, models=404) as endpoint:
        assert (await run_bench(endpoint.config(model="m"), tokens(1))).summary.completed == 1
        config = endpoint.config(model="m", ready_check_timeout_s=0.0, base_url=endpoint.url + "/v1/")
        assert (await run_bench(config, tokens(1))).summary.completed == 1
