"""What must be true of a scheduler whatever happens, read from its own books; only here is looked inside."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from streamgen.scheduling.sequence import State

if TYPE_CHECKING:
    from streamgen.messages import StepPlan
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.scheduler import Scheduler


class InvariantBroken(AssertionError):
    """Something is not as it has to be; the text says what."""


def require(holds: bool, what: str) -> None:
    """Something that must hold.

    Raises:
        InvariantBroken: it does not.
    """
    if not holds:
        raise InvariantBroken(what)


def check_plan(plan: StepPlan, limits: Limits) -> None:
    """A plan keeps to the budget of rows, and names each slot once."""
    require(sum(plan.counts) <= limits.step_tokens, f"step {plan.step}: more rows than the budget")
    require(len(set(plan.slots)) == len(plan.slots) <= limits.max_running, f"step {plan.step}: a slot twice")
    require(min(plan.counts) >= 1, f"step {plan.step}: a sequence without rows")


def check_sums(scheduler: Scheduler) -> None:
    """free + cached + held = total, where who holds is counted by tables; quick enough for every step."""
    cache = scheduler._cache
    refs = cache.pool._refs
    num_held = len(refs) - refs.count(0)
    num_holders = sum([len(sequence.pages) for sequence in scheduler._batch]) + cache.pins.num_pages
    require(num_held + cache.pool.num_free + cache.pool.num_cached == len(refs), "free + cached + held is not total")
    require(sum(refs) == num_holders, "pages have other holders than running sequences and pins")


def check_books(scheduler: Scheduler) -> None:
    """Every page is in one state, every reference has its table, every sequence is in one place."""
    cache, batch = scheduler._cache, scheduler._batch
    pool, running = cache.pool, [*batch]
    holders = Counter(page for table in (*(s.pages for s in running), *cache.pins) for page in table)
    require(dict(pool.held_pages()) == dict(holders), "reference counts are not the number of tables")
    everywhere = [*pool.free_pages(), *pool.cached_pages(), *holders]
    require(len(everywhere) == len(set(everywhere)) == pool.num_total, "a page is in two states, or in none")
    require(all(pool.is_indexed(page) for page in pool.cached_pages()), "a cached page cannot be found")
    require(not any(pool.is_indexed(page) for page in pool.free_pages()), "a free page can be found")
    slots = [*batch.free_slots, *(s.slot for s in running)]
    require(
        sorted(slot for slot in slots if slot is not None) == [*range(len(slots))], "a slot is lost, or given twice"
    )
    require(all(s.state is State.RUNNING for s in running), "who has a slot is not running")
    waiting = [*batch.queue]
    require(all(s.state is State.WAITING and not s.pages for s in waiting), "who waits is not waiting, or holds pages")
    require(len(batch.queue) == len(waiting), "the length of the queue is wrong")


def check_idle(scheduler: Scheduler) -> None:
    """Nothing is open: nothing is held but pins."""
    stats = scheduler.stats()
    require(scheduler.num_open == scheduler.num_in_flight == 0, "requests or plans are open while nothing happens")
    require((stats.running, stats.waiting, stats.paused) == (0, 0, 0), f"sequences are left: {stats}")
    require(stats.pages_used == 0, f"{stats.pages_used} pages are held while nothing runs")
