"""The engine from its front door: open, ask, fail, drain, close, on asyncio, trio and plain threads."""

from __future__ import annotations

import gc
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus
from blockbuster import blockbuster_ctx

import streamgen as sg
from streamgen.sync import Engine as SyncEngine
from tests.fakes import BOS, EOS, VOCAB_SIZE, FakeOpener, expected_text, say, threads_of_engines

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


# ---- answers -------------------------------------------------------------------------------------------------------


async def test_generate_returns_the_whole() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        reply = await engine.generate("hello", max_tokens=20)
    assert reply.text == expected_text(HELLO, 20)
    assert bytes(reply.ids).decode() == reply.text
    assert (reply.finish_reason, reply.stop) == ("length", None)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 20)
    timings = reply.timings
    assert timings.tokenized is not None and timings.first_token is not None and timings.finished is not None
    assert 0 <= timings.tokenized <= timings.first_token <= timings.finished
    assert reply.logprobs is None and reply.prompt_logprobs is None


async def test_the_three_forms_of_a_prompt() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        by_text = await engine.generate("hello", max_tokens=5)
        by_ids = await engine.generate(HELLO, max_tokens=5)
        by_chat = await engine.generate([sg.user("hello")], max_tokens=5)
        rendered = engine.render([sg.user("hello")])
        same_as_chat = await engine.generate(rendered.ids, max_tokens=5)
    assert by_text.text == by_ids.text
    assert rendered.text == "<|user|>hello"
    assert by_chat.text == same_as_chat.text != by_text.text


async def test_many_at_once_are_each_their_own_and_share_steps() -> None:
    opener = FakeOpener()
    prompts = [f"prompt number {i} " * (i + 1) for i in range(12)]
    replies: dict[int, str] = {}

    async def ask(engine: sg.Engine, i: int) -> None:
        replies[i] = (await engine.generate(prompts[i], max_tokens=30)).text

    async with sg.Engine(_opener=opener) as engine, anyio.create_task_group() as group:
        for i in range(len(prompts)):
            group.start_soon(ask, engine, i)
    assert replies == {i: expected_text((BOS, *prompts[i].encode()), 30) for i in range(len(prompts))}
    assert opener.runner.max_sequences > 1, "requests were not batched"


async def test_end_of_text_ends_without_its_text() -> None:
    async with sg.Engine(_opener=FakeOpener(say("Rhine, Po"))) as engine:
        reply = await engine.generate("rivers?", max_tokens=50)
    assert (reply.text, reply.finish_reason, reply.stop) == ("Rhine, Po", "stop", EOS)
    assert reply.ids == (*b"Rhine, Po", EOS)
    assert reply.usage.completion_tokens == 10


async def test_a_stop_id_that_is_text_is_dropped_unless_wanted() -> None:
    async with sg.Engine(_opener=FakeOpener(say("one.two"))) as engine:
        plain = await engine.generate("x", stop_ids=[ord(".")])
        whole = await engine.generate("x", stop_ids=[ord(".")], include_stop=True)
        ignored = await engine.generate("x", ignore_eos=True, max_tokens=9)
    assert (plain.text, plain.stop, plain.ids) == ("one", ord("."), (*b"one.",))
    assert (whole.text, whole.stop) == ("one.", ord("."))
    assert (ignored.text, ignored.finish_reason) == ("one.two", "length")


async def test_a_stop_string_cuts_text_and_ids() -> None:
    opener = FakeOpener(say("alpha beta gamma"))
    async with sg.Engine(_opener=opener) as engine:
        plain = await engine.generate("x", stop="eta")
        whole = await engine.generate("x", stop=["zzz", "eta"], include_stop=True)
        held = await engine.generate("x", stop="gammas")
        assert engine.stats().open_requests == 0
    assert (plain.text, plain.finish_reason, plain.stop) == ("alpha b", "stop", "eta")
    assert bytes(plain.ids) == b"alpha beta"
    assert (whole.text, whole.stop) == ("alpha beta", "eta")
    assert (held.text, held.stop) == ("alpha beta gamma", EOS), "what was held back for a stop string was lost"


