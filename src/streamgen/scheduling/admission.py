"""Whether a request may wait, and whether the next one may start: refusals, and a prediction of memory.

A request is started only if the pages that all running sequences will hold at their common peak still fit. The peak is
that of LightLLM's router: sequences grow by a token per step until they end, so the total is largest just before one of
them ends, and it is enough to look there. Who is paused is counted as if it went on: it will, or gives way. How long
outputs will be is learned from those that ended (the idea of Past-Future scheduling, ASPLOS 2025). A wrong guess costs
a preemption, never a result.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from streamgen.messages import Admit, Refused
from streamgen.scheduling.sequence import Sequence, State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from streamgen.config import Tenant
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.pages import PagePool

# Results come when the next step is planned already: a sequence holds its pages a step longer than it grows.
RESULT_LAG = 1


class Growth(NamedTuple):
    """Tokens that a sequence holds alone now, and how many it will still add, one per step, before it ends."""

    held: int
    growth: int


def predicted_peak_pages(growths: Iterable[Growth], page_size: int) -> int:
    """The most pages that will be held at one time.

    In order of decreasing growth, the first i sequences are those alive when the i-th ends, and each has grown by that
    one's growth. The sum of ceil((held + t) / page_size) over them is kept as pages and a histogram of remainders.
    """
    peak = num_pages = 0
    remainders = [0] * page_size
    for num_alive, (held, growth) in enumerate(sorted(growths, key=_by_growth, reverse=True), 1):
        pages, remainder = divmod(held, page_size)
        num_pages += pages
        remainders[remainder] += 1
        more, part = divmod(growth, page_size)
        # ceil((remainder + part) / page_size) is 0 if both are 0, 2 if they pass a page, else 1.
        partial = num_alive + sum(remainders[page_size - part + 1 :]) if part else num_alive - remainders[0]
        peak = max(peak, num_pages + num_alive * more + partial)
    return peak


def _by_growth(item: Growth) -> int:
    return item.growth


class OutputLengths:
    """The lengths of the outputs that ended last, and what they tell of one that is being written.

    The prediction is a high quantile of those longer than the output already is, so that it fails seldom and grows with
    the output. Until `min_known` lengths are known, at least `guess` tokens are expected of everyone, which for a
    request with a small `max_tokens` means all of them.
    """

    def __init__(self, *, capacity: int = 512, quantile: float = 0.9, guess: int = 256, min_known: int = 32) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._capacity = capacity
        self._quantile = quantile
        self._guess = guess
        self._min_known = min_known

    def add(self, length: int) -> None:
        """An output ended with this many tokens."""
        if len(self._recent) == self._capacity:
            oldest = self._recent.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._recent.append(length)
        insort(self._sorted, length)

    def predict(self, num_outputs: int, max_tokens: int) -> int:
        """How long an output of `num_outputs` tokens so far is expected to become."""
        longer = bisect_right(self._sorted, num_outputs)
        num_longer = len(self._sorted) - longer
        if num_longer:
            expected = self._sorted[longer + int(self._quantile * (num_longer - 1) + 0.5)]
        else:
            expected = num_outputs + num_outputs // 4 + 1
        if len(self._sorted) < self._min_known:
            expected = max(expected, self._guess)
        return min(expected, max_tokens)


class Admission:
    """Predicts the peak of pages of a set of sequences: those that run, and maybe a candidate with its prefix pages."""

    def __init__(self, limits: Limits, pool: PagePool) -> None:
        self._limits = limits
        self._pool = pool
        self.lengths = OutputLengths()

    def fits(
        self, running: Iterable[Sequence], candidate: Sequence, *, num_pinned: int = 0, with_followers: bool = True
    ) -> bool:
        """Whether all of them can run side by side to their ends, beside pinned pages, as far as can be told."""
        sequences = [*running, candidate]
        if num_pinned + self._most_pages(sequences) <= self._limits.num_pages:
            return True  # whatever becomes of them
        peak = self.predicted_peak(sequences, with_followers=with_followers)
        return peak + num_pinned <= self._limits.num_pages

    def _most_pages(self, sequences: Iterable[Sequence]) -> int:
        """Pages if all of them, and their followers, wrote as much as they may and shared nothing."""
        size = self._limits.page_size
        return sum([((s.num_prompt + s.max_tokens) // size + 1) * (1 + len(s.followers)) for s in sequences])

    def predicted_peak(self, sequences: Collection[Sequence], *, with_followers: bool = True) -> int:
        """The most pages that they will hold at one time; those whose prompts are not computed in the order they run.

        Pages with several holders are counted once, and as if they were held until all end. `with_followers` tells
        whether the followers that leaders among them have not yet shared their prompt with are counted too.
        """
        rows_per_step = max(1, self._limits.step_tokens - len(sequences))
        num_shared, rows_ahead = self._pool.num_shared, 0
        growths: list[Growth] = []
        for sequence in sequences:
            wait = RESULT_LAG
            rows = self._prompt_rows(sequence)
            if rows:
                rows_ahead += rows
                wait += -(-rows_ahead // rows_per_step)
            shared = _count_shared(sequence, self._pool)
            if with_followers and sequence.followers:
                growths += self._follower_growths(sequence, wait)
                whole = _shareable_pages(sequence, self._limits.page_size)
                num_shared += max(0, whole - shared)
                shared = max(shared, whole)
            growths.append(self._growth(sequence, shared, wait))
        return num_shared + predicted_peak_pages(growths, self._limits.page_size)

    def _prompt_rows(self, sequence: Sequence) -> int:
        """Rows that have to run before the sequence decodes."""
        if sequence.state is State.WAITING:
            return max(1, sequence.num_tokens - len(sequence.pages) * self._limits.page_size)
        rows = sequence.num_tokens - sequence.num_scheduled
        return rows if rows > 1 or sequence.num_scheduled < sequence.num_prompt else 0

    def _growth(self, sequence: Sequence, num_shared: int, wait: int) -> Growth:
        expected = self.lengths.predict(sequence.num_tokens - sequence.num_prompt, sequence.max_tokens)
        end = max(sequence.num_prompt, sequence.num_prompt + expected - 1)  # the last token is never a row
        # All others have had their rows of the step that is being planned; a candidate may sample in it.
        num_tokens = sequence.num_tokens + (1 if sequence.state is State.WAITING else 0)
        held = min(num_tokens, end)
        return Growth(max(0, held - num_shared * self._limits.page_size), end - held + wait)

    def _follower_growths(self, leader: Sequence, wait: int) -> list[Growth]:
        """Sequences that will begin when the leader's prompt is computed, with all but its last page shared."""
        held = leader.num_prompt - _shareable_pages(leader, self._limits.page_size) * self._limits.page_size
        growth = max(0, self.lengths.predict(0, leader.max_tokens) - 1) + wait + RESULT_LAG
        return [Growth(held, growth)] * len(leader.followers)


