"""An executor without arithmetic: what it answers is a hash of what it reads back through slots and page tables.

The "keys and values" of position p are a hash of those of position p - 1, read through the table, of the token id and
of p. A sampled token is a hash of those of all positions up to its row's, and of (seed, sample index, position). So a
wrong page, a stale prefix, a missed copy, a chunk that starts too late, or a row before its predecessor change every
token after it.
`solo_output` says what a request must answer, whoever else runs.
"""

from __future__ import annotations

from streamgen.messages import Admit, Begin, GrammarUse, StepDone, StepPlan, TokenLogprobs, Turn
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.sequence import count_agreeing

VOCABULARY = 61
POISON = -1


def next_state(previous: int, token: int, position: int) -> int:
    return hash((previous, token, position)) & 0xFFFFFFFF


def forcing(period: int, run: int, *, end: int | None = None, guess: int = 0) -> GrammarUse:
    """A grammar in which the last `run` of every `period` output tokens are forced, and which ends after `end`.

    guess   how many tokens it says are likely, whenever there is a choice; a part of them never comes
    """
    return GrammarUse(key=f"{period} {run} {end or 0} {guess}")


class Forcing:
    """What the key of such a grammar says."""

    def __init__(self, use: GrammarUse) -> None:
        self.period, self.run, self.end, self.guess = (int(word) for word in use.key.split())

    def forced(self, index: int) -> int | None:
        """The only token that may stand there in the output; None where there is a choice."""
        return 10 + index % 40 if index % self.period >= self.period - self.run else None

    def turn(self, i: int, length: int) -> Turn:
        """What there is to say when the output has this length."""
        tokens: list[int] = []
        while (token := self.forced(length + len(tokens))) is not None and length + len(tokens) != self.end:
            tokens.append(token)
        ends = length + len(tokens) == self.end
        first = length + len(tokens)
        guessed = tuple((first + k) % 3 for k in range(self.guess))
        return Turn(i, tuple(tokens), ends, () if ends else guessed)


def draw(states: list[int], *, begin: Begin, position: int) -> int:
    """The token after the row at `position`; ids that may not be drawn yet are drawn again."""
    if begin.grammar is not None:
        grammar, index = Forcing(begin.grammar), position + 1 - begin.num_prompt
        forced = grammar.forced(index)
        if forced is not None:
            return forced
        if grammar.guess and hash((states[-1], position)) % 3:
            return index % 3  # as is guessed
    banned = begin.stop_ids if position + 1 < begin.min_length else ()
    attempt = 0
    while True:
        seed = (begin.sampling.seed, begin.sample_index, position, attempt)
        token = hash((*states, *seed)) % VOCABULARY
        if token not in banned:
            return token
        attempt += 1


def logprobs_of(state: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(hash((state, token)) % 1000), rank=1 + token)


