"""The detokenizer on outputs with reasoning and calls: ids, usage, ends, stop strings, what a reader gets."""

from __future__ import annotations

from typing import Any

import pytest

from streamgen.actors.detokenizer import Detokenizer
from streamgen.completion import Finished, Reasoning, Started, Text, ToolCall, ToolDelta
from streamgen.mailbox import Mailbox
from streamgen.messages import Open, OutputParts, Progress, StopFound
from streamgen.sampling import ResolvedSampling
from streamgen.stream import Stream
from streamgen.text.parts import OutputFormats
from tests.fakes import BOS, EOS, SPECIALS, FakeTokenizer

THINK, END_THINK, CALL, END_CALL = 300, 301, 302, 303
MARKERS = {"<think>": THINK, "</think>": END_THINK, "<tool_call>": CALL, "</tool_call>": END_CALL}
TEMPLATE = '<think> </think> {{ tools }} <tool_call> "arguments"'
ALL = OutputParts(reasoning=True, calls=True)
CALLED = [CALL, *b'\n{"name": "f", "arguments": {"a": 1}}\n', END_CALL]


class MarkedTokenizer(FakeTokenizer):
    """One id per byte, and tokens that mark parts."""

    def byte_table(self, *, skip_special: bool) -> dict[int, bytes]:
        return {**super().byte_table(skip_special=skip_special), **{i: t.encode() for t, i in MARKERS.items()}}

    def token_text(self, token_id: int) -> str:
        return next((t for t, i in MARKERS.items() if i == token_id), "") or super().token_text(token_id)

    def token_id(self, text: str) -> int | None:
        return MARKERS.get(text) or next((i for i, t in SPECIALS.items() if t == text), None)


TOKENIZER: Any = MarkedTokenizer()


class Host:
    """Routes, and one request with parts."""

    def __init__(
        self, parts: OutputParts | None = ALL, *, n: int = 1, on_slow: str = "coalesce", **fields: Any
    ) -> None:
        self.is_closed = False
        self.boxes = tuple(Mailbox("r1", clock=lambda: 0.0) for _ in range(n))
        formats = OutputFormats(TOKENIZER, TEMPLATE)
        self.detokenizer = Detokenizer(TOKENIZER, self, formats=formats, slow_tokens=4)
        self.detokenizer.open(
            Open(
                request_id=1,
                prompt_ids=(BOS, 65),
                sampling=ResolvedSampling(**fields),
                stop_ids=(EOS,),
                num_sequences=n,
                parts=parts,
                on_slow=on_slow,
            )
        )

    def mailboxes(self, request_id: int) -> tuple[Mailbox, ...] | None:
        return None if self.is_closed else self.boxes

    def close(self, request_id: int) -> None:
        self.is_closed = True

    def progress(self, *ids: int, index: int = 0, finish: str | None = None, **more: Any) -> None:
        self.detokenizer.advance((Progress(request_id=1, index=index, ids=ids, finish=finish, **more),))


def test_a_reply_with_all_parts() -> None:
    host = Host()
    (mailbox,) = host.boxes
    ids = [THINK, *b"\nHm.", END_THINK, *b"\n\nI look.\n", *CALLED, EOS]
    for token in ids[:-1]:
        host.progress(token)
    host.progress(EOS, finish="stop")
    done = mailbox.completion()
    assert (done.reasoning, done.text, done.finish_reason, done.stop) == ("Hm.", "I look.", "tool_calls", EOS)
    assert done.ids == tuple(ids) and done.usage.completion_tokens == len(ids)
    assert done.usage.reasoning_tokens == 6
    (call,) = done.tool_calls
    assert (call.name, call.arguments, call.parsed) == ("f", '{"a": 1}', {"a": 1})
    assert done.message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": call.id, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    delta = mailbox.take()
    assert delta is not None and (delta.reasoning, delta.text, delta.ids) == ("Hm.", "I look.", tuple(ids))
    assert delta.tool_calls == (ToolDelta(index=0, id=call.id, name="f", arguments='{"a": 1}'),)
    assert list(mailbox.taken_parts()) == [
        Reasoning(text="Hm."),
        Text(text="I look."),
        delta.tool_calls[0],
        call,
    ]


def test_what_comes_step_by_step_keeps_its_order() -> None:
    host = Host()
    (mailbox,) = host.boxes
    parts: list[Any] = []
    for token in [*b"One.", *CALLED, *b"\nTwo.", *CALLED]:
        host.progress(token)
        if mailbox.take() is not None:
            parts += mailbox.taken_parts()
    host.progress(EOS, finish="stop")
    kinds = [type(part).__name__ for part in parts]
    runs = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    assert runs == ["Text", "ToolDelta", "ToolCall", "Text", "ToolDelta", "ToolCall"]
    assert "".join(p.text for p in parts if isinstance(p, Text)) == "One.\nTwo."[:4] + "Two."
    calls = [p for p in parts if isinstance(p, ToolCall)]
    assert tuple(calls) == mailbox.completion().tool_calls and calls[0].id != calls[1].id


@pytest.mark.parametrize(
    ("finish", "output", "reason"),
    [
        ("stop", [*CALLED, EOS], "tool_calls"),
        ("complete", CALLED, "tool_calls"),
        ("complete", [*b"text"], "stop"),
        ("length", CALLED, "length"),
        ("cancelled", CALLED, "cancelled"),
    ],
)
def test_ends(finish: str, output: list[int], reason: str) -> None:
    host = Host()
    host.progress(*output, finish=finish, cached_tokens=0)
    done = host.boxes[0].completion()
    assert (done.finish_reason, done.ids) == (reason, tuple(output))
    assert done.stop == (EOS if finish == "stop" else None)


