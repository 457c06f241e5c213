"""The public surface: a name, a method or an argument that comes or goes shows up here."""

from __future__ import annotations

import inspect
import pickle
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import streamgen as sg
from streamgen import sync
from streamgen.request import RequestFields
from streamgen.sampling import SamplingFields

if TYPE_CHECKING:
    from typing import assert_type

PUBLIC = """
AdmissionError Completion ConfigError CorruptWeights DeadlineExceeded Delta Engine EngineClosed EngineFailed
EngineOptions EngineOverloaded EngineState Err Event EventStream FinishReason Finished FirstToken
GenerationError Histogram IncompleteOutput InsufficientMemory InvalidRequest KernelUnavailable Latencies
LifecycleEvent LoadError LoadProgress LogitsProcessor MemoryPlan Message ModelNotFound NotSupported Ok
OutputInvalid ProcessorError Prompt PromptTooLong RateLimited Rendered RequestAdmitted RequestError
RequestFinished RequestPreempted RequestStarted ResultStream Sampling SamplingFields SchemaError
SchemaTooComplex Session SessionBusy SlowConsumer Started StateChanged Stats StepCompleted Stream
StreamgenError TemplateError Tenant Text TextEngine Timings TokenLogprob TopLogprob UnknownAdapter
UnsupportedModel Usage __version__ assistant errors sync system tool_result user
Choice CompiledOutput Grammar GrammarStats JsonSchema OutputSpec Reasoning Regex ToolCall ToolDelta
""".split()

ENGINE_OPTIONS = """
device dtype quantization kv_memory kv_dtype max_context max_running max_queued isolation tensor_parallel
pipeline_parallel speculation prefix_cache deterministic seed threads step_budget_ms tenants grammars
idle_sleep chat_template offline revision on_progress name
""".split()

ENGINE_METHODS = """
aclose beam_search compile drain embed generate load_adapter load_progress map name open options plan render restart
run_tools sample score session sleep state stats stream subscribe tokenize trace wake
""".split()

STREAM_FIELDS = """
output sampling tools tool_choice tenant priority timeout first_token_timeout queue_timeout cache adapter
on_slow processors request_id
""".split()

STREAM_METHODS = "cancel events fields final id items partials result texts".split()

SAMPLING = """
max_tokens min_tokens temperature top_p top_k min_p typical_p repetition_penalty presence_penalty
frequency_penalty logit_bias stop stop_ids include_stop ignore_eos seed logprobs prompt_logprobs
""".split()

COMPLETION = """
id text parsed ids reasoning tool_calls finish_reason stop usage timings logprobs prompt_logprobs
""".split()


def public(cls: object) -> list[str]:
    return sorted(name for name in dir(cls) if not name.startswith("_"))


