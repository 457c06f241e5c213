"""The format of Llama 3: the answer is a JSON object with a name and parameters, after `<|python_tag|>` or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.text.calls.formats import CallFormat, CallGrammar, chosen
from streamgen.text.calls.json_calls import JsonCalls
from streamgen.text.calls.parser import MarkerKind
from streamgen.text.calls.schemas import call_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.grammar.source import GrammarSource
    from streamgen.text.calls.formats import CallTokens, Definition

TAG = "<|python_tag|>"


class LlamaCalls(CallFormat):
    """Nothing but its shape tells a call from an answer."""

    name = "Llama 3"

    def __init__(self, tokens: CallTokens) -> None:
        super().__init__(tokens)
        self._markers = tokens.marker(MarkerKind.BEGIN, TAG)

    def parser(self) -> JsonCalls:
        """An object at the beginning, or after the tag."""
        return JsonCalls(self._markers, begin="" if self._markers else TAG)

    def grammar(self, definitions: Sequence[Definition], choice: str) -> CallGrammar | None:
        """From the first token on, where a call is required; else there is no telling whether one has begun."""
        if choice == "auto":
            self._refuse_strict(definitions)
            return None
        return CallGrammar(source=self._source(definitions, choice))

    def grammar_after_reasoning(self, definitions: Sequence[Definition], choice: str) -> GrammarSource:
        """The object."""
        return self._source(definitions, choice, before="\n\n")

    def _source(self, definitions: Sequence[Definition], choice: str, *, before: str = "") -> GrammarSource:
        return call_source(chosen(definitions, choice), arguments_key="parameters", before=before)
