"""The parts of an output: reasoning, answer and calls of tools, told apart token by token.

`OutputFormats` is made once for a model and knows how its template writes them. It says what may come in the output of
a request (`parts`), what a grammar has to do with it (`grammar_use`), and makes the decoder of a sequence (`split`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from streamgen.completion import Part, Reasoning, Text, ToolCall, ToolDelta
from streamgen.errors import InvalidRequest, NotSupported
from streamgen.messages import OutputParts
from streamgen.text.calls.formats import CallTokens
from streamgen.text.calls.parser import CallArguments, CallEnd, CallStart
from streamgen.text.calls.plain import PlainCalls, describe_plainly
from streamgen.text.calls.registry import find_format, takes_tools
from streamgen.text.reasoning import ReasoningSplitter, find_reasoning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamgen.grammar.source import GrammarSource
    from streamgen.text.calls.formats import CallFormat, Definition
    from streamgen.text.calls.parser import CallParser, Piece
    from streamgen.text.decoder import TextDecoder
    from streamgen.text.stops import StopMatcher
    from streamgen.text.tokenizer import Tokenizer

_PROMPT_END = 16  # ids of a prompt that tell whether it has opened the reasoning


def describe_tools(tools: Sequence[Definition]) -> list[dict[str, Any]]:
    """Tools as a chat template gets them: what `strict` says is not the model's business."""
    return [{**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}} for tool in tools]


