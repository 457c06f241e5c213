"""Every exception that streamgen raises.

    StreamgenError
      ConfigError (ValueError)         an option of the engine
      LoadError                        opening a model
        ModelNotFound  UnsupportedModel  CorruptWeights  InsufficientMemory  KernelUnavailable
      RequestError (ValueError)        one request, before any compute
        InvalidRequest  NotSupported  PromptTooLong  TemplateError  UnknownAdapter
        SchemaError  SchemaTooComplex  SessionBusy
      AdmissionError                   the engine does not take the request now
        EngineOverloaded  RateLimited  EngineClosed
      GenerationError                  one request, while it ran
        DeadlineExceeded (TimeoutError)  IncompleteOutput  OutputInvalid  SlowConsumer  ProcessorError
      EngineFailed                     the engine itself

A message says what was wanted, what came and what to do. It never holds prompt text.
"""

from __future__ import annotations

from typing import Any, ClassVar


class StreamgenError(Exception):
    """Base of all errors of this library.

    Attributes:
        code: stable snake_case name of the class of error.
        retryable: whether the same call may succeed later.
        http_status: the status that a web server should answer with.
        request_id: the id of the request, where there is one.
        partial: the `Completion` so far, where there is one.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, request_id: str | None = None, partial: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.partial = partial

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(cls: type[StreamgenError], message: str, state: dict[str, Any]) -> StreamgenError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(StreamgenError, ValueError):
    """An option of `Engine` cannot be used; `option` names it."""

    code = "config_error"
    http_status = 500

    def __init__(self, message: str, *, option: str | None = None, **common: Any) -> None:
        super().__init__(message, **common)
        self.option = option


class LoadError(StreamgenError):
    """A model could not be opened."""

    code = "load_error"
    http_status = 503


class ModelNotFound(LoadError):
    """There is no model at that path or of that name."""

    code = "model_not_found"
    http_status = 404


class UnsupportedModel(LoadError):
    """The checkpoint is well formed, but this version cannot run it."""

    code = "unsupported_model"


class CorruptWeights(LoadError):
    """A checkpoint file contradicts itself or its configuration."""

    code = "corrupt_weights"


class InsufficientMemory(LoadError):
    """The model or its cache does not fit; the message holds the number that would."""

    code = "insufficient_memory"


class KernelUnavailable(LoadError):
    """No backend can run the model here; the message lists each with its reasons."""

    code = "kernel_unavailable"


class RequestError(StreamgenError, ValueError):
    """The request cannot be run as it stands."""

    code = "invalid_request"
    http_status = 400


class InvalidRequest(RequestError):
    """A field of the request has a wrong value; `param` names it."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, **common: Any) -> None:
        super().__init__(message, **common)
        self.param = param


class NotSupported(InvalidRequest):
    """A field of the contract that this version does not implement yet."""

    code = "not_supported"
    http_status = 501


class PromptTooLong(RequestError):
    """The prompt has more tokens than the context holds."""

    code = "prompt_too_long"

    def __init__(self, message: str, *, prompt_tokens: int = 0, max_context: int = 0, **common: Any) -> None:
        super().__init__(message, **common)
        self.prompt_tokens = prompt_tokens
        self.max_context = max_context


class TemplateError(RequestError):
    """The chat template refused the messages, or is missing or broken."""

    code = "template_error"


class UnknownAdapter(RequestError):
    """The adapter is not loaded in this engine."""

    code = "unknown_adapter"
    http_status = 404


class SchemaError(RequestError):
    """The output type cannot be turned into a grammar.

    `pointer` is the JSON pointer into the schema and `keyword` what cannot be enforced there, where that is the reason.
    """

    code = "schema_error"

    def __init__(self, message: str, *, pointer: str | None = None, keyword: str | None = None, **common: Any) -> None:
        super().__init__(message, **common)
        self.pointer = pointer
        self.keyword = keyword


class SchemaTooComplex(RequestError):
    """The grammar would pass the limits on size or time; `bound` names the limit."""

    code = "schema_too_complex"

    def __init__(self, message: str, *, bound: str | None = None, **common: Any) -> None:
        super().__init__(message, **common)
        self.bound = bound


class SessionBusy(RequestError):
    """A session runs one turn at a time."""

    code = "session_busy"
    http_status = 409


class AdmissionError(StreamgenError):
    """The engine does not take the request now."""

    code = "not_admitted"
    retryable = True
    http_status = 503

    def __init__(self, message: str, *, retry_after: float | None = None, **common: Any) -> None:
        super().__init__(message, **common)
        self.retry_after = retry_after


class EngineOverloaded(AdmissionError):
    """The queue is full."""

    code = "engine_overloaded"


class RateLimited(AdmissionError):
    """This tenant has used up its share."""

    code = "rate_limited"
    http_status = 429


class EngineClosed(AdmissionError):
    """The engine is not open (yet, or any more)."""

    code = "engine_closed"
    retryable = False


class GenerationError(StreamgenError):
    """The request failed while it ran; `partial` holds what was generated."""

    code = "generation_error"


class DeadlineExceeded(GenerationError, TimeoutError):
    """A time limit of the request passed."""

    code = "deadline_exceeded"
    retryable = True
    http_status = 504


class IncompleteOutput(GenerationError):
    """The output was cut before the value was whole."""

    code = "incomplete_output"


class OutputInvalid(GenerationError):
    """The output does not validate against its type."""

    code = "output_invalid"


class SlowConsumer(GenerationError):
    """The stream's reader fell behind, and `on_slow="cancel"` was asked for."""

    code = "slow_consumer"


class ProcessorError(GenerationError):
    """A logits processor of the request raised."""

    code = "processor_error"


class EngineFailed(StreamgenError):
    """The engine died; `await engine.restart()` may bring it back."""

    code = "engine_failed"
    retryable = True
    http_status = 503