@pytest.mark.parametrize("parts", [None, ALL])
def test_a_grammars_end_shows_every_id(parts: OutputParts | None) -> None:
    host = Host(parts)
    host.progress(*b'{"a":1}', finish="complete", cached_tokens=1)
    done = host.boxes[0].completion()
    assert (done.text, done.finish_reason, done.stop) == ('{"a":1}', "stop", None)
    assert host.boxes[0].is_started


def test_a_call_that_is_cut_off_is_the_last_of_the_calls() -> None:
    host = Host()
    host.progress(*CALLED, CALL, *b'\n{"name": "g", "arguments": {"b', finish="length")
    (first, second) = host.boxes[0].completion().tool_calls
    assert (first.name, second.name, second.arguments) == ("f", "g", '{"b')
    with pytest.raises(Exception, match="tool call 'g': expected a JSON object"):
        _ = second.parsed


def test_stop_strings_are_looked_for_in_the_answer() -> None:
    host = Host(stop=("no",))
    ids = [THINK, *b"no", END_THINK, *b"say n"]
    host.progress(*ids)
    assert host.boxes[0].completion().text == "say"
    host.progress(*b"ow", *b"xyz")
    assert host.detokenizer.take_words() == [StopFound(request_id=1)]
    host.progress(*b"more", finish="stopped")
    done = host.boxes[0].completion()
    assert (done.reasoning, done.text, done.stop, done.finish_reason) == ("no", "say ", "no", "stop")
    assert done.ids == (*ids, *b"o"), "tokens behind the stop string are dropped"


def test_a_stop_string_after_a_call_is_an_end_with_calls() -> None:
    host = Host(stop=("no",))
    host.progress(*CALLED, *b"no", finish="length")
    assert (host.boxes[0].completion().finish_reason, host.boxes[0].completion().stop) == ("tool_calls", "no")


def test_logprobs_go_with_the_ids() -> None:
    from streamgen.messages import TokenLogprobs

    host = Host(logprobs=0)
    ids = (THINK, *b"a", END_THINK, *b"b")
    host.progress(*ids, logprobs=(TokenLogprobs(-0.5, 1),) * len(ids))
    assert [entry.text for entry in host.boxes[0].completion().logprobs or ()] == ["<think>", "a", "</think>", "b"]


def test_calls_of_a_request_have_names_of_their_own_that_do_not_change() -> None:
    names = []
    for _ in range(2):
        host = Host(n=2)
        for index in (0, 1):
            host.progress(*CALLED, *CALLED, index=index, finish="length")
        names.append([call.id for box in host.boxes for call in box.completion().tool_calls])
    assert names[0] == names[1] and len(set(names[0])) == 4
    assert all(len(name) == 9 and name.isalnum() for name in names[0])


def test_an_error_in_the_parts_ends_the_request_alone() -> None:
    host = Host()

    def broken(*args: Any, **more: Any) -> Any:
        raise KeyError("secret")

    host.detokenizer._requests[1].sequences[0].parts.feed = broken  # type: ignore[method-assign, union-attr]
    host.progress(97)
    host.progress(finish="error")
    end = host.boxes[0].end
    assert end is not None and (end.code, end.message) == ("generation_error", "decoding the output failed: KeyError")


def test_a_reader_of_reasoning_may_be_slow_as_well() -> None:
    host = Host(on_slow="pause")
    host.progress(THINK, *b"abcdef")
    assert [type(word).__name__ for word in host.detokenizer.take_words()] == ["Pause"]


class Submitted:
    """What a stream needs of a request that is under way."""

    id = "r1"
    output = None
    tools = None
    is_submitted = True

    def __init__(self, host: Host) -> None:
        self.mailboxes = host.boxes

    @property
    def is_running(self) -> bool:
        return self.mailboxes[0].end is None

    def submit(self) -> None:
        """It is."""


@pytest.mark.anyio
@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_events_come_in_order(step: int) -> None:
    host = Host()
    stream: Stream[None] = Stream(host, Submitted(host))  # type: ignore[arg-type]  # as much of one as it needs
    ids = [THINK, *b"Hm.", END_THINK, *b"One. ", *CALLED, *b"Two.", EOS]
    events, seen = stream.events(), list[Any]()
    for at in range(0, len(ids), step):
        is_last = at + step >= len(ids)
        finish = "stop" if is_last else None
        host.progress(*ids[at : at + step], finish=finish, cached_tokens=0 if at == 0 else None)
        if at == 0:
            seen.append(await events.__anext__())
        while not (seen and isinstance(seen[-1], Finished)) and (is_last or has_events(stream)):
            seen.append(await events.__anext__())
    with pytest.raises(StopAsyncIteration):
        await events.__anext__()
    kinds = [type(event) for event in seen]
    runs = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    assert runs == [Started, Reasoning, Text, ToolDelta, ToolCall, Text, Finished]
    done = seen[-1].completion
    assert "".join(e.text for e in seen if isinstance(e, Text)) == done.text == "One.Two."
    assert [e for e in seen if isinstance(e, ToolCall)] == list(done.tool_calls)
    assert done.finish_reason == "tool_calls"


def has_events(stream: Stream[None]) -> bool:
    """Whether the next event is there without waiting, looked up where events wait."""
    parts = stream._mailbox._parts
    return parts is not None and parts.has_unread
