"""The detokenizer's core: exact text whatever the token borders, stop strings, one terminal for each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.actors.detokenizer import Detokenizer, DetokenizerActor
from streamgen.mailbox import Mailbox
from streamgen.messages import Advance, Cancel, Open, Pause, Progress, Refused, StopFound, TokenLogprobs
from streamgen.sampling import ResolvedSampling
from tests.fakes import BOS, EOS, FakeTokenizer

if TYPE_CHECKING:
    from streamgen.completion import Completion

TOKENIZER: Any = FakeTokenizer()
LOGPROB = TokenLogprobs(-0.5, 1)


class Host:
    """Routes, and what a host would read."""

    def __init__(self, **options: Any) -> None:
        self.routes: dict[int, tuple[Mailbox, ...]] = {}
        self.detokenizer = Detokenizer(TOKENIZER, self, **options)

    def mailboxes(self, request_id: int) -> tuple[Mailbox, ...] | None:
        return self.routes.get(request_id)

    def close(self, request_id: int) -> None:
        self.routes.pop(request_id, None)

    def ask(
        self,
        request_id: int = 1,
        *,
        prompt: tuple[int, ...] = (BOS, 65),
        n: int = 1,
        score_from: int | None = None,
        on_slow: str = "coalesce",
        **fields: Any,
    ) -> tuple[Mailbox, ...]:
        """Open a request."""
        mailboxes = tuple(Mailbox(f"r{request_id}", clock=lambda: 0.0) for _ in range(n))
        self.routes[request_id] = mailboxes
        self.detokenizer.open(
            Open(
                request_id=request_id,
                prompt_ids=prompt,
                sampling=ResolvedSampling(**fields),
                stop_ids=(EOS,),
                score_from=score_from,
                num_sequences=n,
                on_slow=on_slow,
            )
        )
        return mailboxes

    def progress(self, *ids: int, request_id: int = 1, index: int = 0, finish: str | None = None, **more: Any) -> None:
        """A step's result for one sequence."""
        entry = Progress(request_id=request_id, index=index, ids=ids, finish=finish, **more)
        self.detokenizer.advance((entry,))


@pytest.fixture
def host() -> Host:
    return Host()


def result(mailbox: Mailbox) -> Completion[Any]:
    return mailbox.completion()


def test_text_and_ids_of_a_step(host: Host) -> None:
    (mailbox,) = host.ask()
    host.progress(*b"ab", cached_tokens=1)
    delta = mailbox.take()
    assert delta is not None and (delta.text, delta.ids) == ("ab", (97, 98))
    assert mailbox.is_started and mailbox.usage.cached_tokens == 1 and mailbox.usage.prompt_tokens == 2
    host.progress(99, finish="length")
    assert (result(mailbox).text, result(mailbox).finish_reason) == ("abc", "length")
    assert host.routes == {}, "the route of an ended request is closed"


def test_a_stop_id_is_an_id_but_no_text(host: Host) -> None:
    (mailbox,) = host.ask()
    host.progress(97, EOS, finish="stop")
    assert (result(mailbox).text, result(mailbox).ids, result(mailbox).stop) == ("a", (97, EOS), EOS)


def test_a_stop_string_ends_here_and_the_scheduler_is_told(host: Host) -> None:
    (mailbox,) = host.ask(stop=("bc",))
    host.progress(97, 98)
    assert result(mailbox).text == "a", "what may become a stop string is held back"
    host.progress(99, 100)
    assert host.detokenizer.take_words() == [StopFound(request_id=1)]
    host.progress(101)
    assert result(mailbox).finish_reason is None, "slot and pages are not free yet"
    host.progress(finish="stopped")
    assert (result(mailbox).text, result(mailbox).stop) == ("a", "bc")
    assert result(mailbox).ids == (97, 98, 99), "tokens that were under way are dropped"
    assert host.detokenizer.take_words() == []


