"""Text of one choice: token ids in, text that may be shown out, stop strings found on the way.

Owns: what text may already be sent, where a stop string cuts it, after which token that happened.
Must not know: streams, HTTP, the tokenizer beyond "next token id to next characters".
Source: vLLM's `v1/engine/detokenizer.py` for what counts and what is shown. Matching is Knuth-Morris-Pratt, so
the result does not depend on how text is cut into tokens, and only a possible start of a match is held back.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.messages import SamplingParams


class Detokenizer(Protocol):
    """Incremental decoding of one sequence."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty inside a UTF-8 sequence or for a hidden token."""
        ...

    def finish(self) -> str:
        """What is left of an incomplete UTF-8 sequence, as replacement characters."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What a push added. `num_tokens` of the tokens pushed count; those behind a stop string do not."""

    text: str
    num_tokens: int
    stop: str | None = None  # the stop string that ended the text


class StopMatcher:
    """Finds the first of several strings in a text that arrives in pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = tuple((text, _borders(text)) for text in stop)
        self._matched = [0] * len(self._patterns)  # longest prefix of each string that ends the text so far

    @property
    def num_open_chars(self) -> int:
        """Characters at the end of the text that may be the start of a match."""
        return max(self._matched, default=0)

    def find(self, piece: str) -> tuple[int, str] | None:
        """Add a piece. On a match: how many of its characters were read, and the string found there.

        If several strings end at the same character the longest is taken, since it starts first.
        """
        for position, char in enumerate(piece, start=1):
            found: str | None = None
            for index, (text, borders) in enumerate(self._patterns):
                matched = self._matched[index]
                while matched and text[matched] != char:
                    matched = borders[matched - 1]
                matched += text[matched] == char
                self._matched[index] = matched
                if matched == len(text) and (found is None or len(text) > len(found)):
                    found = text
            if found is not None:
                return position, found
        return None


class TextStream:
    """Turns the token ids of one choice into text, up to the first stop string.

    A token of `end_ids` is not shown if it turns out to have ended the choice, which is known only with the next
    token or the end: until then it is held back.
    """

    def __init__(self, detokenizer: Detokenizer, sampling: SamplingParams, *, end_ids: Collection[int] = ()) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._end_ids = end_ids
        self._min_tokens = sampling.min_tokens
        self._shows_stop = sampling.include_stop_str_in_output
        self._held_text = ""  # decoded, and possibly the start of a stop string
        self._held_ids: tuple[int, ...] = ()  # at most one, of `end_ids`
        self._num_decoded = 0

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Text that these tokens make showable. Once `stop` is set, nothing may be pushed any more."""
        num_pushed, num_held = len(token_ids), len(self._held_ids)
        if self._end_ids and token_ids:
            token_ids = (*self._held_ids, *token_ids)
            self._held_ids = (token_ids[-1],) if token_ids[-1] in self._end_ids else ()
            token_ids = token_ids[: len(token_ids) - len(self._held_ids)]
        if self._matcher is None:
            push = self._detokenizer.push
            return TextDelta(text="".join([push(token_id) for token_id in token_ids]), num_tokens=num_pushed)
        shown: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            stop = self._push_text(self._detokenizer.push(token_id), shown)
            if stop is not None:
                return TextDelta(text="".join(shown), num_tokens=max(count - num_held, 0), stop=stop)
        return TextDelta(text="".join(shown), num_tokens=num_pushed)

    def finish(self, *, ended_by_token: bool) -> TextDelta:
        """The rest, when no more tokens come. `ended_by_token`: the last one ended the choice and is not shown."""
        pieces = [] if ended_by_token else [self._detokenizer.push(token_id) for token_id in self._held_ids]
        rest = "".join([*pieces, self._detokenizer.finish()])
        if self._matcher is None:
            return TextDelta(text=rest, num_tokens=0)
        if not pieces:
            self._num_decoded -= 1  # the rest belongs to the last token
        shown: list[str] = []
        stop = self._push_text(rest, shown)
        if stop is None:
            shown.append(self._held_text)
        return TextDelta(text="".join(shown), num_tokens=0, stop=stop)

    def _push_text(self, piece: str, shown: list[str]) -> str | None:
        """Add one token's characters: append what is safe to `shown`, return the stop string if one ended."""
        assert self._matcher is not None
        self._num_decoded += 1
        if self._num_decoded <= self._min_tokens:  # too early for any stop, as in vLLM
            shown.append(piece)
            return None
        found = self._matcher.find(piece)
        text = self._held_text + (piece if found is None else piece[: found[0]])
        if found is None:
            cut = len(text) - self._matcher.num_open_chars
        else:
            cut = len(text) if self._shows_stop else len(text) - len(found[1])
        shown.append(text[:cut])
        self._held_text = text[cut:]
        return None if found is None else found[1]


def _borders(text: str) -> tuple[int, ...]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return tuple(borders)