async def test_logprobs_of_output_and_prompt() -> None:
    async with sg.Engine(_opener=FakeOpener(say("ab"))) as engine:
        reply = await engine.generate("xyz", logprobs=1, prompt_logprobs=1)
        silent = await engine.generate("xyz")
    assert reply.logprobs is not None and reply.prompt_logprobs is not None
    assert [(p.id, p.text, p.logprob) for p in reply.logprobs] == [(97, "a", -0.97), (98, "b", -0.98), (EOS, "</s>", -2.57)]
    assert reply.logprobs[0].top[0].text == "a"
    assert reply.prompt_logprobs[0] is None
    assert [p.text for p in reply.prompt_logprobs[1:] if p is not None] == ["x", "y", "z"]
    assert silent.logprobs is None and silent.prompt_logprobs is None


async def test_sample_and_best_of() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        three = await engine.sample("hello", n=3, max_tokens=8)
        best = await engine.sample("hello", n=2, best_of=5, max_tokens=8)
        with_logprobs = await engine.sample("hello", n=1, best_of=5, max_tokens=8, logprobs=0)
        with pytest.raises(sg.InvalidRequest, match="best_of: expected an integer >= 3"):
            await engine.sample("hello", n=3, best_of=2)
    assert len({c.text for c in three}) == 3
    assert three[0].text == expected_text(HELLO, 8)
    assert len(best) == 2 and all(c.logprobs is None for c in best)
    means = [-sum(c.ids) / len(c.ids) for c in best]
    assert means == sorted(means, reverse=True)
    assert with_logprobs[0].text == best[0].text and with_logprobs[0].logprobs is not None


async def test_score() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        by_text = await engine.score("hello", " you")
        by_ids = await engine.score("hello", list(b" you"))
        by_chat = await engine.score([sg.user("hello")], "you")
        steps = engine.stats().steps
        whole_context = await engine.score(list(range(256)) + list(range(255)), [7])
    assert [(p.text, p.logprob) for p in by_text] == [(" ", -0.32), ("y", -1.21), ("o", -1.11), ("u", -1.17)]
    assert by_ids == by_text
    assert [p.text for p in by_chat] == ["y", "o", "u"]
    assert steps == 3, "scoring generates nothing"
    assert [p.id for p in whole_context] == [7]


async def test_tokenize_gives_what_would_run() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        assert await engine.tokenize("hé<|user|>") == [BOS, *"hé".encode(), 258]
        with pytest.raises(sg.InvalidRequest, match="text: expected text that is not empty"):
            await engine.tokenize("")


async def test_seeds_come_from_the_engine_or_are_random() -> None:
    seeds: list[list[int]] = []
    for seed in (7, 7, None):
        opener = FakeOpener()
        async with sg.Engine(_opener=opener, seed=seed) as engine:
            await engine.generate("a", max_tokens=1)
            first = opener.runner._begins[0].sampling.seed
            await engine.generate("b", max_tokens=1)
            second = opener.runner._begins[0].sampling.seed
            await engine.generate("b", max_tokens=1, seed=99)
            assert opener.runner._begins[0].sampling.seed == 99
        seeds.append([first, second])
    assert seeds[0] == seeds[1] != seeds[2]
    assert len({*seeds[0], *seeds[2]}) == 4


async def test_defaults_of_the_checkpoint_fill_what_a_request_leaves_open() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        await engine.generate("a", max_tokens=1)
        assert opener.runner._begins[0].sampling.temperature == 0.5
        await engine.generate("a", max_tokens=1, sampling=sg.Sampling(temperature=2.0, top_k=4), top_k=9)
        assert (opener.runner._begins[0].sampling.temperature, opener.runner._begins[0].sampling.top_k) == (2.0, 9)


async def test_prefix_cache_is_shared_within_a_tenant_only() -> None:
    prompt = "a prefix of several pages, the same every time. " * 3
    async with sg.Engine(_opener=FakeOpener()) as engine:
        first = await engine.generate(prompt, max_tokens=1, tenant="one")
        again = await engine.generate(prompt, max_tokens=1, tenant="one")
        other = await engine.generate(prompt, max_tokens=1, tenant="two")
    assert first.usage.cached_tokens == 0 == other.usage.cached_tokens
    assert again.usage.cached_tokens >= 128
    assert first.text == again.text == other.text