def _shareable_pages(leader: Sequence, page_size: int) -> int:
    return (leader.num_prompt - 1) // page_size


def _count_shared(sequence: Sequence, pool: PagePool) -> int:
    """How many of a sequence's first pages have other holders too.

    Who holds a page of a chain holds those before it, so they are a prefix of the table; its end is looked for from
    where it was last time.
    """
    pages, count = sequence.pages, min(sequence.num_shared_hint, len(sequence.pages))
    while count < len(pages) and pool.num_holders(pages[count]) > 1:
        count += 1
    while count and pool.num_holders(pages[count - 1]) == 1:
        count -= 1
    sequence.num_shared_hint = count
    return count


def refusal(request: Admit, limits: Limits) -> Refused | None:
    """Why a request can never run, or None."""
    num_prompt = len(request.prompt_ids)
    if not num_prompt or request.num_sequences < 1:
        wrong = "prompt: expected >= 1 token, got 0" if not num_prompt else _bad_count(request.num_sequences)
        return Refused(request_id=request.request_id, code="invalid_request", message=wrong)
    capacity = min(limits.max_context, limits.num_pages * limits.page_size)
    needed = num_prompt + (1 if request.max_tokens else 0)
    if needed <= capacity:
        return None
    return Refused(
        request_id=request.request_id,
        code="prompt_too_long",
        message=f"prompt: expected <= {capacity - needed + num_prompt} tokens, got {num_prompt}; the context is "
        f"{limits.max_context} tokens, the cache {limits.num_pages} pages of {limits.page_size}. Shorten the prompt, "
        "or open the engine with more kv_memory or a larger max_context",
        details={"prompt_tokens": num_prompt, "max_context": capacity},
    )


def _bad_count(num_sequences: int) -> str:
    return f"num_sequences: expected >= 1, got {num_sequences}"


def overload(request: Admit, limits: Limits, *, num_waiting: int, num_running: int) -> Refused | None:
    """Whether the queue is full: `max_queued` sequences wait, not counting those for which a slot is free."""
    num_free = limits.max_running - num_running
    if num_waiting < limits.max_queued + num_free:
        return None
    return Refused(
        request_id=request.request_id,
        code="engine_overloaded",
        message=f"queue: expected < {limits.max_queued} waiting beyond {limits.max_running} running, got {num_waiting} "
        f"waiting and {num_running} running; retry later, or open the engine with a larger max_queued",
    )


def tenant_overload(request: Admit, limits: Limits, tenant: Tenant, *, num_open: int) -> Refused | None:
    """Whether its tenant has too much open. A request of several sequences may always be its tenant's only one."""
    if tenant.max_queued is None:
        return None
    most = (tenant.max_running or limits.max_running) + tenant.max_queued
    if num_open == 0 or num_open + request.num_sequences <= most:
        return None
    return Refused(
        request_id=request.request_id,
        code="rate_limited",
        message=f"tenant {request.tenant!r}: expected <= {most} open sequences (its max_running + max_queued), got "
        f"{num_open + request.num_sequences}; try again later",
    )


def output_limit(request: Admit, limits: Limits) -> int:
    """`max_tokens`, cut so that the sequence never passes the context, nor all pages when it runs alone.

    The last token is never a row, so it needs no place in a page.
    """
    num_prompt = len(request.prompt_ids)
    in_context = limits.max_context - num_prompt
    in_pages = limits.num_pages * limits.page_size + 1 - num_prompt
    return max(0, min(request.max_tokens, in_context, in_pages))
