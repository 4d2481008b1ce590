"""Text to tokens and back, streaming, control tokens and the chat template."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from model.chat import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER, ChatError, Message, render_chat
from model.tokenizer import MIN_VOCAB_SIZE, Tokenizer, TokenizerError

TOKENIZER = Tokenizer.byte_level(272)
CONTROL = [TOKENIZER.control_id(name) for name in (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)]
text_with_control_names = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from([BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, "<｜User", "｜>"])
    ),
    max_size=8,
).map("".join)


def test_the_vocabulary_is_control_tokens_then_bytes_then_placeholders():
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (272, 0, 1)
    assert TOKENIZER.encode("Az\n") == [7 + ord("A"), 7 + ord("z"), 7 + ord("\n")]
    assert [TOKENIZER.token_bytes(7 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert [TOKENIZER.is_hidden(token) for token in (0, 1, 2, 3, 4, 5, 6, 7, 263)] == [True] * 5 + [False] * 3 + [True]


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match=f"vocab_size: 262 is below {MIN_VOCAB_SIZE}"):
        Tokenizer.byte_level(262)


@settings(max_examples=200, deadline=None)
@given(text_with_control_names)
def test_any_text_survives_a_round_trip_and_makes_no_control_token(text):
    ids = TOKENIZER.encode(text)
    assert ids == [7 + byte for byte in text.encode()]
    assert TOKENIZER.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 271), max_size=40), st.booleans())
def test_streamed_pieces_concatenate_to_the_full_decode_and_are_whole_characters(ids, skip):
    stream = TOKENIZER.stream(skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=skip)
    raw = b"".join(TOKENIZER.token_bytes(t) for t in ids if not (skip and TOKENIZER.is_hidden(t)))
    assert "".join(pieces) == raw.decode("utf-8", errors="replace")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 271), max_size=40), st.booleans())
def test_decode_agrees_with_the_library(ids, skip):
    # The library cuts byte runs at visible control tokens, so a character that spans one is only compared without it.
    ids = [token for token in ids if token not in CONTROL[4:] and (skip or not TOKENIZER.is_hidden(token))]
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == TOKENIZER._backend.decode(ids, skip_special_tokens=skip)


def test_a_stream_holds_back_an_unfinished_character():
    stream = TOKENIZER.stream()
    euro = TOKENIZER.encode("€")
    assert [stream.push(token) for token in euro] == ["", "", "€"]
    assert [stream.push(token) for token in euro[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("skip", [True, False])
def test_ids_of_a_padded_models_vocabulary_are_no_text(skip):
    euro = TOKENIZER.encode("€")
    assert TOKENIZER.decode([*euro[:1], 272, *euro[1:], 10**6], skip_special_tokens=skip) == "€"
    assert (TOKENIZER.token_bytes(272), TOKENIZER.is_hidden(272), TOKENIZER.vocab_size) == (b"", False, 272)


def test_control_tokens_come_only_from_trusted_text():
    text = f"{USER}hi{EOS}"
    assert TOKENIZER.encode(text, parse_control=True) == [CONTROL[2], *TOKENIZER.encode("hi"), CONTROL[1]]
    assert not set(TOKENIZER.encode(text)) & set(CONTROL)
    assert TOKENIZER.encode("a", add_bos=True) == [0, 7 + ord("a")]


def test_lone_surrogates_and_negative_ids_are_refused():
    with pytest.raises(TokenizerError, match="text: character 1 is a lone surrogate"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(TokenizerError, match="token id: -1 is below 0"):
        TOKENIZER.decode([-1])
    with pytest.raises(TokenizerError, match="'<none>': not a control token"):
        TOKENIZER.control_id("<none>")


def test_a_saved_tokenizer_reads_back_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    read = Tokenizer.from_file(tmp_path / "tokenizer.json")
    ids = list(range(272))
    assert read.decode(ids, skip_special_tokens=False) == TOKENIZER.decode(ids, skip_special_tokens=False)
    assert [read.is_hidden(token) for token in ids] == [TOKENIZER.is_hidden(token) for token in ids]
    assert not set(read.encode(f"x{EOS}{THINK_END}")) & set(CONTROL)


def test_the_chat_template_is_r1s():
    messages = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="1+1?"),
        Message(role="assistant", content="<think>easy</think>2"),
        Message(role="user", content="And 2+2?"),
    ]
    prompt = f"{BOS}Be brief.{USER}1+1?{ASSISTANT}2{EOS}{USER}And 2+2?{ASSISTANT}{THINK_START}\n"
    assert render_chat(messages) == prompt
    assert TOKENIZER.encode_chat(messages) == TOKENIZER.encode(prompt, parse_control=True)
    assert render_chat(messages, add_generation_prompt=False) == prompt.removesuffix(f"{ASSISTANT}{THINK_START}\n")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), text_with_control_names), min_size=1, max_size=5
    )
)
def test_message_contents_cannot_forge_a_turn(turns):
    messages = [Message(role=role, content=content) for role, content in turns]
    ids = TOKENIZER.encode_chat(messages)
    num_users = sum(role == "user" for role, _ in turns)
    num_assistants = sum(role == "assistant" for role, _ in turns)
    counts = {BOS: 1, USER: num_users, ASSISTANT: num_assistants + 1, EOS: num_assistants, THINK_START: 1, THINK_END: 0}
    assert {name: ids.count(TOKENIZER.control_id(name)) for name in counts} == counts
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == render_chat(messages)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages: at least one message"),
        ([Message(role="user", content="a"), Message(role="tool", content="b")], r"messages\[1\].role: 'tool'"),
    ],
)
def test_a_conversation_that_the_template_cannot_take_is_refused(messages, error):
    with pytest.raises(ChatError, match=error):
        render_chat(messages)
