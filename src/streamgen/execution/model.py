"""Opening a model: checkpoint, program, memory plan, tokenizer, runner. Blocking; runs in a worker thread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.backends.base import Backend, LoadedModel, LoadOptions
from streamgen.backends.select import select_backend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.checkpoints.quantized import UnpackedWeights
from streamgen.config import EngineOptions, LoadProgress, MemoryPlan, parse_quantization
from streamgen.errors import ConfigError
from streamgen.execution.background import Background, LoadCancelled, check_cancelled
from streamgen.execution.memory import LEDGER, PAGE_SIZE, STEP_ROWS, Promise, plan_memory
from streamgen.execution.runner import Runner
from streamgen.execution.threads import available_threads
from streamgen.hub import resolve_model
from streamgen.models.program import Embed, Linear
from streamgen.models.registry import build_program, read_freq_factors
from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.packing import asked_packing, choose_packing, is_what_was_asked
from streamgen.scheduling.scheduler import Limits
from streamgen.text.chat import ChatTemplates
from streamgen.text.parts import OutputFormats
from streamgen.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.checkpoints.base import Checkpoint, TensorInfo
    from streamgen.config import Quantization
    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.hub_models import OnProgress
    from streamgen.models.config import ModelConfig
    from streamgen.models.program import LinearWeight, Program
    from streamgen.sampling import Sampling

EMBEDDING = "model.embed_tokens.weight"


class Prepared:
    """A checkpoint with its program and plan, before its weights are read. Headers only."""

    def __init__(self, options: EngineOptions, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        try:
            self.options = options
            self.config = self.checkpoint.config
            asked = None if options.quantization is None else parse_quantization(options.quantization)
            self.dtype = choose_dtype(options.dtype, self.checkpoint, asked)
            self.threads = options.threads or available_threads()
            max_context = options.max_context or self.config.max_context
            factors = read_freq_factors(self.checkpoint)
            self.program: Program = build_program(self.config, max_context=max_context, freq_factors=factors)
            self.backend: Backend = select_backend(self.program, self.dtype)
            self.packings = choose_packings(self.program, self.checkpoint, self.dtype, asked)
        except BaseException:
            self.checkpoint.close()
            raise

    def make_plan(self) -> MemoryPlan:
        """Its sizes, from what memory is left now; see `plan_memory`."""
        return plan_memory(
            self.options,
            self.config,
            self.program,
            self.backend,
            dtype=self.dtype,
            threads=self.threads,
            packings=self.packings,
        )


class OpenModel:
    """A model that is ready to run. Close it once nothing runs any more.

    processors   logits processors by request id; owned by who accepts requests
    """

    supports_processors = True

    def __init__(self, prepared: Prepared, text: OpenText, promise: Promise, model: LoadedModel) -> None:
        plan = promise.plan
        self.name = prepared.checkpoint.model_name
        self.config: ModelConfig = prepared.config
        self.plan: MemoryPlan = plan
        self.sampling_defaults: Sampling = prepared.checkpoint.sampling_defaults
        self.tokenizer = text.tokenizer
        self.chat_template = text.templates
        self.limits = limits_of(plan, prepared.options)
        self.processors: dict[int, tuple[Callable[..., object], ...]] = {}
        self.grammars: dict[str, TokenGrammar] = {}
        self.formats = text.formats
        self.runner = make_runner(model, plan, self.processors, self.grammars)
        self._promise = promise
        self._recipe = _Recipe.of(prepared, plan)
        _promise_pages(promise, self.runner)

    def sleep(self, *, keep_weights: bool) -> None:
        """Give pages and workspace back to the system, and weights unless they are kept; `wake` undoes it.

        Blocking; called while nothing runs. What the pages held is gone. Weights that were given back are read from
        the model's file again, which the system may still have in memory.
        """
        self.runner.sleep(keep_weights=keep_weights)
        if not keep_weights:
            self._promise.planned = 0

    def wake(self, is_cancelled: Callable[[], bool]) -> None:
        """Take the memory again; nothing to do where the weights were kept.

        Raises:
            LoadError: the model's file is not there any more or has changed, the memory is not there, or
                `is_cancelled` said so. The model still sleeps then, and can be woken again.
        """
        if self.runner.has_model:
            return
        LEDGER.renew(self._promise)
        try:
            self.runner.wake(self._recipe.load(self._promise, is_cancelled))
        except BaseException:
            self._promise.planned = 0
            raise
        _promise_pages(self._promise, self.runner)

    def close(self) -> None:
        """Free weights, pages and threads; idempotent."""
        self.runner.close()
        LEDGER.release(self._promise)


def plan_model(options: EngineOptions) -> MemoryPlan:
    """What `open_model` would take. Reads headers only.

    Raises:
        LoadError: the model cannot be opened.
    """
    prepared = Prepared(options, find_model(options, None))
    try:
        return prepared.make_plan()
    finally:
        prepared.checkpoint.close()


def open_model(options: EngineOptions, on_progress: OnProgress, is_cancelled: Callable[[], bool]) -> OpenModel:
    """Load a model for `options`.

    Where `is_cancelled` says so it ends within some tens of milliseconds. What cannot be stopped, as a library that
    builds a tokenizer, then ends by itself in its own thread, and is read by nobody.

    Raises:
        LoadError: it is not there, not supported, corrupt, does not fit, or LoadCancelled.
    """
    path = Background(lambda: find_model(options, on_progress), daemon=True).result(is_cancelled)
    prepared = Prepared(options, path)
    try:
        check_cancelled(is_cancelled)
        promise = LEDGER.reserve(prepared.make_plan)
        try:
            return _load(prepared, promise, on_progress, is_cancelled)
        except BaseException:
            LEDGER.release(promise)
            raise
    finally:
        prepared.checkpoint.close()


def load_runner(
    options: EngineOptions,
    plan: MemoryPlan,
    on_progress: OnProgress,
    is_cancelled: Callable[[], bool],
    *,
    grammars: Mapping[str, TokenGrammar] | None = None,
) -> Runner:
    """The runner alone, with the sizes of a plan that was made before: for an executor in a process of its own.

    grammars   those that plans name, by key; owned by the caller

    Raises:
        LoadError: as `open_model`.
    """
    prepared = Prepared(options, find_model(options, None))
    try:
        recipe = _Recipe.of(prepared, plan)
        model = recipe.load_from(
            prepared.checkpoint, lambda done: _tell(on_progress, done, plan), is_cancelled=is_cancelled
        )
    finally:
        prepared.checkpoint.close()
    return make_runner(model, plan, {}, {} if grammars is None else grammars)


def _load(prepared: Prepared, promise: Promise, on_progress: OnProgress, is_cancelled: Callable[[], bool]) -> OpenModel:
    checkpoint, options = prepared.checkpoint, prepared.options
    text = Background(lambda: open_text(checkpoint, options), daemon=False)
    try:
        model = _Recipe.of(prepared, promise.plan).load_from(
            checkpoint, _counting(promise, on_progress), is_cancelled=is_cancelled
        )
    except LoadCancelled:
        raise
    except BaseException:
        text.join()
        raise
    try:
        return OpenModel(prepared, text.result(is_cancelled), promise, model)
    except BaseException:
        model.close()
        raise


class _Recipe(Struct):
    """What it takes to load the weights, the first time and again."""

    path: Path
    program: Program
    backend: Backend
    options: LoadOptions

    @classmethod
    def of(cls, prepared: Prepared, plan: MemoryPlan) -> _Recipe:
        load = LoadOptions(
            dtype=prepared.dtype,
            max_rows=STEP_ROWS,
            num_pages=plan.num_pages,
            page_size=PAGE_SIZE,
            max_context=plan.max_context,
            threads=prepared.threads,
            packings=prepared.packings,
            kv_dtype=prepared.options.kv_dtype,
        )
        return cls(prepared.checkpoint.path, prepared.program, prepared.backend, load)

    def load(self, promise: Promise, is_cancelled: Callable[[], bool]) -> LoadedModel:
        """Open the checkpoint again for it."""
        checkpoint = open_checkpoint(self.path)
        try:
            return self.load_from(checkpoint, _counting(promise, None), is_cancelled=is_cancelled)
        finally:
            checkpoint.close()

    def load_from(
        self, checkpoint: Checkpoint, on_packed: Callable[[int], None], *, is_cancelled: Callable[[], bool]
    ) -> LoadedModel:
        """Pack the weights; `on_packed` hears the bytes."""

        def on_bytes(done: int) -> None:
            check_cancelled(is_cancelled)
            on_packed(done)

        weights = UnpackedWeights(CheckpointWeights(checkpoint), self.options.packings)
        return self.backend.load(self.program, weights, self.options, on_bytes)


def _counting(promise: Promise, on_progress: OnProgress) -> Callable[[int], None]:
    """What is packed counts as touched, and is told to the host."""
    packed = 0
    promise.touched = lambda: packed

    def on_packed(done: int) -> None:
        nonlocal packed
        packed = done
        _tell(on_progress, done, promise.plan)

    return on_packed


def _tell(on_progress: OnProgress, done: int, plan: MemoryPlan) -> None:
    if on_progress is not None:
        on_progress(LoadProgress(stage="weights", done=done, total=plan.weights))


def find_model(options: EngineOptions, on_progress: OnProgress) -> Path:
    """Where the model is; a hub id may be fetched. Raises ModelNotFound."""
    return Path(
        resolve_model(options.model, offline=options.offline, revision=options.revision, on_progress=on_progress)
    )


def _promise_pages(promise: Promise, runner: Runner) -> None:
    """The weights are in memory; pages and workspace come as they are used."""
    promise.touched = runner.resident_bytes
    promise.planned = promise.plan.cache + promise.plan.workspace


def choose_dtype(asked: str, checkpoint: Checkpoint, quantization: Quantization | None = None) -> str:
    """The dtype of dense weights, operands and pages: float32 checkpoints stay so, everything else runs in bfloat16."""
    if asked != "auto":
        return asked
    info = checkpoint.tensors.get(EMBEDDING)
    is_float32 = info is not None and info.type is TensorType.F32 and quantization is None
    if is_float32 and not any(info.type.is_integer for info in checkpoint.tensors.values()):
        return "float32"
    return "bfloat16"


def choose_packings(
    program: Program, checkpoint: Checkpoint, dtype: str, asked: Quantization | None = None
) -> dict[str, Packing]:
    """The packing of every matrix that does not become dense, by name.

    Raises:
        ConfigError: `asked`, the option `quantization`, does not fit a matrix, or contradicts the checkpoint.
    """
    packings, edges = {}, edge_weights(program)
    for weight in program.linear_weights():
        info = checkpoint.tensors.get(f"{weight.name}.weight")
        if info is None:
            continue  # packing says which tensor is missing
        packing = choose_packing(info.type, weight.columns, group=info.group, dtype=dtype)
        if asked is not None:
            packing = _asked_packing(asked, weight, info, packing, is_edge=weight.name in edges)
        if packing.type.is_integer:
            packings[weight.name] = packing
    return packings


def _asked_packing(
    asked: Quantization, weight: LinearWeight, info: TensorInfo, stored: Packing, *, is_edge: bool
) -> Packing:
    if not info.type.is_integer:
        return asked_packing(asked, info.name, weight.columns, is_edge=is_edge)
    if is_what_was_asked(asked, stored, weight.columns, is_edge=is_edge):
        return stored
    group = f" in groups of {info.group}" if info.group else ""
    raise ConfigError(
        f"quantization: {asked}: the checkpoint is quantized already: tensor {info.name!r} is {info.type.name}{group}; "
        "leave the option out to run it as it is, or take an unquantized checkpoint",
        option="quantization",
    )


def edge_weights(program: Program) -> set[str]:
    """Names of the embedding and the head, which is all that comes after the split."""
    embeddings = {op.weight.name for op in program.ops if isinstance(op, Embed)}
    heads = {weight.name for op in program.ops[program.split :] if isinstance(op, Linear) for weight in op.weights}
    return embeddings | heads


def limits_of(plan: MemoryPlan, options: EngineOptions) -> Limits:
    """What the scheduler may give away."""
    return Limits(
        num_pages=plan.num_pages,
        page_size=PAGE_SIZE,
        max_running=plan.max_running,
        step_tokens=STEP_ROWS,
        max_context=plan.max_context,
        max_queued=options.max_queued,
        prefix_cache=options.prefix_cache,
    )


def make_runner(
    model: LoadedModel,
    plan: MemoryPlan,
    processors: Mapping[int, tuple[Callable[..., object], ...]],
    grammars: Mapping[str, TokenGrammar],
) -> Runner:
    """A runner for the sizes of a plan."""
    return Runner(
        model,
        num_slots=plan.max_running,
        max_context=plan.max_context,
        page_size=PAGE_SIZE,
        processors=processors,
        grammars=grammars,
    )


class OpenText(Struct):
    """How a checkpoint's text becomes ids, messages text, and what may be told apart in what it writes."""

    tokenizer: Tokenizer
    templates: ChatTemplates
    formats: OutputFormats


def open_text(checkpoint: Checkpoint, options: EngineOptions) -> OpenText:
    """Load tokenizer and chat templates. Raises LoadError."""
    source = checkpoint.tokenizer_source
    tokenizer = load_tokenizer(source)
    sources = source.chat_templates if options.chat_template is None else {"default": options.chat_template}
    templates = ChatTemplates(sources, special_tokens=tokenizer.special_tokens)
    return OpenText(tokenizer, templates, OutputFormats(tokenizer, sources))
