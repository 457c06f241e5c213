"""The model under a FakeEngine: one token per byte, and a runner that says what the request's reply says.

The rest is the real engine: scheduler, pages, detokenizer, streams. So cancelling, time limits, slow readers, overload
and statistics are what they are in earnest.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from streamgen.config import EngineOptions, LoadProgress, MemoryPlan
from streamgen.errors import EngineFailed, GenerationError, TemplateError
from streamgen.faults import DeviceDead
from streamgen.messages import Begin, Fault, StepDone, StepPlan, TokenLogprobs
from streamgen.sampling import Sampling
from streamgen.scheduling.limits import Limits
from streamgen.testing.clock import RealClock
from streamgen.testing.script import Reply
from streamgen.text.chat import normalize_messages
from streamgen.text.parts import OutputFormats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from streamgen.testing.clock import VirtualClock

BOS, EOS = 256, 257
VOCAB_SIZE = 258
PAGE_SIZE = 16
PAGE_BYTES = 1024
STEP_TOKENS = 512
MAX_CONTEXT = 65_536  # a token is a byte, so what fits into a real model's context should fit here
_SPECIALS = {BOS: "<s>", EOS: "</s>"}


class Config(Struct, frozen=True, kw_only=True):
    """As much of a model's shape as engines ask for."""

    vocab_size: int = VOCAB_SIZE
    max_context: int = MAX_CONTEXT
    family: str = "fake"


