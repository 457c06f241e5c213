"""Detokenizer: turns ids into exact text, finds stop strings, and puts deltas where the host reads them.

Where a request's output has parts (reasoning, calls of tools), `text.parts` tells them apart on the way.

`Detokenizer` is the synchronous core, driven by tests without a loop; `DetokenizerActor` is its shell. A request has
one mailbox per sequence; when the last of them has its terminal, the request is over and its route is closed.

The terminal of a sequence waits for the scheduler's last word on it, so that whoever sees it may count on slot and
pages being free: a stop string, a reader too slow or an error in here first tells the scheduler (`StopFound` or
`Cancel`), and ends towards the host when the scheduler has answered.
"""

from __future__ import annotations

import hashlib
import logging
import string
from functools import partial
from typing import TYPE_CHECKING, Protocol, assert_never

from msgspec import structs

from streamgen.actors.actor import Actor
from streamgen.completion import FinishReason, Text, TokenLogprob, TopLogprob
from streamgen.mailbox import End, Mailbox, Wakes
from streamgen.messages import (
    Advance,
    Cancel,
    DetokenizerInbox,
    Open,
    Pause,
    Progress,
    Refused,
    SchedulerInbox,
    StopFound,
    TokenLogprobs,
)
from streamgen.text.decoder import TextDecoder
from streamgen.text.stops import StopMatcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.text.parts import OutputFormats, PartsDecoder
    from streamgen.text.tokenizer import Tokenizer


logger = logging.getLogger(__name__)

CALL_ID_LENGTH = 9
_LETTERS = string.ascii_letters + string.digits

SLOW_TOKENS = 128  # unread tokens at which a reader is slow, for those who asked for "pause" or "cancel"


class Routes(Protocol):
    """Where outputs go: kept by the supervisor."""

    def mailboxes(self, request_id: int) -> tuple[Mailbox, ...] | None:
        """One mailbox per sequence; None where the request is unknown or over."""
        ...

    def close(self, request_id: int) -> None:
        """Every sequence of the request has ended."""
        ...


class _Sequence:
    """What one stream of tokens needs to become text. With `parts`, that has decoder and stops."""

    __slots__ = ("decoder", "ending", "is_over", "mailbox", "parts", "scores", "stops")

    def __init__(
        self, mailbox: Mailbox, decoder: TextDecoder, stops: StopMatcher | None, parts: PartsDecoder | None
    ) -> None:
        self.mailbox = mailbox
        self.decoder = decoder
        self.stops = stops
        self.parts = parts
        self.scores: list[TokenLogprobs] = []
        self.ending: End | None = None  # its terminal, once the scheduler has answered
        self.is_over = False


class _Request:
    """An open request. `left` counts its sequences that still run."""

    __slots__ = ("left", "open", "sequences")

    def __init__(self, open_: Open, sequences: tuple[_Sequence, ...]) -> None:
        self.open = open_
        self.sequences = sequences
        self.left = len(sequences)


