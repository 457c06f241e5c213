"""An engine without weights: the real actors, scheduler and text parts over a runner that answers with hashes.

The runner keeps every token in the pages that the scheduler names, and draws its answers from what it reads back
through the page table. So a wrong page, a stale prefix or a bad border between chunks changes what comes out.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamgen.config import EngineOptions, LoadProgress, MemoryPlan
from streamgen.errors import LoadError
from streamgen.faults import DeviceDead
from streamgen.messages import Begin, StepDone, StepPlan, TokenLogprobs
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.sampling import Sampling
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.sequence import count_agreeing
from streamgen.text.chat import ChatTemplate

BOS, EOS, USER = 256, 257, 258
VOCAB_SIZE = 259
SPECIALS = {BOS: "<s>", EOS: "</s>", USER: "<|user|>"}
PAGE = 16
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'refuse' %}"
    "{{ raise_exception('no system messages') }}{% endif %}<|user|>{{ m.content }}{% endfor %}"
)

NextToken = Callable[[tuple[int, ...], int], int]
"""(ids so far, how many of them are the prompt) -> the next token."""


def hash_token(ids: tuple[int, ...], num_prompt: int) -> int:
    """A lower-case letter that depends on every id before it."""
    return 97 + zlib.crc32(repr(ids).encode()) % 26


def expected_text(prompt: Iterable[int], count: int) -> str:
    """What `hash_token` continues a prompt with."""
    ids = list(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(hash_token(tuple(ids), start))
    return bytes(ids[start:]).decode()


def say(text: str | bytes, *, then: int = EOS) -> NextToken:
    """Draw this text's bytes, then one id for ever."""
    data = text.encode() if isinstance(text, str) else text

    def draw(ids: tuple[int, ...], num_prompt: int) -> int:
        index = len(ids) - num_prompt
        return data[index] if index < len(data) else then

    return draw


class FakeTokenizer:
    """One id per byte, and three special tokens."""

    vocab_size = VOCAB_SIZE
    bos_id = BOS
    eos_ids = (EOS,)
    add_bos = True
    drops_leading_space = False
    special_ids = frozenset(SPECIALS)

    def __init__(self) -> None:
        self.may_encode = threading.Event()
        self.may_encode.set()
        self.encoding = threading.Event()  # set once somebody encodes

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Ids of a text; waits while the gate is shut."""
        self.encoding.set()
        assert self.may_encode.wait(30), "the test left the tokenizer's gate shut"
        if "\x00" in text:
            raise RuntimeError("the fake tokenizer breaks at NUL")
        ids = list(self._split(text))
        wants_bos = self.add_bos if add_bos is None else add_bos
        return [BOS, *ids] if wants_bos else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool) -> str:
        """The text of ids."""
        table = self.byte_table(skip_special=skip_special)
        return b"".join(table[i] for i in ids).decode("utf-8", "replace")

    def byte_table(self, *, skip_special: bool) -> Mapping[int, bytes]:
        """Id -> bytes."""
        table = {i: bytes([i]) for i in range(256)}
        table.update({i: b"" if skip_special else text.encode() for i, text in SPECIALS.items()})
        return table

    def token_text(self, token_id: int) -> str:
        """The token as text to show."""
        return SPECIALS.get(token_id) or bytes([token_id]).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of texts."""
        return token_id in SPECIALS

    def _split(self, text: str) -> Iterable[int]:
        while text:
            for token, literal in SPECIALS.items():
                if text.startswith(literal):
                    yield token
                    text = text[len(literal) :]
                    break
            else:
                yield from text[0].encode()
                text = text[1:]


