"""What the actors need of a model, so that they run over any that offers it: a real one, or one made for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.config import EngineOptions, LoadProgress, MemoryPlan
    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.messages import StepDone, StepPlan
    from streamgen.sampling import Sampling
    from streamgen.scheduling.limits import Limits
    from streamgen.text.chat import ChatTemplate, ChatTemplates
    from streamgen.text.parts import OutputFormats
    from streamgen.text.tokenizer import Tokenizer


class RunsPlans(Protocol):
    """What an executor drives: `execution.Runner`."""

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """Run one step; blocks until the device is done.

        wake_fd   a file descriptor to which a byte is written once the step runs without the interpreter
        """
        ...


class OpenModel(Protocol):
    """What the engine thread runs: `execution.OpenModel`."""

    tokenizer: Tokenizer
    limits: Limits
    plan: MemoryPlan
    sampling_defaults: Sampling

    @property
    def processors(self) -> dict[int, tuple[Callable[..., object], ...]]:
        """Logits processors by request id: filled when a request is accepted, emptied when it has ended."""
        ...

    @property
    def supports_processors(self) -> bool:
        """Whether its runner can call functions of this process."""
        ...

    @property
    def grammars(self) -> dict[str, TokenGrammar]:
        """Grammars by key, of the requests that are open: filled and emptied by the compiler actor."""
        ...

    @property
    def formats(self) -> OutputFormats | None:
        """What may be told apart in its outputs, and how; None: nothing, and no grammar is enforced."""
        ...

    @property
    def chat_template(self) -> ChatTemplate | ChatTemplates | None:
        """What turns messages into text."""
        ...

    @property
    def config(self) -> Any:
        """The model's `ModelConfig`."""
        ...

    @property
    def runner(self) -> RunsPlans:
        """Runs the plans."""
        ...

    def sleep(self, *, keep_weights: bool) -> None:
        """Give pages back, and weights unless they are kept. Blocking; called while nothing runs."""
        ...

    def wake(self, is_cancelled: Callable[[], bool]) -> None:
        """Take them again. Blocking; raises soon after `is_cancelled()`."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class ModelOpener(Protocol):
    """How an engine gets its model. Both are blocking."""

    def open(
        self,
        options: EngineOptions,
        on_progress: Callable[[LoadProgress], None] | None,
        is_cancelled: Callable[[], bool],
    ) -> OpenModel:
        """Load it; raises soon after `is_cancelled()`."""
        ...

    def plan(self, options: EngineOptions) -> MemoryPlan:
        """Its sizes, from headers only."""
        ...
