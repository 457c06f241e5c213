"""Events: what they say, how they are read on every kind of host, and what they cost who does not read."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

import streamgen as sg
from streamgen import mailbox, sync
from streamgen.actors.recorder import Recorder
from streamgen.config import EngineState
from streamgen.lifecycle import (
    MAX_UNREAD,
    AnyLifecycleEvent,
    EventStream,
    FirstToken,
    RequestAdmitted,
    RequestFinished,
    RequestPreempted,
    RequestStarted,
    StateChanged,
    StepCompleted,
)
from tests.fakes import FakeOpener
from tests.journaled import STEP_SECONDS, Scene
from tests.scheduling.simulation import trust_everyone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.anyio


def kinds(events: Sequence[AnyLifecycleEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


def about(seconds: float) -> Any:
    return pytest.approx(seconds)


def step_event(number: int) -> StepCompleted:
    return StepCompleted(time=0.0, step=number, rows=1, sequences=1, seconds=0.0)


# ---- what they say -----------------------------------------------------------------------------------------------


def test_the_life_of_a_request() -> None:
    scene = Scene()
    stream = scene.recorder.subscribe()
    scene.ask(1, prompt=20, max_tokens=2, tenant="gold", priority=3)
    scene.clock.now += 1.0
    scene.run()
    events = stream.take()
    assert events == [
        RequestAdmitted(time=100.0, request_id="req-1", prompt_tokens=20, tenant="gold", priority=3),
        RequestStarted(time=101.0, request_id="req-1", queue_seconds=1.0),
        StepCompleted(time=about(101.01), step=0, rows=16, sequences=1, seconds=STEP_SECONDS),
        StepCompleted(time=about(101.02), step=1, rows=4, sequences=1, seconds=STEP_SECONDS),
        FirstToken(time=about(101.02), request_id="req-1", seconds=about(1.02)),
        StepCompleted(time=about(101.03), step=2, rows=1, sequences=1, seconds=STEP_SECONDS),
        RequestFinished(
            time=about(101.03),
            request_id="req-1",
            finish_reason="length",
            cause="length",
            prompt_tokens=20,
            completion_tokens=2,
            seconds=about(1.03),
        ),
    ]


def test_a_first_token_comes_once_even_if_it_is_said_again() -> None:
    scene = Scene()
    scene.ask(1, max_tokens=5)
    stream = scene.recorder.subscribe()
    scene.step()
    (sequence,) = scene.scheduler._requests[1]
    scene.journal.first_token(sequence)
    assert kinds(stream.take()).count("FirstToken") == 1
    assert scene.recorder.latencies().first_token.count == 1


def test_cached_tokens_and_preemptions_are_told() -> None:
    scene = Scene()
    scene.ask(1, prompt=12, max_tokens=1)
    scene.run()
    stream = scene.recorder.subscribe()
    scene.ask(1 + 50, prompt=12, max_tokens=1)  # ids repeat after 50: the same prompt
    scene.run()
    started = [e for e in stream.take() if isinstance(e, RequestStarted)]
    assert [e.cached_tokens for e in started] == [8]

    crowded = Scene(num_pages=6)
    stream = crowded.recorder.subscribe()
    crowded.crowd()
    crowded.run()
    events = stream.take()
    preempted = [e for e in events if isinstance(e, RequestPreempted)]
    assert len(preempted) == crowded.scheduler.stats().preemptions > 0
    started = [e for e in events if isinstance(e, RequestStarted)]
    assert len(started) == 3 + len(preempted)
    assert sum(isinstance(e, FirstToken) for e in events) == 3


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [
        ("cancelled", "cancelled"),
        ("deadline", "deadline"),
        ("queue_deadline", "deadline"),
        ("first_token_deadline", "deadline"),
        ("slow_consumer", "error"),
        ("error", "error"),
    ],
)
def test_every_end_has_its_words(reason: str, finish_reason: str) -> None:
    scene = Scene()
    stream = scene.recorder.subscribe()
    scene.ask(1, num_sequences=2)
    scene.step()
    scene.cancel(1, reason)
    finished = [e for e in stream.take() if isinstance(e, RequestFinished)]
    assert [(e.index, e.finish_reason, e.cause) for e in finished] == [
        (0, finish_reason, reason),
        (1, finish_reason, reason),
    ]


def test_a_stop_string_is_a_stop() -> None:
    scene = Scene()
    stream = scene.recorder.subscribe()
    scene.ask(1, max_tokens=20)
    scene.step()
    scene.stop_found(1)
    (finished,) = [e for e in stream.take() if isinstance(e, RequestFinished)]
    assert (finished.finish_reason, finished.cause, finished.completion_tokens) == ("stop", "stopped", 1)


def test_each_sequence_ends_once_however_the_engine_ends() -> None:
    for state, cause, reason in [
        (EngineState.FAILED, "engine_failed", "error"),
        (EngineState.CLOSED, "engine_closed", "cancelled"),
    ]:
        scene = Scene()
        stream = scene.recorder.subscribe()
        scene.ask(1, num_sequences=2, max_tokens=20)
        scene.step()
        scene.recorder.state_changed(state)
        scene.run()
        events = stream.take()
        finished = [e for e in events if isinstance(e, RequestFinished)]
        assert [(e.cause, e.finish_reason) for e in finished] == [(cause, reason)] * 2
        assert [e.state for e in events if isinstance(e, StateChanged)] == [state]


def test_events_round_trip_through_json() -> None:
    scene = Scene(num_pages=6)
    stream = scene.recorder.subscribe()
    scene.crowd()
    scene.run()
    scene.recorder.state_changed(EngineState.READY)
    events = stream.take()
    assert len(set(kinds(events))) == 7
    assert msgspec.json.decode(msgspec.json.encode(events), type=list[AnyLifecycleEvent]) == events


def test_events_are_frozen() -> None:
    with pytest.raises(AttributeError):
        step_event(1).rows = 2  # type: ignore[misc]


# ---- who listens -------------------------------------------------------------------------------------------------


def test_nothing_is_made_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RequestAdmitted", "RequestStarted", "FirstToken", "RequestFinished", "StepCompleted", "StateChanged"):
        monkeypatch.delattr(f"streamgen.actors.recorder.{name}")
    scene = Scene()
    scene.ask(1)
    scene.run()
    scene.recorder.state_changed(EngineState.DRAINING)
    assert scene.recorder._pending == []


def test_each_subscriber_gets_everything_and_a_closed_one_nothing() -> None:
    scene = Scene()
    first, second, closed = (scene.recorder.subscribe() for _ in range(3))
    closed.close()
    scene.ask(1)
    scene.run()
    events = first.take()
    assert events and events == second.take()
    assert closed.take() == []


def test_a_stream_that_is_dropped_unsubscribes() -> None:
    scene = Scene()
    stream = scene.recorder.subscribe()
    assert len(scene.recorder._streams) == 1
    del stream
    gc.collect()
    scene.ask(1)
    scene.run()
    assert len(scene.recorder._streams) == 0
    scene.recorder.subscribe()  # and the next ones do not add up
    scene.recorder.subscribe()
    assert len(scene.recorder._streams) <= 1


def test_the_oldest_are_dropped_and_counted() -> None:
    stream = EventStream(capacity=4)
    stream.put([step_event(n) for n in range(3)])
    assert stream.dropped == 0
    stream.put([step_event(n) for n in range(3, 9)])
    assert stream.dropped == 5
    assert [e.step for e in stream.take() if isinstance(e, StepCompleted)] == [5, 6, 7, 8]
    assert "5 dropped" in repr(stream)


def test_a_subscriber_who_never_reads_stays_bounded() -> None:
    scene = Scene()
    stream = scene.recorder.subscribe()
    num_events = 0
    while num_events <= MAX_UNREAD + 100:
        scene.recorder.state_changed(EngineState.READY)
        num_events += 1
    assert len(stream._events) == MAX_UNREAD
    assert stream.dropped == num_events - MAX_UNREAD


# ---- reading -----------------------------------------------------------------------------------------------------


async def test_reading_with_async_for_ends_when_the_engine_is_closed() -> None:
    scene = Scene()
    async with scene.recorder.subscribe() as stream:
        seen: list[AnyLifecycleEvent] = []
        async with anyio.create_task_group() as group:

            async def read() -> None:
                seen.extend([event async for event in stream])

            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(scene.ask, 1)
            await anyio.to_thread.run_sync(scene.run)
            await anyio.to_thread.run_sync(scene.recorder.state_changed, EngineState.CLOSED)
    assert kinds(seen)[:2] == ["RequestAdmitted", "RequestStarted"]
    assert kinds(seen)[-2:] == ["RequestFinished", "StateChanged"]
    assert stream.is_closed


async def test_what_is_unread_when_it_ends_may_still_be_read() -> None:
    scene = Scene()
    stream = scene.recorder.subscribe()
    scene.recorder.state_changed(EngineState.CLOSED)
    assert kinds([event async for event in stream]) == ["StateChanged"]
    scene.recorder.state_changed(EngineState.READY)
    assert [event async for event in stream] == []


async def test_close_ends_every_reader() -> None:
    stream = Scene().recorder.subscribe()
    async with anyio.create_task_group() as group:

        async def read() -> None:
            assert [event async for event in stream] == []

        group.start_soon(read)
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        stream.close()
    stream.close()
    await stream.aclose()


async def test_close_forgets_what_is_unread() -> None:
    stream = Scene().recorder.subscribe()
    stream.put([step_event(1)])
    stream.close()
    assert [event async for event in stream] == []
    assert list(stream) == []


async def test_cancelling_a_reader_loses_no_event() -> None:
    stream = Scene().recorder.subscribe()
    async with anyio.create_task_group() as group:
        group.start_soon(stream.__anext__)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    stream.put([step_event(1)])
    assert await anext(stream) == step_event(1)
    assert stream._notifier._waiters == []


def test_reading_in_a_plain_thread() -> None:
    scene = Scene()
    seen: list[AnyLifecycleEvent] = []
    with scene.recorder.subscribe() as stream:
        thread = threading.Thread(target=lambda: seen.extend(stream))
        thread.start()
        scene.ask(1, max_tokens=1)
        scene.run()
        scene.recorder.state_changed(EngineState.CLOSED)
        thread.join(20)
    assert not thread.is_alive()
    assert kinds(seen) == [
        "RequestAdmitted",
        "RequestStarted",
        "StepCompleted",
        "FirstToken",
        "RequestFinished",
        "StateChanged",
    ]


async def test_a_turn_wakes_a_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many events and readers there are: what is posted to a loop is counted."""
    posts: list[int] = []
    calls: list[Callable[[], object]] = []
    scene = Scene(call_soon=calls.append)
    streams = [scene.recorder.subscribe() for _ in range(3)]

    async def read(stream: EventStream) -> None:
        while stream._events or not stream.is_closed:
            try:
                await anext(stream)
            except StopAsyncIteration:
                return

    real_post = mailbox.current_post()

    def counting(call: Callable[..., object], *arguments: Any) -> None:
        posts.append(len(arguments[0]))
        real_post(call, *arguments)

    monkeypatch.setattr(mailbox, "current_post", lambda: counting)
    async with anyio.create_task_group() as group:
        for stream in streams:
            group.start_soon(read, stream)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            scene.ask(number, num_sequences=3)
            scene.step()
            assert len(calls) == 1, "one turn, one call"
            calls.pop()()
            assert posts == [3], "one post for the loop, for all three readers"
            posts.clear()
        for stream in streams:
            stream.close()