class FakeRunner:
    """Runs plans on pages of ids. `gate` holds the device before a step; `fail_at` breaks it at a step number."""

    def __init__(self, draw: NextToken = hash_token, *, fail_at: int | None = None) -> None:
        self.draw = draw
        self.fail_at = fail_at
        self.gate = threading.Semaphore(0)
        self.is_gated = False
        self.stepping = threading.Event()  # set once a step has been asked for
        self.num_steps = 0
        self.closed = 0
        self.max_sequences = 0
        self.begun: list[Begin] = []
        self._pages: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}
        self._tokens: dict[int, dict[int, int]] = {}
        self._begins: dict[int, Begin] = {}

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """One step."""
        if wake_fd is not None:
            os.write(wake_fd, b"\0")
        self.stepping.set()
        if self.is_gated:
            assert self.gate.acquire(timeout=30), "the test left the device's gate shut"
        if plan.step == self.fail_at:
            raise DeviceDead("the device is on fire")
        self.num_steps += 1
        self.max_sequences = max(self.max_sequences, len(plan.slots))
        self._take(plan)
        rows = [self._run(plan, i) for i in range(len(plan.slots))]
        return StepDone(
            step=plan.step,
            tokens=tuple(tokens for tokens, _, _ in rows),
            logprobs=tuple(logprobs for _, logprobs, _ in rows),
            scores=tuple(scores for _, _, scores in rows),
            seconds=1e-6,
        )

    def close(self) -> None:
        """Count closings."""
        self.closed += 1

    def forget(self) -> None:
        """What a device does that gives its memory back."""
        for state in (self._pages, self._tables, self._tokens, self._begins):
            state.clear()

    def release(self, steps: int = 1) -> None:
        """Let so many steps through."""
        self.gate.release(steps)

    def open_gate(self) -> None:
        """Let every step through from now on."""
        self.is_gated = False
        self.gate.release(1000)

    def _take(self, plan: StepPlan) -> None:
        for source, target in plan.copies:
            self._pages[target] = list(self._pages[source])
        self.begun += plan.begins
        for begin in plan.begins:
            self._begins[begin.slot] = begin
            self._tables[begin.slot] = list(begin.pages)
            self._tokens[begin.slot] = dict(enumerate(begin.ids))
        for i, (slot, start, pages) in enumerate(zip(plan.slots, plan.starts, plan.pages, strict=True)):
            self._tables[slot].extend(pages)
            for offset, token in enumerate(plan.drafts[i] if plan.drafts else ()):
                self._tokens[slot][start + 1 + offset] = token

    def _run(
        self, plan: StepPlan, i: int
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
        slot, start, count, samples = plan.slots[i], plan.starts[i], plan.counts[i], plan.samples[i]
        begin = self._begins[slot]
        drawn: list[int] = []
        scores: list[TokenLogprobs] = []
        for position in range(start, start + count):
            self._store(slot, position, self._tokens[slot][position])
            if begin.score_from is not None and begin.score_from - 1 <= position < begin.num_prompt - 1:
                scores.append(_score(self._tokens[slot][position + 1]))
            if position >= start + count - samples:
                drawn.append(self._draw(slot, position))
        if samples:
            drafts = plan.drafts[i][1 - samples :] if samples > 1 else ()
            kept = count_agreeing(drafts, tuple(drawn))
            self._tokens[slot].setdefault(start + count, 0)  # a plan under way may go on behind all drafts
            self._tokens[slot][start + count - samples + 1 + kept] = drawn[kept]
        wants_logprobs = begin.sampling.logprobs is not None
        return tuple(drawn), tuple(_score(t) for t in drawn) if wants_logprobs else (), tuple(scores)

    def _draw(self, slot: int, position: int) -> int:
        ids = self._read(slot, position)
        begin = self._begins[slot]
        if begin.sampling.temperature > 0 and begin.sample_index:
            ids = (begin.sample_index, *ids[1:])  # another continuation draws other tokens
        return self.draw(ids, begin.num_prompt)

    def _store(self, slot: int, position: int, token: int) -> None:
        page = self._pages.setdefault(self._tables[slot][position // PAGE], [-1] * PAGE)
        page[position % PAGE] = token

    def _read(self, slot: int, position: int) -> tuple[int, ...]:
        table = self._tables[slot]
        return tuple(self._pages[table[p // PAGE]][p % PAGE] for p in range(position + 1))


def _score(token: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-token / 100, rank=1, top_ids=(token,), top_logprobs=(-token / 100,))


class PlainFormats:
    """Outputs are text, and obey what was asked for."""

    def parts(self, *arguments: object) -> None:
        """Nothing is told apart."""

    def prepare_chat(self, chat: Any, *arguments: object) -> tuple[Any, dict[str, Any]]:
        """As it is."""
        return chat, {}

    def grammar_use(self, output: Any, *arguments: object) -> tuple[Any, dict[str, Any]]:
        """The grammar, from the first token on."""
        return output, {}


class FakeModel:
    """What `open_model` returns, over a `FakeRunner`."""

    def __init__(self, runner: FakeRunner, limits: Limits, template: str | None) -> None:
        self.runner = runner
        self.limits = limits
        self.tokenizer: Any = FakeTokenizer()
        self.chat_template = None if template is None else ChatTemplate(template, special_tokens={"bos_token": "<s>"})
        self.sampling_defaults = Sampling(temperature=0.5)
        self.plan = fake_plan(limits)
        self.config = ModelConfig(
            family="fake",
            architecture="FakeForCausalLM",
            hidden_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=8,
            vocab_size=VOCAB_SIZE,
            norm_eps=1e-5,
            max_context=limits.max_context,
            rope=RopeConfig(rotary_dim=8),
        )
        self.num_closed = 0
        self.supports_processors = True
        self.processors: dict[int, tuple[Callable[..., object], ...]] = {}
        self.grammars: dict[str, Any] = {}
        self.formats: Any = PlainFormats()
        self.sleeps: list[str] = []
        self.may_wake = threading.Event()
        self.may_wake.set()

    def sleep(self, *, keep_weights: bool) -> None:
        """Forget every page."""
        self.sleeps.append("keep" if keep_weights else "drop")
        self.runner.forget()

    def wake(self, is_cancelled: Callable[[], bool]) -> None:
        """Be there again, once the gate is open."""
        while not self.may_wake.wait(0.001):
            if is_cancelled():
                raise LoadError("given up")
        self.sleeps.append("wake")

    def close(self) -> None:
        """Close the runner."""
        self.num_closed += 1
        self.runner.close()


def fake_plan(limits: Limits) -> MemoryPlan:
    """A memory plan with these limits."""
    return MemoryPlan(
        weights=1000,
        cache=limits.num_pages * 64,
        workspace=10,
        headroom=10_000,
        page_bytes=64,
        num_pages=limits.num_pages,
        max_context=limits.max_context,
        max_running=limits.max_running,
    )


class FakeOpener:
    """Gives an engine its fake model. `load_gate` holds loading, which polls for being given up meanwhile."""

    def __init__(
        self,
        draw: NextToken = hash_token,
        *,
        fail_at: int | None = None,
        num_pages: int = 256,
        max_running: int = 8,
        max_context: int = 512,
        template: str | None = TEMPLATE,
        error: Exception | None = None,
    ) -> None:
        self.runner = FakeRunner(draw, fail_at=fail_at)
        self.load_gate = threading.Event()
        self.load_gate.set()
        self.loading = threading.Event()
        self.was_given_up = False
        self.models: list[FakeModel] = []
        self._error = error
        self._template = template
        self._limits = {"num_pages": num_pages, "max_running": max_running, "max_context": max_context}

    @property
    def model(self) -> FakeModel:
        """The model opened last."""
        return self.models[-1]

    def open(
        self,
        options: EngineOptions,
        on_progress: Callable[[LoadProgress], None] | None,
        is_cancelled: Callable[[], bool],
    ) -> Any:
        """Load."""
        self.loading.set()
        if on_progress is not None:
            on_progress(LoadProgress(stage="weights", done=500, total=1000))
        while not self.load_gate.wait(0.001):
            if is_cancelled():
                self.was_given_up = True
                raise LoadError("given up")
        if self._error is not None:
            raise self._error
        self.models.append(FakeModel(self.runner, self._make_limits(options), self._template))
        return self.model

    def plan(self, options: EngineOptions) -> MemoryPlan:
        """Headers only."""
        return fake_plan(self._make_limits(options))

    def _make_limits(self, options: EngineOptions) -> Limits:
        limits = dict(self._limits)
        if options.max_running is not None:
            limits["max_running"] = options.max_running
        if options.max_context is not None:
            limits["max_context"] = options.max_context
        return Limits(
            page_size=PAGE,
            step_tokens=64,
            max_queued=options.max_queued,
            prefix_cache=options.prefix_cache,
            **limits,
        )


def threads_of_engines() -> Sequence[str]:
    """Names of the threads that engines have running."""
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("streamgen"))