class OutputFormats:
    """What may be told apart in a model's outputs. Safe to share between threads.

    template   the source of the chat template; where there are several by name, "tool_use" is the one for tools
    """

    def __init__(self, tokenizer: Tokenizer, template: str | Mapping[str, str] | None) -> None:
        self._tokenizer = tokenizer
        default, for_tools = _sources(template)
        self._has_template = bool(for_tools)
        self._takes_tools = takes_tools(for_tools)
        self.reasoning = find_reasoning(default, lambda text: tokenizer.token_id(text))
        self.calls: CallFormat | None = None
        if self._takes_tools:
            self.calls = find_format(for_tools, _call_tokens(tokenizer))
        elif self._has_template:
            self.calls = PlainCalls(_call_tokens(tokenizer))

    def prepare_chat(
        self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Definition], choice: str
    ) -> tuple[Sequence[Mapping[str, Any]], dict[str, Any]]:
        """(the chat as the template can take it, the template's arguments)."""
        given = tools if choice != "none" else ()
        if isinstance(self.calls, PlainCalls):
            return describe_plainly(chat, given), {}
        return chat, {"tools": describe_tools(given)} if given else {}

    def parts(
        self, prompt_ids: Sequence[int], tools: Sequence[Definition] = (), choice: str = "auto"
    ) -> OutputParts | None:
        """What the output of a request may hold beside text; None if nothing.

        Raises:
            NotSupported: the model cannot be given tools.
        """
        calls = bool(tools) and choice != "none"
        if calls and self.calls is None:
            raise self._no_calls()
        end = self._prompt_end(prompt_ids) if self.reasoning is not None else ""
        reasoning = self.reasoning is not None and not self.reasoning.has_closed(end)
        if not calls and not reasoning:
            return None
        is_open = self.reasoning is not None and self.reasoning.has_opened(end)
        return OutputParts(reasoning=reasoning, is_reasoning=is_open, calls=calls)

    def grammar_use(
        self,
        output: GrammarSource | None,
        tools: Sequence[Definition] = (),
        choice: str = "auto",
        parts: OutputParts | None = None,
    ) -> tuple[GrammarSource | None, dict[str, Any]]:
        """(what the output has to obey, the fields of its `GrammarUse` but the key).

        parts   what `parts` has said of the request

        Raises:
            InvalidRequest: output and tools at once.
            NotSupported: what is asked for cannot be enforced in the format of this model.
        """
        if not tools or choice == "none":
            return (None, {}) if output is None else (output, self._after_reasoning(parts))
        if output is not None:
            raise InvalidRequest(
                'output: expected either output or tools, got both; with tool_choice="none" the model sees no tools, '
                "and answers as output says",
                param="output",
            )
        return self._grammar_of_calls(tools, choice, parts)

    def split(
        self,
        parts: OutputParts,
        *,
        decoder: TextDecoder,
        stops: StopMatcher | None,
        name_call: Callable[[int], str],
    ) -> PartsDecoder:
        """The decoder of one sequence.

        decoder     makes text of ids
        stops       looks for stop strings in the answer; they stand for nothing in reasoning and calls
        name_call   the id of a call by its index
        """
        reasoning = None
        if parts.reasoning and self.reasoning is not None:
            reasoning = ReasoningSplitter(self.reasoning, is_open=parts.is_reasoning)
        calls = self.calls.parser() if parts.calls and self.calls is not None else None
        answer = _Answer(calls, stops, name_call)
        visible = self._tokenizer.byte_table(skip_special=True)
        return PartsDecoder(decoder, reasoning, answer, token_text=lambda i: visible[i].decode("utf-8", "replace"))

    def _prompt_end(self, prompt_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(prompt_ids[-_PROMPT_END:], skip_special=False, at_start=False)

    def _after_reasoning(self, parts: OutputParts | None) -> dict[str, Any]:
        """When the grammar of a request without tools begins."""
        if parts is None or not parts.reasoning or self.reasoning is None:
            return {}
        begin, end = self.reasoning.begin_id, self.reasoning.end_id
        if begin is None or end is None:
            if not parts.is_reasoning:
                return {}  # it holds from the first token, and there is no reasoning
            raise NotSupported(
                f"output: this model's prompt opens its reasoning, and {self.reasoning.end} is no token after which "
                "the grammar could begin; turn the reasoning off in the prompt",
                param="output",
            )
        return {"begins_after": (end,)} if parts.is_reasoning else {"begins_after": (end,), "opens_with": (begin,)}

    def _grammar_of_calls(
        self, tools: Sequence[Definition], choice: str, parts: OutputParts | None
    ) -> tuple[GrammarSource | None, dict[str, Any]]:
        if self.calls is None:
            raise self._no_calls()
        if choice != "auto" and parts is not None and parts.is_reasoning:
            source = self.calls.grammar_after_reasoning(tools, choice)
            return source, self._after_reasoning(parts)
        grammar = self.calls.grammar(tools, choice)
        if grammar is None:
            return None, {}
        use = {
            "begins_after": grammar.begins_after,
            "is_forced": grammar.is_forced,
            "repeats": grammar.repeats,
        }
        return grammar.source, use

    def _no_calls(self) -> NotSupported:
        if not self._has_template:
            why = "this model has no chat template, which would describe them"
        else:
            why = "this model's chat template has calls written in a way that is not known here"
        return NotSupported(f"tools: {why}", param="tools")


class Decoded(Struct, frozen=True):
    """What some tokens brought.

    parts          in order
    num_used       how many of the tokens belong to the output
    stop           the stop string that is complete
    num_reasoning  tokens that were reasoning
    """

    parts: tuple[Part, ...]
    num_used: int
    stop: str | None = None
    num_reasoning: int = 0


class PartsDecoder:
    """Makes parts of one sequence's ids. Owned by whoever feeds it.

    token_text   what a token adds to a text
    """

    def __init__(
        self,
        decoder: TextDecoder,
        reasoning: ReasoningSplitter | None,
        answer: _Answer,
        *,
        token_text: Callable[[int], str],
    ) -> None:
        self._decoder = decoder
        self._reasoning = reasoning
        self._answer = answer
        self._token_text = token_text
        self._marks_reasoning = reasoning.markers if reasoning is not None else frozenset[int]()
        self._markers = self._marks_reasoning | answer.markers

    @property
    def has_calls(self) -> bool:
        """Whether there was a call."""
        return self._answer.num_calls > 0

    def feed(self, ids: Sequence[int], *, num_ids: int, is_last: bool) -> Decoded:
        """Take tokens.

        num_ids   how many tokens there are with those behind `ids` that are not shown
        is_last   the output ends with them
        """
        num_reasoning = 0
        for index, token in enumerate(ids):
            was_reasoning = self._is_reasoning
            self._feed_token(token)
            num_reasoning += was_reasoning or self._is_reasoning
            if self._answer.stop is not None:
                return Decoded(self._answer.take(), index + 1, self._answer.stop, num_reasoning)
        if is_last:
            self._finish()
        return Decoded(self._answer.take(), num_ids, self._answer.stop, num_reasoning)

    @property
    def _is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_reasoning

    def _feed_token(self, token: int) -> None:
        if token not in self._markers:
            text = self._decoder.feed((token,))
            if text:
                self._feed_text(text)
            return
        unfinished = self._decoder.finish()  # a character that a marker cuts is never whole
        if unfinished:
            self._feed_text(unfinished)
        if token in self._marks_reasoning:
            assert self._reasoning is not None, "its markers are its own"
            self._put(*self._reasoning.feed_token(token, self._token_text(token)))
        elif self._is_reasoning:
            self._feed_text(self._token_text(token))
        else:
            self._begin_answer()
            self._answer.feed_marker(token)

    def _feed_text(self, text: str) -> None:
        if self._reasoning is None:
            self._answer.feed(text)
        else:
            self._put(*self._reasoning.feed(text))

    def _begin_answer(self) -> None:
        """What might have become reasoning is answer: a call begins."""
        if self._reasoning is not None:
            self._put(*self._reasoning.finish_beginning())

    def _put(self, reasoning: str, answer: str) -> None:
        self._answer.reason(reasoning)
        self._answer.feed(answer)

    def _finish(self) -> None:
        unfinished = self._decoder.finish()
        if unfinished:
            self._feed_text(unfinished)
        if self._reasoning is not None:
            self._put(*self._reasoning.finish())
        self._answer.finish()


class _Answer:
    """What follows the reasoning: text up to a stop string, and calls. Gathers the parts of an output in order."""

    def __init__(self, calls: CallParser | None, stops: StopMatcher | None, name_call: Callable[[int], str]) -> None:
        self.markers: frozenset[int] = frozenset(calls.markers) if calls is not None else frozenset()
        self.num_calls = 0
        self.stop: str | None = None
        self._calls = calls
        self._stops = stops
        self._name_call = name_call
        self._parts: list[Part] = []
        self._space: list[str] = []  # that may stand before a call
        self._follows_call = False
        self._call: _OpenCall | None = None

    def take(self) -> tuple[Part, ...]:
        """The parts since the last time."""
        parts, self._parts = self._parts, []
        return tuple(parts)

    def reason(self, text: str) -> None:
        """More reasoning."""
        if text:
            self._parts.append(Reasoning(text=text))

    def feed(self, text: str) -> None:
        """More of the answer."""
        if text and self.stop is None:
            self._take_pieces([text] if self._calls is None else self._calls.feed(text))

    def feed_marker(self, token: int) -> None:
        """A token of `markers`."""
        assert self._calls is not None, "its markers are its own"
        if self.stop is None:
            self._take_pieces(self._calls.feed_token(token))

    def finish(self) -> None:
        """The output is over."""
        if self._calls is not None and self.stop is None:
            self._take_pieces(self._calls.finish())
        if self.stop is None:
            self._end_text()
        self._show_space()

    def _take_pieces(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self.stop is not None:
                return
            match piece:
                case str():
                    self._say(piece)
                case CallStart():
                    self._end_text()
                    self._begin_call(piece)
                case CallArguments():
                    self._add_arguments(piece.text)
                case CallEnd():
                    self._end_call()

    # ---- text ----

    def _say(self, text: str) -> None:
        if self._stops is not None:
            text, self.stop = self._stops.feed(text)
        self._show(text)
        if self.stop is not None:
            self._show_space()

    def _end_text(self) -> None:
        """Text ends here, or a call interrupts it: what looked like the beginning of a stop string is none."""
        if self._stops is not None:
            self._show(self._stops.finish())

    def _show(self, text: str) -> None:
        """White space around a call belongs to its format."""
        if self._calls is None or not text:
            self._add_text(text)
            return
        if self._follows_call:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            self._follows_call = False
            self._show_space()
            self._add_text(body)
        self._space.append(text[len(body) :])

    def _show_space(self) -> None:
        self._add_text("".join(self._space))
        self._space.clear()

    def _add_text(self, text: str) -> None:
        if text:
            self._parts.append(Text(text=text))

    # ---- calls ----

    def _begin_call(self, start: CallStart) -> None:
        self._space.clear()
        self._call = _OpenCall(start.index, self._name_call(start.index), start.name)
        self.num_calls += 1
        self._parts.append(self._call.delta(""))

    def _add_arguments(self, text: str) -> None:
        call = self._call
        assert call is not None, "a call's arguments come after its start"
        call.arguments.append(text)
        self._parts.append(call.delta(text))

    def _end_call(self) -> None:
        call = self._call
        assert call is not None, "a call's end comes after its start"
        self._parts.append(ToolCall(id=call.id, name=call.name, arguments="".join(call.arguments)))
        self._call = None
        self._follows_call = True


class _OpenCall:
    """A call that is being written."""

    __slots__ = ("arguments", "id", "index", "name")

    def __init__(self, index: int, id_: str, name: str) -> None:
        self.index = index
        self.id = id_
        self.name = name
        self.arguments: list[str] = []

    def delta(self, text: str) -> ToolDelta:
        return ToolDelta(index=self.index, id=self.id, name=self.name, arguments=text)


def _sources(template: str | Mapping[str, str] | None) -> tuple[str, str]:
    """(the template of a chat without tools, the one of a chat with tools)."""
    if template is None or isinstance(template, str):
        return template or "", template or ""
    default = template.get("default", "")
    return default, template.get("tool_use", default)


def _call_tokens(tokenizer: Tokenizer) -> CallTokens:
    return CallTokens(tokenizer.token_id, tokenizer.is_special, tokenizer.drops_leading_space)
