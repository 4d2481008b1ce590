"""Text of a choice: what is shown, what is held back, where a stop string cuts."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from serving.detokenize import StopMatcher, TextStream
from serving.messages import SamplingParams

TOKENIZER = Tokenizer.byte_level(300)


def stream(*stop: str, **sampling: object) -> TextStream:
    params = SamplingParams(max_tokens=99, stop=stop, **sampling)  # type: ignore[arg-type]
    return TextStream(TOKENIZER.stream(), params)


def pieces(text: TextStream, tokens: str) -> list[str]:
    return [text.push([token_id]).text for token_id in TOKENIZER.encode(tokens)]


def test_without_stop_strings_every_token_shows_at_once():
    assert pieces(stream(), "abc") == ["a", "b", "c"]


def test_half_a_character_is_held_back_and_the_end_replaces_it():
    text = stream()
    assert pieces(text, "aé") == ["a", "", "é"]
    assert text.push(TOKENIZER.encode("é")[:1]).text == ""
    assert text.finish(ended_by_token=False).text == "\N{REPLACEMENT CHARACTER}"


def test_only_the_possible_start_of_a_stop_string_is_held_back():
    # "aba" stays open; the second "a" in a row leaves only itself open, so "aba" is shown.
    assert pieces(stream("abab"), "xabaabx") == ["x", "", "", "", "aba", "", "abx"]


def test_a_stop_string_cuts_the_text_and_counts_the_token_that_completed_it():
    delta = stream("STOP").push(TOKENIZER.encode("one STOP two"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("one ", "STOP", 8)


def test_the_stop_string_is_shown_when_that_is_asked_for():
    delta = stream("STOP", include_stop_str_in_output=True).push(TOKENIZER.encode("one STOP two"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("one STOP", "STOP", 8)


def test_of_two_that_end_together_the_one_that_starts_first_wins():
    assert stream("b", "ab").push(TOKENIZER.encode("xab")).stop == "ab"


def test_stop_strings_do_not_count_before_min_tokens():
    text = stream("b", min_tokens=3)
    assert text.push(TOKENIZER.encode("abb")).stop is None
    assert text.push(TOKENIZER.encode("b")).stop == "b"


def test_what_was_held_back_is_shown_at_the_end():
    text = stream("abc")
    assert pieces(text, "xab") == ["x", "", ""]
    assert text.finish(ended_by_token=False).text == "ab"


def test_a_stop_string_may_end_in_the_replacement_of_a_broken_character():
    text = stream("\N{REPLACEMENT CHARACTER}")
    text.push(TOKENIZER.encode("é")[:1])
    assert text.finish(ended_by_token=False).stop == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_end_token_shows_only_when_it_was_not_the_end(stop):
    (dot,) = TOKENIZER.encode(".")
    for ended_by_token, rest in ((True, ""), (False, ".")):
        text = TextStream(TOKENIZER.stream(), SamplingParams(max_tokens=9, stop=stop), end_ids={dot})
        assert pieces(text, "a.b.") == ["a", "", ".b", ""]
        assert text.push([]).text == ""
        assert text.finish(ended_by_token=ended_by_token).text == rest


def test_a_stop_string_found_in_a_token_that_was_held_back_counts_no_later_token():
    text = TextStream(TOKENIZER.stream(), SamplingParams(max_tokens=9, stop=("a.",)), end_ids=TOKENIZER.encode("."))
    assert text.push(TOKENIZER.encode("xa.")).stop is None
    delta = text.push(TOKENIZER.encode("bc"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("", "a.", 0)


@given(
    text=st.text(alphabet="abé", max_size=40),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_the_result_is_that_of_searching_the_whole_text(text: str, stop: Sequence[str], cuts: Sequence[int]):
    token_ids = TOKENIZER.encode(text)
    edges = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    subject, shown, found = stream(*stop), "", None
    for start, end in pairwise(edges):
        delta = subject.push(token_ids[start:end])
        shown += delta.text
        assert text.startswith(shown), "what was shown is never taken back"
        if delta.stop is not None:
            found = delta.stop
            break
    else:
        shown += subject.finish(ended_by_token=False).text
    ends = [(text.find(item) + len(item), -len(item), item) for item in stop if item in text]
    assert (shown, found) == ((text[: min(ends)[0] + min(ends)[1]], min(ends)[2]) if ends else (text, None))


@pytest.mark.parametrize("piece", ["ab", "b"])
def test_a_matcher_holds_nothing_open_when_nothing_can_follow(piece: str):
    matcher = StopMatcher(["xyz"])
    assert matcher.find(piece) is None
    assert matcher.num_open_chars == 0