async def test_in_an_engine_loop_events_come_after_the_turn() -> None:
    order: list[str] = []

    async def turn() -> None:
        recorder = Recorder(clock=lambda: 1.0)
        stream = recorder.subscribe()
        journal = recorder.attach(lambda number: "r")
        journal._tell(step_event(1))
        order.append(f"{len(stream.take())} in the turn")
        await asyncio.sleep(0)
        order.append(f"{len(stream.take())} after it")

    await anyio.to_thread.run_sync(lambda: asyncio.run(turn()))
    assert order == ["0 in the turn", "1 after it"]


# ---- histograms --------------------------------------------------------------------------------------------------


def test_latencies_count_what_happened() -> None:
    scene = Scene(max_running=1)
    scene.ask(1, max_tokens=3)
    scene.ask(2, max_tokens=3)
    scene.run()
    latencies = scene.recorder.latencies()
    assert latencies.queue.count == latencies.first_token.count == latencies.per_token.count == 2
    assert latencies.queue.total == about(3 * STEP_SECONDS)  # the second waits for the first
    assert latencies.first_token.total == about(STEP_SECONDS + 4 * STEP_SECONDS)
    assert latencies.per_token.mean == about(STEP_SECONDS)
    assert (latencies.step.count, latencies.step.mean) == (6, about(STEP_SECONDS))
    assert latencies.step.counts[latencies.step.bounds.index(0.01)] == 6