class Detokenizer:
    """Owns the text state of every open request.

    formats   how the model marks parts of its outputs; wanted where an `Open` has parts

    After a turn, `wakes` holds the readers to wake and `take_words` what the scheduler has to be told.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        routes: Routes,
        *,
        formats: OutputFormats | None = None,
        slow_tokens: int = SLOW_TOKENS,
    ) -> None:
        self._tokenizer = tokenizer
        self._formats = formats
        self._routes = routes
        self._slow_tokens = slow_tokens
        self._requests: dict[int, _Request] = {}
        self._words: list[StopFound | Pause | Cancel] = []
        self.wakes = Wakes()

    def open(self, message: Open) -> None:
        """A request was admitted."""
        mailboxes = self._routes.mailboxes(message.request_id)
        if mailboxes is None:
            return
        sequences = tuple(self._new_sequence(message, mailbox, i) for i, mailbox in enumerate(mailboxes))
        self._requests[message.request_id] = _Request(message, sequences)
        wants_logprobs = message.sampling.logprobs is not None
        for mailbox in mailboxes:
            self.wakes.add(mailbox.open(prompt_ids=message.prompt_ids, wants_logprobs=wants_logprobs))

    def refuse(self, message: Refused) -> None:
        """A request ends before it ran."""
        self._end_all(message.request_id, _refused_end(message))

    def advance(self, entries: tuple[Progress, ...]) -> None:
        """Take what a step brought."""
        for entry in entries:
            request = self._requests.get(entry.request_id)
            if request is None:
                continue  # over: tokens that were already under way
            sequence = request.sequences[entry.index]
            if not sequence.is_over:
                self._advance_guarded(request, sequence, entry)

    def take_words(self) -> list[StopFound | Pause | Cancel]:
        """What happened here that concerns the scheduler."""
        words, self._words = self._words, []
        return words

    # ---- one sequence ----

    def _new_sequence(self, message: Open, mailbox: Mailbox, index: int) -> _Sequence:
        at_start = message.prompt_ids in ((), (self._tokenizer.bos_id,))
        decoder = TextDecoder(self._tokenizer, at_start=at_start)
        stops = _new_matcher(message)
        if message.parts is None or self._formats is None:
            return _Sequence(mailbox, decoder, stops, None)
        name_call = partial(_call_id, mailbox.request_id, index)
        parts = self._formats.split(message.parts, decoder=decoder, stops=stops, name_call=name_call)
        return _Sequence(mailbox, decoder, stops, parts)

    def _advance_guarded(self, request: _Request, sequence: _Sequence, entry: Progress) -> None:
        """An error while one request's output is decoded ends that request alone."""
        try:
            if sequence.ending is None:
                self._advance_one(request, sequence, entry)
        except Exception as error:
            logger.debug("an output could not be decoded", exc_info=error)
            why = f"decoding the output failed: {type(error).__name__}"
            self._end_early(request, End(finish_reason="error", code="generation_error", message=why))
        if entry.finish is not None and sequence.ending is not None and not sequence.is_over:
            sequence.mailbox.count_drafts(*entry.drafts)
            self._end(request, sequence, sequence.ending)

    def _end_early(self, request: _Request, end: End) -> None:
        """All that is left of a request ends, once the scheduler has freed it."""
        for sequence in request.sequences:
            if not sequence.is_over and sequence.ending is None:
                sequence.ending = end
        self._words.append(Cancel(request_id=request.open.request_id, reason="error"))

    def _advance_one(self, request: _Request, sequence: _Sequence, entry: Progress) -> None:
        mailbox = sequence.mailbox
        # The first entry of a sequence that never ran tells of its end; that is no start.
        if entry.cached_tokens is not None and entry.finish in (None, "stop", "complete", "length"):
            self.wakes.add(mailbox.start(cached_tokens=entry.cached_tokens))
        sequence.scores.extend(entry.scores)
        if sequence.parts is None:
            text, used, stop = self._decode(request, sequence, entry)
            if used or text:
                ids = entry.ids[:used]
                self.wakes.add(mailbox.put(text, ids, self._describe(ids, entry.logprobs) if entry.logprobs else ()))
        else:
            stop = self._put_parts(request, sequence.parts, mailbox, entry)
        if stop is not None:
            sequence.ending = _with_calls(End(finish_reason="stop", stop=stop), sequence)
            if entry.finish is None:
                self._words.append(StopFound(request_id=entry.request_id, index=entry.index))
        elif entry.finish is not None:
            sequence.ending = _with_calls(_finish_end(entry), sequence)
        elif request.open.on_slow != "coalesce" and mailbox.pause(self._slow_tokens):
            self._slow_down(request, entry)

    def _slow_down(self, request: _Request, entry: Progress) -> None:
        if request.open.on_slow == "pause":
            self._words.append(Pause(request_id=entry.request_id, index=entry.index))
        else:
            self._words.append(Cancel(request_id=entry.request_id, reason="slow_consumer"))

    def _decode(self, request: _Request, sequence: _Sequence, entry: Progress) -> tuple[str, int, str | None]:
        """(text to emit, how many of the ids belong to the output, the stop string that is complete)."""
        ids = entry.ids
        shown = _shown_ids(request, entry)
        if sequence.stops is None:
            text = sequence.decoder.feed(shown)
            return (text + sequence.decoder.finish() if entry.finish is not None else text), len(ids), None
        return _decode_until_stop(sequence.decoder, sequence.stops, shown, ids, is_last=entry.finish is not None)

    def _put_parts(self, request: _Request, parts: PartsDecoder, mailbox: Mailbox, entry: Progress) -> str | None:
        """Hand out what an entry brings to an output with parts; the stop string that is complete."""
        is_last = entry.finish is not None
        decoded = parts.feed(_shown_ids(request, entry), num_ids=len(entry.ids), is_last=is_last)
        ids = entry.ids[: decoded.num_used]
        if ids or decoded.parts:
            text = "".join([part.text for part in decoded.parts if isinstance(part, Text)])
            logprobs = self._describe(ids, entry.logprobs) if entry.logprobs else ()
            self.wakes.add(mailbox.put(text, ids, logprobs, decoded.parts, decoded.num_reasoning))
        return decoded.stop

    def _end(self, request: _Request, sequence: _Sequence, end: End) -> None:
        sequence.is_over = True
        prompt_logprobs = self._prompt_logprobs(request, sequence)
        request.left -= 1
        if request.left == 0:
            del self._requests[request.open.request_id]
            self._routes.close(request.open.request_id)
        # NOTE: the terminal comes last: who sees it may count on the request being closed.
        self.wakes.add(sequence.mailbox.finish(end, prompt_logprobs))

    def _end_all(self, request_id: int, end: End) -> None:
        mailboxes = self._routes.mailboxes(request_id) or ()
        self._requests.pop(request_id, None)
        self._routes.close(request_id)
        for mailbox in mailboxes:
            self.wakes.add(mailbox.finish(end))

    # ---- logprobs ----

    def _describe(self, ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> list[TokenLogprob]:
        # NOTE: ids may be cut at a stop string, logprobs not.
        return [self._token_logprob(token, entry) for token, entry in zip(ids, logprobs, strict=False)]

    def _token_logprob(self, token: int, entry: TokenLogprobs) -> TokenLogprob:
        text = self._tokenizer.token_text
        top = tuple(
            TopLogprob(id=other, text=text(other), logprob=logprob)
            for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        )
        return TokenLogprob(id=token, text=text(token), logprob=entry.logprob, rank=entry.rank, top=top)

    def _prompt_logprobs(self, request: _Request, sequence: _Sequence) -> tuple[TokenLogprob | None, ...] | None:
        """One entry per prompt token; those before `score_from` are None. Sequences of a request share a prompt."""
        start = request.open.score_from
        if start is None:
            return None
        scores = sequence.scores or next((s.scores for s in request.sequences if s.scores), [])
        ids = request.open.prompt_ids
        scored = [self._token_logprob(token, entry) for token, entry in zip(ids[start:], scores, strict=False)]
        return (None,) * start + tuple(scored)


class DetokenizerActor(Actor[DetokenizerInbox]):
    """The shell of `Detokenizer`."""

    name = "detokenizer"

    def __init__(
        self, detokenizer: Detokenizer, *, to_scheduler: Callable[[SchedulerInbox], None], capacity: int
    ) -> None:
        super().__init__(capacity=capacity)
        self._detokenizer = detokenizer
        self._to_scheduler = to_scheduler

    def handle(self, message: DetokenizerInbox) -> None:
        """Pass a message on to the core."""
        match message:
            case Advance():
                self._detokenizer.advance(message.entries)
            case Open():
                self._detokenizer.open(message)
            case Refused():
                self._detokenizer.refuse(message)
            case _:
                assert_never(message)

    def settle(self) -> None:
        """Tell the scheduler what ended here, then wake the hosts."""
        for word in self._detokenizer.take_words():
            self._to_scheduler(word)
        self._detokenizer.wakes.flush()


def _new_matcher(message: Open) -> StopMatcher | None:
    sampling = message.sampling
    return StopMatcher(sampling.stop, include_stop=sampling.include_stop) if sampling.stop else None


def _shown_ids(request: _Request, entry: Progress) -> tuple[int, ...]:
    """The text of a stop id stays out unless asked for; the id itself is part of the output."""
    is_stopped = entry.finish == "stop" and len(entry.ids) > 0
    return entry.ids[:-1] if is_stopped and not request.open.sampling.include_stop else entry.ids


def _with_calls(end: End, sequence: _Sequence) -> End:
    """The end of an output that is whole and has calls: the model waits for their results."""
    has_calls = sequence.parts is not None and sequence.parts.has_calls
    return structs.replace(end, finish_reason="tool_calls") if has_calls and end.finish_reason == "stop" else end


def _call_id(request_id: str, index: int, call: int) -> str:
    """A name for a call, the same whenever the request is. Some templates want nine letters or digits."""
    digest = int.from_bytes(hashlib.sha256(f"{request_id}/{index}/{call}".encode()).digest(), "big")
    letters = []
    for _ in range(CALL_ID_LENGTH):
        digest, letter = divmod(digest, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)


def _decode_until_stop(
    decoder: TextDecoder, stops: StopMatcher, shown: tuple[int, ...], ids: tuple[int, ...], *, is_last: bool
) -> tuple[str, int, str | None]:
    """Token by token, so that the ids end with the token that completed the stop string."""
    pieces: list[str] = []
    for index, token in enumerate(shown):
        emitted, matched = stops.feed(decoder.feed((token,)))
        pieces.append(emitted)
        if matched is not None:
            return "".join(pieces), index + 1, matched
    if is_last:
        emitted, matched = stops.feed(decoder.finish())
        pieces.append(emitted)
        if matched is not None:
            return "".join(pieces), len(ids), matched
        pieces.append(stops.finish())
    return "".join(pieces), len(ids), None


# A finish -> (finish_reason, an error's code, its message where the scheduler has none)
_FINISHES: dict[str, tuple[FinishReason, str | None, str]] = {
    "complete": ("stop", None, ""),
    "length": ("length", None, ""),
    "cancelled": ("cancelled", None, ""),
    "deadline": ("deadline", "deadline_exceeded", "the request's timeout passed"),
    "queue_deadline": ("deadline", "deadline_exceeded", "the request's queue_timeout passed before it started"),
    "first_token_deadline": (
        "deadline",
        "deadline_exceeded",
        "the request's first_token_timeout passed before it had a token",
    ),
    "slow_consumer": (
        "error",
        "slow_consumer",
        f'the reader was more than {SLOW_TOKENS} tokens behind, and on_slow="cancel" was asked for; read faster, or '
        'use on_slow="coalesce"',
    ),
    "error": ("error", "generation_error", "the request failed"),
}


def _finish_end(entry: Progress) -> End:
    assert entry.finish is not None, "only a last progress ends a sequence"
    if entry.finish == "stop":
        return End(finish_reason="stop", stop=entry.ids[-1] if entry.ids else None)
    reason, code, message = _FINISHES[entry.finish]
    return End(finish_reason=reason, code=entry.code or code, message=entry.message or message)


def refused_end(reason: str, message: str = "") -> End:
    """The terminal of a request that was cancelled before it ran; `reason` as in `Cancel`."""
    finish, code, words = _FINISHES[reason]
    return End(finish_reason=finish, code=code, message=message or words)


def _refused_end(message: Refused) -> End:
    if message.code in _FINISHES:
        return refused_end(message.code, message.message)
    return End(finish_reason="error", code=message.code, message=message.message, details=dict(message.details))
