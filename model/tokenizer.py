"""Text to token ids and back.

Owns: the byte-level vocabulary of the mini models, encoding, decoding, and streaming decoding.
Must not know: requests, HTTP, the model.
Source: DeepSeek-R1's tokenizer.json (names of the control tokens; `<think>` tags are visible text, the others
are not).

Rule for control tokens: `encode` never makes one. Text that spells a control token, such as "<｜User｜>", is
encoded as its characters, so a user cannot forge a turn or an end of text. Control tokens come from the chat
template, `encode_chat`, or from `encode(..., parse_control=True)` for text that the caller trusts.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from model.chat import ASSISTANT, BOS, EOS, PAD, THINK_END, THINK_START, USER, Message, chat_pieces

# In order of their ids. R1 keeps the thinking tags out of the special tokens so that they appear in the
# answer's text.
CONTROL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK_START, THINK_END)
VISIBLE_CONTROL_TOKENS = frozenset({THINK_START, THINK_END})
_NUM_BYTES = 256
MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + _NUM_BYTES


class TokenizerError(ValueError):
    """Text or ids that the tokenizer cannot take."""


class Tokenizer:
    """A byte-level tokenizer read from a tokenizer.json (ours or DeepSeek-R1's own)."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._control_ids = {token.content: token_id for token_id, token in added.items()}
        self._hidden_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        bytes_by_char = _bytes_by_char()
        self._token_bytes: list[bytes] = []
        for token_id in range(backend.get_vocab_size(with_added_tokens=True)):
            token = backend.id_to_token(token_id)
            if token is None or token_id in added:
                self._token_bytes.append((token or "").encode())
            else:
                self._token_bytes.append(bytes(bytes_by_char[char] for char in token))

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises TokenizerError if it is none."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises nothing more special
            raise TokenizerError(f"{path}: {error}") from None
        return cls(backend)

    @classmethod
    def byte_level(cls, vocab_size: int) -> "Tokenizer":
        """The mini models' vocabulary: control tokens, the 256 bytes in order, then placeholders up to `vocab_size`."""
        if vocab_size < MIN_VOCAB_SIZE:
            raise TokenizerError(
                f"vocab_size: {vocab_size} is below {MIN_VOCAB_SIZE}, control tokens and bytes do not fit"
            )
        names = list(CONTROL_TOKENS)
        names += [char for char, _ in sorted(_bytes_by_char().items(), key=lambda item: item[1])]
        placeholders = [f"<｜place▁holder▁no▁{i}｜>" for i in range(vocab_size - len(names))]
        vocab = {name: token_id for token_id, name in enumerate(names + placeholders)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens(
            [
                AddedToken(name, special=name not in VISIBLE_CONTROL_TOKENS, normalized=False)
                for name in (*CONTROL_TOKENS, *placeholders)
            ]
        )
        return cls(backend)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json."""
        self._backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        return len(self._token_bytes)

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the vocabulary: equal digests give equal ids."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    @property
    def bos_token_id(self) -> int:
        return self.control_id(BOS)

    @property
    def eos_token_id(self) -> int:
        return self.control_id(EOS)

    def control_id(self, name: str) -> int:
        """Id of a control token. Raises TokenizerError if this vocabulary has no such token."""
        if name not in self._control_ids:
            raise TokenizerError(f"token {name!r}: not a control token of this vocabulary")
        return self._control_ids[name]

    def encode(self, text: str, *, add_bos: bool = False, parse_control: bool = False) -> list[int]:
        """Token ids of `text`; see the module's rule for control tokens. Raises TokenizerError for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text: character {error.start} is a lone surrogate, not UTF-8 text") from None
        ids = [self.bos_token_id] if add_bos else []
        start = 0
        for match in self._control_pattern.finditer(text):
            # Cut inside the name: no piece spells it in full, so the library cannot take it for the token.
            cut = match.start() + (0 if parse_control else 1)
            ids += self._encode_plain(text[start:cut])
            start = cut
            if parse_control:
                ids.append(self._control_ids[match.group()])
                start = match.end()
        return ids + self._encode_plain(text[start:])

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation under R1's chat template; message contents make no control tokens."""
        ids: list[int] = []
        for text, is_control in chat_pieces(messages, add_generation_prompt=add_generation_prompt):
            ids += self.encode(text, parse_control=is_control)
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def stream(self, *, skip_special_tokens: bool = True) -> "TextStream":
        """An incremental decoder whose pieces concatenate to what `decode` gives."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; a control token stands for its name.

        An id beyond the vocabulary stands for nothing: a model's own may be padded (R1's is), and may choose such an
        id. Raises TokenizerError if it is below 0.
        """
        if token_id < 0:
            raise TokenizerError(f"token id: {token_id} is below 0")
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def is_hidden(self, token_id: int) -> bool:
        """Whether the token is left out of the text that a client sees."""
        return token_id in self._hidden_ids

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids) if text else []


class TextStream:
    """Decodes tokens one by one and never emits half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that is complete once this token is known; may be empty."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._skip_special_tokens and self._tokenizer.is_hidden(token_id):
            return ""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD if the tokens ended inside a character."""
        return self._decoder.decode(b"", final=True)


def _bytes_by_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others are moved to U+0100 and above, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(_NUM_BYTES + index): byte for index, byte in enumerate(moved)}