def test_a_stop_string_in_the_last_progress_needs_no_message(host: Host) -> None:
    (mailbox,) = host.ask(stop=("bc",))
    host.progress(*b"abc", finish="length")
    assert (result(mailbox).finish_reason, result(mailbox).stop) == ("stop", "bc")
    assert host.detokenizer.take_words() == []


def test_a_half_character_at_the_end_shows_as_one_replacement(host: Host) -> None:
    (mailbox,) = host.ask()
    host.progress(97, 0xF0, 0x9F, finish="length")
    assert result(mailbox).text == "a�"


def test_sequences_of_a_request_are_their_own(host: Host) -> None:
    first, second = host.ask(n=2, stop=("x",))
    host.progress(97, index=0)
    host.progress(98, 120, index=1)
    assert host.detokenizer.take_words() == [StopFound(request_id=1, index=1)]
    host.progress(index=1, finish="stopped")
    assert (result(first).finish_reason, result(second).finish_reason) == (None, "stop")
    assert 1 in host.routes, "one sequence still runs"
    host.progress(99, index=0, finish="length")
    assert (result(first).text, result(second).text) == ("ac", "b") and host.routes == {}


def test_logprobs_are_cut_with_the_ids(host: Host) -> None:
    (mailbox,) = host.ask(stop=("b",), logprobs=0)
    host.progress(*b"abc", logprobs=(LOGPROB,) * 3)
    assert [entry.text for entry in result(mailbox).logprobs or ()] == ["a", "b"]


def test_prompt_logprobs_are_gathered_over_chunks_and_shared(host: Host) -> None:
    first, second = host.ask(prompt=(BOS, 65, 66, 67), n=2, score_from=1, prompt_logprobs=0)
    host.progress(scores=(LOGPROB,), cached_tokens=0)
    host.progress(scores=(LOGPROB, LOGPROB))
    host.progress(97, finish="length")
    host.progress(98, index=1, finish="length")
    for mailbox in (first, second):
        prompt_logprobs = result(mailbox).prompt_logprobs
        assert prompt_logprobs is not None and prompt_logprobs[0] is None
        assert [entry.text for entry in prompt_logprobs[1:] if entry] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("finish", "reason", "code"),
    [
        ("cancelled", "cancelled", None),
        ("deadline", "deadline", "deadline_exceeded"),
        ("queue_deadline", "deadline", "deadline_exceeded"),
        ("first_token_deadline", "deadline", "deadline_exceeded"),
        ("slow_consumer", "error", "slow_consumer"),
        ("error", "error", "generation_error"),
    ],
)
def test_ends_that_are_not_the_models(host: Host, finish: str, reason: str, code: str | None) -> None:
    (mailbox,) = host.ask()
    host.progress(finish=finish, cached_tokens=0, message="why")
    assert mailbox.end is not None and (mailbox.end.finish_reason, mailbox.end.code) == (reason, code)
    assert not mailbox.is_started, "the end of what never ran is no start"


@pytest.mark.parametrize(
    ("code", "reason", "end_code"),
    [
        ("cancelled", "cancelled", None),
        ("deadline", "deadline", "deadline_exceeded"),
        ("prompt_too_long", "error", "prompt_too_long"),
    ],
)
def test_refusals_before_and_after_opening(host: Host, code: str, reason: str, end_code: str | None) -> None:
    (opened,) = host.ask(1)
    unopened = Mailbox("r2", clock=lambda: 0.0)
    host.routes[2] = (unopened,)
    for request_id in (1, 2, 3):
        host.detokenizer.refuse(Refused(request_id=request_id, code=code))
    for mailbox in (opened, unopened):
        assert mailbox.end is not None and (mailbox.end.finish_reason, mailbox.end.code) == (reason, end_code)
    assert host.routes == {}


def test_requests_that_are_gone_are_ignored(host: Host) -> None:
    host.progress(97)
    host.detokenizer.open(Open(request_id=5, prompt_ids=(1,), sampling=ResolvedSampling()))
    host.progress(97, request_id=5)
    assert host.routes == {} and host.detokenizer.take_words() == []