def keywords(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")]


def test_names() -> None:
    assert sorted(sg.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        if name != "__version__":
            assert getattr(sg, name) is not None
    assert {*PUBLIC} <= {*dir(sg)}


def test_lazy_names_and_all_agree() -> None:
    lazy = {*sg._HOMES, *sg._SUBMODULES, "__version__"}
    assert lazy == {*sg.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        _ = sg.Engin


def test_engine() -> None:
    assert keywords(sg.Engine.__init__) == ENGINE_OPTIONS
    assert public(sg.Engine("x")) == sorted(ENGINE_METHODS)
    assert keywords(sg.Engine.stream) == STREAM_FIELDS
    assert keywords(sg.Engine.sample) == ["n", "best_of", "output"]
    assert {*RequestFields.__annotations__} == {*STREAM_FIELDS, *SAMPLING} - {"output"}


def test_waits_are_async_and_the_rest_is_not() -> None:
    waits = {name for name in public(sg.Engine) if inspect.iscoroutinefunction(getattr(sg.Engine, name))}
    assert waits == {
        *"aclose beam_search compile drain embed generate load_adapter open restart run_tools sample score".split(),
        *"sleep tokenize wake".split(),
    }
    assert not any(inspect.iscoroutinefunction(getattr(sync.Engine, name)) for name in public(sync.Engine))


def test_stream() -> None:
    assert sorted({*public(sg.Stream), "id"}) == sorted(STREAM_METHODS)


def test_sampling_and_completion_fields() -> None:
    assert list(sg.Sampling.__struct_fields__) == SAMPLING == list(SamplingFields.__annotations__)
    assert list(sg.Completion.__struct_fields__) == COMPLETION


def test_values_round_trip_and_refuse_unknown_fields() -> None:
    sampling = sg.Sampling(max_tokens=3, stop=("a",), logit_bias={5: 1.0})
    assert msgspec.json.decode(msgspec.json.encode(sampling), type=sg.Sampling) == sampling
    options = sg.EngineOptions(model="m", max_running=4)
    assert msgspec.json.encode(options) == b'{"model":"m","max_running":4}'
    assert msgspec.json.decode(msgspec.json.encode(options), type=sg.EngineOptions) == options
    for kind in (sg.Sampling, sg.EngineOptions):
        with pytest.raises(msgspec.ValidationError, match="unknown field"):
            msgspec.json.decode(b'{"nonsense": 1}', type=kind)
    stats = sg.Stats(state=sg.EngineState.READY, running=2)
    assert msgspec.json.decode(msgspec.json.encode(stats), type=sg.Stats) == stats
    completion: sg.Completion[None] = sg.Completion(id="i", text="t", ids=(1,), finish_reason="stop", stop=1)
    assert msgspec.json.decode(msgspec.json.encode(completion), type=sg.Completion[None]) == completion


def test_every_error_pickles_and_has_a_code() -> None:
    values = vars(sg.errors).values()
    errors = [v for v in values if isinstance(v, type) and issubclass(v, sg.StreamgenError)]
    assert len(errors) > 25
    for cls in errors:
        error = pickle.loads(pickle.dumps(cls("why", request_id="r")))
        assert (type(error), str(error), error.request_id) == (cls, "why", "r")
        assert cls.code and isinstance(cls.retryable, bool) and 400 <= cls.http_status < 600


def test_messages_are_plain_dicts() -> None:
    assert sg.system("a") == {"role": "system", "content": "a"}
    assert sg.user("a") == {"role": "user", "content": "a"}
    assert sg.assistant("a") == {"role": "assistant", "content": "a"}
    assert sg.tool_result("4", tool_call_id="c1", name="add") == {
        "role": "tool",
        "content": "4",
        "tool_call_id": "c1",
        "name": "add",
    }
    completion: sg.Completion[None] = sg.Completion(id="i", text="hi")
    assert completion.message == sg.assistant("hi")


def test_sizes() -> None:
    from streamgen.config import parse_bytes

    cases = {"2GiB": 2 << 30, "512 MB": 512_000_000, "1048576": 1 << 20, "1.5kib": 1536, " 7 B ": 7}
    assert {text: parse_bytes(text) for text in cases} == cases
    for text in ("", "GiB", "-1GiB", "1 2", "1e9", "2 gigs"):
        with pytest.raises(ValueError, match="expected a size"):
            parse_bytes(text)


if TYPE_CHECKING:

    class Invoice: ...

    async def static_types(engine: sg.Engine, plain: sync.Engine) -> None:
        assert_type(await engine.generate("x", max_tokens=3), sg.Completion[None])
        assert_type(await engine.generate("x", output=Invoice), sg.Completion[Invoice])
        assert_type(engine.stream("x"), sg.Stream[None])
        assert_type(engine.stream("x", output=Invoice, temperature=0.5), sg.Stream[Invoice])
        assert_type(plain.generate("x", output=Invoice), sg.Completion[Invoice])
        assert_type(plain.stream("x", top_k=3), sync.Stream[None])
        async for delta in engine.stream("x"):
            assert_type(delta, sg.Delta)
        async for event in engine.stream("x").events():
            assert_type(event, sg.Event)
        engine.stream("x", max_tokns=3)  # type: ignore[call-overload]
        sg.Engine("x", max_runing=3)  # type: ignore[arg-type]
