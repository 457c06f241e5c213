"""Engine.map: order, errors as values, back-pressure on the source, and that nothing is left behind half-way."""

from __future__ import annotations

import gc
import itertools
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from streamgen import Err, Ok
from streamgen.config import Tenant
from tests.fakes import BOS, EOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.anyio


def as_many_as_asked(ids: tuple[int, ...], num_prompt: int) -> int:
    """Answers "7" with seven tokens, whoever else runs."""
    prompt = bytes(i for i in ids[:num_prompt] if i < 256).decode()
    return EOS if len(ids) - num_prompt >= int(prompt) else ord("x")


class Source:
    """Prompts that are counted as they are taken, without end unless they are given."""

    def __init__(self, prompts: Any = None) -> None:
        self.num_taken = 0
        self.is_closed = False
        self._prompts = (f"prompt {i}" for i in itertools.count()) if prompts is None else iter(prompts)

    def plain(self) -> Iterator[Any]:
        try:
            for prompt in self._prompts:
                self.num_taken += 1
                yield prompt
        finally:
            self.is_closed = True

    async def asynchronous(self) -> AsyncIterator[Any]:
        try:
            for prompt in self._prompts:
                await anyio.lowlevel.checkpoint()
                self.num_taken += 1
                yield prompt
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.is_closed = True


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
async def engine(opener: FakeOpener) -> Any:
    async with sg.Engine(_opener=opener) as engine:
        yield engine
        opener.runner.open_gate()
        gc.collect()
    assert threads_of_engines() == []


async def until_open(engine: sg.Engine, count: int) -> None:
    """Until so many requests are open."""
    with anyio.fail_after(10):
        while engine.stats().open_requests != count:
            await anyio.lowlevel.checkpoint()


async def read(results: Any, into: list[Any] | None = None) -> list[Any]:
    """All results; `into` has them even if reading raises."""
    got = [] if into is None else into
    async for result in results:
        got.append(result)  # a comprehension would lose them
    return got


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("is_entered", [False, True])
async def test_every_item_is_answered_once(engine: sg.Engine, ordered: bool, kind: str, is_entered: bool) -> None:
    source = Source([f"item {i}" for i in range(40)])
    results = engine.map(getattr(source, kind)(), concurrency=3, ordered=ordered, max_tokens=6)
    if is_entered:
        async with results:
            got = await read(results)
    else:
        got = await read(results)
    assert all(isinstance(result, Ok) for result in got)
    texts = {result.index: result.completion.text for result in got}
    assert texts == {i: expected_text((BOS, *f"item {i}".encode()), 6) for i in range(40)}
    assert len(got) == 40 and source.is_closed
    if ordered:
        assert [result.index for result in got] == list(range(40))


async def test_results_come_as_they_end_or_in_order() -> None:
    async with sg.Engine(_opener=FakeOpener(as_many_as_asked)) as engine:
        ends = [result.index async for result in engine.map(["90", "1", "40"], concurrency=3)]
        ordered = [result.index async for result in engine.map(["90", "1", "40"], concurrency=3, ordered=True)]
    assert ends == [1, 2, 0]
    assert ordered == [0, 1, 2]


async def test_nothing_in_nothing_out(engine: sg.Engine) -> None:
    assert await read(engine.map([])) == []
    results = engine.map(["a"], max_tokens=2)
    assert len(await read(results)) == 1
    assert await read(results) == [], "it stays at its end"


async def test_prompts_of_every_form(engine: sg.Engine) -> None:
    prompts = ["hello", [BOS, *b"hello"], [sg.user("hello")]]
    got = await read(engine.map(prompts, ordered=True, max_tokens=5))
    assert got[0].completion.ids == got[1].completion.ids
    assert got[2].completion.usage.prompt_tokens == 6


# ---- errors ----------------------------------------------------------------------------------------------------------


async def test_an_items_error_is_its_own_value(engine: sg.Engine) -> None:
    prompts: list[Any] = ["good", "", "x" * 600, 7, "\x00", [sg.system("refuse")], [10_000], "fine"]
    got = await read(engine.map(prompts, ordered=True, concurrency=4, max_tokens=5))
    assert [result.index for result in got] == list(range(8))
    errors = {result.index: type(result.error).__name__ for result in got if isinstance(result, Err)}
    assert errors == {
        1: "InvalidRequest",
        2: "PromptTooLong",
        3: "InvalidRequest",
        4: "GenerationError",
        5: "TemplateError",
        6: "InvalidRequest",
    }
    assert got[2].error.prompt_tokens == 601
    assert got[0].completion.text == expected_text((BOS, *b"good"), 5)
    assert got[7].completion.text == expected_text((BOS, *b"fine"), 5)


