"""Sessions: the history and its rules, one turn at a time, forks, and that nothing is computed twice."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from tests.fakes import PAGE, FakeOpener, say, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamgen.session import Session

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}{% if m.content == 'refuse' %}{{ raise_exception('refused') }}{% endif %}<|user|>{{ m.content }}"
    "{% endif %}{% endfor %}"
)
"""What a model writes, and its end, is what the next turn's text begins with."""


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener(template=TEMPLATE)


@pytest.fixture
async def engine(opener: FakeOpener) -> Any:
    async with sg.Engine(_opener=opener) as engine:
        yield engine
        opener.runner.open_gate()
        gc.collect()
    assert threads_of_engines() == []


def last_prompt(opener: FakeOpener) -> tuple[int, ...]:
    begin = opener.runner.begun[-1]
    return begin.ids[: begin.num_prompt]


async def until_idle(engine: sg.Engine) -> None:
    with anyio.fail_after(10):
        while engine.stats().open_requests:
            await anyio.lowlevel.checkpoint()


# ---- the history -----------------------------------------------------------------------------------------------------


async def test_turns_become_history() -> None:
    async with sg.Engine(_opener=FakeOpener(say("fine"), template=TEMPLATE)) as engine:
        session = engine.session(system="be kind")
        reply = await session.ask("how are you?")
        assert reply.text == "fine" and reply.finish_reason == "stop"
        await session.ask([sg.user("and"), sg.user("now?")])
        await session.ask(sg.user("really?"))
    assert session.system == "be kind" and session.tools == ()
    assert session.messages == [
        sg.user("how are you?"),
        sg.assistant("fine"),
        sg.user("and"),
        sg.user("now?"),
        sg.assistant("fine"),
        sg.user("really?"),
        sg.assistant("fine"),
    ]


async def test_the_prompt_is_system_history_and_the_new_turn(engine: sg.Engine, opener: FakeOpener) -> None:
    session = engine.session(system="S", max_tokens=3)
    first = await session.ask("one")
    await session.ask("two")
    text = f"<|user|>S<|user|>one{first.text}</s><|user|>two"
    assert last_prompt(opener) == engine.render([*[sg.system("S")], *session.messages[:-1]]).ids
    assert bytes(i for i in last_prompt(opener) if i < 256).decode() == text.replace("<|user|>", "").replace("</s>", "")


async def test_a_turn_carries_the_ids_of_those_before(engine: sg.Engine, opener: FakeOpener) -> None:
    session = engine.session(max_tokens=40)
    first = await session.ask("x" * 30)
    known = last_prompt(opener) + first.ids
    second = await session.ask("again")
    assert last_prompt(opener)[: len(known)] == known
    # The last token that was drawn was never computed.
    assert second.usage.cached_tokens == (len(known) - 1) // PAGE * PAGE > 0


async def test_usage_adds_up(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=20)
    replies = [await session.ask("x" * 20), await session.ask("y")]
    usage = session.usage
    assert usage.completion_tokens == 40
    assert usage.prompt_tokens == sum(reply.usage.prompt_tokens for reply in replies)
    assert usage.cached_tokens == replies[1].usage.cached_tokens > 0


async def test_a_stream_read_to_its_end_is_history(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=5)
    async with session.stream("one") as stream:
        text = "".join([text async for text in stream.texts()])
        assert session.messages == [sg.user("one"), sg.assistant(text)], "as soon as it was read"
    async with session.stream("two") as stream:
        events = [event async for event in stream.events()]
    assert isinstance(events[-1], sg.Finished)
    async for _ in session.stream("three"):
        pass
    async with session.stream("four") as stream:
        reply = await stream.final()
    assert [m["content"] for m in session.messages[::2]] == ["one", "two", "three", "four"]
    assert session.messages[-1] == reply.message


async def test_what_a_caller_passed_is_not_shared(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=3)
    message = sg.user("one")
    await session.ask([message])
    message["content"] = "changed"
    assert session.messages[0] == sg.user("one")


async def test_the_history_may_be_edited(engine: sg.Engine, opener: FakeOpener) -> None:
    session = engine.session(max_tokens=4)
    first = await session.ask("one")
    await session.ask("two")
    del session.messages[2:]
    session.messages[1]["content"] = "edited"
    await session.ask("three")
    assert last_prompt(opener) == engine.render([sg.user("one"), sg.assistant("edited"), sg.user("three")]).ids
    assert first.text not in str(session.messages)

    session.messages = session.messages[:1]
    again = await session.ask([])
    assert session.messages == [sg.user("one"), sg.assistant(again.text)], "the history as it was got an answer"
    assert again.text == first.text

    session.system = "later"
    await session.ask("four")
    assert last_prompt(opener) == engine.render([sg.system("later"), *session.messages[:-1]]).ids


