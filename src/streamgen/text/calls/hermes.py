"""The format of Hermes and Qwen: `<tool_call>`, a JSON object, `</tool_call>`, once for each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.text.calls.formats import CallFormat, CallGrammar, chosen, may_be_strict
from streamgen.text.calls.json_calls import JsonCalls
from streamgen.text.calls.parser import MarkerKind
from streamgen.text.calls.schemas import call_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.grammar.source import GrammarSource
    from streamgen.text.calls.formats import CallTokens, Definition

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesCalls(CallFormat):
    """`<tool_call>` is a token of its own in most vocabularies, and written in letters in the others."""

    name = "<tool_call>"

    def __init__(self, tokens: CallTokens) -> None:
        super().__init__(tokens)
        self._begin_id = tokens.find_id(BEGIN)
        self._markers = tokens.marker(MarkerKind.BEGIN, BEGIN) | tokens.marker(MarkerKind.END, END)
        end_id = tokens.find_id(END)
        # NOTE: a grammar is made of bytes, and hidden tokens have none: where the end is one, a call ends without it.
        self._after = "" if end_id is not None and tokens.is_hidden(end_id) else f"\n{END}"

    def parser(self) -> JsonCalls:
        """Objects, each in a block."""
        return JsonCalls(self._markers, begin=BEGIN if self._begin_id is None else "", end=END)

    def grammar(self, definitions: Sequence[Definition], choice: str) -> CallGrammar | None:
        """After the token; without one, a required call is spelled from the first character on."""
        if choice == "auto":
            return self._auto(definitions)
        allowed = chosen(definitions, choice)
        if self._begin_id is None:
            return CallGrammar(source=call_source(allowed, before=f"{BEGIN}\n", after=self._after))
        return CallGrammar(
            source=call_source(allowed, before="\n", after=self._after),
            begins_after=(self._begin_id,),
            is_forced=True,
            repeats=choice == "required",
        )

    def grammar_after_reasoning(self, definitions: Sequence[Definition], choice: str) -> GrammarSource:
        """The bare object, which is a call at the beginning of an answer."""
        return call_source(chosen(definitions, choice), before="\n\n")

    def _auto(self, definitions: Sequence[Definition]) -> CallGrammar | None:
        free = frozenset(d["function"]["name"] for d in definitions if not may_be_strict(d))
        if len(free) == len(definitions):
            return None
        if self._begin_id is None:
            self._refuse_strict(definitions)
            return None
        return CallGrammar(
            source=call_source(definitions, free=free, before="\n", after=self._after),
            begins_after=(self._begin_id,),
            repeats=True,
        )
