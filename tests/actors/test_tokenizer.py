"""The tokenizer's core and shell: what is encoded, what is refused, in which order the others hear of it."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from streamgen.actors.tokenizer import PromptEncoder, TokenizerActor
from streamgen.actors.workers import Workers
from streamgen.errors import InvalidRequest, PromptTooLong, TemplateError
from streamgen.messages import Admit, Cancel, Open, Refused, Submit
from streamgen.sampling import ResolvedSampling
from streamgen.text.chat import ChatTemplate
from tests.fakes import BOS, EOS, TEMPLATE, USER, FakeTokenizer

pytestmark = pytest.mark.anyio

HELLO = ({"role": "user", "content": "hi"},)


@pytest.fixture
def anyio_backend() -> str:
    """The engine thread runs asyncio."""
    return "asyncio"


def make_encoder(*, template: str | None = TEMPLATE, max_context: int = 32) -> PromptEncoder:
    tokenizer: Any = FakeTokenizer()
    chat = None if template is None else ChatTemplate(template, special_tokens={"bos_token": "<s>"})
    return PromptEncoder(tokenizer, chat, None, max_context=max_context)


def submit(request_id: int = 1, *, sampling: dict[str, Any] | None = None, **fields: Any) -> Submit:
    return Submit(request_id=request_id, sampling=ResolvedSampling(**(sampling or {})), **fields)


ENCODED: list[tuple[dict[str, Any], tuple[int, ...], int | None]] = [
    ({"text": "hi"}, (BOS, *b"hi"), None),
    ({"text": "<s>hi"}, (BOS, BOS, *b"hi"), None),  # the fake always adds; the real one looks first
    ({"ids": (1, 2)}, (1, 2), None),
    ({"chat": HELLO}, (USER, *b"hi"), None),
    ({"text": "hi", "sampling": {"prompt_logprobs": 2}}, (BOS, *b"hi"), 1),
    ({"text": "hi", "continuation": " you"}, (BOS, *b"hi you"), 3),
    ({"text": "hi", "continuation": (7, 8)}, (BOS, *b"hi", 7, 8), 3),
    ({"ids": (1, 2), "continuation": "a"}, (1, 2, 97), 2),
    ({"ids": (1, 2), "continuation": (3,)}, (1, 2, 3), 2),
    ({"chat": HELLO, "continuation": "!"}, (USER, *b"hi!"), 3),
]


@pytest.mark.parametrize(("fields", "ids", "score_from"), ENCODED)
def test_ids(fields: dict[str, Any], ids: tuple[int, ...], score_from: int | None) -> None:
    encoded = make_encoder().encode(submit(**fields))
    assert (encoded.ids, encoded.score_from) == (ids, score_from)


class Merging(FakeTokenizer):
    """ "th" is one token, so that a border between texts need not be one between tokens."""

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        ids = super().encode(text.replace("th", "\x02"), add_bos=add_bos, parse_special=parse_special)
        return ids


def test_a_continuation_that_merges_with_the_prompt() -> None:
    tokenizer: Any = Merging()
    encoder = PromptEncoder(tokenizer, None, None, max_context=32)
    encoded = encoder.encode(submit(text="at", continuation="he"))
    assert (encoded.ids, encoded.score_from) == ((BOS, *b"a\x02e"), 2)


def test_refusals() -> None:
    with pytest.raises(PromptTooLong) as caught:
        make_encoder().encode(submit(text="x" * 31))
    assert (caught.value.prompt_tokens, caught.value.max_context) == (32, 32)
    make_encoder().encode(submit(text="x" * 30))
    make_encoder().encode(submit(text="x" * 30, continuation="y"))
    with pytest.raises(PromptTooLong):
        make_encoder().encode(submit(text="x" * 30, continuation="yz"))
    with pytest.raises(TemplateError, match="no system messages"):
        make_encoder().encode(submit(chat=({"role": "system", "content": "refuse"},)))
    with pytest.raises(TemplateError, match="no chat template"):
        make_encoder(template=None).encode(submit(chat=HELLO))
    with pytest.raises(InvalidRequest, match="no tokens"):
        make_encoder(template="{{ '' }}").encode(submit(chat=HELLO))


class Shell:
    """A running tokenizer actor, and what it sent, in order."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.tokenizer = FakeTokenizer()
        tokenizer: Any = self.tokenizer
        self.workers = Workers(2, name="streamgen-test", loop=asyncio.get_running_loop())
        self.actor = TokenizerActor(
            PromptEncoder(tokenizer, None, None, max_context=32),
            self.workers,
            eos_ids=(EOS,),
            max_context=32,
            to_scheduler=self.take,
            to_compiler=self.take,
            to_detokenizer=self.take,
            capacity=100,
        )
        self.changed = anyio.Event()

    def take(self, message: Any) -> None:
        self.sent.append(message)
        self.changed.set()

    async def until(self, count: int) -> None:
        with anyio.fail_after(10):
            while len(self.sent) < count:
                self.changed = anyio.Event()
                await self.changed.wait()


