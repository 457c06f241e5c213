"""streamgen: an LLM inference engine that is a library.

Open it in your process, await token streams from it, close it. The names below are loaded when they are first used, so
that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamgen import errors, sync
    from streamgen.completion import (
        Completion,
        Delta,
        Event,
        Finished,
        FinishReason,
        Started,
        Text,
        Timings,
        TokenLogprob,
        TopLogprob,
        Usage,
    )
    from streamgen.config import EngineOptions, EngineState, LoadProgress, MemoryPlan
    from streamgen.engine import Engine
    from streamgen.errors import (
        AdmissionError,
        ConfigError,
        CorruptWeights,
        DeadlineExceeded,
        EngineClosed,
        EngineFailed,
        EngineOverloaded,
        GenerationError,
        IncompleteOutput,
        InsufficientMemory,
        InvalidRequest,
        KernelUnavailable,
        LoadError,
        ModelNotFound,
        NotSupported,
        OutputInvalid,
        ProcessorError,
        PromptTooLong,
        RateLimited,
        RequestError,
        SchemaError,
        SchemaTooComplex,
        SessionBusy,
        SlowConsumer,
        StreamgenError,
        TemplateError,
        UnknownAdapter,
        UnsupportedModel,
    )
    from streamgen.metrics import Stats
    from streamgen.prompt import Message, Prompt, Rendered, assistant, system, tool_result, user
    from streamgen.sampling import Sampling, SamplingFields
    from streamgen.stream import Stream

    __version__: str

_MODULES = {
    "completion": ("Completion Delta Event Finished FinishReason Started Text Timings TokenLogprob TopLogprob Usage"),
    "config": "EngineOptions EngineState LoadProgress MemoryPlan",
    "engine": "Engine",
    "errors": (
        "AdmissionError ConfigError CorruptWeights DeadlineExceeded EngineClosed EngineFailed EngineOverloaded "
        "GenerationError IncompleteOutput InsufficientMemory InvalidRequest KernelUnavailable LoadError ModelNotFound "
        "NotSupported OutputInvalid ProcessorError PromptTooLong RateLimited RequestError SchemaError SchemaTooComplex "
        "SessionBusy SlowConsumer StreamgenError TemplateError UnknownAdapter UnsupportedModel"
    ),
    "metrics": "Stats",
    "prompt": "Message Prompt Rendered assistant system tool_result user",
    "sampling": "Sampling SamplingFields",
    "stream": "Stream",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
_SUBMODULES = ("errors", "sync")

__all__ = [  # compared with the lazy names in a test
    "AdmissionError",
    "Completion",
    "ConfigError",
    "CorruptWeights",
    "DeadlineExceeded",
    "Delta",
    "Engine",
    "EngineClosed",
    "EngineFailed",
    "EngineOptions",
    "EngineOverloaded",
    "EngineState",
    "Event",
    "FinishReason",
    "Finished",
    "GenerationError",
    "IncompleteOutput",
    "InsufficientMemory",
    "InvalidRequest",
    "KernelUnavailable",
    "LoadError",
    "LoadProgress",
    "MemoryPlan",
    "Message",
    "ModelNotFound",
    "NotSupported",
    "OutputInvalid",
    "ProcessorError",
    "Prompt",
    "PromptTooLong",
    "RateLimited",
    "Rendered",
    "RequestError",
    "Sampling",
    "SamplingFields",
    "SchemaError",
    "SchemaTooComplex",
    "SessionBusy",
    "SlowConsumer",
    "Started",
    "Stats",
    "Stream",
    "StreamgenError",
    "TemplateError",
    "Text",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "UnknownAdapter",
    "UnsupportedModel",
    "Usage",
    "__version__",
    "assistant",
    "errors",
    "sync",
    "system",
    "tool_result",
    "user",
]


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version("streamgen")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(f"streamgen.{_HOMES[name]}"), name)
    elif name in _SUBMODULES:
        from importlib import import_module

        value = import_module(f"streamgen.{name}")
    else:
        raise AttributeError(f"module 'streamgen' has no attribute {name!r}")
    globals()[name] = value  # the next access finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
