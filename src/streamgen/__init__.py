"""streamgen: an LLM inference engine that is a library.

Open it in your process, await token streams from it, close it. The names below are loaded when they are first used, so
that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamgen import errors, sync
    from streamgen.compiled import CompiledOutput
    from streamgen.completion import (
        Completion,
        Delta,
        Event,
        Finished,
        FinishReason,
        Reasoning,
        Started,
        Text,
        Timings,
        TokenLogprob,
        ToolCall,
        ToolDelta,
        TopLogprob,
        Usage,
    )
    from streamgen.config import EngineOptions, EngineState, LoadProgress, MemoryPlan, Tenant
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
    from streamgen.grammar.grammar import GrammarStats
    from streamgen.grammar.outputs import Choice, Grammar, JsonSchema, OutputSpec, Regex
    from streamgen.latencies import Histogram, Latencies
    from streamgen.lifecycle import (
        EventStream,
        FirstToken,
        LifecycleEvent,
        RequestAdmitted,
        RequestFinished,
        RequestPreempted,
        RequestStarted,
        StateChanged,
        StepCompleted,
    )
    from streamgen.mapping import Err, Ok, ResultStream
    from streamgen.metrics import Stats
    from streamgen.prompt import Message, Prompt, Rendered, assistant, system, tool_result, user
    from streamgen.sampling import LogitsProcessor, Sampling, SamplingFields
    from streamgen.session import Session
    from streamgen.stream import Stream
    from streamgen.text_engine import TextEngine

    __version__: str

_MODULES = {
    "compiled": "CompiledOutput",
    "completion": (
        "Completion Delta Event Finished FinishReason Reasoning Started Text Timings TokenLogprob ToolCall ToolDelta "
        "TopLogprob Usage"
    ),
    "config": "EngineOptions EngineState LoadProgress MemoryPlan Tenant",
    "engine": "Engine",
    "errors": (
        "AdmissionError ConfigError CorruptWeights DeadlineExceeded EngineClosed EngineFailed EngineOverloaded "
        "GenerationError IncompleteOutput InsufficientMemory InvalidRequest KernelUnavailable LoadError ModelNotFound "
        "NotSupported OutputInvalid ProcessorError PromptTooLong RateLimited RequestError SchemaError SchemaTooComplex "
        "SessionBusy SlowConsumer StreamgenError TemplateError UnknownAdapter UnsupportedModel"
    ),
    "grammar.grammar": "GrammarStats",
    "grammar.outputs": "Choice Grammar JsonSchema OutputSpec Regex",
    "latencies": "Histogram Latencies",
    "lifecycle": (
        "EventStream FirstToken LifecycleEvent RequestAdmitted RequestFinished RequestPreempted RequestStarted "
        "StateChanged StepCompleted"
    ),
    "mapping": "Err Ok ResultStream",
    "metrics": "Stats",
    "prompt": "Message Prompt Rendered assistant system tool_result user",
    "sampling": "LogitsProcessor Sampling SamplingFields",
    "session": "Session",
    "stream": "Stream",
    "text_engine": "TextEngine",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
_SUBMODULES = ("errors", "sync")

__all__ = [  # compared with the lazy names in a test
    "AdmissionError",
    "Choice",
    "CompiledOutput",
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
    "Err",
    "Event",
    "EventStream",
    "FinishReason",
    "Finished",
    "FirstToken",
    "GenerationError",
    "Grammar",
    "GrammarStats",
    "Histogram",
    "IncompleteOutput",
    "InsufficientMemory",
    "InvalidRequest",
    "JsonSchema",
    "KernelUnavailable",
    "Latencies",
    "LifecycleEvent",
    "LoadError",
    "LoadProgress",
    "LogitsProcessor",
    "MemoryPlan",
    "Message",
    "ModelNotFound",
    "NotSupported",
    "Ok",
    "OutputInvalid",
    "OutputSpec",
    "ProcessorError",
    "Prompt",
    "PromptTooLong",
    "RateLimited",
    "Reasoning",
    "Regex",
    "Rendered",
    "RequestAdmitted",
    "RequestError",
    "RequestFinished",
    "RequestPreempted",
    "RequestStarted",
    "ResultStream",
    "Sampling",
    "SamplingFields",
    "SchemaError",
    "SchemaTooComplex",
    "Session",
    "SessionBusy",
    "SlowConsumer",
    "Started",
    "StateChanged",
    "Stats",
    "StepCompleted",
    "Stream",
    "StreamgenError",
    "TemplateError",
    "Tenant",
    "Text",
    "TextEngine",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolDelta",
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
