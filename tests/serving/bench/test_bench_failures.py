"""Every request ends in one record, whatever the endpoint does to it."""

import asyncio

import pytest
from aiohttp import web

from serving.report import format_table


def only(result):
    (record,) = result.records
    return record


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("status", "outcome"), [(400, "rejected"), (404, "rejected"), (429, "rejected"), (500, "failed"), (503, "failed")]
)
async def test_an_http_error_is_an_outcome_with_its_message(measure, status, outcome):
    async def script(exchange):
        return exchange.error(status, "no luck")

    result, _ = await measure(script)
    assert [(r.outcome, r.reason, r.error) for r in result.records] == [
        (outcome, f"HTTP {status}", f"HTTP {status}: no luck")
    ] * 4
    assert result.summary.failed == 4
    assert result.exit_code == 1
    assert f"{outcome}: HTTP {status}" in format_table(result)


@pytest.mark.asyncio
async def test_an_error_without_json_is_quoted(measure, tokens):
    async def script(exchange):
        return web.Response(status=502, text="<html>bad gateway</html>")

    result, _ = await measure(script, tokens(1))
    assert only(result).error == "HTTP 502: '<html>bad gateway</html>'"


async def error_event(exchange):
    await exchange.token()
    await exchange.event({"error": {"message": "engine died", "code": 500}})


async def malformed(exchange):
    await exchange.token()
    await exchange.raw(b"data: {nonsense\n\n")
    await asyncio.Event().wait()  # a client that keeps reading would wait for ever


async def lost_connection(exchange):
    await exchange.token()
    exchange.drop()


async def dropped_before(exchange):
    exchange.drop()


async def cut_short(exchange):
    await exchange.token()


async def nothing(exchange):
    await exchange.start()


async def aborted_by_server(exchange):
    await exchange.token(finish_reason="abort")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("script", "reason", "num_tokens"),
    [
        (error_event, "error in stream", 1),
        (malformed, "malformed chunk", 1),
        (lost_connection, "connection", 1),
        (dropped_before, "connection", 0),
        (cut_short, "cut short", 1),
        (nothing, "no token", 0),
        (aborted_by_server, "finish_reason abort", 1),
    ],
)
async def test_a_stream_that_breaks_is_a_failure_with_its_reason(measure, tokens, script, reason, num_tokens):
    result, _ = await measure(script, tokens(2))
    assert [(r.outcome, r.reason, r.num_output_tokens) for r in result.records] == [("failed", reason, num_tokens)] * 2
    assert all(record.error for record in result.records)
    assert result.summary.completed == 0


@pytest.mark.asyncio
async def test_one_bad_request_leaves_the_others_alone(measure, tokens):
    async def script(exchange):
        if exchange.id == "w-2":
            return exchange.error(500, "no luck")
        await exchange.answer()

    result, _ = await measure(script, tokens(5))
    assert [r.outcome for r in result.records] == ["finished", "finished", "failed", "finished", "finished"]


@pytest.mark.asyncio
async def test_a_request_that_never_ends_times_out(measure, tokens):
    async def script(exchange):
        await exchange.token()
        await asyncio.Event().wait()

    result, _ = await measure(script, tokens(2), request_timeout_s=0.3)
    assert [(r.outcome, r.reason) for r in result.records] == [("failed", "timeout")] * 2