async def test_a_broken_history_is_refused_until_it_is_mended(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=4)
    await session.ask("one")
    good = session.messages
    for bad in ([{"role": "nobody", "content": "x"}], [7], "text", None):
        session.messages = bad  # type: ignore[assignment]
        with pytest.raises(sg.InvalidRequest):
            await session.ask("two")
        assert not session.is_busy
    session.messages = good
    await session.ask("two")
    assert len(session.messages) == 4


# ---- fields ----------------------------------------------------------------------------------------------------------


async def test_defaults_and_the_turns_own_fields(engine: sg.Engine, opener: FakeOpener) -> None:
    session = engine.session(max_tokens=3, temperature=0.0)
    assert len((await session.ask("a")).ids) == 3
    assert len((await session.ask("b", max_tokens=7)).ids) == 7
    assert opener.runner.begun[-1].sampling.temperature == 0.0
    assert len((await session.ask("c", sampling=sg.Sampling(max_tokens=2, temperature=0.9))).ids) == 2
    assert opener.runner.begun[-1].sampling.temperature == 0.9, "a turn's own sampling is all its sampling"


async def test_bad_arguments(engine: sg.Engine) -> None:
    with pytest.raises(sg.InvalidRequest, match="did you mean 'max_tokens'"):
        engine.session(max_token=3)
    with pytest.raises(sg.InvalidRequest, match="max_tokens"):
        engine.session(max_tokens=-1)
    with pytest.raises(sg.InvalidRequest, match=r"tools\[0\] 'print'"):
        engine.session(tools=[print])
    with pytest.raises(sg.InvalidRequest, match="system: expected text or None, got int"):
        engine.session(system=3)  # type: ignore[arg-type]
    with pytest.raises(sg.InvalidRequest, match="pin: expected True or False"):
        engine.session(pin="yes")  # type: ignore[arg-type]
    with pytest.raises(sg.InvalidRequest, match="request_id"):
        engine.session(request_id="same")
    session = engine.session()
    for said in ([1, 2, 3], 7, None, b"bytes"):
        with pytest.raises(sg.InvalidRequest, match=r"expected a user's text or messages|prompt"):
            await session.ask(said)  # type: ignore[arg-type]
    with pytest.raises(sg.InvalidRequest):
        await session.ask([])
    with pytest.raises(sg.InvalidRequest):
        session.stream("x", temperature=-1)
    assert not session.is_busy and session.messages == []


async def test_a_session_may_be_made_before_the_engine_is_open() -> None:
    engine = sg.Engine(_opener=FakeOpener(template=TEMPLATE))
    session = engine.session(max_tokens=2)
    with pytest.raises(sg.EngineClosed):
        await session.ask("too early")
    async with engine:
        await session.ask("now")
    assert len(session.messages) == 2


# ---- turns that are dropped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["break", "cancel", "cancel and read", "task", "deadline", "error", "never entered"])
async def test_a_turn_that_is_cut_leaves_the_history(engine: sg.Engine, opener: FakeOpener, way: str) -> None:
    session = engine.session(max_tokens=400)
    await session.ask("one", max_tokens=3)
    before = list(session.messages)
    opener.runner.is_gated = True
    if way == "task":
        with anyio.move_on_after(0.02):
            await session.ask("two")
    elif way == "deadline":
        with pytest.raises(sg.DeadlineExceeded):
            await session.ask("two", timeout=0.02)
    elif way == "never entered":
        session.stream("two").cancel()
    elif way == "error":
        with pytest.raises(KeyError):
            async with session.stream("two"):
                raise KeyError
    else:
        async with session.stream("two") as stream:
            opener.runner.release(2)
            await anext(stream)
            if way != "break":
                stream.cancel()
            if way == "cancel and read":
                async for _ in stream:
                    pass
                assert stream.result.finish_reason == "cancelled"
    assert session.messages == before and not session.is_busy
    opener.runner.open_gate()
    await until_idle(engine)
    await session.ask("three", max_tokens=3)
    assert [m["content"] for m in session.messages[::2]] == ["one", "three"]


async def test_a_turn_is_kept_only_if_it_was_read(engine: sg.Engine) -> None:
    """However far the engine has come, what was not read to its end is not history: no race decides it."""
    session = engine.session(max_tokens=3)
    async with session.stream("one"):
        await until_idle(engine)
    assert session.messages == []
    async with session.stream("two") as stream:
        await until_idle(engine)
        stream.cancel()
        assert [d async for d in stream]
    assert session.messages == []
    assert session.usage.completion_tokens == 6, "what was computed is counted"


