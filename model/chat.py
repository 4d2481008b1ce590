"""DeepSeek-R1's chat template: messages to pieces of prompt.

Owns: the control tokens' names and where they go in a conversation.
Must not know: token ids, HTTP.
Source: chat_template of deepseek-ai/DeepSeek-R1 tokenizer_config.json (without tools): system text first,
reasoning of earlier assistant turns removed up to its last closing tag, the new turn opened with a thinking
tag.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"

ROLES = ("system", "user", "assistant")


class ChatError(ValueError):
    """A conversation that the template cannot take. The message names the message and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


def chat_pieces(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Iterator[tuple[str, bool]]:
    """Pieces of the prompt in order, each with whether it holds control tokens (True) or a message's own text
    (False)."""
    if not messages:
        raise ChatError("messages: at least one message is needed")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise ChatError(f"messages[{index}].role: {message.role!r} is not one of {', '.join(ROLES)}")
    yield BOS, True
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    yield system, False
    for message in messages:
        if message.role == "user":
            yield USER, True
            yield message.content, False
        elif message.role == "assistant":
            yield ASSISTANT, True
            yield message.content.rsplit(THINK_END, 1)[-1], False
            yield EOS, True
    if add_generation_prompt:
        yield ASSISTANT + THINK_START, True
        yield "\n", False


def render_chat(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The prompt as one string, for people to read. Encode with Tokenizer.encode_chat, which cannot be forged."""
    return "".join(text for text, _ in chat_pieces(messages, add_generation_prompt=add_generation_prompt))