# ---- what a request may be ---------------------------------------------------------------------------------------------

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
    ("output", str),
    ("tools", [print]),
    ("tool_choice", "required"),
    ("adapter", object()),
    ("processors", [print]),
    ("queue_timeout", 1.0),
    ("first_token_timeout", 1.0),
    ("cache", "request"),
    ("on_slow", "block"),
]


async def test_fields_of_later_versions_are_refused_by_name() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        for name, value in NOT_YET:
            with pytest.raises(sg.NotSupported, match=f"^{name}: not available") as caught:
                engine.stream("x", **{name: value})
            assert caught.value.param == name


async def test_methods_of_later_versions_say_so() -> None:
    engine = sg.Engine(_opener=FakeOpener())
    for name in ("map", "trace"):
        with pytest.raises(sg.NotSupported, match=f"^{name}: not available"):
            getattr(engine, name)("x")
    for name in ("session", "subscribe"):
        with pytest.raises(sg.NotSupported, match=name):
            getattr(engine, name)()
    for name, arguments in {"restart": {}, "sleep": {}, "wake": {}, "beam_search": {"width": 2}}.items():
        with pytest.raises(sg.NotSupported, match=name):
            await getattr(engine, name)(*(("x",) if arguments else ()), **arguments)
    for name in ("compile", "embed", "load_adapter"):
        with pytest.raises(sg.NotSupported, match=name):
            await getattr(engine, name)("x")


async def test_prompt_too_long_with_counts() -> None:
    async with sg.Engine(_opener=FakeOpener(max_context=32)) as engine:
        with pytest.raises(sg.PromptTooLong, match="got 32") as caught:
            engine.stream(list(range(32)))
        assert (caught.value.prompt_tokens, caught.value.max_context) == (32, 32)
        stream = engine.stream("x" * 40)
        with pytest.raises(sg.PromptTooLong, match="expected <= 31 tokens .* got 41") as caught:
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
        with pytest.raises(sg.EngineOverloaded, match="expected <= 5 open requests") as caught:
            await engine.generate("one too many")
        assert caught.value.retryable and caught.value.retry_after
        opener.runner.open_gate()
        assert {(await stream.final()).text for stream in streams} == {expected_text(HELLO, 2)}
        assert (await engine.generate("hello", max_tokens=2)).text == expected_text(HELLO, 2)


# ---- time and cancellation ---------------------------------------------------------------------------------------------


async def test_timeout_raises_with_the_part_that_is_there() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        opener.runner.release(3)
        with pytest.raises(sg.DeadlineExceeded) as caught:
            await engine.generate("hello", timeout=0.1)
        partial = caught.value.partial
        assert isinstance(caught.value, TimeoutError) and caught.value.retryable
        assert (partial.text, partial.finish_reason) == (expected_text(HELLO, 3), "deadline")
        opener.runner.open_gate()


async def test_a_stream_yields_what_is_there_before_its_deadline_is_raised() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        opener.runner.release(2)
        read = ""
        with pytest.raises(sg.DeadlineExceeded):
            async with engine.stream("hello", timeout=0.1) as stream:
                async for delta in stream:
                    read += delta.text
        assert read == expected_text(HELLO, 2) == stream.result.text
        assert stream.result.finish_reason == "deadline"
        opener.runner.open_gate()


async def test_cancelling_generate_frees_everything() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        with anyio.move_on_after(5) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: engine.generate("hello"))
                await in_thread(opener.runner.stepping)
                group.cancel_scope.cancel()
        assert not scope.cancelled_caught
        assert engine.stats().open_requests == 0
        opener.runner.open_gate()
        assert (await engine.generate("hello", max_tokens=3)).text == expected_text(HELLO, 3)
        assert engine.stats().pages_used == 0


async def test_cancel_while_the_prompt_is_encoded() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        tokenizer = opener.model.tokenizer
        tokenizer.may_encode.clear()
        stream = engine.stream("hello")
        async with anyio.create_task_group() as group:
            group.start_soon(stream.__aenter__)
            await in_thread(tokenizer.encoding)
            stream.cancel()
        assert stream.result.finish_reason == "cancelled"
        assert engine.stats().open_requests == 0
        tokenizer.may_encode.set()
        assert (await engine.generate("hello", max_tokens=2)).text == expected_text(HELLO, 2)
        assert opener.runner.num_steps == 2, "a cancelled request ran"