def test_waiting_again_after_a_preemption_is_no_queueing() -> None:
    scene = Scene(num_pages=6)
    scene.crowd()
    scene.run()
    assert scene.scheduler.stats().preemptions > 0
    latencies = scene.recorder.latencies()
    assert latencies.queue.count == latencies.first_token.count == 3


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_each_sequence_is_told_of_in_order_and_ends_once(seed: int) -> None:
    rng = random.Random(seed)
    scene = Scene(num_pages=12, max_running=4, step_tokens=8)
    if seed % 2:
        trust_everyone(scene)  # many preemptions
    stream = scene.recorder.subscribe()
    stream._events = deque()  # all of them
    asked = 0
    while asked < 40 or scene.scheduler.num_open:
        match rng.randrange(6):
            case 0 if asked < 40:
                scene.ask(
                    asked, prompt=rng.randint(1, 20), max_tokens=rng.randint(0, 16), num_sequences=rng.randint(1, 3)
                )
                asked += 1
            case 1 if asked and rng.random() < 0.2:
                scene.cancel(rng.randrange(asked), rng.choice(["cancelled", "deadline"]))
            case _:
                scene.step(depth=rng.randint(1, 2))
    scene.run()
    histories: dict[tuple[str, int], list[str]] = defaultdict(list)
    for event in stream.take():
        if not isinstance(event, RequestAdmitted | StepCompleted | StateChanged):
            histories[event.request_id, event.index].append(type(event).__name__)
    assert len(histories) == sum(request.num_sequences for request in scene.requests.values())
    for history in histories.values():
        assert history.count("RequestFinished") == 1
        assert history[-1] == "RequestFinished"
        assert history.count("FirstToken") <= 1
        assert history.count("RequestStarted") - history.count("RequestPreempted") in (0, 1)
    assert scene.recorder._tracks == scene.recorder._prefilling == {}
    assert scene.recorder.latencies().step.count == scene.num_plans


