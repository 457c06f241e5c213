"""`isolation="process"`: the executor of a device in a child process, so that its death is not the host's.

The host reads headers, tokenizer and templates, plans the memory, and sends plans; the child has weights, pages and the
kernels. `RemoteRunner` keeps one child alive: a thread waits for its end and starts another at once, within a budget.
Slots and pages are lost with a child, so the first plan after that is answered with `ExecutorLost`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from streamgen.config import EngineOptions
from streamgen.errors import ConfigError, LoadError, StreamgenError
from streamgen.execution.background import Background, LoadCancelled, check_cancelled
from streamgen.execution.child import Child
from streamgen.execution.memory import LEDGER, Promise
from streamgen.execution.model import OpenText, Prepared, find_model, limits_of, open_text
from streamgen.execution.remote_grammars import GrammarSender
from streamgen.execution.wire import (
    ConnectionEnded,
    DropPages,
    Dropped,
    FrameTooLarge,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    StepError,
)
from streamgen.faults import DeviceDead, ExecutorLost, StepRaised
from streamgen.messages import StepDone, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.config import LoadProgress, MemoryPlan
    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.hub_models import OnProgress
    from streamgen.models.config import ModelConfig
    from streamgen.sampling import Sampling

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW = 600.0  # seconds
LOAD_SILENCE = 60.0  # seconds without a word from a child that loads, before it counts as stuck
_POLL_SECONDS = 0.02


class RestartBudget:
    """How often something may be started again: `count` times in any `seconds`. Pure."""

    def __init__(self, count: int = MAX_RESTARTS, seconds: float = RESTART_WINDOW) -> None:
        self.count = count
        self.seconds = seconds
        self._times: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Whether one more is allowed at `now`; counts it."""
        while self._times and now - self._times[0] >= self.seconds:
            self._times.popleft()
        if len(self._times) >= self.count:
            return False
        self._times.append(now)
        return True