async def test_cancel_while_waiting_for_a_slot() -> None:
    opener = FakeOpener(max_running=1)
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        first = engine.stream("hello", max_tokens=2)
        second = engine.stream("other", max_tokens=2)
        async with first:
            async with second:
                second.cancel()
            events = [event async for event in second.events()]
            assert [type(event).__name__ for event in events] == ["Finished"], "it never started"
            assert second.result.finish_reason == "cancelled"
            opener.runner.open_gate()
            assert (await first.final()).text == expected_text(HELLO, 2)


async def test_random_cancels_leave_no_page_behind() -> None:
    import random

    rng = random.Random(11)
    opener = FakeOpener(num_pages=24, max_running=4)
    async with sg.Engine(_opener=opener) as engine:

        async def ask(i: int) -> None:
            prompt = f"{i}" * rng.randint(1, 60)
            read = ""
            stop_after = rng.randint(0, 40)
            async with engine.stream(prompt, max_tokens=rng.randint(1, 60), tenant="t") as stream:
                async for delta in stream:
                    read += delta.text
                    if len(read) >= stop_after:
                        break
            assert expected_text((BOS, *prompt.encode()), len(stream.result.ids)) == stream.result.text
            assert stream.result.text.startswith(read)

        async with anyio.create_task_group() as group:
            for i in range(60):
                group.start_soon(ask, i)
        await engine.generate("last", max_tokens=1)
        stats = engine.stats()
        assert (stats.open_requests, stats.running, stats.waiting, stats.pages_used) == (0, 0, 0, 0)
    assert opener.runner.num_steps > 20


# ---- life --------------------------------------------------------------------------------------------------------------


async def test_states_of_a_life() -> None:
    opener = FakeOpener()
    opener.load_gate.clear()
    seen: list[sg.LoadProgress] = []
    engine = sg.Engine("some/model", _opener=opener, on_progress=seen.append)
    assert engine.state == "new" and threads_of_engines() == []
    assert engine.plan().weights == 1000, "a plan needs no open engine"
    with pytest.raises(sg.EngineClosed, match="is new"):
        engine.stream("x")
    async with anyio.create_task_group() as group:
        group.start_soon(engine.open)
        await in_thread(opener.loading)
        assert engine.state == "loading"
        with pytest.raises(sg.EngineClosed, match="still loading"):
            engine.stream("x")
        opener.load_gate.set()
    assert engine.state == "ready" and seen == [sg.LoadProgress(stage="weights", done=500, total=1000)]
    with pytest.raises(sg.ConfigError, match="ready already"):
        await engine.open()
    await engine.drain()
    assert engine.state == "draining"
    with pytest.raises(sg.EngineClosed, match="draining"):
        engine.stream("x")
    await engine.aclose()
    await engine.aclose()
    assert engine.state == "closed" and opener.model.num_closed == 1
    with pytest.raises(sg.EngineClosed, match="is closed"):
        engine.stream("x")
    assert engine.stats().state == "closed"


async def test_one_engine_opened_twice_in_a_row() -> None:
    opener = FakeOpener()
    engine = sg.Engine(_opener=opener)
    for _ in range(2):
        async with engine:
            assert (await engine.generate("hello", max_tokens=4)).text == expected_text(HELLO, 4)
        assert engine.state == "closed"
    assert [model.num_closed for model in opener.models] == [1, 1]


async def test_two_engines_at_once() -> None:
    async with sg.Engine(_opener=FakeOpener(say("one"))) as one, sg.Engine(_opener=FakeOpener(say("two"))) as two:
        assert [(await engine.generate("x")).text for engine in (one, two, one)] == ["one", "two", "one"]
        assert len(threads_of_engines()) == 8


async def test_cancelling_open_gives_up_loading() -> None:
    opener = FakeOpener()
    opener.load_gate.clear()
    engine = sg.Engine(_opener=opener)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.open)
        await in_thread(opener.loading)
        group.cancel_scope.cancel()
    assert opener.was_given_up and engine.state == "closed" and threads_of_engines() == []
    opener.load_gate.set()
    async with engine:
        assert engine.state == "ready"


