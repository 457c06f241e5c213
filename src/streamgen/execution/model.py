"""Opening a model: checkpoint, program, memory plan, tokenizer, runner. Blocking; runs in a worker thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgen.backends.base import Backend, LoadOptions
from streamgen.backends.select import select_backend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.config import EngineOptions, LoadProgress, MemoryPlan
from streamgen.errors import LoadError
from streamgen.execution.memory import PAGE_SIZE, STEP_ROWS, plan_memory
from streamgen.execution.runner import Runner
from streamgen.execution.threads import available_threads
from streamgen.hub import resolve_model
from streamgen.models.registry import build_program, read_freq_factors
from streamgen.quantization.base import TensorType
from streamgen.scheduling.scheduler import Limits
from streamgen.text.chat import ChatTemplates
from streamgen.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.checkpoints.base import Checkpoint
    from streamgen.hub_models import OnProgress
    from streamgen.models.config import ModelConfig
    from streamgen.models.program import Program
    from streamgen.sampling import Sampling

EMBEDDING = "model.embed_tokens.weight"


class LoadCancelled(LoadError):
    """Opening was given up by who asked for it."""

    code = "load_cancelled"


class _Prepared:
    """A checkpoint with its program and plan, before its weights are read. Headers only."""

    def __init__(self, options: EngineOptions, on_progress: OnProgress) -> None:
        path = resolve_model(options.model, offline=options.offline, revision=options.revision, on_progress=on_progress)
        self.checkpoint: Checkpoint = open_checkpoint(Path(path))
        try:
            self.config = self.checkpoint.config
            self.dtype = choose_dtype(options.dtype, self.checkpoint)
            self.threads = options.threads or available_threads()
            max_context = options.max_context or self.config.max_context
            factors = read_freq_factors(self.checkpoint)
            self.program: Program = build_program(self.config, max_context=max_context, freq_factors=factors)
            self.backend: Backend = select_backend(self.program, self.dtype)
            self.plan = plan_memory(
                options, self.config, self.program, self.backend, dtype=self.dtype, threads=self.threads
            )
        except BaseException:
            self.checkpoint.close()
            raise


class OpenModel:
    """A model that is ready to run. Close it once nothing runs any more."""

    def __init__(
        self, *, prepared: _Prepared, runner: Runner, tokenizer: Tokenizer, chat_template: ChatTemplates, limits: Limits
    ) -> None:
        self.name = prepared.checkpoint.model_name
        self.config: ModelConfig = prepared.config
        self.plan: MemoryPlan = prepared.plan
        self.sampling_defaults: Sampling = prepared.checkpoint.sampling_defaults
        self.runner = runner
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.limits = limits

    def close(self) -> None:
        """Free weights, pages and threads; idempotent."""
        self.runner.close()


def plan_model(options: EngineOptions) -> MemoryPlan:
    """What `open_model` would take. Reads headers only.

    Raises:
        LoadError: the model cannot be opened.
    """
    prepared = _Prepared(options, None)
    prepared.checkpoint.close()
    return prepared.plan


def open_model(options: EngineOptions, on_progress: OnProgress, is_cancelled: Callable[[], bool]) -> OpenModel:
    """Load a model for `options`.

    Raises:
        LoadError: it is not there, not supported, corrupt, does not fit, or `is_cancelled` said so.
    """
    prepared = _Prepared(options, on_progress)
    try:
        text = _Background(lambda: _open_text(prepared.checkpoint, options))
        try:
            runner = _load_runner(prepared, on_progress, is_cancelled)
        finally:
            text.join()
        try:
            tokenizer, templates = text.result()
        except BaseException:
            runner.close()
            raise
        return OpenModel(
            prepared=prepared,
            runner=runner,
            tokenizer=tokenizer,
            chat_template=templates,
            limits=_limits(prepared, options),
        )
    finally:
        prepared.checkpoint.close()


def choose_dtype(asked: str, checkpoint: Checkpoint) -> str:
    """The dtype of weights, operands and pages: float32 checkpoints stay so, everything else runs in bfloat16."""
    if asked != "auto":
        return asked
    info = checkpoint.tensors.get(EMBEDDING)
    return "float32" if info is not None and info.type is TensorType.F32 else "bfloat16"


def _limits(prepared: _Prepared, options: EngineOptions) -> Limits:
    return Limits(
        num_pages=prepared.plan.num_pages,
        page_size=PAGE_SIZE,
        max_running=prepared.plan.max_running,
        step_tokens=STEP_ROWS,
        max_context=prepared.plan.max_context,
        max_queued=options.max_queued,
        prefix_cache=options.prefix_cache,
    )


def _load_runner(prepared: _Prepared, on_progress: OnProgress, is_cancelled: Callable[[], bool]) -> Runner:
    plan = prepared.plan

    def on_bytes(done: int) -> None:
        if is_cancelled():
            raise LoadCancelled("opening the model was cancelled")
        if on_progress is not None:
            on_progress(LoadProgress(stage="weights", done=done, total=plan.weights))

    load = LoadOptions(
        dtype=prepared.dtype,
        max_rows=STEP_ROWS,
        num_pages=plan.num_pages,
        page_size=PAGE_SIZE,
        max_context=plan.max_context,
        threads=prepared.threads,
    )
    weights = CheckpointWeights(prepared.checkpoint)
    model = prepared.backend.load(prepared.program, weights, load, on_bytes)
    return Runner(model, num_slots=plan.max_running, max_context=plan.max_context, page_size=PAGE_SIZE)


def _open_text(checkpoint: Checkpoint, options: EngineOptions) -> tuple[Tokenizer, ChatTemplates]:
    source = checkpoint.tokenizer_source
    tokenizer = load_tokenizer(source)
    sources = source.chat_templates if options.chat_template is None else {"default": options.chat_template}
    return tokenizer, ChatTemplates(sources, special_tokens=tokenizer.special_tokens)


class _Background:
    """Runs one function in a thread of its own, beside packing; `result` waits and re-raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="streamgen-text")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as error:  # re-raised by result
            self._error = error

    def join(self) -> None:
        self._thread.join()

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome
