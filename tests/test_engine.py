"""What an engine answers, on asyncio and trio."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from tests.fakes import BOS, EOS, FakeOpener, expected_text, say, threads_of_engines

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
    assert [(p.id, p.text, p.logprob) for p in reply.logprobs] == [
        (97, "a", -0.97),
        (98, "b", -0.98),
        (EOS, "</s>", -2.57),
    ]
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