async def test_closing_while_another_task_opens() -> None:
    opener = FakeOpener()
    opener.load_gate.clear()
    engine = sg.Engine(_opener=opener)
    caught: list[BaseException] = []

    async def open_it() -> None:
        try:
            await engine.open()
        except sg.StreamgenError as e:
            caught.append(e)

    async with anyio.create_task_group() as group:
        group.start_soon(open_it)
        await in_thread(opener.loading)
        await engine.aclose()
    assert isinstance(caught[0], sg.EngineClosed) and opener.was_given_up


async def test_a_load_error_comes_out_of_open() -> None:
    engine = sg.Engine(_opener=FakeOpener(error=sg.ModelNotFound("there is no such model")))
    with pytest.raises(sg.ModelNotFound, match="no such model"):
        await engine.open()
    assert engine.state == "closed" and threads_of_engines() == []
    with pytest.raises(sg.ModelNotFound):
        async with engine:
            pass


async def test_an_error_in_on_progress_ends_loading() -> None:
    def on_progress(progress: sg.LoadProgress) -> None:
        raise RuntimeError("the bar broke")

    with pytest.raises(RuntimeError, match="the bar broke"):
        async with sg.Engine(_opener=FakeOpener(), on_progress=on_progress):
            pass


async def test_leaving_well_drains() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        stream = engine.stream("hello", max_tokens=50)
        await stream.__aenter__()
    assert stream.result.text == expected_text(HELLO, 50) and stream.result.finish_reason == "length"
    assert (await stream.final()).finish_reason == "length", "a finished stream outlives its engine"


async def test_leaving_by_an_error_cancels() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    opener.runner.release(1)
    with pytest.raises(ZeroDivisionError):
        async with sg.Engine(_opener=opener) as engine:
            stream = engine.stream("hello", max_tokens=50)
            assert (await anext(stream)).text == expected_text(HELLO, 1)
            opener.runner.gate.release(2)  # what is at the device ends; nothing new starts
            raise ZeroDivisionError
    with pytest.raises(sg.EngineClosed, match="while the request ran") as caught:
        while True:
            await anext(stream)
    assert caught.value.partial.text.startswith(expected_text(HELLO, 1))
    assert stream.result.finish_reason == "cancelled"


async def test_drain_with_a_timeout_cuts() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        stream = engine.stream("hello", max_tokens=50)
        await stream.__aenter__()
        await engine.drain(timeout=0.05)
        with pytest.raises(sg.EngineClosed):
            await stream.final()
        assert stream.result.finish_reason == "cancelled"
        opener.runner.open_gate()