class ByteTokenizer:
    """One id per byte of UTF-8, and two special tokens."""

    vocab_size = VOCAB_SIZE
    bos_id = BOS
    eos_ids = (EOS,)
    add_bos = True
    drops_leading_space = False
    special_ids = frozenset(_SPECIALS)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """The text's bytes."""
        ids = list(text.encode())
        return [BOS, *ids] if (self.add_bos if add_bos is None else add_bos) else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool = True) -> str:
        """The text of ids."""
        table = self.byte_table(skip_special=skip_special)
        return b"".join(table[i] for i in ids).decode("utf-8", "replace")

    def byte_table(self, *, skip_special: bool) -> Mapping[int, bytes]:
        """Id -> bytes."""
        table = {i: bytes([i]) for i in range(256)}
        return {**table, **{i: b"" if skip_special else text.encode() for i, text in _SPECIALS.items()}}

    def token_text(self, token_id: int) -> str:
        """A token as text to show."""
        return _SPECIALS.get(token_id) or bytes([token_id]).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """The id of a special token."""
        return next((token for token, literal in _SPECIALS.items() if literal == text), None)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of texts."""
        return token_id in _SPECIALS


class ScriptedFormats(OutputFormats):
    """A script says what it says, whatever grammar it should obey; a JSON object with name and arguments is a call."""

    def grammar_use(self, *arguments: object) -> tuple[None, dict[str, Any]]:
        """None."""
        return None, {}


class PlainTemplate:
    """A chat as lines of "role: content"."""

    def render(self, messages: tuple[dict[str, Any], ...], **arguments: object) -> str:
        """The chat as text; arguments are those of real templates, and change nothing."""
        try:
            lines = [f"{message['role']}: {message['content']}" for message in normalize_messages(messages)]
        except KeyError as error:  # normalize_messages leaves none out
            raise TemplateError(f"a message lacks {error}") from None
        return "\n".join([*lines, "assistant: "])


class ReplyTable(dict[int, tuple[Any, ...]]):
    """Replies by request, in the place of logits processors; who sleeps hears of requests that are gone."""

    def __init__(self, clock: VirtualClock | RealClock) -> None:
        super().__init__()
        self._clock = clock

    def pop(self, request_id: int, *default: Any) -> Any:
        """A request has ended."""
        entry = super().pop(request_id, *default)
        self._clock.wake()
        return entry


class ScriptedRunner:
    """Answers plans from replies. A request's reply lies in the model's table, under the request's id."""

    def __init__(self, table: ReplyTable, clock: VirtualClock | RealClock) -> None:
        self._table = table
        self._clock = clock
        self._begins: dict[int, Begin] = {}
        self._replies: dict[int, Reply] = {}
        self._given_up = threading.Event()
        self.failure: str | None = None  # makes the next step the last

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """One step: as long as the slowest of its tokens takes, unless its request ends before."""
        if wake_fd is not None:
            os.write(wake_fd, b"\0")
        for begin in plan.begins:
            self._begin(begin)
        rows = list(zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True))
        self._wait([(self._seconds(slot, start + count), slot) for slot, start, count, n in rows if n])
        if self.failure is not None:
            raise DeviceDead(self.failure)
        faults = [self._fault(i, slot, start + count) for i, (slot, start, count, n) in enumerate(rows) if n]
        tokens = tuple((self._token(slot, start + count),) if n else () for slot, start, count, n in rows)
        return StepDone(
            step=plan.step,
            tokens=tokens,
            logprobs=tuple(self._logprobs(slot, drawn) for (slot, *_), drawn in zip(rows, tokens, strict=True)),
            scores=tuple(self._scores(slot, start, start + count) for slot, start, count, _ in rows),
            faults=tuple(fault for fault in faults if fault is not None),
            seconds=1e-6,
        )

    def give_up(self) -> None:
        """The engine closes: nothing waits any more. Any thread."""
        self._given_up.set()
        self._clock.wake()

    def forget(self) -> None:
        """What a device does that gives its memory back."""
        self._begins.clear()
        self._replies.clear()

    def _begin(self, begin: Begin) -> None:
        self._begins[begin.slot] = begin
        entry = self._table.get(begin.processors) if begin.processors is not None else None
        # A request that has ended since the step was planned says nothing any more.
        self._replies[begin.slot] = entry[0].reply if entry else Reply()

    def _index(self, slot: int, position: int) -> int:
        return position - self._begins[slot].num_prompt

    def _token(self, slot: int, position: int) -> int:
        """The token that stands at this position."""
        reply, index = self._replies[slot], self._index(slot, position)
        data = reply.text.encode()
        if index < len(data):
            return data[index]
        return (data[-1:] or b".")[0] if reply.never_ends else EOS

    def _seconds(self, slot: int, position: int) -> float:
        return self._replies[slot].seconds(self._index(slot, position))

    def _fault(self, i: int, slot: int, position: int) -> Fault | None:
        reply = self._replies[slot]
        if reply.error is None or self._index(slot, position) < reply.fail_after:
            return None
        if isinstance(reply.error, EngineFailed):
            raise DeviceDead(reply.error.message)
        code = reply.error.code if isinstance(reply.error, GenerationError) else "generation_error"
        return Fault(i, code, reply.error.message)

    def _logprobs(self, slot: int, tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
        """Of tokens that were said."""
        if self._begins[slot].sampling.logprobs is None:
            return ()
        return tuple(self._logprob(slot, token, self._begins[slot].sampling.logprobs) for token in tokens)

    def _scores(self, slot: int, start: int, end: int) -> tuple[TokenLogprobs, ...]:
        """Of the prompt's tokens that these rows lead to."""
        begin = self._begins[slot]
        if begin.score_from is None:
            return ()
        first, last = max(start, begin.score_from - 1), min(end, begin.num_prompt - 1)
        wanted = begin.sampling.prompt_logprobs
        return tuple(self._logprob(slot, begin.ids[position + 1], wanted) for position in range(first, last))

    def _logprob(self, slot: int, token: int, wanted: int | None) -> TokenLogprobs:
        logprob = self._replies[slot].logprob
        return TokenLogprobs(logprob, 1, (token,) if wanted else (), (logprob,) if wanted else ())

    def _wait(self, delays: list[tuple[float, int]]) -> None:
        start = self._clock()
        for seconds, slot in sorted(delays):
            if seconds > 0:
                number = self._begins[slot].processors
                self._clock.sleep_until(start + seconds, given_up=partial(self._is_over, number))

    def _is_over(self, number: int | None) -> bool:
        return self._given_up.is_set() or number not in self._table


class ScriptedModel:
    """What the engine thread runs."""

    supports_processors = False  # of the application, that is: replies travel in their place

    def __init__(self, limits: Limits, clock: VirtualClock | RealClock) -> None:
        self.processors = ReplyTable(clock)
        self.grammars: dict[str, Any] = {}
        self.runner = ScriptedRunner(self.processors, clock)
        self.limits = limits
        tokenizer: Any = ByteTokenizer()
        self.tokenizer = tokenizer
        self.formats: Any = ScriptedFormats(tokenizer, "{{ messages }}")
        self.chat_template: Any = PlainTemplate()
        self.sampling_defaults = Sampling(temperature=0.0)
        self.config = Config(max_context=limits.max_context)
        self.plan = make_plan(limits)

    def sleep(self, *, keep_weights: bool) -> None:
        """Forget every page."""
        self.runner.forget()

    def wake(self, is_cancelled: Callable[[], bool]) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """There is nothing to free."""
        self.runner.give_up()


class ScriptedOpener:
    """Gives an engine its scripted model."""

    def __init__(self, clock: VirtualClock | None, *, num_pages: int, load_error: Exception | None) -> None:
        self._clock = clock or RealClock()
        self._num_pages = num_pages
        self._load_error = load_error
        self.model: ScriptedModel | None = None

    def open(
        self,
        options: EngineOptions,
        on_progress: Callable[[LoadProgress], None] | None,
        is_cancelled: Callable[[], bool],
    ) -> Any:
        """Load."""
        if on_progress is not None:
            on_progress(LoadProgress(stage="weights", done=1, total=1))
        if self._load_error is not None:
            raise self._load_error
        self.model = ScriptedModel(self._limits(options), self._clock)
        return self.model

    def plan(self, options: EngineOptions) -> MemoryPlan:
        """Sizes of nothing."""
        return make_plan(self._limits(options))

    def _limits(self, options: EngineOptions) -> Limits:
        return Limits(
            num_pages=self._num_pages,
            page_size=PAGE_SIZE,
            max_running=options.max_running or 64,
            step_tokens=STEP_TOKENS,
            max_context=options.max_context or min(MAX_CONTEXT, self._num_pages * PAGE_SIZE),
            max_queued=options.max_queued,
            prefix_cache=options.prefix_cache,
        )


def make_plan(limits: Limits) -> MemoryPlan:
    """A memory plan with these limits."""
    return MemoryPlan(
        weights=0,
        cache=limits.num_pages * PAGE_BYTES,
        workspace=0,
        headroom=0,
        page_bytes=PAGE_BYTES,
        num_pages=limits.num_pages,
        max_context=limits.max_context,
        max_running=limits.max_running,
        backend="fake",
    )
