"""One stream of tokens: what is known of it, what of it was planned, what was computed.

Positions count from the prompt's first token. The row at position p computes the keys and values of token p; if it
samples, it gives token p + 1.

    ids            0 ............ len(ids) | num_pending tokens that steps under way will give
    num_computed   0 ...... rows whose results arrived
    num_scheduled  0 ............... rows planned so far: the next plan starts here
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias

from streamgen.messages import Admit, Begin

if TYPE_CHECKING:
    from streamgen.messages import Turn
    from streamgen.scheduling.tenants import Share

AGE_SECONDS = 10.0  # of waiting are worth one step of priority

Rank: TypeAlias = tuple[int, float, int, int]


class State(Enum):
    """Where a sequence is. Its pages and slot are its own only while it runs."""

    HELD = auto()  # a further continuation, whose request's prompt is not computed yet
    WAITING = auto()
    PARKED = auto()  # without a slot while its reader is behind: it waits for him, outside the queue
    RUNNING = auto()
    ENDED = auto()


class Rows:
    """One sequence's part of a planned step, kept until its results arrive.

    run, num_rollbacks   the sequence's when it was planned; other values later mean that the results are void
    drafts     ids that the executor writes at start + 1 ...
    proposals  the drafted tokens among them, which the sampled ones are compared with
    """

    __slots__ = (
        "count",
        "drafts",
        "num_rollbacks",
        "pages",
        "proposals",
        "run",
        "samples",
        "sequence",
        "slot",
        "start",
    )

    def __init__(
        self,
        sequence: Sequence,
        *,
        start: int,
        count: int,
        samples: int,
        pages: tuple[int, ...],
        drafts: tuple[int, ...] = (),
        proposals: tuple[int, ...] = (),
    ) -> None:
        assert sequence.slot is not None, "rows of a sequence without a slot"
        self.sequence = sequence
        self.run = sequence.run
        self.num_rollbacks = sequence.num_rollbacks
        self.slot = sequence.slot
        self.start = start
        self.count = count
        self.samples = samples
        self.pages = pages
        self.drafts = drafts
        self.proposals = proposals

    @property
    def is_void(self) -> bool:
        """Whether the sequence lost its slot since, or went back behind these rows."""
        return self.run != self.sequence.run or self.num_rollbacks != self.sequence.num_rollbacks


class Sequence:
    """The mutable state of one continuation of a request, owned by the scheduler alone.

    rank             the smaller, the more important: (level, deadline, arrival, index). A level is a step of priority,
                     or AGE_SECONDS of having arrived earlier; ranks never change, so queues stay sorted
    share            of its tenant, from when it is admitted
    has_started      it had a slot before, and was charged for its prompt
    is_paused        its reader is behind: it gets no rows
    num_rollbacks    how often drafts did not come true, so that rows planned behind them are void
    is_complete      its grammar says that nothing can follow
    is_drafted_over  the executor may have drafts where it had written forced tokens
    likely           (position, ids): what its grammar thinks will stand from there on
    drafts           (drafted tokens, those of them that came true), over all its runs
    num_losses       executors that died while it ran
    max_tokens       cut to what the context and the page pool can hold
    names            prefix-cache names: the root, then one per full page, as far as they were needed
    num_offered      pages that were offered to the prefix index in this run
    run              grows whenever the sequence loses its slot, so that results under way can be told to be void
    next_score       prompt position whose score is the next to report; None: no scores are wanted
    leader           the sequence whose computed prompt this one can share, until it ran once
    followers        the other way round: those that have yet to begin
    num_shared_hint  how many of `pages` others held when last looked; see admission.py
    """

    __slots__ = (
        "cached_tokens",
        "drafts",
        "followers",
        "has_reported",
        "has_started",
        "ids",
        "index",
        "is_complete",
        "is_drafted_over",
        "is_paused",
        "leader",
        "likely",
        "max_tokens",
        "names",
        "next_score",
        "num_computed",
        "num_losses",
        "num_offered",
        "num_prompt",
        "num_rollbacks",
        "num_scheduled",
        "num_shared_hint",
        "pages",
        "rank",
        "request",
        "run",
        "share",
        "slot",
        "state",
        "stop_ids",
    )

    share: Share

    def __init__(self, request: Admit, *, index: int, arrival: int, max_tokens: int, root: bytes) -> None:
        self.request = request
        self.index = index
        level = int(request.arrival // AGE_SECONDS) - request.priority
        deadline = float("inf") if request.deadline is None else request.deadline
        self.rank: Rank = (level, deadline, arrival, index)
        self.ids = list(request.prompt_ids)
        self.num_prompt = len(self.ids)
        self.max_tokens = max_tokens
        self.stop_ids = frozenset(request.stop_ids)
        self.next_score = None if request.score_from is None or index else max(request.score_from, 1)
        self.names = [root]
        self.leader: Sequence | None = None
        self.followers: list[Sequence] = []
        self.state = State.WAITING
        self.slot: int | None = None
        self.pages: list[int] = []
        self.run = 0
        self.num_scheduled = self.num_computed = 0
        self.num_offered = self.num_shared_hint = 0
        self.num_rollbacks = 0
        self.is_drafted_over = self.is_paused = self.is_complete = False
        self.likely: tuple[int, tuple[int, ...]] = (0, ())
        self.num_losses = 0
        self.drafts = (0, 0)
        self.cached_tokens = 0
        self.has_reported = self.has_started = False

    @property
    def num_pending(self) -> int:
        """Tokens that steps under way will give: the last of these draws the token at `num_scheduled`."""
        return max(0, self.num_scheduled + 1 - len(self.ids)) if self.max_tokens else 0

    @property
    def num_tokens(self) -> int:
        """Length, tokens under way included."""
        return len(self.ids) + self.num_pending

    @property
    def num_outputs(self) -> int:
        """Output tokens that are known."""
        return len(self.ids) - self.num_prompt

    @property
    def is_prompt_computed(self) -> bool:
        """Whether every row of the prompt has run."""
        return self.num_computed >= self.num_prompt

    @property
    def can_decode(self) -> bool:
        """Whether a row may be planned that samples one more token."""
        return not self.is_paused and self.num_tokens - self.num_prompt < self.max_tokens

    @property
    def num_unplanned(self) -> int:
        """Known tokens whose rows have not been planned."""
        return len(self.ids) - self.num_scheduled

    @property
    def num_decode_rows(self) -> int:
        """Rows that the next token costs, drafts aside: more than one where the last tokens were forced."""
        return max(1, len(self.ids) - self.num_scheduled)

    @property
    def max_reusable(self) -> int:
        """Positions that the prefix cache may provide: one must run to sample, and those to be scored must run."""
        limit = len(self.ids) - 1
        if self.next_score is not None and self.next_score < self.num_prompt:
            limit = min(limit, self.next_score - 1)
        return limit

    def start(self, slot: int, pages: list[int], *, num_computed: int, num_shared: int) -> None:
        """Take a slot, with pages that hold the first `num_computed` positions; the first `num_shared` were found."""
        self.state = State.RUNNING
        self.slot = slot
        self.pages = pages
        self.num_computed = self.num_scheduled = num_computed
        self.num_offered = num_shared
        self.num_shared_hint = num_shared
        self.cached_tokens = num_computed

    def leave(self) -> None:
        """Give up slot and pages, which the caller frees, and everything that steps under way will bring."""
        self.slot = None
        self.pages = []
        self.run += 1
        self.num_scheduled = self.num_computed = 0
        self.is_drafted_over = False

    def describe(self) -> Begin:
        """What the executor is told when the sequence takes its slot."""
        assert self.slot is not None, "a sequence begins without a slot"
        sampling = self.request.sampling
        wants_scores = self.next_score is not None and self.next_score < self.num_prompt
        return Begin(
            slot=self.slot,
            ids=tuple(self.ids),
            num_prompt=self.num_prompt,
            sampling=sampling,
            pages=tuple(self.pages),
            stop_ids=self.request.stop_ids,
            min_length=self.num_prompt + sampling.min_tokens if sampling.min_tokens else 0,
            sample_index=self.index,
            score_from=self.next_score if wants_scores else None,
            processors=self.request.request_id if self.request.has_processors else None,
            grammar=self.request.grammar,
        )

    def plan_chunk(self, count: int, pages: tuple[int, ...]) -> Rows:
        """Rows for the next `count` known tokens; the last of all samples."""
        start = self.num_scheduled
        is_last = start + count == len(self.ids)
        samples = 1 if is_last and self.max_tokens > 0 else 0
        self.num_scheduled = start + count
        return Rows(self, start=start, count=count, samples=samples, pages=pages)

    def plan_decode(self, pages: tuple[int, ...], proposals: tuple[int, ...]) -> Rows:
        """Rows for the last token, those forced before it, and drafted ones after it.

        Drafts are taken for true until their results come: the next plan goes on behind them.
        """
        start, count = self.num_scheduled, self.num_decode_rows + len(proposals)
        drafts = (*self.ids[start + 1 :], *proposals) if proposals or self.is_drafted_over else ()
        self.is_drafted_over = False
        self.num_scheduled = start + count
        samples = 1 + len(proposals)
        return Rows(self, start=start, count=count, samples=samples, pages=pages, drafts=drafts, proposals=proposals)

    def take(self, rows: Rows, tokens: tuple[int, ...], turn: Turn | None = None) -> tuple[int, ...]:
        """Account for the results of rows, and for what the grammar says after them; the new output tokens."""
        kept = tokens
        if rows.proposals:
            kept = self._up_to_stop(tokens[: count_agreeing(rows.proposals, tokens) + 1])
        first = rows.start + rows.count - rows.samples + 1  # position of the first token
        self.num_computed = first - 1 + len(kept) if rows.samples else rows.start + rows.count
        new = kept[max(0, len(self.ids) - first) :]  # those that were not forced, and known, before
        self.ids.extend(new)
        if len(kept) < rows.samples:
            self._roll_back()
        return new if turn is None else new + self._take_turn(turn)

    def _roll_back(self) -> None:
        """Rows behind a draft that did not come true are planned, and their pages written, again."""
        self.num_scheduled = self.num_computed
        self.num_rollbacks += 1
        self.is_drafted_over = True

    def _take_turn(self, turn: Turn) -> tuple[int, ...]:
        """Forced tokens, as far as the output may go. Those that steps under way will give are known with them."""
        forced = turn.forced[: self.max_tokens - self.num_outputs]
        self.ids.extend(forced)
        self.is_complete = turn.ends and len(forced) == len(turn.forced)
        self.likely = len(self.ids), turn.likely
        return forced

    def take_likely(self) -> tuple[int, ...]:
        """Ids that may be drafted after the rows that are known, once; () where what came since is something else."""
        position, ids = self.likely
        self.likely = 0, ()
        known = self.ids[position : position + len(ids)]
        if not ids or known != list(ids[: len(known)]):
            return ()
        return ids[self.num_scheduled + self.num_decode_rows - position :]

    def _up_to_stop(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for i, token in enumerate(tokens):
            if token in self.stop_ids:
                return tokens[: i + 1]
        return tokens

    @property
    def finish(self) -> str | None:
        """Why the sequence is at its end, or None."""
        if self.num_outputs and self.ids[-1] in self.stop_ids:
            return "stop"
        if self.is_complete:
            return "complete"
        if self.num_outputs >= self.max_tokens and self.is_prompt_computed:
            return "length"
        return None


def count_agreeing(proposals: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    """How many drafted tokens are what the model drew, up to the first that is not."""
    count = 0
    for proposal, token in zip(proposals, tokens, strict=False):
        if proposal != token:
            break
        count += 1
    return count