class RemoteRunner:
    """Runs plans in a child process. One thread calls `prepare` and `execute`; `kill` and `cancel` may be anywhere.

    load      what the child is told first
    grammars  those of open requests, by key
    on_death  called in a thread of the runner, with words, when a child ended that was not told to
    """

    def __init__(
        self,
        load: Load,
        *,
        grammars: Mapping[str, TokenGrammar] | None = None,
        budget: RestartBudget | None = None,
        load_silence: float | None = None,
        on_death: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.on_death = on_death
        self._grammars = GrammarSender({} if grammars is None else grammars)
        self._load = load
        self._budget = budget or RestartBudget()
        self._load_silence = LOAD_SILENCE if load_silence is None else load_silence
        self._progress: deque[LoadProgress] = deque(maxlen=64)
        self._changed = threading.Condition()  # over the six below
        self._child: Child | None = None  # the one that is alive, loading or ready
        self._is_ready = False
        self._is_wanted = False
        self._dead: Exception | None = None  # why there will be none any more
        self._keeper: threading.Thread | None = None
        self._holder: Child | None = None  # who has the slots and pages that plans speak of
        self._said: StreamgenError | None = None  # what a child said of the model; the keeper's own
        self.start()

    # ---- the device's thread ----

    def prepare(self) -> None:
        """Return when a step can begin: blocks while a child loads. Raises DeviceDead."""
        if self._holder is None:
            self._take_child()

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """Run one step; blocks until the child is done.

        wake_fd   a file descriptor to which a byte is written once the plan was sent

        Raises:
            StepRaised: the step raised; the child is well.
            ExecutorLost: the child that had the slots and pages is gone. The next plan runs in another.
            DeviceDead: there is no child, and there will be none.
        """
        child = self._holder or self._take_child()
        if child.is_gone:
            self._lose(child)
        try:
            for message in self._grammars.messages(plan, child):
                child.connection.send(message)
            child.connection.send(plan)
            if wake_fd is not None:
                _write(wake_fd)
            answer = child.connection.receive()
        except ConnectionEnded:
            self._lose(child)
        except FrameTooLarge as error:
            raise StepRaised(f"FrameTooLarge: {error}") from None
        if isinstance(answer, StepError):
            raise StepRaised(answer.message)
        assert isinstance(answer, StepDone), f"expected StepDone, got {type(answer).__name__}"
        return answer

    # ---- any thread ----

    def start(self) -> None:
        """Have a child again, after `rest`; returns at once."""
        with self._changed:
            self._is_wanted, self._dead, self._said, self._holder = True, None, None, None
            # A daemon: it waits for a child that ends with this process, and must not hold it up.
            self._keeper = threading.Thread(target=self._keep, name="streamgen-keeper", daemon=True)
            self._keeper.start()

    def wait_ready(self, is_cancelled: Callable[[], bool], on_progress: OnProgress = None) -> None:
        """Block until the child has loaded; `on_progress` is called in this thread.

        Raises:
            LoadError: it could not load, or `is_cancelled` said so.
        """
        while True:
            with self._changed:
                if not self._is_ready and self._dead is None:
                    self._changed.wait(_POLL_SECONDS)
                is_ready, dead = self._is_ready, self._dead
            while on_progress is not None and self._progress:
                on_progress(self._progress.popleft())
            if dead is not None:
                raise dead
            if is_ready:
                return
            check_cancelled(is_cancelled)

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        child = self._child
        return None if child is None else child.pid

    @property
    def is_wanted(self) -> bool:
        """Whether there is to be a child: not after `rest`."""
        return self._is_wanted

    @property
    def is_ready(self) -> bool:
        """Whether a child is there that has loaded."""
        return self._is_ready

    def resident_bytes(self) -> int:
        """Bytes of the child that are in memory; 0 while there is none."""
        child = self._child
        return 0 if child is None else child.resident_bytes()

    def kill(self) -> None:
        """End the child, as one that is stuck; another takes its place, if the budget allows."""
        child = self._child
        if child is not None:
            child.kill()

    def cancel(self) -> None:
        """End the child, and have none until `start`: what waits for it raises. Returns at once; `rest` cleans up."""
        with self._changed:
            self._is_wanted = False
            if self._child is not None:
                self._child.kill()
            self._changed.notify_all()

    def rest(self) -> None:
        """End the child, and have none until `start`. Blocks for some milliseconds; no step runs then. Idempotent."""
        self.cancel()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.join()
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.connection.close()

    def drop_pages(self) -> None:
        """Have the child give its pages back; called while nothing runs. A child that is gone has none."""
        child, self._holder = self._holder, None
        if child is None or child.is_gone:
            return
        try:
            child.connection.send(DropPages())
            answer = child.connection.receive()
        except ConnectionEnded:
            return
        assert isinstance(answer, Dropped), f"expected Dropped, got {type(answer).__name__}"

    def close(self) -> None:
        """End the child for good, once no step runs; idempotent."""
        self.rest()

    # ---- inside ----

    def _take_child(self) -> Child:
        """The child that is ready becomes the one that has slots and pages; blocks while it loads."""
        with self._changed:
            while not self._is_ready:
                if self._dead is not None:
                    raise DeviceDead(str(self._dead))
                if not self._is_wanted:
                    raise DeviceDead("the executor's process was closed")
                self._changed.wait()
            assert self._child is not None, "a child that is ready is there"
            self._holder = self._child
            return self._child

    def _lose(self, child: Child) -> NoReturn:
        self._holder = None
        why = child.how_it_ended()
        child.connection.close()
        raise ExecutorLost(why)

    # ---- the keeper's thread ----

    def _keep(self) -> None:
        """One child after the other, for as long as one is wanted and the budget allows."""
        while (child := self._begin()) is not None:
            if self._bring_up(child):
                self._set_ready()
            child.wait()
            why = child.how_it_ended()
            self._end(child, why)

    def _begin(self) -> Child | None:
        with self._changed:
            if not self._is_wanted or self._dead is not None:
                return None
            try:
                self._child = Child()
            except LoadError as error:
                self._give_up(error)
            return self._child

    def _bring_up(self, child: Child) -> bool:
        """Have it load. Returns whether it did; else it ends by itself, or was killed."""
        try:
            child.connection.send(self._load)
            while not isinstance(message := child.connection.receive(self._load_silence), Loaded):
                if isinstance(message, LoadFailed):
                    self._said = _typed(message)
                    return False
                if isinstance(message, Loading):
                    self._progress.append(message.progress)
        except ConnectionEnded:
            child.kill()  # it may just be silent
            return False
        return True

    def _set_ready(self) -> None:
        with self._changed:
            self._is_ready = True
            self._changed.notify_all()

    def _end(self, child: Child, why: str) -> None:
        """A child has ended: whether another takes its place."""
        with self._changed:
            child.is_gone = True
            if child is not self._holder:  # else who uses it finds out, and closes it
                child.connection.close()
            self._child, self._is_ready = None, False
            is_wanted = self._is_wanted
            if not is_wanted:
                return
            if self._said is not None:  # another child would say the same of the model
                self._give_up(self._said)
            elif not self._budget.take(time.monotonic()):
                count, seconds = self._budget.count, self._budget.seconds
                self._give_up(LoadError(f"{why}; it was replaced {count} times in {seconds:g} s, and is not any more"))
        logger.warning("%s", why)
        self.on_death(why)

    def _give_up(self, error: StreamgenError) -> None:
        self._dead = error
        self._changed.notify_all()


class RemoteModel:
    """A model whose executor is a child process; what `execution.OpenModel` is for one in this process.

    processors   empty for ever: functions of this process cannot be called in another
    """

    supports_processors = False

    def __init__(
        self,
        prepared: Prepared,
        text: OpenText,
        promise: Promise,
        runner: RemoteRunner,
        grammars: dict[str, TokenGrammar],
    ) -> None:
        plan = promise.plan
        self.name = prepared.checkpoint.model_name
        self.config: ModelConfig = prepared.config
        self.plan: MemoryPlan = plan
        self.sampling_defaults: Sampling = prepared.checkpoint.sampling_defaults
        self.tokenizer = text.tokenizer
        self.chat_template = text.templates
        self.limits = limits_of(plan, prepared.options)
        self.processors: dict[int, tuple[Callable[..., object], ...]] = {}
        self.grammars = grammars
        self.formats = text.formats
        self.runner = runner
        self._promise = promise

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the pages back; unless weights are kept, the whole child is ended. Blocking; while nothing runs."""
        if keep_weights:
            self.runner.drop_pages()
            return
        self.runner.rest()
        self._promise.planned = 0

    def wake(self, is_cancelled: Callable[[], bool]) -> None:
        """Have a child with the weights again; nothing to do where they were kept.

        Raises:
            LoadError: the model cannot be loaded again, the memory is not there, or `is_cancelled` said so. It still
                sleeps then.
        """
        if self.runner.is_wanted:
            return
        LEDGER.renew(self._promise)
        self.runner.start()
        try:
            self.runner.wait_ready(is_cancelled)
        except BaseException:
            self.runner.rest()
            self._promise.planned = 0
            raise

    def close(self) -> None:
        """End the child; idempotent."""
        self.runner.close()
        LEDGER.release(self._promise)


def open_remote(options: EngineOptions, on_progress: OnProgress, is_cancelled: Callable[[], bool]) -> RemoteModel:
    """Load a model for `options` into a process of its own. This one reads headers, tokenizer and templates.

    Raises:
        LoadError: as `open_model`; or there can be no such process.
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


def _load(
    prepared: Prepared, promise: Promise, on_progress: OnProgress, is_cancelled: Callable[[], bool]
) -> RemoteModel:
    grammars: dict[str, TokenGrammar] = {}
    runner = RemoteRunner(load_message(prepared, promise.plan), grammars=grammars)
    promise.touched = runner.resident_bytes
    text = Background(lambda: open_text(prepared.checkpoint, prepared.options), daemon=False)
    try:
        runner.wait_ready(is_cancelled, on_progress)
        return RemoteModel(prepared, text.result(is_cancelled), promise, runner, grammars)
    except BaseException as error:
        runner.close()
        if not isinstance(error, LoadCancelled):
            text.join()
        raise


def load_message(prepared: Prepared, plan: MemoryPlan) -> Load:
    """What a child has to know: where the weights are, and the sizes. Nothing of tenants, texts and templates."""
    options = prepared.options
    return Load(
        options=EngineOptions(
            model=str(prepared.checkpoint.path.resolve()),
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            kv_dtype=options.kv_dtype,
            max_context=options.max_context,
            threads=prepared.threads,
            deterministic=options.deterministic,
            offline=True,
        ),
        plan=plan,
    )


def _typed(failed: LoadFailed) -> StreamgenError:
    """The error that the child met, as the class with its code."""
    if failed.code == LoadError.code:
        return LoadError(failed.message)
    classes: tuple[type[StreamgenError], ...] = (*LoadError.__subclasses__(), ConfigError)
    return next((c(failed.message) for c in classes if c.code == failed.code), LoadError(failed.message))


def _write(wake_fd: int) -> None:
    with suppress(BlockingIOError):  # a full pipe will be read
        os.write(wake_fd, b"\0")