async def test_a_refused_turn_leaves_the_history(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=3)
    await session.ask("one")
    before = list(session.messages)
    with pytest.raises(sg.TemplateError):
        await session.ask("refuse")
    with pytest.raises(sg.PromptTooLong):
        await session.ask("x" * 600)
    with pytest.raises(sg.PromptTooLong):
        async for _ in session.stream("x" * 600):
            pass
    assert session.messages == before
    await session.ask("two")


async def test_a_dropped_stream_frees_its_session(engine: sg.Engine, opener: FakeOpener) -> None:
    session = engine.session(max_tokens=300)
    stream = session.stream("never entered")
    assert session.is_busy
    del stream
    assert not session.is_busy
    opener.runner.is_gated = True
    with pytest.warns(ResourceWarning, match="was dropped while it ran"):
        stream = session.stream("entered")
        await stream.__aenter__()
        del stream
        gc.collect()
    assert not session.is_busy and session.messages == []


# ---- one turn at a time ----------------------------------------------------------------------------------------------


async def test_a_second_turn_is_refused_at_once(engine: sg.Engine, opener: FakeOpener) -> None:
    session = engine.session(max_tokens=4)
    opener.runner.is_gated = True
    errors: list[Exception] = []

    def in_a_thread() -> None:
        try:
            session.stream("from a thread")
        except sg.SessionBusy as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(session.ask, "one")
        await anyio.wait_all_tasks_blocked()
        assert session.is_busy and "busy" in repr(session)
        with pytest.raises(sg.SessionBusy, match="one turn runs at a time"):
            await session.ask("two")
        with pytest.raises(sg.SessionBusy):
            session.stream("three")
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        opener.runner.open_gate()
    assert len(errors) == 1
    assert [m["content"] for m in session.messages[::2]] == ["one"]
    await session.ask("four")
    assert session.usage.completion_tokens == 8


async def test_one_of_many_tasks_has_the_turn(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=4)
    outcomes: list[str] = []

    async def turn(i: int) -> None:
        try:
            await session.ask(f"turn {i}")
            outcomes.append("done")
        except sg.SessionBusy:
            outcomes.append("busy")

    async with anyio.create_task_group() as group:
        for i in range(8):
            group.start_soon(turn, i)
    assert sorted(outcomes) == ["busy"] * 7 + ["done"]
    assert len(session.messages) == 2


# ---- forks -----------------------------------------------------------------------------------------------------------


async def test_forks_are_independent_and_share_pages(engine: sg.Engine) -> None:
    session = engine.session(system="S" * 40, max_tokens=8)
    await session.ask("one")
    fork = session.fork()
    assert type(fork) is type(session) and fork.messages == session.messages and fork.system == session.system
    fork.messages[0]["content"] = "changed"
    assert session.messages[0] == sg.user("one")
    fork.messages[0]["content"] = "one"

    here, there = await session.ask("here"), await fork.ask("there")
    assert session.messages[2:] == [sg.user("here"), here.message]
    assert fork.messages[2:] == [sg.user("there"), there.message]
    assert there.usage.cached_tokens >= 40 // PAGE * PAGE
    assert fork.usage.completion_tokens == 8 and session.usage.completion_tokens == 16


async def test_a_fork_during_a_turn_has_the_history_before_it(engine: sg.Engine) -> None:
    session = engine.session(max_tokens=3)
    await session.ask("one")
    async with session.stream("two") as stream:
        fork = session.fork()
        assert not fork.is_busy and len(fork.messages) == 2
        await fork.ask("three")
        await stream.final()
    assert [m["content"] for m in session.messages[::2]] == ["one", "two"]
    assert [m["content"] for m in fork.messages[::2]] == ["one", "three"]


async def test_private_pages_are_shared_by_a_session_and_its_forks_alone(engine: sg.Engine) -> None:
    session = engine.session(cache="private", max_tokens=8)
    await session.ask("x" * 40)
    assert (await session.ask("again")).usage.cached_tokens > 0
    assert (await session.fork().ask("other")).usage.cached_tokens > 0
    stranger = engine.session(cache="private", max_tokens=8)
    assert (await stranger.ask("x" * 40)).usage.cached_tokens == 0


# ---- pinned pages ----------------------------------------------------------------------------------------------------