async def test_a_deadline_is_the_items_error(engine: sg.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    (result,) = await read(engine.map(["late"], timeout=0.05))
    assert isinstance(result.error, sg.DeadlineExceeded) and result.error.partial is not None


class SourceBroke(Exception):
    """Not one of the library's."""


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("is_entered", [False, True])
async def test_a_source_that_raises(engine: sg.Engine, kind: str, is_entered: bool) -> None:
    fault = SourceBroke("the source broke")

    def prompts() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise fault

    results = engine.map(getattr(Source(prompts()), kind)(), concurrency=8, max_tokens=4)
    got: list[Any] = []
    with pytest.raises(SourceBroke) as caught:
        if is_entered:
            async with results:
                await read(results, got)
        else:
            await read(results, got)
    assert caught.value is fault, "as it was raised, in no group"
    assert sorted(result.index for result in got) == [0, 1, 2], "what was under way is delivered first"
    assert await read(results) == []


async def test_a_source_that_cannot_be_iterated_raises_when_read(engine: sg.Engine) -> None:
    class Odd:
        def __iter__(self) -> Any:
            raise SourceBroke

    with pytest.raises(SourceBroke):
        await read(engine.map(Odd()))


async def test_closing_fails_what_was_taken_then_raises(engine: sg.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    source = Source()
    got: list[Any] = []

    async def consume() -> None:
        with pytest.raises(sg.EngineClosed):
            await read(engine.map(source.plain(), concurrency=3), got)

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await until_open(engine, 3)
        await engine.drain(timeout=0)
    assert [type(result.error) for result in got] == [sg.EngineClosed] * 3
    assert source.num_taken == 3 and source.is_closed


async def test_bad_arguments(engine: sg.Engine) -> None:
    for source in ("text", b"bytes", {"a": 1}, 7, None):
        with pytest.raises(sg.InvalidRequest, match="prompts: expected"):
            engine.map(source)  # type: ignore[arg-type]
    for count in (0, -1, True, 2.0, "2"):
        with pytest.raises(sg.InvalidRequest, match="concurrency: expected an integer >= 1"):
            engine.map(["a"], concurrency=count)  # type: ignore[arg-type]
    with pytest.raises(sg.InvalidRequest, match="did you mean 'max_tokens'"):
        engine.map(["a"], max_token=3)  # type: ignore[call-overload]
    with pytest.raises(sg.InvalidRequest, match="request_id"):
        engine.map(["a"], request_id="one")
    with pytest.raises(sg.EngineClosed):
        sg.Engine(_opener=FakeOpener()).map(["a"])


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
async def test_the_source_is_taken_only_as_fast_as_results_are(
    engine: sg.Engine, opener: FakeOpener, kind: str
) -> None:
    opener.runner.is_gated = True
    source = Source()
    async with engine.map(getattr(source, kind)(), concurrency=2, max_tokens=3) as results:
        await until_open(engine, 2)
        await anyio.wait_all_tasks_blocked()
        assert source.num_taken == 2, "no more than may run"
        opener.runner.open_gate()
        await until_open(engine, 0)  # nobody reads
        while source.num_taken < 4:
            await anyio.lowlevel.checkpoint()
        await until_open(engine, 0)
        await anyio.wait_all_tasks_blocked()
        assert source.num_taken == 4, "two ran, two more while those lay unread"
        for count in range(1, 20):
            await anext(results)
            assert source.num_taken <= count + 4
    assert opener.runner.max_sequences <= 2


async def test_an_ordered_map_does_not_run_away_from_its_head() -> None:
    source = Source(["200", *["1"] * 50])
    opener = FakeOpener(as_many_as_asked)
    async with sg.Engine(_opener=opener) as engine:
        results = engine.map(source.plain(), concurrency=3, ordered=True)
        assert (await anext(results)).index == 0
        assert source.num_taken == 6, "twice the concurrency, while the head ran"
        assert len(await read(results)) == 50


async def test_by_default_it_fills_the_engine(engine: sg.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    source = Source()
    async with engine.map(source.plain()):
        await until_open(engine, 8)
        await anyio.wait_all_tasks_blocked()
        assert source.num_taken == 8 == engine.plan().max_running


async def test_a_full_engine_is_waited_for() -> None:
    opener = FakeOpener(max_running=2)
    async with sg.Engine(_opener=opener, max_queued=1) as engine:
        got = await read(engine.map(Source(range(0)).plain()))
        assert got == []
        got = await read(engine.map([f"p{i}" for i in range(20)], concurrency=16, max_tokens=4))
    assert sorted(result.index for result in got if isinstance(result, Ok)) == list(range(20))


@pytest.mark.parametrize("is_entered", [False, True])
async def test_an_engine_full_of_others_is_waited_for(is_entered: bool) -> None:
    opener = FakeOpener(max_running=1)
    opener.runner.is_gated = True
    got: list[Any] = []
    source = Source(["a", "b"])

    async def consume(engine: sg.Engine) -> None:
        results = engine.map(source.plain(), concurrency=2, max_tokens=4)
        if is_entered:
            async with results:
                got.extend(await read(results))
        else:
            got.extend(await read(results))

    async with sg.Engine(_opener=opener, max_queued=1) as engine, anyio.create_task_group() as group:
        async with engine.stream("first", max_tokens=4) as first, engine.stream("second", max_tokens=4) as second:
            group.start_soon(consume, engine)
            while source.num_taken == 0:
                await anyio.lowlevel.checkpoint()
            assert engine.stats().open_requests == 2 and got == []
            opener.runner.open_gate()
            await first.final()
            await second.final()
    assert sorted(result.index for result in got if isinstance(result, Ok)) == [0, 1]


async def test_a_tenants_share_is_waited_for() -> None:
    tenants = {"small": Tenant(max_running=1, max_queued=0)}
    async with sg.Engine(_opener=FakeOpener(), tenants=tenants) as engine:
        got = await read(engine.map(["a", "b", "c", "d"], tenant="small", concurrency=4, max_tokens=4))
    assert sorted(result.index for result in got if isinstance(result, Ok)) == [0, 1, 2, 3]


async def test_a_source_may_wait_for_results(engine: sg.Engine) -> None:
    send, receive = anyio.create_memory_object_stream[str](1)
    with send:
        send.send_nowait("seed")
        async with engine.map(receive, concurrency=4, max_tokens=4) as results:
            with anyio.fail_after(10):
                seen = []
                async for result in results:
                    seen.append(result.index)
                    if len(seen) == 5:
                        break
                    assert isinstance(result, Ok)
                    send.send_nowait(result.completion.text)
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(anyio.ClosedResourceError):
        receive.receive_nowait()


# ---- half-way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("way", ["break", "error", "aclose"])
async def test_leaving_half_way_leaves_nothing(engine: sg.Engine, opener: FakeOpener, kind: str, way: str) -> None:
    source = Source()
    results = engine.map(getattr(source, kind)(), concurrency=4, max_tokens=300, ignore_eos=True)
    opener.runner.is_gated = True
    try:
        async with results:
            await until_open(engine, 4)
            if way == "error":
                raise SourceBroke
            if way == "aclose":
                await results.aclose()
                assert engine.stats().open_requests == 0 and source.is_closed
                assert await read(results) == []
    except SourceBroke:
        assert way == "error"
    assert engine.stats().open_requests == 0 and source.is_closed
    assert await read(results) == []
    opener.runner.open_gate()
    assert (await engine.generate("after", max_tokens=3)).text == expected_text((BOS, *b"after"), 3)


async def test_leaving_while_output_comes() -> None:
    async with sg.Engine(_opener=FakeOpener(as_many_as_asked)) as engine:
        for _ in range(60):
            with anyio.fail_after(10):
                async with engine.map(["1", "400", "400", "400"], concurrency=4) as results:
                    assert (await anext(results)).index == 0
            assert engine.stats().open_requests == 0


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("is_entered", [False, True])
async def test_cancelling_leaves_nothing(engine: sg.Engine, opener: FakeOpener, kind: str, is_entered: bool) -> None:
    opener.runner.is_gated = True
    source = Source()
    results = engine.map(getattr(source, kind)(), concurrency=4)

    async def consume() -> None:
        if is_entered:
            async with results:
                await read(results)
        else:
            await read(results)

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await until_open(engine, 4)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert engine.stats().open_requests == 0 and source.is_closed


@pytest.mark.parametrize("is_entered", [False, True])
async def test_cancelling_while_the_source_waits(engine: sg.Engine, is_entered: bool) -> None:
    is_closed = False

    async def prompts() -> AsyncIterator[str]:
        nonlocal is_closed
        try:
            await anyio.sleep_forever()
            yield "never"
        finally:
            is_closed = True

    results = engine.map(prompts())
    with anyio.move_on_after(0.02) as scope:
        if is_entered:
            async with results:
                await read(results)
        else:
            await read(results)
    assert scope.cancelled_caught and is_closed
    assert await read(results) == []


async def test_waiting_for_a_result_may_be_given_up(engine: sg.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    async with engine.map(["a", "b"], ordered=True, max_tokens=3) as results:
        with anyio.move_on_after(0.02) as scope:
            await anext(results)
        assert scope.cancelled_caught
        opener.runner.open_gate()
        assert [result.index async for result in results] == [0, 1], "an entered map goes on"


async def test_a_dropped_map_is_cancelled_with_a_warning(engine: sg.Engine, opener: FakeOpener) -> None:
    results = engine.map(Source().plain(), concurrency=3, max_tokens=4)
    await anext(results)
    opener.runner.is_gated = True
    while results.num_open == 0:
        await anext(results)
    with pytest.warns(ResourceWarning, match="was dropped while it ran"):
        del results
        gc.collect()
    opener.runner.open_gate()
    await until_open(engine, 0)


async def test_a_map_that_was_never_read_is_nothing(engine: sg.Engine) -> None:
    source = Source()
    results = engine.map(source.plain())
    assert "0 open" in repr(results)
    del results
    gc.collect()
    assert source.num_taken == 0 and engine.stats().requests == 0


async def test_an_error_of_a_source_that_closes_badly(engine: sg.Engine) -> None:
    async def prompts() -> AsyncIterator[str]:
        try:
            for i in itertools.count():
                yield f"prompt {i}"
        finally:
            raise SourceBroke

    with pytest.raises(SourceBroke):
        async with engine.map(prompts(), max_tokens=3) as results:
            await anext(results)
    assert engine.stats().open_requests == 0


# ---- plain code ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_engine(opener: FakeOpener) -> Any:
    with sg.sync.Engine(_opener=opener) as engine:
        yield engine
        opener.runner.open_gate()
        gc.collect()


@pytest.mark.parametrize("ordered", [False, True])
def test_plain_every_item_is_answered_once(plain_engine: sg.sync.Engine, ordered: bool) -> None:
    source = Source([*(f"item {i}" for i in range(40)), ""])
    got = list(plain_engine.map(source.plain(), concurrency=3, ordered=ordered, max_tokens=6))
    texts = {result.index: result.completion.text for result in got if isinstance(result, Ok)}
    assert texts == {i: expected_text((BOS, *f"item {i}".encode()), 6) for i in range(40)}
    assert [result.index for result in got if isinstance(result, Err)] == [40]
    assert source.is_closed and (not ordered or [result.index for result in got] == list(range(41)))


def test_plain_a_source_that_raises(plain_engine: sg.sync.Engine) -> None:
    fault = SourceBroke()

    def prompts() -> Iterator[str]:
        yield "a"
        raise fault

    got = []
    with pytest.raises(SourceBroke) as caught:
        for result in plain_engine.map(prompts(), max_tokens=3):
            got.append(result)  # noqa: PERF402  # a list would be lost
    assert caught.value is fault and [result.index for result in got] == [0]


def test_plain_leaving_half_way_leaves_nothing(plain_engine: sg.sync.Engine, opener: FakeOpener) -> None:
    source = Source()
    with plain_engine.map(source.plain(), concurrency=4, max_tokens=6) as results:
        for result in results:
            assert source.num_taken <= result.index + 8
            break
    assert plain_engine.stats().open_requests == 0 and source.is_closed
    assert list(results) == []


def test_plain_a_full_engine_is_waited_for() -> None:
    with sg.sync.Engine(_opener=FakeOpener(max_running=2), max_queued=1) as engine:
        got = list(engine.map([f"p{i}" for i in range(20)], concurrency=16, max_tokens=4))
    assert sorted(result.index for result in got if isinstance(result, Ok)) == list(range(20))


def test_plain_bad_arguments(plain_engine: sg.sync.Engine) -> None:
    async def prompts() -> AsyncIterator[str]:
        yield "a"

    for source in ("text", 7, prompts()):
        with pytest.raises(sg.InvalidRequest, match="expected an iterable of prompts, got"):
            plain_engine.map(source)  # type: ignore[arg-type]
