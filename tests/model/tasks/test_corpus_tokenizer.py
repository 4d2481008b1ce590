"""The trained vocabulary: single digits, R1's control tokens, and the same ids in transformers."""

from random import Random

import pytest

from model.chat import Message
from model.tasks.corpus_tokenizer import VOCAB_SIZE, train_tokenizer
from model.tasks.generator import generate
from model.tokenizer import Tokenizer


def test_sizes_and_control_tokens(corpus_tokenizer):
    assert corpus_tokenizer.vocab_size == VOCAB_SIZE
    assert (corpus_tokenizer.bos_token_id, corpus_tokenizer.eos_token_id) == (0, 1)
    assert corpus_tokenizer.decode([corpus_tokenizer.control_id("<think>")]) == "<think>", "tags are visible text"
    assert corpus_tokenizer.decode([1]) == "", "the end of text is not"


def test_every_digit_is_a_token_of_its_own(corpus_tokenizer):
    ids = corpus_tokenizer.encode("1234567890 12:30")
    assert [corpus_tokenizer.decode([i]) for i in ids] == [*"1234567890", " ", "1", "2", ":", "3", "0"]


def test_any_text_survives_a_round_trip(corpus_tokenizer):
    for text in ("Add 12 and 7.", "ünïcode ☃ 漢字", "\n\n\t x", "<｜User｜> is only text"):
        assert corpus_tokenizer.decode(corpus_tokenizer.encode(text)) == text


def test_problems_are_shorter_than_their_bytes(corpus_tokenizer):
    rng = Random(0)
    texts = [generate(rng, "test").question for _ in range(200)]
    assert sum(len(corpus_tokenizer.encode(text)) for text in texts) < 0.5 * sum(len(text) for text in texts)


def test_equal_seeds_give_equal_files(corpus_tokenizer, tmp_path):
    for name in ("a", "b"):
        train_tokenizer(1, num_problems=500).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_transformers_builds_the_same_prompt(corpus_tokenizer, trained_checkpoint):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained_checkpoint)
    ours = Tokenizer.from_file(trained_checkpoint / "tokenizer.json")
    conversation = [
        ("user", "What is 3 + 4?"),
        ("assistant", "<think>\n3+4=7\n</think>\n\n7"),
        ("user", "Add 1 and 2."),
    ]
    for system in ([], [("system", "Be brief.")]):
        turns = system + conversation
        expected = ours.encode_chat([Message(role=role, content=content) for role, content in turns])
        messages = [{"role": role, "content": content} for role, content in turns]
        built = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(built) == expected
    assert theirs.eos_token_id == ours.eos_token_id
