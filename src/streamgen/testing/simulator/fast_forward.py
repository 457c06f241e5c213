"""Many steps at once, where nothing can happen but that everybody who runs draws another token.

In a replay most steps are like that: no prompt is being computed, nobody can start, nobody comes or ends, and there
are pages. Such a step leaves the same behind whether it is planned and accounted for or not: so many tokens more, the
next pages of the pool, in the same order. Here that is written down for a run of steps in time proportional to the
sequences and the pages, not to the rows; the plan that is at the device afterwards is made by the scheduler itself.

NOTE: this writes into the scheduler's own state, and so has to know what a step does to it. That nothing differs, to
the last bit, is tested over random loads: every report and the scheduler's whole state, with and without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.scheduling.tenants import OUTPUT_COST

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.messages import StepPlan
    from streamgen.scheduling.scheduler import Scheduler
    from streamgen.scheduling.sequence import Sequence
    from streamgen.scheduling.tenants import Share
    from streamgen.testing.simulator.driver import Driver

MIN_STEPS = 2  # fewer are not worth the looking
MAX_STEPS = 1 << 20

Groups = list[list[tuple["Sequence", int]]]  # with the position of the row that is at the device


class FastForward:
    """Lets a driver's time pass while sequences only decode.

    ends    by slot: position of the row that samples a sequence's last token
    token   what every row before that samples
    over    is called at the end of each step that was left out, with its rows and the pages that are held
    """

    def __init__(
        self, driver: Driver, scheduler: Scheduler, *, ends: list[int], token: int, over: Callable[[int, int], None]
    ) -> None:
        self._driver, self._scheduler = driver, scheduler
        self._ends, self._token, self._over = ends, token, over
        self._batch, self._cache = scheduler._batch, scheduler._cache
        limits = scheduler._limits
        self._size, self._has_index = limits.page_size, limits.prefix_cache

    def skip(self) -> int:
        """Go on as long as nothing happens. To be called between turns; how many steps were left out."""
        driver = self._driver
        if len(driver.plans) != 1 or driver.plans[0][1] >= driver.next_time or not self._is_steady(driver.plans[0][0]):
            return 0
        running = list(self._batch.decoding.values())
        most = self._steps_without_end(running)
        if most < MIN_STEPS:
            return 0
        groups = self._group(running)
        count = self._pass_time([len(group) for group in groups], len(running), most)
        if count:
            self._advance(running, groups, count)
        return count

    def _is_steady(self, plan: StepPlan) -> bool:
        """Whether the plan under way is a row of everybody who runs, and the next would be that again."""
        batch = self._batch
        if batch.prefilling or batch.num_paused or self._scheduler._suspects or batch.queue.are_several:
            return False
        if plan.begins or plan.copies or plan.drafts or plan.slots != (*batch.decoding,) or max(plan.counts) != 1:
            return False
        head = batch.queue.head()
        return head is None or batch.is_start_barred or head is batch.misfit or not batch.free_slots

    def _steps_without_end(self, running: list[Sequence]) -> int:
        """How many steps go by in which nobody ends; 0 where somebody's first token is still to come."""
        most = MAX_STEPS
        for sequence in running:
            num_outputs = sequence.num_outputs
            assert sequence.slot is not None, "a sequence runs without a slot"
            left = min(self._ends[sequence.slot] - sequence.num_computed, sequence.max_tokens - num_outputs - 1)
            if left < most:
                most = left
            if most < MIN_STEPS or not num_outputs or sequence.num_decode_rows > 1:
                return 0
        return most

    def _group(self, running: list[Sequence]) -> Groups:
        """Sequences by the steps after which a row is the first of a page; in the order in which they are planned."""
        groups: Groups = [[] for _ in range(self._size)]
        for sequence in running:
            groups[-sequence.num_computed % self._size].append((sequence, sequence.num_computed))
        return groups

    def _pass_time(self, starting: list[int], num_running: int, most: int) -> int:
        """Let steps go by; how many. `starting` says how many sequences begin a page, by the number of steps ahead."""
        driver, pool, size, count = self._driver, self._cache.pool, self._size, 0
        plan, end = driver.plans[0]
        context = sum(plan.starts) + num_running
        num_available, num_held = pool.num_available, pool.num_held
        while count < most and end < driver.next_time:
            num_new = starting[(count + 1) % size]  # pages of the plan that is made while this step runs
            if num_new > num_available:
                break
            num_available, num_held, context = num_available - num_new, num_held + num_new, context + num_running
            driver.charge(driver.cost.seconds_at(num_running, context))
            driver.now, end = end, driver.free_at
            self._over(num_running, num_held)
            count += 1
        driver.plans[0] = plan, end
        return count

    # ---- what the steps leave behind ----------------------------------------------------------------------------

    def _advance(self, running: list[Sequence], groups: Groups, count: int) -> None:
        """All results have come of `count` steps; the scheduler plans the one that is at the device by then."""
        starts = [sequence.num_computed for sequence in running]
        for number in range(1, count):
            group = groups[number % self._size]
            for sequence, start in group:
                self._cache.extend(sequence, start + number + 1)
            # Its page before was full only when this step was planned already.
            self._offer(group, number)
        for sequence, start in zip(running, starts, strict=True):
            self._compute(sequence, start + count)
            sequence.num_scheduled = start + count
        self._count(len(running) * count, running[0].share)
        self._plan_next(count, len(running))
        self._offer(groups[count % self._size], count)

    def _compute(self, sequence: Sequence, end: int) -> None:
        """All rows before `end` have run, and the last has sampled."""
        sequence.ids += (self._token,) * (end + 1 - len(sequence.ids))
        sequence.num_computed = end

    def _offer(self, group: list[tuple[Sequence, int]], number: int) -> None:
        if self._has_index:
            for sequence, start in group:
                self._compute(sequence, start + number)
                self._cache.offer(sequence)

    def _count(self, num_rows: int, share: Share) -> None:
        counters = self._scheduler._counters
        counters.computed_tokens += num_rows
        counters.output_tokens += num_rows
        share.counter += OUTPUT_COST * num_rows / share.weight

    def _plan_next(self, count: int, num_running: int) -> None:
        scheduler, driver = self._scheduler, self._driver
        step = scheduler._in_flight.pop()
        scheduler._counters.steps = step.number + count
        plan = scheduler.plan()
        assert plan is not None and len(plan.slots) == num_running, "steps were left out in which something happened"
        driver.plans[0] = plan, driver.plans[0][1]
