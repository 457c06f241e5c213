"""The formats of Mistral: `[TOOL_CALLS]` and a JSON list; in newer ones `[TOOL_CALLS]name[ARGS]{...}` for each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.errors import NotSupported
from streamgen.text.calls.formats import CallFormat, CallGrammar, chosen, may_be_strict
from streamgen.text.calls.json_calls import JsonCalls
from streamgen.text.calls.named_calls import NamedCalls
from streamgen.text.calls.parser import MarkerKind
from streamgen.text.calls.schemas import arguments_source, call_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.grammar.source import GrammarSource
    from streamgen.text.calls.formats import CallTokens, Definition

BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralListCalls(CallFormat):
    """All calls of an answer stand in one list; nothing follows it."""

    name = "[TOOL_CALLS] list"

    def __init__(self, tokens: CallTokens) -> None:
        super().__init__(tokens)
        self._begin_id = tokens.find_id(BEGIN)
        self._markers = tokens.marker(MarkerKind.BEGIN, BEGIN)
        self._before = " " if tokens.puts_space else ""

    def parser(self) -> JsonCalls:
        """A list in a block without an end."""
        return JsonCalls(self._markers, begin=BEGIN if self._begin_id is None else "")

    def grammar(self, definitions: Sequence[Definition], choice: str) -> CallGrammar | None:
        """After the token; without one, a required call is spelled from the first character on."""
        if choice == "auto":
            return self._auto(definitions)
        source = call_source(
            chosen(definitions, choice),
            is_list=True,
            max_calls=None if choice == "required" else 1,
            before=self._before if self._begin_id is not None else BEGIN,
        )
        if self._begin_id is None:
            return CallGrammar(source=source)
        return CallGrammar(source=source, begins_after=(self._begin_id,), is_forced=True)

    def grammar_after_reasoning(self, definitions: Sequence[Definition], choice: str) -> GrammarSource:
        """The bare object, which is a call at the beginning of an answer."""
        return call_source(chosen(definitions, choice))

    def _auto(self, definitions: Sequence[Definition]) -> CallGrammar | None:
        free = frozenset(d["function"]["name"] for d in definitions if not may_be_strict(d))
        if len(free) == len(definitions):
            return None
        if self._begin_id is None:
            self._refuse_strict(definitions)
            return None
        source = call_source(definitions, free=free, is_list=True, before=self._before)
        return CallGrammar(source=source, begins_after=(self._begin_id,))


class MistralNamedCalls(CallFormat):
    """A name between two tokens, then the arguments."""

    name = "[TOOL_CALLS]name[ARGS]"

    def __init__(self, tokens: CallTokens) -> None:
        super().__init__(tokens)
        self._begin_id = tokens.find_id(BEGIN)
        self._arguments_id = tokens.find_id(ARGUMENTS)
        self._markers = (
            tokens.marker(MarkerKind.BEGIN, BEGIN)
            | tokens.marker(MarkerKind.INNER, ARGUMENTS)
            | tokens.marker(MarkerKind.INNER, CALL_ID)
        )

    def parser(self) -> NamedCalls:
        """One block for each call."""
        return NamedCalls(self._markers, read_head=_read_head, begin=BEGIN if self._begin_id is None else "")

    def grammar(self, definitions: Sequence[Definition], choice: str) -> CallGrammar | None:
        """The arguments of the only function there is. A grammar of bytes cannot hold the token between the two."""
        if choice != "auto":
            raise NotSupported(
                f"tool_choice: the {self.name} format cannot require a call; use 'auto'", param="tool_choice"
            )
        if len(definitions) != 1 or self._arguments_id is None:
            self._refuse_strict(definitions)
            return None
        if not may_be_strict(definitions[0]):
            return None
        source = arguments_source(definitions[0])
        return CallGrammar(source=source, begins_after=(self._arguments_id,), repeats=True)

    def _refuse_strict(self, definitions: Sequence[Definition]) -> None:
        for definition in definitions:
            if definition["function"].get("strict"):
                raise NotSupported(
                    f"tools: {definition['function']['name']}: strict can be enforced in the {self.name} format where "
                    "it is the only tool; leave strict out, or give one tool",
                    param="tools",
                )


def _read_head(head: str) -> str | None:
    """The name in `name[ARGS]`, `name[CALL_ID]id[ARGS]` or `name`."""
    name = head.partition(ARGUMENTS)[0].partition(CALL_ID)[0].strip()
    return name if name and not any(char.isspace() for char in name) else None
