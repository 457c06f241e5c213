"""Tokenizer actor: turns a request's prompt into ids, in worker threads, and lets the request into the engine.

A request is here from `Submit` until its ids are known and its grammar, if it has one, is compiled; then it is opened
at the detokenizer and admitted to the scheduler, in this order. A `Cancel` that finds it here ends it at once; the
thread's result is dropped when it comes.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

from msgspec import Struct

from streamgen.actors.actor import Actor
from streamgen.actors.compiler import Compile, CompiledGrammar
from streamgen.errors import InvalidRequest, PromptTooLong, StreamgenError, TemplateError
from streamgen.grammar.source import GrammarSource  # noqa: TC001  # a field of a Struct
from streamgen.messages import (
    Admit,
    Cancel,
    DetokenizerInbox,
    GrammarUse,
    Open,
    OutputParts,
    Refused,
    SchedulerInbox,
    Submit,
    TokenizerInbox,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamgen.actors.world import RunsCalls
    from streamgen.text.chat import ChatTemplate, ChatTemplates
    from streamgen.text.parts import OutputFormats
    from streamgen.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Encoded(Struct, frozen=True, kw_only=True):
    """A worker thread's answer. `ids` is prompt and continuation; the continuation begins at `score_from`.

    parts   what may be told apart in the output
    source  what the output has to obey, and `use` how: fields of a `GrammarUse` but its key
    """

    request_id: int
    ids: tuple[int, ...] = ()
    score_from: int | None = None
    parts: OutputParts | None = None
    source: GrammarSource | None = None
    use: dict[str, Any] = {}
    error: BaseException | None = None


class Prepared(Struct, frozen=True, kw_only=True):
    """The compiler's answer: the grammar of a request stands in the model's table, or what is wrong with it."""

    request_id: int
    key: str
    error: StreamgenError | None = None


class PromptEncoder:
    """Prompt -> ids. Called from several threads: it only reads.

    formats   how the model marks reasoning and calls; None: its outputs are text, and obey nothing
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | ChatTemplates | None,
        formats: OutputFormats | None,
        *,
        max_context: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._formats = formats
        self._max_context = max_context

    def encode(self, submit: Submit) -> Encoded:
        """The ids that run.

        Raises:
            PromptTooLong: they leave no room for an answer.
            TemplateError: the template refused the chat, or there is none.
            InvalidRequest: nothing is left of the prompt.
        """
        if submit.continuation is not None:
            ids, score_from = self._encode_scored(submit, submit.continuation)
        else:
            ids, score_from = self._encode_prompt(submit), None
            if submit.sampling.prompt_logprobs is not None:
                score_from = 1
        if not ids:
            raise InvalidRequest("prompt: it has no tokens", param="prompt")
        self._check_length(len(ids), scores_only=submit.continuation is not None)
        if submit.continuation is not None or self._formats is None:
            return Encoded(request_id=submit.request_id, ids=ids, score_from=score_from)
        parts = self._formats.parts(ids, submit.tools, submit.tool_choice)
        source, use = self._formats.grammar_use(submit.output, submit.tools, submit.tool_choice, parts)
        return Encoded(
            request_id=submit.request_id, ids=ids, score_from=score_from, parts=parts, source=source, use=use
        )

    def render(self, chat: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The chat as the model sees it."""
        if self._template is None:
            raise TemplateError(
                "the checkpoint has no chat template: pass text or ids, or open the engine with chat_template="
            )
        return self._template.render(chat, **arguments)

    def encode_text(self, text: str, *, add_bos: bool) -> tuple[int, ...]:
        """Special tokens in the text are parsed; BOS is added where the checkpoint wants it and `add_bos`."""
        return tuple(self._tokenizer.encode(text, add_bos=None if add_bos else False))

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """A rendered chat: the template writes BOS itself."""
        return self.encode_text(text, add_bos=False)

    def _encode_prompt(self, submit: Submit) -> tuple[int, ...]:
        if submit.ids is not None:
            return submit.ids
        if submit.text is not None:
            return self.encode_text(submit.text, add_bos=True)
        if self._formats is None:
            return self._encode_chat(submit.chat or (), submit.known)
        chat, arguments = self._formats.prepare_chat(submit.chat or (), submit.tools, submit.tool_choice)
        return self._encode_chat(chat, submit.known, **arguments)

    def _encode_chat(
        self, chat: Sequence[Mapping[str, Any]], known: tuple[int, ...], **arguments: Any
    ) -> tuple[int, ...]:
        """A chat that goes on from a turn whose ids are known keeps them, so that their pages are found again.

        Encoding the whole text anew could split what the model wrote into other tokens than those it wrote.
        """
        text = self.render(chat, **arguments)
        if known:
            said = self._decode(known)
            if text.startswith(said):
                ids = known + self.encode_rendered(text[len(said) :])
                # Some tokenizers put a space in front of every text, also of a rest.
                if self._decode(ids) == text:
                    return ids
        return self.encode_rendered(text)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(ids, skip_special=False, at_start=True)

    def _encode_scored(self, submit: Submit, continuation: str | tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Prompt with continuation, and where the continuation begins.

        Text continues text: both are encoded as one, since a border between tokens need not be one between the texts.
        The first token that differs from the prompt alone is the first of the continuation.
        """
        prompt = self._encode_prompt(submit)
        if not isinstance(continuation, str):
            return prompt + continuation, len(prompt)
        if submit.ids is not None:
            return prompt + self.encode_text(continuation, add_bos=False), len(prompt)
        if submit.text is not None:
            whole = self.encode_text(submit.text + continuation, add_bos=True)
        else:
            whole = self.encode_rendered(self.render(submit.chat or ()) + continuation)
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return whole, min(same, len(whole) - 1)

    def _check_length(self, num_ids: int, *, scores_only: bool) -> None:
        most = self._max_context if scores_only else self._max_context - 1
        if num_ids > most:
            raise PromptTooLong(
                f"prompt: expected <= {most} tokens (max_context {self._max_context}), got {num_ids}",
                prompt_tokens=num_ids,
                max_context=self._max_context,
            )


class TokenizerActor(Actor[TokenizerInbox | Encoded | Prepared]):
    """Owns the requests whose ids are not known yet, or whose grammar is not."""

    name = "tokenizer"

    def __init__(
        self,
        encoder: PromptEncoder,
        workers: RunsCalls,
        *,
        eos_ids: tuple[int, ...],
        max_context: int,
        to_scheduler: Callable[[SchedulerInbox], None],
        to_detokenizer: Callable[[DetokenizerInbox], None],
        to_compiler: Callable[[Compile | Cancel], None],
        capacity: int,
    ) -> None:
        super().__init__(capacity=capacity)
        self._encoder = encoder
        self._workers = workers
        self._eos_ids = eos_ids
        self._max_context = max_context
        self._to_scheduler = to_scheduler
        self._to_detokenizer = to_detokenizer
        self._to_compiler = to_compiler
        self._encoding: dict[int, Submit] = {}
        self._compiling: dict[int, Encoded] = {}  # those of them whose ids are known

    def handle(self, message: TokenizerInbox | Encoded | Prepared) -> None:
        """Begin, give up or let in a request."""
        match message:
            case Submit():
                self._begin(message)
            case Cancel():
                self._cancel(message)
            case Encoded():
                self._go_on(message)
            case Prepared():
                self._prepared(message)
            case _:
                assert_never(message)

    def _begin(self, submit: Submit) -> None:
        self._encoding[submit.request_id] = submit
        if submit.ids is not None and not isinstance(submit.continuation, str):
            self._go_on(_try_encode(self._encoder, submit))  # nothing to tokenize: no thread
        else:
            self._workers.submit(partial(_try_encode, self._encoder, submit), self._encoded)

    def _encoded(self, encoded: Encoded | None, error: BaseException | None) -> None:
        assert encoded is not None, f"encoding reports its own errors, got {error!r}"
        self.post(encoded)

    def _cancel(self, cancel: Cancel) -> None:
        if self._encoding.pop(cancel.request_id, None) is None:
            self._to_scheduler(cancel)
            return
        if self._compiling.pop(cancel.request_id, None) is not None:
            self._to_compiler(cancel)
        self._to_detokenizer(Refused(request_id=cancel.request_id, code=cancel.reason, message=cancel.message))

    def _go_on(self, encoded: Encoded) -> None:
        submit = self._encoding.get(encoded.request_id)
        if submit is None:
            return  # cancelled meanwhile
        if encoded.error is not None:
            self._refuse(encoded.request_id, encoded.error)
        elif encoded.source is None:
            self._admit(submit, encoded, None)
        else:
            self._compiling[encoded.request_id] = encoded
            self._to_compiler(
                Compile(
                    source=encoded.source,
                    request_id=encoded.request_id,
                    answer=partial(self._compiled, encoded.request_id),
                )
            )

    def _compiled(
        self, request_id: int, key: str, grammar: CompiledGrammar | None, error: StreamgenError | None
    ) -> None:
        self.post(Prepared(request_id=request_id, key=key, error=error))

    def _prepared(self, prepared: Prepared) -> None:
        encoded = self._compiling.pop(prepared.request_id, None)
        if encoded is None:
            return  # cancelled meanwhile
        if prepared.error is not None:
            self._refuse(prepared.request_id, prepared.error)
        else:
            submit = self._encoding[prepared.request_id]
            self._admit(submit, encoded, GrammarUse(key=prepared.key, **encoded.use))

    def _refuse(self, request_id: int, error: BaseException) -> None:
        del self._encoding[request_id]
        self._to_detokenizer(_refuse(request_id, error))

    def _admit(self, submit: Submit, encoded: Encoded, grammar: GrammarUse | None) -> None:
        del self._encoding[submit.request_id]
        sampling = submit.sampling
        # A grammar says where an output may end, whatever else was asked for.
        ignores_eos = sampling.ignore_eos and grammar is None
        stop_ids = sampling.stop_ids if ignores_eos else (*self._eos_ids, *sampling.stop_ids)
        self._to_detokenizer(
            Open(
                request_id=submit.request_id,
                prompt_ids=encoded.ids,
                sampling=sampling,
                stop_ids=stop_ids,
                score_from=encoded.score_from,
                num_sequences=submit.num_sequences,
                on_slow=submit.on_slow,
                parts=encoded.parts,
            )
        )
        self._to_scheduler(
            Admit(
                request_id=submit.request_id,
                prompt_ids=encoded.ids,
                sampling=sampling,
                max_tokens=self._max_tokens(submit, len(encoded.ids)),
                stop_ids=stop_ids,
                score_from=encoded.score_from,
                num_sequences=submit.num_sequences,
                scope=submit.scope,
                tenant=submit.tenant,
                priority=submit.priority,
                arrival=submit.arrival,
                deadline=None if submit.timeout is None else submit.arrival + submit.timeout,
                pin=submit.pin,
                has_processors=submit.has_processors,
                grammar=grammar,
            )
        )

    def _max_tokens(self, submit: Submit, num_ids: int) -> int:
        if submit.continuation is not None:
            return 0
        room = self._max_context - num_ids
        return room if submit.sampling.max_tokens is None else min(room, submit.sampling.max_tokens)


_DETAILS = ("prompt_tokens", "max_context", "param", "pointer", "keyword", "bound")  # attributes of errors


def _try_encode(encoder: PromptEncoder, submit: Submit) -> Encoded:
    try:
        return encoder.encode(submit)
    except Exception as e:  # one request's error, whatever it is, ends that request alone
        return Encoded(request_id=submit.request_id, error=e)


def _refuse(request_id: int, error: BaseException) -> Refused:
    if not isinstance(error, StreamgenError):
        logger.debug("a prompt could not be encoded", exc_info=error)
        return Refused(request_id=request_id, code="error", message=f"encoding failed: {type(error).__name__}")
    details = {k: v for k, v in vars(error).items() if k in _DETAILS and v is not None}
    return Refused(request_id=request_id, code=error.code, message=error.message, details=details)
