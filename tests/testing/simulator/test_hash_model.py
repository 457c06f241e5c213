"""The hash model answers what `solo_output` says, in whatever chunks, and notices plans that cannot be right."""

from __future__ import annotations

from random import Random

import pytest

from streamgen.messages import Admit, Begin, StepPlan
from streamgen.sampling import ResolvedSampling
from streamgen.testing.simulator.hash_model import BrokenPlan, HashModel, solo_output

SIZE = 4


def make(request: Admit, slot: int, pages: tuple[int, ...] = (), index: int = 0) -> Begin:
    return Begin(
        slot=slot,
        ids=request.prompt_ids,
        num_prompt=len(request.prompt_ids),
        sampling=request.sampling,
        pages=pages,
        stop_ids=request.stop_ids,
        sample_index=index,
    )


def step(
    number: int,
    slot: int,
    start: int,
    count: int,
    *,
    samples: int = 0,
    pages: tuple[int, ...] = (),
    begins: tuple[Begin, ...] = (),
    copies: tuple[tuple[int, int], ...] = (),
    drafts: tuple[int, ...] = (),
) -> StepPlan:
    return StepPlan(
        step=number,
        begins=begins,
        copies=copies,
        slots=(slot,),
        starts=(start,),
        counts=(count,),
        samples=(samples,),
        pages=(pages,),
        drafts=(drafts,) if drafts else (),
    )


def request(length: int, *, seed: int = 3, max_tokens: int = 9) -> Admit:
    ids = tuple(Random(length).randrange(4000) for _ in range(length))
    return Admit(request_id=1, prompt_ids=ids, sampling=ResolvedSampling(seed=seed), max_tokens=max_tokens)


def model() -> HashModel:
    return HashModel(num_pages=32, page_size=SIZE, num_slots=3)


def begin_whole(what: HashModel, asked: Admit) -> int:
    """Compute a prompt in one step; its first token."""
    num_pages = -(-len(asked.prompt_ids) // SIZE)
    plan = step(0, 0, 0, len(asked.prompt_ids), samples=1, pages=tuple(range(num_pages)), begins=(make(asked, 0),))
    (tokens,) = what.execute(plan).tokens
    return tokens[0]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_make_no_difference(length: int, seed: int) -> None:
    random, asked = Random(seed), request(length)
    what, free, held, position, output = model(), iter(range(31, -1, -1)), 0, 0, list[int]()
    while len(output) < asked.max_tokens:
        known = length + len(output)
        count = random.randint(1, known - position)
        end = position + count
        missing = -(-end // SIZE) - held
        pages = tuple(next(free) for _ in range(missing))
        held += missing
        begins = (make(asked, 0),) if position == 0 else ()
        plan = step(0, 0, position, count, samples=int(end == known), pages=pages, begins=begins)
        output += what.execute(plan).tokens[0]
        position = end
    assert output == solo_output(asked, 0, asked.max_tokens, page_size=SIZE)


def test_an_output_ends_at_its_stop_id() -> None:
    asked = request(6)
    third = solo_output(asked, 0, 9, page_size=SIZE)[2]
    stopping = Admit(
        request_id=1, prompt_ids=asked.prompt_ids, sampling=asked.sampling, max_tokens=9, stop_ids=(third,)
    )
    assert solo_output(stopping, 0, 9, page_size=SIZE)[-1] == third
    assert len(solo_output(stopping, 0, 9, page_size=SIZE)) == 3


def test_samples_seeds_and_prompts_differ() -> None:
    outputs = [solo_output(request(6), i, 4, page_size=SIZE) for i in range(3)]
    outputs += [solo_output(request(6, seed=4), 0, 4, page_size=SIZE), solo_output(request(7), 0, 4, page_size=SIZE)]
    assert len({tuple(output) for output in outputs}) == 5


def test_a_fork_continues_on_a_copied_page() -> None:
    asked, what = request(6), model()
    begin_whole(what, asked)
    fork = make(asked, 1, pages=(0, 9), index=1)
    (tokens,) = what.execute(step(1, 1, 5, 1, samples=1, begins=(fork,), copies=((1, 9),))).tokens
    assert tokens == (solo_output(asked, 1, 1, page_size=SIZE)[0],)


def test_verified_rows_give_what_would_have_been_drawn() -> None:
    asked, what = request(5), model()
    first = begin_whole(what, asked)
    expected = solo_output(asked, 0, 4, page_size=SIZE)
    assert first == expected[0]
    right = what.execute(step(1, 0, 5, 3, samples=3, drafts=(expected[1], expected[2]))).tokens[0]
    assert right == tuple(expected[1:4])
    wrong = what.execute(step(2, 0, 5, 3, samples=3, drafts=(0, 1), pages=(9,))).tokens[0]
    assert wrong[0] == expected[1] and wrong[1:] != tuple(expected[2:4])


def test_a_page_that_others_were_given() -> None:
    asked, what = request(5), model()
    begin_whole(what, asked)
    what.execute(step(1, 1, 0, 4, pages=(0,), begins=(make(request(4), 1),)))
    with pytest.raises(BrokenPlan, match="page 0 was given to another"):
        what.execute(step(2, 0, 5, 1, samples=1))


def test_a_prefix_of_another_prompt() -> None:
    what = model()
    begin_whole(what, request(9))
    with pytest.raises(BrokenPlan, match="does not hold its positions from 0"):
        what.execute(step(1, 1, 4, 4, pages=(9,), begins=(make(request(8), 1, pages=(0,)),)))


def test_a_missed_copy() -> None:
    asked, what = request(6), model()
    begin_whole(what, asked)
    with pytest.raises(BrokenPlan, match="does not hold its positions from 4"):
        what.execute(step(1, 1, 5, 1, samples=1, begins=(make(asked, 1, pages=(0, 9), index=1),)))


def test_a_chunk_that_starts_too_late() -> None:
    with pytest.raises(BrokenPlan, match="position 1 was not computed"):
        model().execute(step(0, 0, 2, 2, pages=(0,), begins=(make(request(4), 0),)))
    with pytest.raises(BrokenPlan, match="page 0 is not full"):
        model().execute(step(0, 0, 4, 1, pages=(0, 1), begins=(make(request(6), 0),)))


def test_rows_without_id_page_or_sequence() -> None:
    asked = request(4)
    with pytest.raises(BrokenPlan, match="is not known"):
        model().execute(step(0, 0, 0, 5, pages=(0, 1), begins=(make(asked, 0),)))
    with pytest.raises(BrokenPlan, match="no page for position 4"):
        model().execute(step(0, 0, 0, 5, pages=(0,), begins=(make(request(5), 0),)))
    with pytest.raises(BrokenPlan, match="rows without a sequence"):
        model().execute(step(0, 2, 0, 1, pages=(0,)))


@pytest.mark.parametrize("is_lost", [False, True])
def test_nothing_of_a_failed_step_is_left(is_lost: bool) -> None:
    asked, what = request(9), model()
    begin_whole(what, asked)
    what.fail(step(1, 0, 9, 1, samples=1), is_lost=is_lost)
    again = step(2, 1, 8, 1, samples=1, pages=(5,), begins=(make(asked, 1, pages=(0, 1)),))
    if is_lost:
        with pytest.raises(BrokenPlan, match="does not hold"):
            what.execute(again)
    else:
        assert what.execute(again).tokens[0] == (solo_output(asked, 0, 1, page_size=SIZE)[0],)