async def until_pinned(engine: sg.Engine, is_right: Callable[[int], bool]) -> None:
    with anyio.fail_after(10):
        while not is_right(engine.stats().pages_pinned):
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("pin", [False, True])
async def test_pinned_pages_outlive_a_flood(pin: bool) -> None:
    async with sg.Engine(_opener=FakeOpener(template=TEMPLATE, num_pages=40)) as engine:
        async with engine.session(pin=pin, max_tokens=8) as session:
            first = await session.ask("x" * 150)
            known = first.usage.prompt_tokens + 8
            for i in range(10):
                await engine.generate(f"{i}" * 200, max_tokens=8)
            second = await session.ask("y")
            assert second.usage.cached_tokens == ((known - 1) // PAGE * PAGE if pin else 0)
        await until_pinned(engine, lambda n: n == 0)
        assert engine.stats().pages_used == 0


async def test_each_session_has_its_own_pin(engine: sg.Engine) -> None:
    session = engine.session(pin=True, max_tokens=8)
    await session.ask("x" * 50)
    fork = session.fork()
    await fork.ask("y" * 50)
    await until_pinned(engine, lambda n: n > 6)
    await session.aclose()
    await until_pinned(engine, lambda n: n == 7)
    del fork
    gc.collect()
    await until_pinned(engine, lambda n: n == 0)


@pytest.mark.parametrize("is_left", [False, True])
async def test_a_turn_that_ended_pins_nothing_for_a_closed_session(engine: sg.Engine, is_left: bool) -> None:
    session = engine.session(pin=True, max_tokens=8)
    async with session.stream("x" * 50):
        await until_idle(engine)
        await until_pinned(engine, lambda n: n > 0)
        if not is_left:
            session.close()
    session.close()
    await until_pinned(engine, lambda n: n == 0)
    assert session.messages == []


# ---- closing ---------------------------------------------------------------------------------------------------------


async def test_closing_ends_the_turn_that_runs(engine: sg.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    async with engine.session(max_tokens=300) as session:
        stream = session.stream("one")
        await stream.__aenter__()
    assert engine.stats().open_requests == 0
    assert [d async for d in stream] == [] and stream.result.finish_reason == "cancelled"
    assert session.messages == [] and not session.is_busy
    with pytest.raises(sg.InvalidRequest, match="it was closed"):
        session.stream("two")
    await session.aclose()
    session.close()
    assert "closed" in repr(session)


async def test_a_session_outlives_its_engine(engine: sg.Engine) -> None:
    async with sg.Engine(_opener=FakeOpener()) as other:
        session = other.session(pin=True, max_tokens=3)
        await session.ask("one")
    with pytest.raises(sg.EngineClosed):
        await session.ask("two")
    await session.aclose()
    assert len(session.messages) == 2


# ---- the demo model --------------------------------------------------------------------------------------------------


@pytest.fixture
async def demo(demo_model_path: Path) -> Any:
    async with sg.Engine(demo_model_path, max_running=2) as engine:
        yield engine
        gc.collect()


def long_text(num_sentences: int) -> str:
    """Prose that no two places of are alike."""
    return " ".join(f"Item {i} costs {i * 7919 % 1000} coins." for i in range(num_sentences))


async def turn_known(session: Session, said: str) -> tuple[Any, int]:
    """The reply, and how many ids the turns up to it have."""
    reply = await session.ask(said)
    return reply, reply.usage.prompt_tokens + len(reply.ids)


async def test_a_second_turn_computes_only_what_is_new(demo: sg.Engine) -> None:
    session = demo.session(system="You answer briefly.", max_tokens=24, temperature=0)
    _, known = await turn_known(session, f"{long_text(190)} What does item 3 cost?")
    assert known > 2000
    second, known_then = await turn_known(session, "And item 4?")
    assert second.usage.cached_tokens >= (known - 1) // PAGE * PAGE
    third, _ = await turn_known(session, "And item 5?")
    assert third.usage.cached_tokens >= (known_then - 1) // PAGE * PAGE
    assert third.usage.prompt_tokens - third.usage.cached_tokens < 100


async def test_what_a_hot_model_writes_is_found_again(demo: sg.Engine) -> None:
    """Sampled text is often not split as the tokenizer would split it; its ids are kept all the same."""
    session = demo.session(max_tokens=64, temperature=2.5, seed=7)
    known, num_odd = 0, 0
    for turn in range(4):
        reply, num_ids = await turn_known(session, f"Tell me something odd, number {turn}.")
        assert reply.usage.cached_tokens >= max(0, known - 1) // PAGE * PAGE, f"turn {turn}"
        known = num_ids
        num_odd += (
            tuple(await demo.tokenize(reply.text)) != reply.ids[: len(reply.ids) - (reply.finish_reason == "stop")]
        )
    assert num_odd > 0, "no reply was split in another way: this shows nothing"


async def test_forks_of_a_real_chat_share_its_pages(demo: sg.Engine) -> None:
    session = demo.session(max_tokens=16, temperature=0)
    _, known = await turn_known(session, f"{long_text(40)} What does item 3 cost?")
    forks = [session.fork() for _ in range(3)]
    for i, fork in enumerate(forks):
        reply = await fork.ask(f"And item {i}?")
        assert reply.usage.cached_tokens >= (known - 1) // PAGE * PAGE
    same = await session.fork().ask("And item 0?")
    assert same.ids == (await demo.generate([*forks[0].messages[:-1]], max_tokens=16, temperature=0)).ids
