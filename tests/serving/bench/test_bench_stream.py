"""From bytes to a record, with literal instants: which chunk is a token, and what is an error."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bench_stream import SseParser, StreamError, StreamRecorder, error_message
from serving.records import Timing

MS = 1_000_000


def completion(text="a", finish_reason=None):
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}).encode()


def chat(delta, finish_reason=None):
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}).encode()


def usage(**values):
    return json.dumps({"choices": [], "usage": values}).encode()


def recorder(*events, is_chat=False):
    """A recorder that has been sent at 100 ms and got `events` as (milliseconds, data)."""
    taken = StreamRecorder("r", num_prompt_tokens=7, chat=is_chat, keep_text=True)
    taken.start_ns = 100 * MS
    for when_ms, data in events:
        taken.on_event(data, when_ms * MS)
    return taken


def gaps_ms(record):
    return [gap / MS for gap in record.wall.itl_ns]


# Server-sent events

STREAM = (
    b'data: {"a": 1}\n\n: a comment\n\ndata:{"b": 2}\r\n\r\nevent: x\ndata: one\ndata: two\nid: 3\n\n'
    b"retry: 10\n\n\n\ndata: caf\xc3\xa9\r\rdata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b'{"b": 2}', b"one\ntwo", b"caf\xc3\xa9", b"[DONE]"]


def test_events_are_split_at_blank_lines_and_comments_left_out():
    parser = SseParser()
    assert parser.feed(STREAM) == EVENTS
    assert parser.close() == []


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_it_does_not_matter_how_the_bytes_arrive(cuts):
    bounds = [0, *sorted(cuts), len(STREAM)]
    parser = SseParser()
    events = [event for a, b in pairwise(bounds) for event in parser.feed(STREAM[a:b])]
    assert events + parser.close() == EVENTS


def test_an_event_that_the_end_of_the_stream_cut_is_given_on_closing():
    parser = SseParser()
    assert parser.feed(b"data: 1\n\ndata: [DO") == [b"1"]
    assert parser.feed(b"NE]\r\n") == []
    assert parser.close() == [b"[DONE]"]


# Tokens and times


def test_times_count_from_sending_and_gaps_between_chunks():
    taken = recorder(
        (130, completion("a")),
        (140, completion("b")),
        (160, completion("c", "length")),
        (500, usage(prompt_tokens=9, completion_tokens=3, total_tokens=12)),
        (900, b"[DONE]"),
    )
    record = taken.finished()
    assert (record.outcome, record.reason) == ("finished", "length")
    assert (record.wall.start_ns, record.wall.ttft_ns, record.wall.e2el_ns) == (100 * MS, 30 * MS, 60 * MS)
    assert gaps_ms(record) == [10, 20]
    assert (record.num_prompt_tokens, record.num_output_tokens, record.has_usage) == (9, 3, True)
    assert record.num_cached_tokens is None
    assert record.simulated is None
    assert record.text == "abc"


def test_a_chunk_of_several_tokens_is_one_gap_and_usage_has_the_count():
    record = recorder(
        (110, completion("abc")), (150, completion("def", "stop")), (150, usage(completion_tokens=6))
    ).finished()
    assert record.num_output_tokens == 6
    assert gaps_ms(record) == [40]


def test_without_usage_chunks_are_counted():
    record = recorder((110, completion()), (120, completion("b", "stop"))).finished()
    assert (record.num_prompt_tokens, record.num_output_tokens, record.has_usage) == (7, 2, False)


def test_a_last_chunk_without_text_is_a_token_only_if_usage_says_so():
    events = [(110, completion("a")), (120, completion("b")), (150, completion("", "stop"))]
    counted = recorder(*events, (150, usage(completion_tokens=3))).finished()  # an end-of-sequence token
    assert gaps_ms(counted) == [10, 30]
    assert counted.wall.e2el_ns == 50 * MS
    for bare in (recorder(*events).finished(), recorder(*events, (150, usage(completion_tokens=2))).finished()):
        assert gaps_ms(bare) == [10]
        assert bare.wall.e2el_ns == 20 * MS
        assert bare.num_output_tokens == 2


def test_a_token_in_mid_stream_that_shows_no_text_is_a_token():
    record = recorder((110, completion("")), (120, completion("")), (130, completion("é", "length"))).finished()
    assert record.wall.ttft_ns == 10 * MS
    assert gaps_ms(record) == [10, 10]


def test_the_chunk_that_opens_a_chat_message_is_not_the_first_token():
    record = recorder(
        (101, chat({"role": "assistant", "content": ""})),
        (130, chat({"reasoning_content": "hm"})),
        (140, chat({"content": "yes"})),
        (141, chat({}, "stop")),
        is_chat=True,
    ).finished()
    assert record.wall.ttft_ns == 30 * MS
    assert gaps_ms(record) == [10]
    assert record.text == "hmyes"


def test_a_chat_chunk_with_role_and_text_is_a_token():
    record = recorder((120, chat({"role": "assistant", "content": "yes"}, "stop")), is_chat=True).finished()
    assert record.wall.ttft_ns == 20 * MS


def test_usage_carries_cached_tokens_and_simulated_times():
    simulated = {"ttft_ms": 12.5, "tpot_ms": 2.0, "e2el_ms": 14.5, "queue_ms": 1.0, "itl_ms": [1.5, 0.5]}
    values = {"completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}, "simulated": simulated}
    record = recorder((110, completion()), (120, completion("b", "stop")), (120, usage(**values))).finished()
    assert record.num_cached_tokens == 32
    assert record.simulated == Timing(
        ttft_ns=12.5 * MS, e2el_ns=14.5 * MS, tpot_ns=2.0 * MS, itl_ns=[1.5 * MS, 0.5 * MS], queue_ns=1.0 * MS
    )


def test_simulated_times_that_did_not_happen_are_left_out():
    values = {"ttft_ms": 3.0, "tpot_ms": None, "e2el_ms": 3.0, "queue_ms": None}
    record = recorder((110, completion("a", "length")), (110, usage(completion_tokens=1, simulated=values))).finished()
    assert record.simulated == Timing(ttft_ns=3.0 * MS, e2el_ns=3.0 * MS)
    values["ttft_ms"] = None
    record = recorder((110, completion("a", "length")), (110, usage(simulated=values))).finished()
    assert record.simulated is None


# What is not an answer


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"3", b'"text"', b"null", b"\xff", b'{"choices": 3}', b'{"choices": [3]}', b'{"choices": {"a": 1}}'],
)
@pytest.mark.parametrize("is_chat", [False, True])
def test_anything_but_a_chunk_is_malformed(data, is_chat):
    with pytest.raises(StreamError, match="malformed chunk") as caught:
        recorder((110, data), is_chat=is_chat)
    assert caught.value.reason == "malformed chunk"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error": {"message": "engine died", "type": "InternalServerError", "code": 500}}', "engine died"),
        (b'{"error": "engine died"}', "engine died"),
        (b'{"error": {"code": 500}}', '{"code": 500}'),
    ],
)
def test_an_error_in_mid_stream_is_an_error(data, message):
    with pytest.raises(StreamError) as caught:
        recorder((110, completion()), (120, data))
    assert (caught.value.reason, str(caught.value)) == ("error in stream", message)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "no token"),
        ([(110, b"[DONE]")], "no token"),
        ([(110, completion())], "cut short"),
        ([(110, completion("a", "abort")), (110, b"[DONE]")], "finish_reason abort"),
        ([(110, completion("a", "error"))], "finish_reason error"),
        ([(110, completion("a", "stop")), (111, usage(completion_tokens="3"))], "malformed usage"),
        ([(110, completion("a", "stop")), (111, usage(completion_tokens=-3))], "malformed usage"),
        ([(110, completion("a", "stop")), (111, usage(simulated=[3]))], "malformed usage"),
        ([(110, completion("a", "stop")), (111, usage(simulated={"ttft_ms": "1", "e2el_ms": 1}))], "malformed usage"),
    ],
)
def test_a_stream_that_is_not_a_whole_answer_is_named(events, reason):
    with pytest.raises(StreamError) as caught:
        recorder(*events).finished()
    assert caught.value.reason == reason


def test_a_stream_may_end_by_done_or_by_a_finish_reason():
    assert recorder((110, completion()), (111, b"[DONE]")).finished().reason == "done"
    assert recorder((110, completion("a", "stop"))).finished().reason == "stop"


def test_what_had_arrived_before_the_end_is_kept():
    record = recorder((110, completion()), (130, completion("b"))).ended("failed", "connection", "reset")
    assert (record.outcome, record.reason, record.error) == ("failed", "connection", "reset")
    assert (record.num_output_tokens, record.text, gaps_ms(record)) == (2, "ab", [20])
    assert recorder().ended("aborted", "interrupted", None).wall is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"error": {"message": "m"}}, "m"),
        ({"message": "m", "type": "service_unavailable"}, "m"),
        ({"detail": "m"}, "m"),
        ({"detail": [{"loc": ["body"]}]}, '[{"loc": ["body"]}]'),
        ("m", "m"),
        ([1], "[1]"),
    ],
)
def test_error_objects_of_other_servers_are_read(error, message):
    assert error_message(error) == message