class HashModel:
    """Runs plans in order."""

    def __init__(self, *, num_pages: int, page_size: int, num_slots: int, max_context: int) -> None:
        self._page_size = page_size
        self._pages = [[POISON] * page_size for _ in range(num_pages)]
        self._tokens = [[POISON] * (max_context + 1) for _ in range(num_slots)]
        self._tables: list[list[int]] = [[] for _ in range(num_slots)]
        self._begins: list[Begin | None] = [None] * num_slots
        self._lengths = [0] * num_slots  # tokens that grammars have taken
        self._behind: dict[int, int] = {}  # slot -> where its next row starts, after a draft that did not come true

    def execute(self, plan: StepPlan, dead_pages: tuple[int, ...] = ()) -> StepDone:
        """Run a plan. `dead_pages` are those nobody held when it was made: what is in them must not matter."""
        for page in dead_pages:
            self._pages[page] = [POISON] * self._page_size
        for begin in plan.begins:
            self._begin(begin)
        for source, target in plan.copies:
            self._pages[target] = list(self._pages[source])
        for i, slot in enumerate(plan.slots):
            for page in plan.pages[i]:
                self._pages[page] = [POISON] * self._page_size
                self._tables[slot].append(page)
            for offset, token in enumerate(plan.drafts[i] if plan.drafts else (), 1):
                self._tokens[slot][plan.starts[i] + offset] = token
            for position in range(plan.starts[i], plan.starts[i] + plan.counts[i]):
                self._compute(slot, position)
        tokens, logprobs, scores = zip(*(self._results(plan, i) for i in range(len(plan.slots))), strict=True)
        turns = [self._turn(plan, i, tokens[i]) for i in range(len(plan.slots)) if tokens[i]]
        found = tuple(turn for turn in turns if turn is not None)
        return StepDone(step=plan.step, tokens=tokens, logprobs=logprobs, scores=scores, turns=found)

    def _turn(self, plan: StepPlan, i: int, tokens: tuple[int, ...]) -> Turn | None:
        """What the sequence's grammar says; nothing after a token that it had forced."""
        slot, begin = plan.slots[i], self._begins[plan.slots[i]]
        if begin is None or begin.grammar is None:
            return None
        start = plan.starts[i] + plan.counts[i] - plan.samples[i] + 1
        if plan.starts[i] > self._behind.get(slot, start):
            return None  # behind a draft that did not come true
        end = start + self._count_kept(plan, i, tokens)
        if end <= self._lengths[slot] or any(token in begin.stop_ids for token in tokens[: end - start]):
            return None
        turn = Forcing(begin.grammar).turn(i, end - begin.num_prompt)
        self._tokens[slot][end : end + len(turn.forced)] = turn.forced
        self._lengths[slot] = end + len(turn.forced)
        return turn if turn.forced or turn.ends or turn.likely else None

    def _count_kept(self, plan: StepPlan, i: int, tokens: tuple[int, ...]) -> int:
        """How many of the sampled tokens are the next ones: those that drafts agree with, and one more."""
        samples = plan.samples[i]
        drafts = plan.drafts[i][1 - samples :] if samples > 1 else ()
        return min(count_agreeing(drafts, tokens) + 1, len(tokens))

    def fail(self, plan: StepPlan, dead_pages: tuple[int, ...], *, is_lost: bool) -> None:
        """Stop in the middle of a plan: what it would have written is garbage; if `is_lost`, everything is."""
        written = (
            {page for pages in plan.pages for page in pages} | {target for _, target in plan.copies} | {*dead_pages}
        )
        for i, slot in enumerate(plan.slots):
            first, last = plan.starts[i] // self._page_size, (plan.starts[i] + plan.counts[i] - 1) // self._page_size
            table = next((list(b.pages) for b in plan.begins if b.slot == slot), self._tables[slot])
            written |= {*[*table, *plan.pages[i]][first : last + 1]}
        for page in range(len(self._pages)) if is_lost else written:
            self._pages[page] = [POISON] * self._page_size
        for slot, row in enumerate(self._tokens):
            row[:] = [POISON] * len(row)
            self._tables[slot], self._begins[slot] = [], None

    def _begin(self, begin: Begin) -> None:
        row = self._tokens[begin.slot]
        row[:] = [POISON] * len(row)
        row[: len(begin.ids)] = begin.ids
        self._tables[begin.slot] = list(begin.pages)
        self._begins[begin.slot] = begin
        self._lengths[begin.slot] = len(begin.ids)
        self._behind.pop(begin.slot, None)

    def _compute(self, slot: int, position: int) -> None:
        previous = self._read(slot, position - 1) if position else 0
        token = self._tokens[slot][position]
        assert token != POISON, f"slot {slot}: the id at position {position} is not known"
        page = self._tables[slot][position // self._page_size]
        self._pages[page][position % self._page_size] = next_state(previous, token, position)

    def _read(self, slot: int, position: int) -> int:
        state = self._pages[self._tables[slot][position // self._page_size]][position % self._page_size]
        assert state != POISON, f"slot {slot}: position {position} was not computed"
        return state

    def _results(
        self, plan: StepPlan, i: int
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
        slot, end, samples = plan.slots[i], plan.starts[i] + plan.counts[i], plan.samples[i]
        begin = self._begins[slot]
        assert begin is not None
        if plan.starts[i] > self._behind.get(slot, end):
            return (0,) * samples, (), ()  # nobody takes it
        self._behind.pop(slot, None)
        states = [self._read(slot, position) for position in range(end)]
        rows = range(end - samples, end)
        tokens = tuple(draw(states[: p + 1], begin=begin, position=p) for p in rows)
        if samples > 1 and begin.grammar is not None and Forcing(begin.grammar).end:
            # Nothing counts that was drafted after the end.
            tokens = tokens[: max(0, begin.num_prompt + Forcing(begin.grammar).end - rows.start - 1)]
        if tokens:
            kept = self._count_kept(plan, i, tokens)
            self._tokens[slot][end - samples + kept] = tokens[kept - 1]
            if kept < samples:
                self._behind[slot] = end - samples + kept
                self._tokens[slot][end] = max(0, self._tokens[slot][end])  # a plan under way goes on behind all drafts
        logprobs: tuple[TokenLogprobs, ...] = ()
        if begin.sampling.logprobs is not None:
            logprobs = tuple(logprobs_of(states[p], t) for p, t in zip(rows, tokens, strict=False))
        return tokens, logprobs, self._scores(begin, states, plan.starts[i])

    def _scores(self, begin: Begin, states: list[int], start: int) -> tuple[TokenLogprobs, ...]:
        if begin.score_from is None:
            return ()
        first, end = max(start + 1, begin.score_from), min(len(states) + 1, begin.num_prompt)
        return tuple(logprobs_of(states[p - 1], begin.ids[p]) for p in range(first, end))


def solo_states(ids: list[int]) -> list[int]:
    states: list[int] = []
    for position, token in enumerate(ids):
        states.append(next_state(states[-1] if states else 0, token, position))
    return states


def solo_output(request: Admit, index: int, max_tokens: int) -> list[int]:
    """The tokens that a request's sequence gives when it runs alone, whole."""
    sampling = request.sampling
    begin = Begin(
        slot=0,
        ids=request.prompt_ids,
        num_prompt=len(request.prompt_ids),
        sampling=sampling,
        stop_ids=request.stop_ids,
        min_length=len(request.prompt_ids) + sampling.min_tokens,
        sample_index=index,
        grammar=request.grammar,
    )
    ids = list(request.prompt_ids)
    states = solo_states(ids)
    output: list[int] = []
    if request.grammar is not None:
        max_tokens = min(max_tokens, Forcing(request.grammar).end or max_tokens)
    while len(output) < max_tokens and not (output and output[-1] in request.stop_ids):
        output.append(draw(states, begin=begin, position=len(states) - 1))
        states.append(next_state(states[-1], output[-1], len(states)))
    return output


def solo_scores(request: Admit) -> list[TokenLogprobs]:
    """The scores of a request's prompt."""
    if request.score_from is None:
        return []
    ids = request.prompt_ids
    states = solo_states(list(ids))
    return [logprobs_of(states[p - 1], ids[p]) for p in range(max(request.score_from, 1), len(ids))]


def make_request(request_id: int, prompt: list[int] | tuple[int, ...], **fields: object) -> Admit:
    """A request with short fields: `seed`, `min_tokens` and `logprobs` go to its sampling."""
    sampling = {name: fields.pop(name) for name in ("seed", "min_tokens", "logprobs") if name in fields}
    fields.setdefault("max_tokens", 8)
    return Admit(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=ResolvedSampling(**sampling),  # type: ignore[arg-type]  # short names for tests
        **fields,  # type: ignore[arg-type]  # checked by the fields' own tests
    )
