"""The stream between the engine, which never waits, and one reader, who may be slow or leave."""

import asyncio

import pytest

from model.step import TokenLogprobs
from serving.messages import Latencies, RequestTimes
from serving.stream import TokenStream

TIMES = RequestTimes(
    simulated=Latencies(queue_ms=0.0, ttft_ms=1.0, tpot_ms=1.0, e2el_ms=2.0),
    wall=Latencies(queue_ms=0.0, ttft_ms=3.0, tpot_ms=3.0, e2el_ms=6.0),
)


class Ends:
    """Whoever serves the request: notes how its reader ended it, and closes the stream as a frontend does."""

    def __init__(self):
        self.calls = []
        self.stream = TokenStream(self)

    def __call__(self, stop_reason):
        self.calls.append(stop_reason)
        self.stream.close("abort" if stop_reason is None else "stop", stop_reason=None, times=TIMES, error=None)
        return TIMES


@pytest.fixture
def ends():
    return Ends()


def logprob(value):
    return TokenLogprobs(logprob=value, top=())


@pytest.mark.asyncio
async def test_a_slow_reader_gets_all_tokens_since_its_last_call_in_one_delta(ends):
    stream = ends.stream
    stream.push((5,), (logprob(-0.5),))
    stream.push((6,), (logprob(-0.6),))
    first = await anext(stream)
    assert (first.token_ids, first.logprobs, first.finish_reason) == ((5, 6), (logprob(-0.5), logprob(-0.6)), None)
    stream.push((7,), (logprob(-0.7),))
    stream.close("stop", stop_reason=7, times=TIMES, error=None)
    last = await anext(stream)
    assert (last.token_ids, last.logprobs) == ((7,), (logprob(-0.7),))
    assert (last.finish_reason, last.stop_reason, last.times) == ("stop", 7, TIMES)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert ends.calls == []


@pytest.mark.asyncio
async def test_a_quick_reader_waits_for_each_token_and_for_the_end(ends):
    stream = ends.stream
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not reading.done()
    stream.push((5,), None)
    assert (await reading).token_ids == (5,)
    reading = asyncio.ensure_future(anext(stream))
    stream.push((), None)  # of a timing shard: a token without a value
    await asyncio.sleep(0)
    assert not reading.done()
    stream.close("error", stop_reason=None, times=TIMES, error="npu 3 is lost")
    delta = await reading
    assert (delta.token_ids, delta.logprobs, delta.finish_reason, delta.error) == ((), None, "error", "npu 3 is lost")


@pytest.mark.asyncio
async def test_leaving_gives_the_request_up_once(ends):
    ends.stream.push((5,), None)
    await ends.stream.aclose()
    await ends.stream.aclose()
    assert ends.calls == [None]
    assert [delta async for delta in ends.stream] == []


@pytest.mark.asyncio
async def test_leaving_after_the_end_changes_nothing(ends):
    ends.stream.close("length", stop_reason=None, times=TIMES, error=None)
    await ends.stream.aclose()
    assert ends.calls == []


@pytest.mark.asyncio
async def test_a_stop_string_ends_the_request_as_finished(ends):
    ends.stream.push((5, 6, 7), None)
    assert ends.stream.finish(stop_reason="###", num_tokens=2) is TIMES
    await ends.stream.aclose()
    assert ends.calls == ["###"]
    assert [delta async for delta in ends.stream] == []


@pytest.mark.asyncio
async def test_closing_wakes_a_reader_that_waits(ends):
    reading = asyncio.ensure_future(anext(ends.stream))
    await asyncio.sleep(0)
    await ends.stream.aclose()
    assert (await reading).finish_reason == "abort"
