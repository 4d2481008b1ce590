"""The exceptions of `serving`, in one tree.

ServingError
  ConfigError             the configuration contradicts itself                     (also a ValueError)
  RequestRejected         not admitted, nothing is held; .reason .status .param    (also a ValueError)
    InvalidRequest          400  a field has a wrong type or value
      PromptTooLong           400  the prompt and the tokens asked for do not fit in max_model_len
      UnsupportedField        400  a field of the protocol that this server does not implement
    Unauthorized            401  no API key, or a wrong one
    ModelNotFound           404
    BodyTooLarge            413
    UnsupportedMediaType    415  the body is not declared to be JSON
    QueueFull               429  with Retry-After
    Draining                503  the server is shutting down
  EngineFailure           an admitted request, or the engine itself, failed        (500)

Owns: the tree, and how each rejection looks from outside (status, reason, field).
Must not know: HTTP frameworks, requests' states. Devices raise their own (devices/faults.py).
"""

from typing import ClassVar

_MAX_SHOWN_CHARS = 80


def shown(value: object) -> str:
    """`value` as an error message quotes it: its repr, cut so that no client can make us echo megabytes."""
    if isinstance(value, str | bytes):
        value = value[: _MAX_SHOWN_CHARS + 1]
    elif isinstance(value, int) and value.bit_length() > 256:  # repr() of a huge integer raises
        return f"an integer of {value.bit_length()} bits"
    elif isinstance(value, list | tuple | dict | set) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


class ServingError(Exception):
    """Base of everything that this package raises on purpose."""


class ConfigError(ServingError, ValueError):
    """The configuration contradicts itself; the message names the field, the value and the limit."""


class RequestRejected(ServingError, ValueError):
    """A request that is not admitted. Nothing was reserved for it.

    `reason` is a short fixed word (a metric label), `status` the HTTP status, `param` the field at fault.
    """

    status: ClassVar[int] = 400
    reason: ClassVar[str] = "invalid"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestRejected):
    """A field has a wrong type or value."""

    @classmethod
    def of(cls, field: str, value: object, rule: str) -> "InvalidRequest":
        """The usual message: field, value and the rule that it breaks, such as 'must be at least 1'."""
        return cls(f"{field}: got {shown(value)}, {rule}", param=field)


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the tokens asked for, do not fit in the model's context."""

    reason = "prompt_too_long"


class UnsupportedField(InvalidRequest):
    """A field of the protocol that this server does not implement holds more than its neutral value."""

    reason = "unsupported"


class Unauthorized(RequestRejected):
    status = 401
    reason = "unauthorized"


class ModelNotFound(RequestRejected):
    status = 404
    reason = "model_not_found"


class BodyTooLarge(RequestRejected):
    status = 413
    reason = "body_too_large"


class UnsupportedMediaType(RequestRejected):
    status = 415
    reason = "media_type"


class QueueFull(RequestRejected):
    """The bounded queue is full; `retry_after_s` is when a place is likely to be free."""

    status = 429
    reason = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class Draining(RequestRejected):
    """The server is shutting down and takes no new work."""

    status = 503
    reason = "draining"


class EngineFailure(ServingError):
    """An admitted request, or the engine itself, failed. The message names what was lost."""
