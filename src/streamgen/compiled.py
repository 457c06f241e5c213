"""CompiledOutput: what an output type means as a grammar, to be asked without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from streamgen.grammar.grammar import Grammar, GrammarStats
    from streamgen.grammar.outputs import OutputPlan

T = TypeVar("T")


class CompiledOutput(Generic[T]):
    """A grammar that is ready, and what it makes of texts. `Engine.compile` makes one. Any thread may use it."""

    def __init__(self, plan: OutputPlan, grammar: Grammar) -> None:
        self._plan = plan
        self._grammar = grammar

    @property
    def stats(self) -> GrammarStats:
        """Which back end serves it, its states and bytes, the seconds that compiling took."""
        return self._grammar.stats

    def accepts(self, text: str) -> bool:
        """Whether a model could have written exactly this, and stopped."""
        return self._grammar.accepts(text.encode("utf-8", "surrogatepass"))

    def prefix_ok(self, text: str) -> bool:
        """Whether a model could have begun with this."""
        return self._grammar.prefix_ok(text.encode("utf-8", "surrogatepass"))

    def parse(self, text: str) -> T:
        """The value that a text stands for.

        Raises:
            OutputInvalid: it stands for none.
        """
        value: T = self._plan.parse(text)
        return value

    def __repr__(self) -> str:
        return f"<CompiledOutput {self.stats.backend}, {self.stats.bytes} bytes>"
