"""The grammars of the running sequences, as the executor sees them.

Automata live in C++ (`csrc/grammar/slots.h`): the sampler asks for their masks in the pool's threads, and Python hears
once a step what has to be told. Any other `TokenGrammar` goes its own way here (`following.py`), with its masks written
before each step; that costs the sequences that have one, and nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  # a field of a Struct
from itertools import groupby, starmap
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from streamgen.backends.base import ANY_TOKEN, GRAMMAR, Int32Array
from streamgen.execution.following import Following
from streamgen.grammar.tokens import AutomatonTokens
from streamgen.messages import Fault, Turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    import streamgen._cpu as _cpu
    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.messages import Begin, GrammarUse

_CODE = "generation_error"
_NUMBERED_LATER = 0  # a SAMPLE_ROW.mask that `make_masks` replaces
_NO_MASKS: NDArray[np.uint32] = np.zeros((0, 0), np.uint32)
_NO_ROWS: NDArray[np.intp] = np.zeros(0, np.intp)
_NOT_ALLOWED = "grammar: a token was drawn that it does not allow"


class Drawn:
    """The rows of a step, and the tokens that were drawn from them. Addresses are looked up once.

    rows     SAMPLE_ROW [n]
    drawn    int32 [n]
    tokens   int32 [num_slots, max_context + 1]
    places   int32 [n]: each row's sequence in the plan; None: row by row
    """

    def __init__(
        self, rows: NDArray[np.void], drawn: Int32Array, tokens: Int32Array, places: Int32Array | None = None
    ) -> None:
        self.rows = rows
        self.drawn = drawn
        self.tokens = tokens
        self.places = places
        self.addresses = (
            rows.ctypes.data,
            len(rows),
            drawn.ctypes.data,
            0 if places is None else places.ctypes.data,
            tokens.ctypes.data,
            tokens.shape[1],
        )

    def place(self, row: int) -> int:
        """The place in the plan of a row's sequence."""
        return row if self.places is None else int(self.places[row])


class Taken(Struct):
    """What grammars say once a step's tokens are taken.

    cuts   place in the plan -> how many of the sequence's tokens count
    """

    turns: tuple[Turn, ...] = ()
    faults: tuple[Fault, ...] = ()
    cuts: Mapping[int, int] = {}


NOTHING_TAKEN = Taken()


