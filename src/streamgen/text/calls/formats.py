"""What a format of calls has to answer, and what formats are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from streamgen.errors import NotSupported
from streamgen.grammar.source import GrammarSource  # noqa: TC001  # a field of a Struct
from streamgen.text.calls.parser import CallParser, Marker, MarkerKind

Definition: TypeAlias = Mapping[str, Any]
"""A tool as OpenAI writes it: {"type": "function", "function": {"name", "description", "parameters", "strict"}}."""


class CallTokens(Struct, frozen=True):
    """What formats ask of a tokenizer.

    find_id      the id of a token by its literal text; None if there is none
    is_hidden    whether a token is left out of texts
    puts_space   whether a text that begins behind a token begins with a space
    """

    find_id: Callable[[str], int | None]
    is_hidden: Callable[[int], bool]
    puts_space: bool = False

    def marker(self, kind: MarkerKind, literal: str) -> dict[int, Marker]:
        """The token of this text as an entry of a parser's markers; empty if there is none."""
        token = self.find_id(literal)
        if token is None:
            return {}
        return {token: Marker(kind, "" if self.is_hidden(token) else literal, literal)}


class CallGrammar(Struct, frozen=True, kw_only=True):
    """What calls have to obey, and how; the fields are those of `messages.GrammarUse`."""

    source: GrammarSource
    begins_after: tuple[int, ...] = ()
    is_forced: bool = False
    repeats: bool = False


class CallFormat(ABC):
    """How one kind of template has calls written."""

    name: str

    def __init__(self, tokens: CallTokens) -> None:
        self._tokens = tokens

    @abstractmethod
    def parser(self) -> CallParser:
        """A reader for one answer."""

    @abstractmethod
    def grammar(self, definitions: Sequence[Definition], choice: str) -> CallGrammar | None:
        """What an answer has to obey, where it comes to calls.

        choice   "auto": calls of functions that are strict obey their schemas. "required": there is a call. A name:
                 there is a call of this function

        Raises:
            NotSupported: this format cannot have it enforced.
        """

    def grammar_after_reasoning(self, definitions: Sequence[Definition], choice: str) -> GrammarSource:
        """What follows reasoning that the prompt has opened, where a call is required.

        Raises:
            NotSupported: this format cannot have it enforced.
        """
        raise NotSupported(
            f"tool_choice: the {self.name} format cannot require a call after reasoning that the prompt has opened; "
            "use 'auto', or turn the reasoning off",
            param="tool_choice",
        )

    def _refuse_strict(self, definitions: Sequence[Definition]) -> None:
        """Who asks for strict has to hear that it cannot be had."""
        for definition in definitions:
            function = definition["function"]
            if function.get("strict"):
                raise NotSupported(
                    f"tools: {function['name']}: strict cannot be enforced in the {self.name} format with tool_choice "
                    "'auto'; use 'required' or the tool's name, or leave strict out",
                    param="tools",
                )


def chosen(definitions: Sequence[Definition], choice: str) -> list[Definition]:
    """The definitions that a forced call may be of."""
    if choice == "required":
        return list(definitions)
    return [definition for definition in definitions if definition["function"]["name"] == choice]


def may_be_strict(definition: Definition) -> bool:
    """Whether the arguments obey their schema wherever that can be had: strict is true, or null."""
    function = definition["function"]
    return "strict" in function and function["strict"] is not False
