"""How the grammars that plans name get into an executor's process: each is sent once, before the first plan with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from streamgen.errors import StreamgenError
from streamgen.execution.wire import AddGrammar, DropGrammar, SetVocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamgen.execution.child import Child
    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.grammar.vocabulary import GrammarVocabulary
    from streamgen.messages import StepPlan

logger = logging.getLogger(__name__)

MAX_UNUSED = 64  # grammars that a child keeps for requests to come


class GrammarSender:
    """The host's side: what one child has been told.

    table   the grammars of open requests, by key
    """

    def __init__(self, table: Mapping[str, TokenGrammar]) -> None:
        self._table = table
        self._child: Child | None = None
        self._sent: dict[str, None] = {}  # in the order of their last use

    def messages(self, plan: StepPlan, child: Child) -> Iterator[SetVocabulary | AddGrammar | DropGrammar]:
        """What the child has to hear before this plan."""
        if child is not self._child:
            self._child, self._sent = child, {}
        for begin in plan.begins:
            grammar = None if begin.grammar is None else self._table.get(begin.grammar.key)
            if begin.grammar is None or grammar is None:
                continue  # free, or its request has ended since the step was planned
            if not self._sent:
                yield _vocabulary_message(grammar.vocabulary)
            if self._sent.pop(begin.grammar.key, False) is False:
                yield AddGrammar(key=begin.grammar.key, dump=grammar.grammar.dump())
            self._sent[begin.grammar.key] = None
        yield from self._drop_unused()

    def _drop_unused(self) -> Iterator[DropGrammar]:
        num_unused = len(self._sent) - len(self._table)
        if num_unused <= MAX_UNUSED:
            return
        for key in [key for key in self._sent if key not in self._table][: num_unused - MAX_UNUSED]:
            del self._sent[key]
            yield DropGrammar(key=key)


class GrammarReceiver:
    """The child's side: fills the table that its runner reads."""

    def __init__(self) -> None:
        self.table: dict[str, TokenGrammar] = {}
        self._vocabulary: GrammarVocabulary | None = None

    def take(self, message: SetVocabulary | AddGrammar | DropGrammar) -> None:
        """Do as it says. A grammar that cannot be made here is missing: the sequences that want it fail alone."""
        if isinstance(message, SetVocabulary):
            from streamgen.grammar.vocabulary import GrammarVocabulary

            self._vocabulary = GrammarVocabulary(list(message.tokens), message.stop_ids, vocab_size=message.vocab_size)
        elif isinstance(message, DropGrammar):
            self.table.pop(message.key, None)
        else:
            self._add(message)

    def _add(self, message: AddGrammar) -> None:
        from streamgen.grammar.compiler import load_grammar

        assert self._vocabulary is not None, "a grammar came before the vocabulary"
        try:
            self.table[message.key] = load_grammar(message.dump).bind(self._vocabulary)
        except StreamgenError as error:
            logger.debug("a grammar could not be made in the executor's process", exc_info=error)


def _vocabulary_message(vocabulary: GrammarVocabulary) -> SetVocabulary:
    return SetVocabulary(
        tokens=tuple(vocabulary.tokens), stop_ids=tuple(vocabulary.stop_ids), vocab_size=vocabulary.vocab_size
    )
