"""Ranges of what passes between the HTTP layer and the frontend."""

import pytest

from serving.errors import InvalidRequest, PromptTooLong, shown
from serving.messages import GenerateRequest, Latencies, SamplingParams


def request(num_prompt_tokens: int, **sampling: int) -> GenerateRequest:
    params = SamplingParams(max_tokens=4, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(request_id="r1", prompt_token_ids=(5,) * num_prompt_tokens, sampling=params)


def test_a_request_that_fills_the_context_fits_and_one_more_does_not():
    request(6).check_fits(max_model_len=10, vocab_size=6)
    with pytest.raises(PromptTooLong, match="7 prompt tokens \\+ max_tokens 4 = 11 exceed max_model_len 10"):
        request(7).check_fits(max_model_len=10, vocab_size=6)
    with pytest.raises(PromptTooLong, match="10 tokens leave no room"):
        request(10).check_fits(max_model_len=10, vocab_size=6)


def test_an_empty_prompt_and_an_unknown_token_do_not_fit():
    with pytest.raises(InvalidRequest, match="at least 1 token"):
        request(0).check_fits(max_model_len=10, vocab_size=6)
    with pytest.raises(InvalidRequest, match="got 5, token ids must be at least 0 and below 5"):
        request(1).check_fits(max_model_len=10, vocab_size=5)


@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_nan_is_out_of_every_range(field: str):
    with pytest.raises(InvalidRequest, match=f"{field}: got nan"):
        SamplingParams(max_tokens=1, **{field: float("nan")})  # type: ignore[arg-type]


def test_tpot_is_the_time_after_the_first_token_over_the_other_tokens():
    instants = {"arrival_ns": 1_000_000, "scheduled_ns": 2_000_000, "first_token_ns": 5_000_000, "end_ns": 11_000_000}
    latencies = Latencies.between(**instants, num_tokens=4)
    assert (latencies.queue_ms, latencies.ttft_ms, latencies.tpot_ms, latencies.e2el_ms) == (1.0, 4.0, 2.0, 10.0)
    assert Latencies.between(**instants, num_tokens=1).tpot_ms is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("short", "'short'"),
        (10**5000, "an integer of 16610 bits"),
        ([0] * 1000, "a list of 1000 items"),
        ("x" * 10**6, "'" + "x" * 79 + "..."),
    ],
    ids=["short", "integer", "list", "text"],
)
def test_values_in_messages_are_cut(value: object, text: str):
    assert shown(value) == text
