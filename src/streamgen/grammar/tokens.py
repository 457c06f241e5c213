"""Automata over the tokens of a vocabulary: a table of masks, and the place of one sequence in it.

The executor asks the table itself (`csrc/grammar`), in the pool's threads; `AutomatonMatcher` is the same as an object,
for everything else that wants to know what a grammar allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.errors import SchemaError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    import streamgen._cpu as _cpu
    from streamgen.grammar.automaton import AutomatonGrammar, ByteAutomaton
    from streamgen.grammar.grammar import GrammarStats
    from streamgen.grammar.vocabulary import GrammarVocabulary

_STOPPED = -1  # the state after a stop id


class AutomatonTokens:
    """An automaton over a vocabulary; a `TokenGrammar`. Shared, immutable."""

    def __init__(self, grammar: AutomatonGrammar, vocabulary: GrammarVocabulary, table: _cpu.MaskTable) -> None:
        self.grammar = grammar
        self.vocabulary = vocabulary
        self.table = table

    @classmethod
    def bind(cls, grammar: AutomatonGrammar, vocabulary: GrammarVocabulary) -> AutomatonTokens:
        """The grammar over the vocabulary; masks are made when they are first asked for.

        Raises:
            SchemaError: the vocabulary cannot spell any output that the automaton accepts.
        """
        table = _make_table(grammar.automaton, vocabulary)
        if not table.is_spellable:
            raise SchemaError(
                "output: expected a grammar that the model's tokens can spell; it wants characters for which the "
                "vocabulary has no tokens"
            )
        return cls(grammar, vocabulary, table)

    @property
    def stats(self) -> GrammarStats:
        """Those of the grammar."""
        return self.grammar.stats

    def start(self) -> AutomatonMatcher:
        """A sequence that has no tokens yet."""
        return AutomatonMatcher(self.table)


def _make_table(automaton: ByteAutomaton, vocabulary: GrammarVocabulary) -> _cpu.MaskTable:
    import numpy as np

    import streamgen._cpu as _cpu

    classes = np.ascontiguousarray(automaton.classes, np.uint8)
    transitions = np.ascontiguousarray(automaton.transitions, np.int32)
    accepting = np.ascontiguousarray(automaton.accepting, np.uint8)
    num_states, num_classes = transitions.shape
    assert classes.shape == (256,) and accepting.shape == (num_states,), "an automaton's arrays fit together"
    return _cpu.MaskTable(
        vocabulary.trie,
        classes.ctypes.data,
        transitions.ctypes.data,
        accepting.ctypes.data,
        num_states,
        num_classes,
        vocabulary.stop_ids,
        vocabulary.masks,
    )


class AutomatonMatcher:
    """One sequence's place in an automaton: a stack of states, one for each token. A `Matcher`."""

    def __init__(self, table: _cpu.MaskTable) -> None:
        self._table = table
        self._states = [0]

    @property
    def may_stop(self) -> bool:
        """Whether the output may end here."""
        return self._state == _STOPPED or self._table.may_stop(self._state)

    @property
    def must_stop(self) -> bool:
        """Whether it has to: nothing can follow."""
        return self._state == _STOPPED or self._table.must_stop(self._state)

    def advance(self, token: int) -> bool:
        """Take a token; False, and no change, if it is not allowed."""
        after = self._after(token)
        if after is None:
            return False
        self._states.append(after)
        return True

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        assert 0 <= count < len(self._states), f"expected at most {len(self._states) - 1} tokens, got {count}"
        del self._states[len(self._states) - count :]

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Write what is allowed next: bit t & 31 of word t >> 5 for token t, [ceil(vocab / 32)]."""
        assert words.shape == (-(-self._table.vocab_size // 32),) and words.flags.c_contiguous, "words of a whole mask"
        if self._state == _STOPPED:
            words[:] = 0
        else:
            self._table.fill_row(self._state, words.ctypes.data)

    def forced_run(self, limit: int) -> tuple[int, ...]:
        """The tokens that follow without a choice, at most `limit`."""
        return () if self._state == _STOPPED else self._table.forced_run(self._state, limit)

    @property
    def _state(self) -> int:
        return self._states[-1]

    def _after(self, token: int) -> int | None:
        if self._state == _STOPPED:
            return None
        if self._table.is_stop(token):
            return _STOPPED if self._table.may_stop(self._state) else None
        return self._table.next_state(self._state, token)
