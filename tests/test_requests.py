"""What a request and an engine's options may be, and what is said of those that may not."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from streamgen.sync import Engine as SyncEngine
from tests.fakes import BOS, VOCAB_SIZE, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    import threading


pytestmark = pytest.mark.anyio

HELLO = (BOS, *b"hello")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert threads_of_engines() == []


async def in_thread(event: threading.Event) -> None:
    """Wait for a thread's event without holding the loop."""
    assert await anyio.to_thread.run_sync(event.wait, 20), "waited for an event that never came"


BAD_REQUESTS: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt: expected text that is not empty"),
    ([], {}, "empty sequence"),
    ((), {}, "empty sequence"),
    (None, {}, "expected a string, token ids or messages, got NoneType"),
    (17, {}, "got int"),
    (b"hello", {}, "got bytes"),
    ({"role": "user", "content": "x"}, {}, "got dict"),
    ([1, "a"], {}, r"prompt\[1\]: expected a token id .* got str"),
    ([1, True], {}, r"prompt\[1\]: .* got bool"),
    ([1, 2.0], {}, r"prompt\[1\]: .* got float"),
    ([1, -1], {}, r"prompt\[1\]: expected a token id >= 0, got -1"),
    ([1, VOCAB_SIZE], {}, f"prompt: expected token ids < {VOCAB_SIZE} .* got {VOCAB_SIZE}"),
    ([1, 2**70], {}, "prompt: expected token ids <"),
    ([1, {"role": "user", "content": "x"}], {}, "either token ids or messages"),
    ([{"role": "usr", "content": "x"}], {}, r"messages\[0\].role"),
    ([{"content": "x"}], {}, r"messages\[0\].role"),
    ([{"role": "user"}], {}, r"messages\[0\].content"),
    ([{"role": "user", "content": 5}], {}, r"messages\[0\].content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"messages\[0\].content\[0\]"),
    ("lone \ud800", {}, "lone surrogate"),
    ([{"role": "user", "content": "lone \ud800"}], {}, "lone surrogate"),
    ("x" * 8_000_001, {}, "expected <= 8000000 bytes"),
    ("x", {"max_tokns": 3}, "unknown field 'max_tokns'; did you mean 'max_tokens'"),
    ("x", {"timeot": 3}, "unknown field 'timeot'; did you mean 'timeout'"),
    ("x", {"max_tokens": 0}, "max_tokens: expected >= 1, got 0"),
    ("x", {"max_tokens": "3"}, "max_tokens: expected an integer, got str"),
    ("x", {"temperature": float("nan")}, "temperature: expected a finite number"),
    ("x", {"timeout": 0}, "timeout: expected seconds > 0"),
    ("x", {"timeout": float("inf")}, "timeout: expected seconds > 0"),
    ("x", {"timeout": "1s"}, "timeout: expected seconds, got str"),
    ("x", {"priority": 1.5}, "priority: expected an integer"),
    ("x", {"priority": 2**40}, "priority: expected >="),
    ("x", {"tenant": ""}, "tenant: expected 1 to 200 characters"),
    ("x", {"tenant": 5}, "tenant: expected a string"),
    ("x", {"request_id": "i" * 201}, "request_id: expected 1 to 200"),
    ("x", {"sampling": {"top_k": 3}}, "sampling: expected a Sampling, got dict"),
    ("x", {"stop_ids": [VOCAB_SIZE]}, "stop_ids: expected token ids <"),
    ("x", {"stop_ids": [-1]}, "stop_ids: expected token ids <"),
    ("x", {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias: expected token ids <"),
    ("x", {"stop": ""}, "stop: expected strings of 1 to 256 bytes"),
    ("x", {"output": "a"}, "output: expected a type, .*, got a str"),
    ("x", {"output": int, "stop": "."}, "stop: a request with output= ends where its value does"),
    ("x", {"output": int, "stop_ids": [1]}, "stop_ids: a request with output= ends where"),
    ("x", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: expected a chat as the prompt"),
    ([{"role": "user", "content": "x"}], {"tool_choice": "required"}, "tool_choice|tools"),
]


async def test_bad_requests_are_refused_when_made() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        for prompt, fields, match in BAD_REQUESTS:
            with pytest.raises(sg.InvalidRequest, match=match) as caught:
                engine.stream(prompt, **fields)
            assert caught.value.param is not None, match
            assert isinstance(caught.value, ValueError)
        assert engine.stats().requests == 0
        assert (await engine.generate("hello", max_tokens=3)).text == expected_text(HELLO, 3)


NOT_YET: list[tuple[str, Any]] = [
    ("adapter", object()),
]


async def test_fields_of_later_versions_are_refused_by_name() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        for name, value in NOT_YET:
            with pytest.raises(sg.NotSupported, match=f"^{name}: not available") as caught:
                engine.stream("x", **{name: value})
            assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"cache": "mine"}, "cache: expected one of private, tenant, public, got 'mine'"),
        ({"processors": print}, "processors: expected a sequence of functions, got builtin"),
        ({"processors": ["upper"]}, "processors: expected functions of .*, got str"),
        ({"processors": [print] * 17}, "processors: expected <= 16, got 17"),
    ],
)
async def test_fields_are_checked_when_the_request_is_made(fields: Any, match: str) -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        with pytest.raises(sg.InvalidRequest, match=match) as caught:
            engine.stream("x", **fields)
        assert caught.value.param == next(iter(fields))


async def test_methods_of_later_versions_say_so() -> None:
    engine = sg.Engine(_opener=FakeOpener())
    with pytest.raises(sg.NotSupported, match="beam_search"):
        await engine.beam_search("x", width=2)
    for name in ("embed", "load_adapter"):
        with pytest.raises(sg.NotSupported, match=name):
            await getattr(engine, name)("x")