# ---- of an engine ------------------------------------------------------------------------------------------------


async def test_an_engine_tells_what_happens_in_it() -> None:
    engine = sg.Engine(_opener=FakeOpener())
    async with engine.subscribe() as stream:
        async with engine:
            completion = await engine.generate("hello", max_tokens=3, request_id="mine")
        events = [event async for event in stream]
    assert completion.usage.completion_tokens == 3
    of_request = [e for e in events if not isinstance(e, StepCompleted | StateChanged)]
    assert kinds(of_request) == ["RequestAdmitted", "RequestStarted", "FirstToken", "RequestFinished"]
    assert {e.request_id for e in of_request} == {"mine"}
    assert sum(isinstance(e, StepCompleted) for e in events) >= 3
    states = [e.state.value for e in events if isinstance(e, StateChanged)]
    assert states == ["ready", "draining", "closed"]
    assert [e.time for e in events] == sorted(e.time for e in events)
    finished = of_request[-1]
    assert isinstance(finished, RequestFinished)
    assert (finished.prompt_tokens, finished.completion_tokens, finished.finish_reason) == (6, 3, "length")


async def test_no_prompt_text_in_events_traces_and_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    canary = "canary" * 3
    engine = sg.Engine(_opener=FakeOpener())
    stream = engine.subscribe()
    async with engine:
        await engine.generate(canary, max_tokens=4, stop=["never canary"])
        await engine.generate([sg.user(canary)], max_tokens=4, tenant="someone")
        async with engine.stream(canary, max_tokens=100) as leaving:
            await anext(leaving)
        with pytest.raises(sg.TemplateError):
            await engine.generate([sg.system("refuse"), sg.user(canary)])
        with pytest.raises(sg.StreamgenError):
            await engine.generate(f"\x00{canary}")  # the tokenizer breaks
        engine.trace(tmp_path / "trace.json")
    told = msgspec.json.encode(stream.take()).decode() + (tmp_path / "trace.json").read_text()
    assert told.count("finished") >= 1
    logged = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    for text in (told, logged):
        assert "canary" not in text
    assert not _contains_run(told, [ord(c) for c in canary[:6]])


def _contains_run(text: str, ids: list[int]) -> bool:
    """Whether the prompt is there as token ids."""
    return ",".join(map(str, ids)) in text.replace(" ", "")


def test_a_sync_engine_tells_a_plain_thread() -> None:
    engine = sync.Engine(_opener=FakeOpener())
    seen: list[AnyLifecycleEvent] = []
    stream = engine.subscribe()
    thread = threading.Thread(target=lambda: seen.extend(stream))
    thread.start()
    with engine:
        engine.generate("hello", max_tokens=3)
    thread.join(20)
    assert not thread.is_alive()
    assert "RequestFinished" in kinds(seen)


async def test_continuations_are_told_apart() -> None:
    engine = sg.Engine(_opener=FakeOpener())
    stream = engine.subscribe()
    async with engine:
        await engine.sample("hello", n=3, max_tokens=3)
    finished = [e for e in stream.take() if isinstance(e, RequestFinished)]
    assert sorted(e.index for e in finished) == [0, 1, 2]
    assert len({e.request_id for e in finished}) == 1