async def test_closing_from_another_task_ends_readers() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    engine = await sg.Engine(_opener=opener).open()
    caught: list[BaseException] = []

    async def read(task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        try:
            async with engine.stream("hello") as stream:
                task_status.started()
                await stream.final()
        except sg.EngineClosed as e:
            caught.append(e)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            await group.start(read)
        opener.runner.open_gate()
        await engine.aclose()
    assert len(caught) == 3


async def test_a_dropped_engine_closes_itself() -> None:
    engine = await sg.Engine(_opener=FakeOpener()).open()
    thread = engine._thread
    assert thread is not None
    with pytest.warns(ResourceWarning, match="was dropped while open"):
        del engine
        gc.collect()
    await thread.closed.wait()
    await anyio.to_thread.run_sync(thread.thread.join)


# ---- failure -------------------------------------------------------------------------------------------------------------


async def test_a_failed_step_reaches_everybody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    opener = FakeOpener(fail_at=4)
    opener.runner.is_gated = True
    failures: list[sg.EngineFailed] = []

    async def ask(engine: sg.Engine) -> None:
        with pytest.raises(sg.EngineFailed, match="the device is on fire") as caught:
            await engine.generate("secret prompt")
        failures.append(caught.value)

    async with sg.Engine(_opener=opener) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(ask, engine)
            await in_thread(opener.runner.stepping)
            opener.runner.open_gate()
        assert engine.state == "failed"
        with pytest.raises(sg.EngineFailed, match="on fire"):
            engine.stream("x")
        assert engine.stats().open_requests == 0
    assert engine.state == "closed" and opener.model.num_closed == 1
    assert len(failures) == 4 and all(e.partial.finish_reason == "error" for e in failures)
    assert all("secret" not in str(e) for e in failures) and "secret" not in caplog.text
    copy = pickle.loads(pickle.dumps(failures[0]))
    assert (copy.message, copy.partial) == (failures[0].message, failures[0].partial)


async def test_a_bug_in_an_actor_fails_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen.actors.detokenizer import Detokenizer

    def broken(self: object, entries: object) -> None:
        raise KeyError("a bug")

    async with sg.Engine(_opener=FakeOpener()) as engine:
        monkeypatch.setattr(Detokenizer, "advance", broken)
        with pytest.raises(sg.EngineFailed, match="a bug"):
            await engine.generate("hello")
        monkeypatch.undo()
        await engine.aclose()
        async with engine:
            assert (await engine.generate("hello", max_tokens=1)).text == expected_text(HELLO, 1)


# ---- hosts ---------------------------------------------------------------------------------------------------------------


async def test_one_engine_serves_several_loops_and_threads_at_once() -> None:
    answers: dict[str, str] = {}
    prompts = {name: f"from {name}" for name in ("asyncio", "trio", "thread", "here")}

    async with sg.Engine(_opener=FakeOpener()) as engine:

        async def ask(name: str) -> None:
            text = ""
            async with engine.stream(prompts[name], max_tokens=60) as stream:
                async for delta in stream:
                    text += delta.text
            answers[name] = text

        def ask_blocking() -> None:
            submission = engine._submission(prompts["thread"], {"max_tokens": 60})
            submission.submit()
            submission.mailboxes[0].wait_end_blocking()
            answers["thread"] = submission.mailboxes[0].completion().text

        async with anyio.create_task_group() as group:
            for backend in ("asyncio", "trio"):
                group.start_soon(anyio.to_thread.run_sync, lambda b=backend: anyio.run(ask, b, backend=b))
            group.start_soon(anyio.to_thread.run_sync, ask_blocking)
            group.start_soon(ask, "here")
    assert answers == {name: expected_text((BOS, *prompt.encode()), 60) for name, prompt in prompts.items()}


async def test_a_loop_that_ended_stalls_nobody() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:

        async def leave() -> None:
            stream = engine.stream("gone")
            await stream.__aenter__()
            left.append(stream)

        left: list[Any] = []
        await anyio.to_thread.run_sync(lambda: anyio.run(leave))
        opener.runner.open_gate()
        assert (await engine.generate("hello", max_tokens=5)).text == expected_text(HELLO, 5)
        left[0].cancel()


async def test_the_host_loop_is_never_blocked(anyio_backend: str) -> None:
    if anyio_backend == "trio":
        pytest.skip("blockbuster watches asyncio")
    with blockbuster_ctx("streamgen"):
        async with sg.Engine(_opener=FakeOpener()) as engine:
            async with engine.stream([sg.user("hello")], max_tokens=20, stop="zzz") as stream:
                async for _ in stream:
                    pass
            await engine.sample("hello", n=2, max_tokens=3)
            await engine.tokenize("hello")
            engine.stats()


def test_an_exit_without_closing_is_clean(tmp_path: Path) -> None:
    script = tmp_path / "leave.py"
    script.write_text(
        "import anyio, streamgen as sg\n"
        "from tests.fakes import FakeOpener\n"
        "async def main():\n"
        "    global engine, stream\n"
        "    engine = await sg.Engine(_opener=FakeOpener()).open()\n"
        "    stream = engine.stream('hello')\n"
        "    print((await anext(stream)).text[:1], flush=True)\n"
        "anyio.run(main)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == expected_text(HELLO, 1)


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
        ({"quantization": "int8"}, "quantization: 'int8' is not available"),
        ({"kv_dtype": "int8"}, "kv_dtype: 'int8' is not available"),
        ({"isolation": "process"}, "isolation: 'process' is not available"),
        ({"tensor_parallel": 2}, "tensor_parallel: 2 is not available"),
        ({"pipeline_parallel": 2}, "pipeline_parallel: 2 is not available"),
        ({"speculation": object()}, "speculation: object is not available"),
        ({"step_budget_ms": 50.0}, "step_budget_ms: 50.0 is not available"),
        ({"tenants": {"a": object()}}, "tenants: dict is not available"),
        ({"grammars": [object()]}, "grammars: list is not available"),
        ({"idle_sleep": 60.0}, "idle_sleep: 60.0 is not available"),
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