class Grammars:
    """The grammar of each slot that has one. Owned by the device thread.

    table       key -> grammar; owned by who accepts requests
    vocab_size  logits of a row
    automata    those that are automata; None until there is one
    """

    def __init__(self, table: Mapping[str, TokenGrammar], *, num_slots: int, vocab_size: int) -> None:
        self._table = table
        self._num_slots = num_slots
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._following: dict[int, Following] = {}
        self._failed: dict[int, str] = {}  # slot -> why its sequence cannot go on
        self.automata: _cpu.GrammarSlots | None = None

    def begin(self, begin: Begin) -> int:
        """A sequence takes a slot, with or without a grammar. Returns its SAMPLE_ROW.mask."""
        self._following.pop(begin.slot, None)
        self._failed.pop(begin.slot, None)
        if self.automata is not None:
            self.automata.drop(begin.slot)
        if begin.grammar is None:
            return ANY_TOKEN
        try:
            return self._begin(begin, begin.grammar)
        except Exception as error:  # of a grammar, which may be anybody's: it is the fault of this sequence alone
            self._failed[begin.slot] = f"grammar: {type(error).__name__} where a sequence began with it"
            return ANY_TOKEN

    def propose(self, slot: int, position: int, ids: tuple[int, ...]) -> None:
        """Tokens to verify, written from `position` on; some of them may be known already."""
        if self.automata is not None:
            self.automata.propose(slot, position, ids)

    def concern(self, rows: NDArray[np.void]) -> bool:
        """Whether any of these rows, SAMPLE_ROW [n], is of a sequence with a grammar."""
        return bool((rows["mask"] != ANY_TOKEN).any()) or any(slot in self._failed for slot in rows["slot"].tolist())

    def make_masks(self, rows: NDArray[np.void], tokens: Int32Array) -> NDArray[np.uint32]:
        """Masks of the rows whose grammars are no automata: [num_masks, ceil(vocab / 32)].

        rows    SAMPLE_ROW [n]: their `mask` is written
        tokens  [num_slots, max_context + 1], drafts in place
        """
        where = self._followed(rows)
        rows["mask"][rows["mask"] >= 0] = ANY_TOKEN  # among them sequences that have failed
        if not len(where):
            return _NO_MASKS
        masks = np.empty((len(where), self._num_words), np.uint32)
        rows["mask"][where] = np.arange(len(where), dtype=np.int32)
        self.fill_masks(rows, tokens, masks)
        return masks

    def fill_masks(self, rows: NDArray[np.void], tokens: Int32Array, masks: NDArray[np.uint32]) -> None:
        """Write the masks of `make_masks` for the positions that the rows have now."""
        for first, last in self._stretches(rows):
            slot, mask = int(rows[first]["slot"]), int(rows[first]["mask"])
            chosen = masks[mask : mask + last - first]
            try:
                self._following[slot].fill(rows["position"][first:last].tolist(), tokens[slot], chosen)
            except Exception as error:
                self._fail(slot, f"grammar: {type(error).__name__} where its mask was made")
                chosen[:] = 0xFFFFFFFF

    def take(self, drawn: Drawn) -> Taken:
        """Take the tokens of a step. Forced ones are written behind them."""
        turns: list[Turn] = []
        faults: list[Fault] = []
        cuts: dict[int, int] = {}
        if self.automata is not None:
            said, failed, ends = self.automata.take(*drawn.addresses)
            turns.extend(starmap(Turn, said))
            faults.extend(Fault(place, _CODE, _NOT_ALLOWED) for place in failed)
            cuts.update(ends)
        if self._following or self._failed:
            self._take_followed(drawn, turns, cuts)
            faults.extend(self._faults(drawn))
        return Taken(tuple(turns), tuple(faults), cuts) if turns or faults or cuts else NOTHING_TAKEN

    def _begin(self, begin: Begin, use: GrammarUse) -> int:
        grammar = self._table.get(use.key)
        if grammar is None:
            return self._refuse(begin, "grammar: expected it in the model's table, it is not there any more")
        if grammar.vocabulary.vocab_size != self._vocab_size:
            sizes = f"{self._vocab_size} tokens, got {grammar.vocabulary.vocab_size}"
            return self._refuse(begin, f"grammar: expected one over a vocabulary of {sizes}")
        # Free text before a grammar must not end the output: it would not obey the grammar then.
        held = begin.stop_ids if use.begins_after and not use.repeats else ()
        if isinstance(grammar, AutomatonTokens):
            self._enter(begin, use, grammar.table, held)
            return GRAMMAR
        following = Following(
            grammar,
            use,
            held_ids=held,
            num_prompt=begin.num_prompt,
            wants_runs=begin.sampling.logprobs is None and begin.processors is None,
        )
        if not following.replay(begin.ids[begin.num_prompt :]):
            return self._refuse(begin, _NOT_ALLOWED)
        self._following[begin.slot] = following
        return _NUMBERED_LATER

    def _enter(self, begin: Begin, use: GrammarUse, table: _cpu.MaskTable, held: tuple[int, ...]) -> None:
        if self.automata is None:
            import streamgen._cpu as _cpu

            self.automata = _cpu.GrammarSlots(self._num_slots)
        # An output that is not allowed fails its sequence at the first step.
        self.automata.begin(
            begin.slot,
            table,
            begin.num_prompt,
            begin.ids[begin.num_prompt :],
            use.begins_after,
            use.opens_with,
            use.is_forced,
            use.repeats,
            held,
            begin.sampling.logprobs is None,
        )

    def _refuse(self, begin: Begin, reason: str) -> int:
        self._failed[begin.slot] = reason
        return ANY_TOKEN

    def _fail(self, slot: int, reason: str) -> None:
        del self._following[slot]
        self._failed[slot] = reason

    def _followed(self, rows: NDArray[np.void]) -> NDArray[np.intp]:
        """The rows that draw a token under a grammar which is no automaton."""
        if not self._following:
            return _NO_ROWS
        return np.flatnonzero(np.isin(rows["slot"], list(self._following)) & (rows["target"] < 0))

    def _stretches(self, rows: NDArray[np.void]) -> list[tuple[int, int]]:
        """Those rows as [first, last), one stretch for each sequence."""
        slots = rows["slot"].tolist()
        groups = groupby(self._followed(rows).tolist(), key=slots.__getitem__)
        return [(indices[0], indices[-1] + 1) for indices in (list(group) for _, group in groups)]

    def _take_followed(self, drawn: Drawn, turns: list[Turn], cuts: dict[int, int]) -> None:
        rows = drawn.rows
        for first, last in self._stretches(rows):
            slot, place = int(rows[first]["slot"]), drawn.place(first)
            positions, ids = rows["position"][first:last].tolist(), drawn.drawn[first:last].tolist()
            try:
                took = self._following[slot].take(positions, ids, drawn.tokens[slot])
            except Exception as error:
                self._fail(slot, f"grammar: {type(error).__name__} where it took a token")
                continue
            if took is None:
                self._fail(slot, _NOT_ALLOWED)
                continue
            if took.forced or took.ends:
                turns.append(Turn(place, took.forced, took.ends))
            if took.num_kept is not None:
                cuts[place] = took.num_kept

    def _faults(self, drawn: Drawn) -> list[Fault]:
        """Of the sequences that cannot go on, once each."""
        places: dict[int, int] = {}
        for row, slot in enumerate(drawn.rows["slot"].tolist()):
            if slot in self._failed:
                places.setdefault(slot, drawn.place(row))
        return [Fault(place, _CODE, self._failed[slot]) for slot, place in places.items()]