async def test_prompt_too_long_with_counts() -> None:
    async with sg.Engine(_opener=FakeOpener(max_context=32)) as engine:
        with pytest.raises(sg.PromptTooLong, match="got 32") as caught:
            engine.stream(list(range(32)))
        assert (caught.value.prompt_tokens, caught.value.max_context) == (32, 32)
        stream = engine.stream("x" * 40)
        with pytest.raises(sg.PromptTooLong, match=r"expected <= 31 tokens .* got 41") as caught:
            async with stream:
                pass
        assert (caught.value.prompt_tokens, caught.value.max_context) == (41, 32)
        assert caught.value.request_id == stream.id
        with pytest.raises(sg.PromptTooLong):
            await engine.generate("x" * 40)
        with pytest.raises(sg.PromptTooLong):
            async for _ in engine.stream("x" * 40):
                pass
        assert len((await engine.generate("x" * 30)).ids) == 1
        assert engine.stats().open_requests == 0


async def test_templates_refuse_or_are_missing() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        with pytest.raises(sg.TemplateError, match="no system messages"):
            await engine.generate([sg.system("refuse")])
    async with sg.Engine(_opener=FakeOpener(template=None)) as engine:
        with pytest.raises(sg.TemplateError, match="no chat template"):
            await engine.generate([sg.user("x")])
        with pytest.raises(sg.TemplateError, match="no chat template"):
            engine.render([sg.user("x")])
        with pytest.raises(sg.InvalidRequest, match="sequence of messages"):
            engine.render("x")  # type: ignore[arg-type]


async def test_a_broken_tokenizer_harms_its_request_alone() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        with pytest.raises(sg.StreamgenError, match="encoding failed: RuntimeError"):
            await engine.generate("a\x00b")
        assert (await engine.generate("hello", max_tokens=3)).text == expected_text(HELLO, 3)


async def test_overload_is_refused_at_once() -> None:
    opener = FakeOpener(max_running=2)
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener, max_queued=3) as engine:
        streams = [engine.stream("hello", max_tokens=2) for _ in range(5)]
        for stream in streams:
            await stream.__aenter__()
        with pytest.raises(sg.EngineOverloaded, match="expected <= 5 open sequences") as caught:
            await engine.generate("one too many")
        assert caught.value.retryable and caught.value.retry_after
        opener.runner.open_gate()
        assert {(await stream.final()).text for stream in streams} == {expected_text(HELLO, 2)}
        assert (await engine.generate("hello", max_tokens=2)).text == expected_text(HELLO, 2)


def test_options_are_checked_by_the_constructor() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_runing": 3}, "unknown option 'max_runing'; did you mean 'max_running'"),
        ({"max_running": 0}, "max_running: expected >= 1, got 0"),
        ({"max_running": "4"}, "max_running: expected an integer, got str"),
        ({"max_context": 1}, "max_context: expected >= 2"),
        ({"max_queued": -1}, "max_queued: expected >= 0"),
        ({"max_queued": None}, "max_queued: expected an integer"),
        ({"threads": 0}, "threads: expected >= 1"),
        ({"seed": -1}, "seed: expected >= 0"),
        ({"dtype": "int7"}, "dtype: expected one of auto, float32, bfloat16"),
        ({"dtype": "float16"}, "dtype: 'float16' is not available in this version"),
        ({"kv_memory": "2 bananas"}, "kv_memory: expected a size like '2GiB'"),
        ({"kv_memory": 1.5}, "kv_memory: expected a share of free memory > 0 and < 1"),
        ({"kv_memory": True}, "kv_memory: expected a size"),
        ({"kv_memory": "0GiB"}, "kv_memory: expected more than 0 bytes"),
        ({"prefix_cache": 1}, "prefix_cache: expected True or False"),
        ({"name": ""}, "name: expected a string that is not empty"),
        ({"on_progress": 3}, "on_progress: expected a function"),
        ({"device": "cuda:0"}, "device: 'cuda:0' is not available in this version; use 'auto' or 'cpu'"),
        ({"device": ["cuda:0", "cuda:1"]}, "device: tuple is not available"),
        ({"quantization": "int3"}, "quantization: expected 'int8' or 'int4'"),
        ({"kv_dtype": "int4"}, "kv_dtype: 'int4' is not available in this version; use 'auto' or 'int8'"),
        ({"isolation": "container"}, "isolation: expected one of thread, process, got 'container'"),
        ({"tensor_parallel": 2}, "tensor_parallel: 2 is not available"),
        ({"pipeline_parallel": 2}, "pipeline_parallel: 2 is not available"),
        ({"speculation": object()}, "speculation: object is not available"),
        ({"step_budget_ms": 50.0}, "step_budget_ms: 50.0 is not available"),
        ({"tenants": {"a": object()}}, "tenants: 'a': expected a Tenant or its fields, got object"),
        ({"grammars": 7}, "grammars: expected a sequence of output types, got int"),
        ({"idle_sleep": 0.0}, "idle_sleep: expected seconds > 0"),
    ]
    for options, match in cases:
        with pytest.raises(sg.ConfigError, match=match) as caught:
            sg.Engine(**options)
        assert caught.value.option == next(iter(options))
    with pytest.raises(sg.ConfigError, match="model: expected a string, got int"):
        sg.Engine(3)  # type: ignore[arg-type]
    sg.Engine(Path("x"), device=["cpu"], kv_memory=0.3, dtype="bfloat16")


def test_the_two_kinds_of_engine_are_one_class_below() -> None:
    assert SyncEngine.__mro__[1] is sg.Engine.__mro__[1]