@pytest.fixture
async def shell() -> Any:
    shell = Shell()
    async with anyio.create_task_group() as group:
        await group.start(shell.actor.run)
        yield shell
        group.cancel_scope.cancel()
    shell.tokenizer.may_encode.set()
    shell.workers.stop()


async def test_a_request_is_opened_and_then_admitted(shell: Shell) -> None:
    shell.actor.post(submit(text="hi", scope="s", tenant="t", priority=3, num_sequences=2))
    await shell.until(2)
    opened, admitted = shell.sent
    assert isinstance(opened, Open) and isinstance(admitted, Admit)
    assert opened.prompt_ids == admitted.prompt_ids == (BOS, *b"hi")
    assert opened.stop_ids == admitted.stop_ids == (EOS,)
    assert (admitted.scope, admitted.tenant, admitted.priority, admitted.num_sequences) == ("s", "t", 3, 2)
    assert admitted.max_tokens == 29, "what the context leaves"


async def test_max_tokens_and_stop_ids(shell: Shell) -> None:
    shell.actor.post(submit(1, ids=(1, 2), sampling={"max_tokens": 5, "stop_ids": (9,)}))
    shell.actor.post(submit(2, ids=(1, 2), sampling={"max_tokens": 500, "stop_ids": (9,), "ignore_eos": True}))
    shell.actor.post(submit(3, ids=(1, 2), continuation=(3,), sampling={"max_tokens": 5}))
    await shell.until(6)
    admitted = [m for m in shell.sent if isinstance(m, Admit)]
    assert [a.max_tokens for a in admitted] == [5, 30, 0]
    assert [a.stop_ids for a in admitted] == [(EOS, 9), (9,), (EOS,)]
    assert admitted[2].score_from == 2


async def test_a_refusal_carries_the_numbers(shell: Shell) -> None:
    shell.actor.post(submit(text="x" * 40))
    await shell.until(1)
    refused = shell.sent[0]
    assert isinstance(refused, Refused) and refused.code == "prompt_too_long"
    assert refused.details == {"prompt_tokens": 41, "max_context": 32}


async def test_a_cancel_that_finds_the_request_here_answers_at_once(shell: Shell) -> None:
    shell.tokenizer.may_encode.clear()
    shell.actor.post(submit(text="hi"))
    await anyio.to_thread.run_sync(shell.tokenizer.encoding.wait)
    shell.actor.post(Cancel(request_id=1, reason="deadline"))
    await shell.until(1)
    assert shell.sent == [Refused(request_id=1, code="deadline")]
    shell.tokenizer.may_encode.set()
    shell.actor.post(submit(2, text="hi"))
    await shell.until(3)
    assert [m.request_id for m in shell.sent] == [1, 2, 2], "the thread's late answer is dropped"


async def test_a_later_cancel_goes_on_to_the_scheduler(shell: Shell) -> None:
    shell.actor.post(submit(ids=(1,)))
    shell.actor.post(Cancel(request_id=1))
    await shell.until(3)
    assert [type(m).__name__ for m in shell.sent] == ["Open", "Admit", "Cancel"]


async def test_one_broken_prompt_is_its_own_affair(shell: Shell) -> None:
    shell.actor.post(submit(1, text="a\x00"))
    await shell.until(1)
    assert (shell.sent[0].code, shell.sent[0].message) == ("error", "encoding failed: RuntimeError")
    shell.actor.post(submit(2, text="a"))
    await shell.until(3)
