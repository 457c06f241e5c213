"""What every back end answers: a compiled grammar, the same over a vocabulary, and one sequence's place in it.

    Grammar       of bytes: shared, immutable, knows nothing of tokens
    TokenGrammar  a grammar over one vocabulary; shared, immutable
    Matcher       where one sequence is

Two states of one grammar are the same thing whichever way they were reached, and nothing here depends on who else
runs, so that constrained output is as reproducible as any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streamgen.grammar.vocabulary import GrammarVocabulary


class GrammarStats(Struct, frozen=True, kw_only=True):
    """Figures of a compiled grammar.

    backend   which one serves it: "outlines" | "llguidance"
    states    of its automaton; None where the back end makes them as it goes
    bytes     of memory that it holds, token masks aside
    seconds   that compiling took
    warnings  keywords that are not enforced, with their JSON pointers, where the caller allowed that
    """

    backend: str
    states: int | None = None
    bytes: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


class Grammar(Protocol):
    """A compiled grammar over bytes."""

    @property
    def stats(self) -> GrammarStats:
        """Its figures."""
        ...

    def accepts(self, text: bytes) -> bool:
        """Whether exactly this may be the whole output."""
        ...

    def prefix_ok(self, text: bytes) -> bool:
        """Whether some output begins with this."""
        ...

    def dump(self) -> bytes:
        """Everything about it, for `compiler.load_grammar` in another process."""
        ...

    def bind(self, vocabulary: GrammarVocabulary) -> TokenGrammar:
        """The grammar over the tokens of a vocabulary.

        Raises:
            SchemaError: the vocabulary cannot spell it.
        """
        ...


class TokenGrammar(Protocol):
    """A grammar over the tokens of one vocabulary."""

    @property
    def grammar(self) -> Grammar:
        """The grammar over bytes."""
        ...

    @property
    def vocabulary(self) -> GrammarVocabulary:
        """The tokens."""
        ...

    @property
    def stats(self) -> GrammarStats:
        """Those of the grammar."""
        ...

    def start(self) -> Matcher:
        """A sequence that has no tokens yet."""
        ...


class Matcher(Protocol):
    """One sequence's place in a grammar. Not thread-safe.

    A stop id is a token like others: allowed where the output may end, and nothing is allowed after it.
    """

    @property
    def may_stop(self) -> bool:
        """Whether the output may end here."""
        ...

    @property
    def must_stop(self) -> bool:
        """Whether it has to: nothing can follow."""
        ...

    def advance(self, token: int) -> bool:
        """Take a token; False, and no change, if it is not allowed."""
        ...

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens; all that were ever taken may be."""
        ...

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Write what is allowed next: bit t & 31 of word t >> 5 for token t, [ceil(vocab / 32)]; stop ids included."""
        ...

    def forced_run(self, limit: int) -> tuple[int, ...]:
        """The tokens that follow without a choice: one allowed token each, at most `limit`, no stop id among them."""
        ...
