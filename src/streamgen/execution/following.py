"""A sequence and its grammar, where that is no automaton: `csrc/grammar/slots.h` over any `Matcher`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from streamgen.backends.base import Int32Array
    from streamgen.grammar.grammar import Matcher, TokenGrammar
    from streamgen.messages import GrammarUse

MOST_FORCED = 15  # tokens at a time: with the last one drawn they are the rows that any step has room for


class Took(Struct, frozen=True):
    """What a sequence's grammar says once tokens of a step are taken; see `messages.Turn`.

    num_kept   how many of the tokens count; None: all that agree with drafts
    """

    forced: tuple[int, ...] = ()
    ends: bool = False
    num_kept: int | None = None


class Following:
    """Where one sequence is in its grammar.

    held_ids     not allowed in free text before the grammar
    num_prompt   where its output begins
    wants_runs   of forced tokens
    """

    def __init__(
        self,
        grammar: TokenGrammar,
        use: GrammarUse,
        *,
        held_ids: tuple[int, ...],
        num_prompt: int,
        wants_runs: bool,
    ) -> None:
        self._way = _Way(grammar, use, held_ids)
        self._num_prompt = num_prompt
        self._num_taken = 0
        self._wants_runs = wants_runs

    def replay(self, output: Iterable[int]) -> bool:
        """Take the output so far; False if it is not allowed."""
        for token in output:
            if not self._way.advance(token):
                return False
            self._num_taken += 1
        self._way.commit()
        return True

    def fill(self, positions: list[int], ids: Int32Array, masks: NDArray[np.uint32]) -> None:
        """Write what may follow each of these positions, which are in order: masks [n, words].

        ids   [max_context + 1] of the sequence, with the drafts that are verified
        """
        num_drafted = 0
        for position, words in zip(positions, masks, strict=True):
            place = position + 1
            output = place - self._num_prompt
            if output < self._num_taken:
                _allow_only(words, int(ids[place]))  # forced, and taken before
            elif output == self._num_taken + num_drafted:
                self._way.fill(words)
                if position != positions[-1] and self._way.advance(int(ids[place])):
                    num_drafted += 1
            else:
                words[:] = 0xFFFFFFFF  # behind a draft that cannot come true
        self._way.undo(num_drafted)

    def take(self, positions: list[int], drawn: list[int], ids: Int32Array) -> Took | None:
        """Take the tokens drawn after these positions, those after a draft that did not come true left out.

        ids   still with the drafts; forced tokens are written behind the last one

        Returns None if a token is not allowed.
        """
        last: int | None = None
        for i, (position, token) in enumerate(zip(positions, drawn, strict=True)):
            place, is_last = position + 1, i + 1 == len(positions)
            output = place - self._num_prompt
            if token < 0 or output > self._num_taken:
                break
            comes_true = not is_last and int(ids[place]) == token
            if output == self._num_taken:
                if not self._way.advance(token):
                    return None
                self._way.commit()
                self._num_taken += 1
                last = place
                if self._way.ends and not is_last:
                    return Took((), True, i + 1)
            if not comes_true:
                break
        if last is None:
            return Took()
        return Took(self._run_on(last, ids) if self._wants_runs else (), self._way.ends)

    def _run_on(self, place: int, ids: Int32Array) -> tuple[int, ...]:
        """Take what is forced behind `place`, and write it there."""
        run: list[int] = []
        limit = min(MOST_FORCED, len(ids) - 1 - place)
        while len(run) < limit and (forced := self._way.forced(limit - len(run))):
            for token in forced:
                if not self._way.advance(token):
                    raise RuntimeError("a forced token is not allowed")
            run.extend(forced)
        self._way.commit()
        ids[place + 1 : place + 1 + len(run)] = run
        self._num_taken += len(run)
        return tuple(run)


class _Phase(Enum):
    FREE = "free text"
    FIRST = "one of begins_after"
    OPENING = "one of opens_with, or the grammar's first"
    WITHIN = "in the grammar"
    AFTER = "complete: it ends, or begins again"
    ENDED = "nothing can follow"


class _Way:
    """One sequence's way through free text and grammar; what was not committed can be undone."""

    def __init__(self, grammar: TokenGrammar, use: GrammarUse, held_ids: tuple[int, ...]) -> None:
        self._grammar = grammar
        self._use = use
        self._held_ids = held_ids
        self._matcher = grammar.start()
        self._phase = self._first_phase()
        self._before: list[tuple[_Phase, Matcher, bool]] = []  # each token, and whether the matcher took it

    @property
    def ends(self) -> bool:
        """Whether nothing can follow."""
        if self._phase is _Phase.WITHIN and not self._use.repeats:
            return self._matcher.must_stop
        return self._phase is _Phase.ENDED

    def advance(self, token: int) -> bool:
        """Take a token; False, and no change, if it is not allowed."""
        before = (self._phase, self._matcher)
        took = False
        if self._phase is _Phase.ENDED:
            pass
        elif self._begins(token):
            self._phase, self._matcher = _Phase.WITHIN, self._grammar.start()
        elif self._phase is _Phase.FREE:
            pass
        elif self._phase is _Phase.OPENING and token in self._use.opens_with:
            self._phase = _Phase.FREE
        elif self._phase is _Phase.FIRST:
            return False
        else:
            was_loose, was_at_end = self._is_loose, self.ends
            took = self._matcher.advance(token)
            if took:
                self._phase = self._settled(is_stop=token in self._grammar.vocabulary.stop_ids)
            elif was_loose and not self._use.is_forced:
                self._phase = _Phase.FREE
            elif was_at_end:
                self._phase = _Phase.ENDED  # a step was under way already: what it draws does not count
            else:
                return False
        self._before.append((*before, took))
        return True

    def commit(self) -> None:
        """None of the tokens so far will be undone."""
        self._before.clear()

    def undo(self, count: int) -> None:
        """Take the last `count` tokens back."""
        for _ in range(count):
            took_matcher = self._matcher
            self._phase, self._matcher, took = self._before.pop()
            if took:
                assert took_matcher is self._matcher, "a matcher that took a token is still there"
                self._matcher.rollback(1)

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Write what may follow: [words]."""
        use = self._use
        if self._phase is _Phase.ENDED or (self._is_loose and not use.is_forced):
            words[:] = 0xFFFFFFFF
        elif self._phase is _Phase.FREE:
            words[:] = 0xFFFFFFFF
            for token in self._held_ids:
                words[token >> 5] &= ~np.uint32(1 << (token & 31))
        elif self._phase is _Phase.FIRST:
            words[:] = 0
            _allow(words, use.begins_after)
        else:
            self._matcher.fill_mask(words)
            if self._phase is _Phase.OPENING:
                _allow(words, use.opens_with)
            elif self._phase is _Phase.AFTER or self._is_loose:
                _allow(words, use.begins_after)

    def forced(self, limit: int) -> tuple[int, ...]:
        """Tokens that follow without a choice; once they are taken there may be more."""
        if self._phase is _Phase.FIRST:
            return self._use.begins_after if len(self._use.begins_after) == 1 else ()
        if self._phase is not _Phase.WITHIN or self._is_loose:
            return ()
        return self._matcher.forced_run(1 if self._use.repeats else limit)

    def _first_phase(self) -> _Phase:
        if not self._use.begins_after:
            return _Phase.WITHIN
        if self._use.is_forced:
            return _Phase.FIRST
        return _Phase.OPENING if self._use.opens_with else _Phase.FREE

    @property
    def _is_loose(self) -> bool:
        """Whether the output is complete, so that something else than the grammar may follow."""
        return self._phase is _Phase.WITHIN and self._use.repeats and self._matcher.may_stop

    def _begins(self, token: int) -> bool:
        may_begin = self._phase in (_Phase.FREE, _Phase.FIRST, _Phase.AFTER) or self._is_loose
        return may_begin and token in self._use.begins_after

    def _settled(self, *, is_stop: bool) -> _Phase:
        """The phase after the matcher took a token."""
        is_loose = self._use.repeats and not self._use.is_forced
        if is_stop:
            return _Phase.FREE if is_loose and self._phase is _Phase.WITHIN else _Phase.ENDED
        if not self._use.repeats or not self._matcher.must_stop:
            return _Phase.WITHIN
        return _Phase.FREE if is_loose else _Phase.AFTER


def _allow(words: NDArray[np.uint32], ids: Iterable[int]) -> None:
    for token in ids:
        words[token >> 5] |= np.uint32(1 << (token & 31))


def _allow_only(words: NDArray[np.uint32], token: int) -> None:
    words[:] = 0
    _allow(words, (token,))