def test_an_error_in_here_ends_its_request_alone(host: Host) -> None:
    first, second = host.ask(1, n=2)
    (other,) = host.ask(2)

    def broken(ids: Any) -> str:
        raise KeyError("secret")

    host.detokenizer._requests[1].sequences[1].decoder.feed = broken  # type: ignore[method-assign]
    host.progress(97, index=0)
    host.progress(98, index=1)
    assert host.detokenizer.take_words() == [Cancel(request_id=1, reason="error")]
    assert first.end is None and second.end is None, "slot and pages are not free yet"
    host.progress(99, index=0)
    for index in (0, 1):
        host.progress(index=index, finish="error")
    for mailbox in (first, second):
        assert mailbox.end is not None and mailbox.end.code == "generation_error"
        assert mailbox.end.message == "decoding the output failed: KeyError"
    assert result(first).text == "a" and list(host.routes) == [2]
    host.progress(97, request_id=2, finish="length")
    assert result(other).text == "a"


@pytest.mark.parametrize(
    ("policy", "word"), [("pause", Pause(request_id=1)), ("cancel", Cancel(request_id=1, reason="slow_consumer"))]
)
def test_a_slow_reader_is_named_once(policy: str, word: Any) -> None:
    host = Host(slow_tokens=4)
    (mailbox,) = host.ask(on_slow=policy)
    caught_up: list[int] = []
    mailbox.when_caught_up(lambda: caught_up.append(1))
    host.progress(*b"abcd")
    assert host.detokenizer.take_words() == []
    host.progress(*b"e")
    host.progress(*b"f")
    assert host.detokenizer.take_words() == [word]
    assert mailbox.take() is not None and caught_up == [1]
    host.progress(*b"ghijk")
    assert host.detokenizer.take_words() == [word], "behind once more"


def test_the_shell_passes_everything_on(host: Host) -> None:
    stops: list[Any] = []
    actor = DetokenizerActor(host.detokenizer, to_scheduler=stops.append, capacity=1)
    (mailbox,) = host.ask(stop=("b",))
    (failing,) = host.ask(2)
    actor.handle(Advance(entries=(Progress(request_id=1, ids=(97, 98)),)))
    actor.handle(Refused(request_id=2, code="engine_failed", message="gone"))
    actor.settle()
    host.progress(finish="stopped")
    assert result(mailbox).stop == "b" and stops == [StopFound(request_id=1)]
    assert failing.end is not None and (failing.end.code, failing.end.message) == ("engine_failed", "gone")


def oracle(text: bytes, stops: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    """Cut at the stop string that ends first; of those that end together, the longest."""
    whole = text.decode("utf-8", "replace")
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    if not ends:
        return whole, None
    end, _, stop = min(ends)
    return whole[: end if include else end - len(stop)], stop


@given(
    text=st.text(alphabet="abé🙂", max_size=30),
    stops=st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=40),
    include=st.booleans(),
)
def test_however_tokens_arrive_the_text_is_the_same(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    host = Host()
    (mailbox,) = host.ask(stop=tuple(stops), include_stop=include)
    data, seen, at = text.encode(), "", 0
    for size in (*sizes, len(data)):
        host.progress(*data[at : at + size])
        at = min(at + size, len(data))
        delta = mailbox.take()
        seen += delta.text if delta else ""
    host.progress(finish="stopped" if host.detokenizer.take_words() else "length")
    delta = mailbox.take()
    seen += delta.text if delta else ""
    expected, stop = oracle(data, tuple(stops), include=include)
    done = result(mailbox)
    assert seen == done.text == expected
    assert (done.finish_reason, done.stop) == (("stop", stop) if stop else ("length", None))
    if stop:
        shortest = bytes(done.ids).decode("utf-8", "ignore")
        assert shortest.endswith(stop) and stop not in bytes(done.ids[:-1]).decode("utf-8", "ignore")
    else:
        assert bytes(done.ids) == data
