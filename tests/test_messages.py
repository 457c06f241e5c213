"""Every message through encode and decode, so that any of them may cross a process border."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import msgspec
import pytest

from streamgen import messages
from streamgen.messages import (
    Admit,
    Advance,
    Begin,
    Cancel,
    DetokenizerInbox,
    ExecutorInbox,
    Fault,
    Message,
    Open,
    Pause,
    Progress,
    Refused,
    Resume,
    SchedulerInbox,
    StepDone,
    StepFailed,
    StepPlan,
    StopFound,
    Submit,
    TokenizerInbox,
    TokenLogprobs,
    Unpin,
)
from streamgen.sampling import ResolvedSampling

SAMPLING = ResolvedSampling(
    max_tokens=7, temperature=0.3, logit_bias={5: -1.5}, stop=("a", "bé"), stop_ids=(9,), seed=2**63
)
LOGPROBS = TokenLogprobs(-0.25, 3, (1, 2), (-0.1, -0.2))
BEGIN = Begin(
    slot=3,
    ids=(1, 2, 3),
    num_prompt=2,
    sampling=SAMPLING,
    pages=(4, 5),
    stop_ids=(9,),
    min_length=5,
    sample_index=1,
    score_from=1,
)
EXAMPLES: list[Message] = [
    Submit(request_id=1, sampling=SAMPLING, text="héllo", tenant="t", scope="t", priority=-2, timeout=1.5),
    Submit(request_id=1, sampling=SAMPLING, ids=(1, 2), num_sequences=4, continuation=(3,)),
    Submit(request_id=1, sampling=SAMPLING, chat=({"role": "user", "content": "x"},), continuation="y"),
    Cancel(request_id=1, reason="deadline"),
    Admit(request_id=1, prompt_ids=(1, 2), sampling=SAMPLING, max_tokens=5, stop_ids=(0,), score_from=1, scope="s"),
    Open(request_id=1, prompt_ids=(1, 2), sampling=SAMPLING, stop_ids=(0,)),
    Refused(request_id=1, code="prompt_too_long", message="m", details={"a": 1, "b": "x", "c": None, "d": 0.5}),
    BEGIN,
    StepPlan(
        step=9,
        begins=(BEGIN,),
        copies=((1, 2),),
        slots=(3, 4),
        starts=(0, 7),
        counts=(2, 1),
        samples=(1, 0),
        pages=((1,), ()),
        drafts=((), (5, 6)),
    ),
    StepDone(step=9, tokens=((1,), ()), logprobs=((LOGPROBS,), ()), scores=((), (LOGPROBS,)), seconds=0.01),
    StepDone(step=9, tokens=((-1,),), faults=(Fault(0, "processor_error", "it raised"),)),
    StepFailed(step=9, message="no", kind="lost"),
    Pause(request_id=1, index=2),
    Resume(request_id=1),
    Unpin(key="session:1"),
    Advance(
        entries=(
            Progress(request_id=1, ids=(1,), logprobs=(LOGPROBS,), cached_tokens=0),
            Progress(request_id=1, index=2, scores=(LOGPROBS,), finish="error", message="m"),
        )
    ),
    StopFound(request_id=1, index=2),
]
INBOXES: dict[str, Any] = {
    "tokenizer": TokenizerInbox,
    "scheduler": SchedulerInbox,
    "executor": ExecutorInbox,
    "detokenizer": DetokenizerInbox,
}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Message) -> None:
    for codec in (msgspec.msgpack, msgspec.json):
        assert codec.decode(codec.encode(message), type=type(message)) == message


def test_every_message_has_an_example() -> None:
    kinds = {v for v in vars(messages).values() if inspect.isclass(v) and issubclass(v, Message) and v is not Message}
    assert kinds == {type(message) for message in EXAMPLES}


@pytest.mark.parametrize("inbox", INBOXES)
def test_an_inbox_decodes_each_of_its_kinds_by_tag(inbox: str) -> None:
    kinds = get_args(INBOXES[inbox]) or (INBOXES[inbox],)
    decoder = msgspec.msgpack.Decoder(INBOXES[inbox])
    examples = [message for message in EXAMPLES if isinstance(message, kinds)]
    assert {type(message) for message in examples} == {*kinds}
    for message in examples:
        assert decoder.decode(msgspec.msgpack.encode(message)) == message


def test_an_inbox_refuses_what_is_not_its_own() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(Refused(request_id=1, code="x")), type=SchedulerInbox)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(b"\x81\xa4type\xa6Cancel", type=TokenizerInbox)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_messages_are_frozen_and_keyword_only(message: Message) -> None:
    field = type(message).__struct_fields__[0]
    with pytest.raises(AttributeError):
        setattr(message, field, 0)
    with pytest.raises(TypeError):
        type(message)(1)
