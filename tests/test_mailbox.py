"""Mailboxes and signals: what is unread merges, readers on every kind of host are woken, nobody is woken twice."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.completion import Completion, Delta, Event, Reasoning, Text, TokenLogprob, ToolCall, ToolDelta
from streamgen.errors import DeadlineExceeded, EngineFailed, PromptTooLong, StreamgenError
from streamgen.mailbox import End, Mailbox, Signal, Waiter, Wakes, current_post, make_error

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mailbox(clock: Clock) -> Mailbox:
    return Mailbox("r1", clock=clock)


def wake(waiters: list[Waiter]) -> None:
    wakes = Wakes()
    wakes.add(waiters)
    wakes.flush()


def test_unread_output_merges(mailbox: Mailbox) -> None:
    assert mailbox.take() is None
    mailbox.put("ab", (1, 2), ())
    mailbox.put("", (3,), ())
    mailbox.put("c", (), ())
    assert mailbox.take() == Delta(text="abc", ids=(1, 2, 3))
    assert mailbox.take() is None
    mailbox.put("d", (4,), ())
    assert mailbox.take() == Delta(text="d", ids=(4,))
    assert (mailbox.completion().text, mailbox.completion().ids) == ("abcd", (1, 2, 3, 4))


@given(st.lists(st.one_of(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3)), st.none())))
def test_however_it_is_read_the_deltas_are_the_whole(turns: list[tuple[str, list[int]] | None]) -> None:
    mailbox = Mailbox("r", clock=lambda: 0.0)
    deltas: list[Delta] = []
    for turn in (*turns, None):
        if turn is not None:
            logprobs = [TokenLogprob(id=i, text="", logprob=0.0, rank=1) for i in turn[1]]
            mailbox.put(turn[0], turn[1], logprobs)
        else:
            delta = mailbox.take()
            if delta is not None:
                deltas.append(delta)
    whole = mailbox.completion()
    assert "".join(d.text for d in deltas) == whole.text == "".join(t[0] for t in turns if t)
    assert sum((d.ids for d in deltas), ()) == whole.ids
    assert [entry.id for d in deltas for entry in d.logprobs] == list(whole.ids)
    assert all(d.text or d.ids for d in deltas)


def test_timings_and_usage(mailbox: Mailbox, clock: Clock) -> None:
    clock.now += 1
    mailbox.open(prompt_ids=tuple(range(7)), wants_logprobs=True)
    clock.now += 1
    mailbox.start(cached_tokens=4)
    mailbox.put("a", (1,), ())
    clock.now += 1
    mailbox.put("b", (2,), ())
    mailbox.finish(End(finish_reason="length"))
    done = mailbox.completion()
    assert (done.timings.tokenized, done.timings.first_token, done.timings.finished) == (1.0, 2.0, 3.0)
    assert (done.usage.prompt_tokens, done.usage.cached_tokens, done.usage.total_tokens) == (7, 4, 9)
    assert done.logprobs == ()


def test_there_is_one_terminal_and_nothing_after_it(mailbox: Mailbox) -> None:
    mailbox.put("a", (1,), ())
    mailbox.finish(End(finish_reason="cancelled"))
    assert mailbox.finish(End(finish_reason="error", code="engine_failed")) == []
    assert mailbox.put("b", (2,), ()) == []
    assert (mailbox.completion().text, mailbox.completion().finish_reason) == ("a", "cancelled")
    mailbox.raise_error()


def test_errors_come_back_as_their_class(mailbox: Mailbox) -> None:
    mailbox.put("part", (1,), ())
    mailbox.finish(End(finish_reason="deadline", code="deadline_exceeded", message="too late"))
    raised: list[StreamgenError] = []
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match="too late") as caught:
            mailbox.raise_error()
        assert (caught.value.request_id, caught.value.partial.text) == ("r1", "part")
        raised.append(caught.value)
    assert raised[0] is not raised[1], "an exception that is raised twice collects tracebacks"


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("engine_failed", {}, EngineFailed),
        ("prompt_too_long", {"prompt_tokens": 9, "max_context": 8}, PromptTooLong),
        ("nobody_knows", {}, StreamgenError),
    ],
)
def test_make_error(code: str, details: dict[str, Any], kind: type[StreamgenError]) -> None:
    error = make_error(End(finish_reason="error", code=code, details=details), request_id="r", partial=None)
    assert type(error) is kind and str(error)
    assert {name: getattr(error, name) for name in details} == details


WAITS: list[tuple[Callable[[Mailbox], Any], Callable[[Mailbox], list[Waiter]]]] = [
    (Mailbox.wait_open, lambda m: m.open(prompt_ids=tuple(range(1)), wants_logprobs=False)),
    (Mailbox.wait_started, lambda m: m.start(cached_tokens=0)),
    (Mailbox.wait_output, lambda m: m.put("a", (1,), ())),
    (Mailbox.wait_end, lambda m: m.finish(End(finish_reason="stop"))),
    (Mailbox.wait_open, lambda m: m.finish(End(finish_reason="stop"))),
    (Mailbox.wait_started, lambda m: m.finish(End(finish_reason="stop"))),
    (Mailbox.wait_output, lambda m: m.finish(End(finish_reason="stop"))),
]


@pytest.mark.anyio
@pytest.mark.parametrize("case", range(len(WAITS)))
async def test_a_task_is_woken_from_a_thread(mailbox: Mailbox, case: int) -> None:
    wait, change = WAITS[case]
    async with anyio.create_task_group() as group:
        group.start_soon(wait, mailbox)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(lambda: wake(change(mailbox)))
    await wait(mailbox)  # and later ones do not wait at all


@pytest.mark.parametrize("name", ["wait_open", "wait_started", "wait_output", "wait_end"])
def test_a_thread_is_woken(mailbox: Mailbox, name: str) -> None:
    thread = threading.Thread(target=getattr(mailbox, f"{name}_blocking"))
    thread.start()
    wake(mailbox.finish(End(finish_reason="stop")))
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.anyio
async def test_a_cancelled_wait_is_forgotten(mailbox: Mailbox) -> None:
    with anyio.move_on_after(0.01):
        await mailbox.wait_output()
    assert mailbox.put("a", (1,), ()) == []


@pytest.mark.anyio
async def test_one_post_for_all_readers_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    mailboxes = [Mailbox(f"r{i}", clock=lambda: 0.0) for i in range(5)]
    posts: list[int] = []
    wakes = Wakes()
    async with anyio.create_task_group() as group:
        for mailbox in mailboxes:
            group.start_soon(mailbox.wait_output)
        await anyio.wait_all_tasks_blocked()
        for mailbox in mailboxes:
            wakes.add(mailbox.put("a", (1,), ()))
        for post, waiters in wakes._by_loop.items():
            assert post == current_post()
            posts.append(len(waiters))
        wakes.flush()
    assert posts == [5]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_has_ended_is_passed_over(mailbox: Mailbox, backend: str) -> None:
    async def leave() -> None:
        dead.append(current_post())

    dead: list[Any] = []
    anyio.run(leave, backend=backend)
    alive = threading.Event()
    wake([Waiter(dead[0], threading.Event()), Waiter(None, alive)])
    assert alive.is_set()


@pytest.mark.anyio
async def test_signal() -> None:
    signal = Signal()
    assert not signal.is_set() and not signal.wait_blocking(0.01)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(signal.wait)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(signal.set)
    signal.set()
    await signal.wait()
    assert signal.is_set() and signal.wait_blocking()


# ---- parts ----------------------------------------------------------------------------------------------------------

PARTS = st.lists(
    st.one_of(
        st.builds(Text, text=st.text(min_size=1, max_size=3)),
        st.builds(Reasoning, text=st.text(min_size=1, max_size=3)),
        st.builds(
            ToolDelta,
            index=st.integers(0, 2),
            id=st.just("i"),
            name=st.just("f"),
            arguments=st.text(max_size=3),
        ),
        st.builds(ToolCall, id=st.just("i"), name=st.just("f"), arguments=st.just("{}")),
    ),
    max_size=5,
)


@given(st.lists(st.one_of(PARTS, st.none()), max_size=8))
def test_however_it_is_read_the_parts_are_in_order_and_merged(turns: list[list[Any] | None]) -> None:
    mailbox = Mailbox("r", clock=lambda: 0.0)
    deltas: list[Delta] = []
    read: list[Any] = []
    for turn in (*turns, None):
        if turn is not None:
            text = "".join(part.text for part in turn if isinstance(part, Text))
            mailbox.put(text, (), (), turn, len(turn))
        else:
            delta = mailbox.take()
            if delta is not None:
                deltas.append(delta)
                taken = list(mailbox.taken_parts())
                kinds = [(type(p), getattr(p, "index", 0)) for p in taken]
                merge = [a for a, b in itertools.pairwise(kinds) if a == b and a[0] is not ToolCall]
                assert merge == [], "neighbours of one kind are one"
                read += taken
    put = [part for turn in turns if turn for part in turn]
    assert spelled(read) == spelled(put)
    done = mailbox.completion()
    assert done.text == "".join(d.text for d in deltas) == "".join(p.text for p in put if isinstance(p, Text))
    assert done.reasoning == "".join(d.reasoning for d in deltas)
    for index in {p.index for p in put if isinstance(p, ToolDelta)}:
        whole = "".join(p.arguments for p in put if isinstance(p, ToolDelta) and p.index == index)
        assert whole == "".join(d.arguments for delta in deltas for d in delta.tool_calls if d.index == index)
    assert mailbox.usage.reasoning_tokens == len(put)


def spelled(parts: list[Any]) -> list[tuple[Any, ...]]:
    """Character by character, so that merging makes no difference."""
    found: list[tuple[Any, ...]] = []
    for part in parts:
        match part:
            case Text() | Reasoning():
                found += [(type(part), char) for char in part.text]
            case ToolDelta():
                found += [(type(part), part.index, char) for char in part.arguments]
            case _:
                found.append((type(part),))
    return found


def test_text_alone_has_parts_too(mailbox: Mailbox) -> None:
    assert list(mailbox.taken_parts()) == []
    mailbox.put("ab", (1,), ())
    mailbox.put("", (2,), ())
    mailbox.take()
    assert list(mailbox.taken_parts()) == [Text(text="ab")]
    mailbox.put("", (3,), ())
    mailbox.take()
    assert list(mailbox.taken_parts()) == []


def test_parts_wake_and_are_dropped_after_the_end(mailbox: Mailbox) -> None:
    mailbox.put("", (), (), (Reasoning(text="r"),), 1)
    delta = mailbox.take()
    assert delta == Delta(reasoning="r") and mailbox.take() is None
    mailbox.finish(End(finish_reason="cancelled"))
    assert mailbox.put("", (), (), (Reasoning(text="s"),), 1) == []
    assert mailbox.completion().reasoning == "r"


@pytest.mark.parametrize(
    "event",
    [
        Reasoning(text="r"),
        ToolDelta(index=1, id="a", name="f", arguments="{"),
        ToolCall(id="a", name="f", arguments="{}"),
        Text(text="t"),
    ],
)
def test_events_round_trip(event: Any) -> None:
    assert msgspec.json.decode(msgspec.json.encode(event), type=Event) == event
    delta = Delta(text="t", reasoning="r", tool_calls=(ToolDelta(index=0, id="a", name="f"),))
    assert msgspec.json.decode(msgspec.json.encode(delta), type=Delta) == delta
    done: Completion[Any] = Completion(id="r", reasoning="r", tool_calls=(ToolCall(id="a", name="f"),))
    assert msgspec.json.decode(msgspec.json.encode(done), type=Completion[Any]) == done
