"""The load generator against a scripted endpoint: what it sends, and what it makes of the answers."""

import asyncio

import pytest

from serving.bench import run_bench
from serving.records import Goodput
from serving.report import format_table, to_json
from serving.workloads.requests import WorkloadRequest
from serving.workloads.workload import Workload


def only(result):
    (record,) = result.records
    return record


@pytest.mark.asyncio
async def test_completions_are_asked_for_with_token_ids_by_default(measure, answer, tokens):
    workload = tokens(1)
    result, endpoint = await measure(
        answer, workload, request_id_prefix="bench-", api_key="secret", headers={"X-A": "b"}
    )
    assert endpoint.bodies["bench-w-0"] == {
        "model": "mini",
        "prompt": workload.prompt_token_ids(workload.requests[0]).tolist(),
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "seed": workload.requests[0].seed,
        "ignore_eos": True,
    }
    assert endpoint.headers["bench-w-0"]["Authorization"] == "Bearer secret"
    assert endpoint.headers["bench-w-0"]["X-A"] == "b"
    assert only(result).request_id == "bench-w-0"
    assert result.exit_code == 0


@pytest.mark.asyncio
async def test_text_and_options_are_sent_as_asked(measure, answer):
    request = WorkloadRequest(request_id="w-0", num_prompt_tokens=2, max_tokens=1, prompt_token_ids=(5, 6), priority=2)
    options = {
        "prompt_format": "text",
        "temperature": None,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "ignore_eos": False,
    }
    options |= {"model": "other", "extra_body": {"max_tokens": 7, "user": "u"}}
    _, endpoint = await measure(answer, Workload(name="w", requests=(request,)), **options)
    assert endpoint.bodies["w-0"] == {
        "model": "other",
        "prompt": "is that",
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "priority": 2,
        "user": "u",
    }


@pytest.mark.asyncio
async def test_chat_is_asked_for_with_text(serve, answer, tokens):
    async with serve(answer) as endpoint:
        result = await run_bench(
            endpoint.config(backend="openai-chat"), tokens(1), render_text=lambda token_ids: f"{len(token_ids)} tokens"
        )
    body = endpoint.bodies["w-0"]
    assert body["messages"] == [{"role": "user", "content": "8 tokens"}]
    assert body["max_completion_tokens"] == 3
    assert "prompt" not in body
    assert only(result).num_output_tokens == 3


@pytest.mark.asyncio
async def test_chunks_are_counted_and_usage_is_believed(measure, tokens):
    async def script(exchange):
        await exchange.answer(5, prompt_tokens=11, prompt_tokens_details={"cached_tokens": 4})

    result, _ = await measure(script, tokens(3, output_len=5))
    for record in result.records:
        assert (record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens) == (11, 5, 4)
        assert len(record.wall.itl_ns) == 4
        assert 0 < record.wall.ttft_ns <= record.wall.e2el_ns
    assert [record.request_id for record in result.records] == ["w-0", "w-1", "w-2"]
    assert result.summary.wall["itl"].count == 12
    assert result.summary.total_output_tokens == 15
    assert result.summary.cache_hit_rate == pytest.approx(4 / 11)
    assert result.records[0].text is None


@pytest.mark.asyncio
async def test_simulated_times_of_the_server_stand_beside_wall_times(measure, tokens):
    async def script(exchange):
        i = int(exchange.id.rpartition("-")[2])
        simulated = {"ttft_ms": 10.0 * (i + 1), "tpot_ms": 2.0, "e2el_ms": 10.0 * (i + 1) + 4, "queue_ms": 0.5}
        await exchange.answer(simulated=simulated)

    result, _ = await measure(script, tokens(3), goodput=Goodput(ttft_ms=20.0))
    simulated = to_json(result)["simulated"]
    assert simulated["p50_ttft_ms"] == 20.0
    assert simulated["mean_tpot_ms"] == 2.0
    assert simulated["p50_itl_ms"] is None
    assert result.summary.slo_attainment["simulated"] == pytest.approx(2 / 3)
    assert "TTFT simulated           20.00" in format_table(result)


@pytest.mark.asyncio
async def test_an_endpoint_without_usage_is_counted_by_chunks_and_said_so(measure):
    async def script(exchange):
        await exchange.token()
        await exchange.token(finish_reason="stop")
        await exchange.raw(b"data: [DONE]\n\n")

    result, _ = await measure(script)
    assert result.summary.total_output_tokens == 8
    assert result.summary.num_without_usage == 4
    assert result.summary.cache_hit_rate is None


@pytest.mark.asyncio
async def test_a_progress_bar_is_drawn_on_stderr_when_wanted(measure, answer, capsys):
    await measure(answer, disable_tqdm=False)
    assert "4/4" in capsys.readouterr().err
    await measure(answer)  # not a terminal
    assert capsys.readouterr().err == ""


@pytest.mark.asyncio
async def test_texts_are_kept_on_request(measure, answer, tokens):
    result, _ = await measure(answer, tokens(1), save_detailed=True)
    assert to_json(result, detailed=True)["generated_texts"] == ["aaa"]


@pytest.mark.asyncio
async def test_events_may_be_cut_anywhere_and_carry_comments(measure, tokens):
    async def script(exchange):
        await exchange.raw(b': ping\r\n\r\ndata: {"choices": [{"te')
        await asyncio.sleep(0.01)
        await exchange.raw(b'xt": "a", "finish_reason": "stop"}]}\r')
        await asyncio.sleep(0.01)
        await exchange.raw(b"\n\r\ndata: [DONE]")

    result, _ = await measure(script, tokens(1))
    assert (only(result).outcome, only(result).reason) == ("finished", "stop")


@pytest.mark.asyncio
async def test_drafts_are_counted_from_the_endpoints_metrics(serve, answer, tokens):
    """Before and after: what warm-ups and others have drafted is not the run's."""

    def exposition():
        drafts = 100 + 2 * len(endpoint.order)
        counts = {"drafts": drafts, "draft_tokens": drafts, "accepted_tokens": len(endpoint.order)}
        return "".join(f'vllm:spec_decode_num_{name}_total{{engine="0"}} {n}\n' for name, n in counts.items())

    async with serve(answer, metrics=exposition) as endpoint:
        result = await run_bench(endpoint.config(num_warmups=3), tokens(4))
    assert (result.spec_decode.num_drafts, result.spec_decode.num_accepted_tokens) == (8, 4)
    assert "Acceptance length:                       1.50" in format_table(result)
    assert to_json(result)["spec_decode_num_drafts"] == 8


@pytest.mark.asyncio
async def test_an_endpoint_without_such_metrics_is_measured_all_the_same(serve, answer, tokens):
    for metrics in (None, lambda: "vllm:num_requests_running 0\n", lambda: "no exposition"):
        async with serve(answer, metrics=metrics) as endpoint:
            result = await run_bench(endpoint.config(), tokens(1))
        assert result.spec_decode is None
        assert result.exit_code == 0
