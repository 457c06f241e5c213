"""Predictions of memory, and refusals."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen.errors import AdmissionError, ConfigError, RequestError
from streamgen.scheduling.admission import Growth, OutputLengths, output_limit, overload, predicted_peak_pages, refusal
from streamgen.scheduling.limits import Limits
from tests.scheduling.harness import Harness
from tests.scheduling.hash_model import VOCABULARY, make_request


def peak_by_simulation(growths: list[Growth], page_size: int) -> int:
    """Walk through the steps: everyone grows by a token, and is gone the step after its last."""
    peak = 0
    for step in range(max((g.growth for g in growths), default=0) + 1):
        alive = [g for g in growths if g.growth >= step]
        peak = max(peak, sum(-(-(g.held + step) // page_size) for g in alive))
    return peak


@given(st.lists(st.builds(Growth, st.integers(0, 70), st.integers(0, 50)), max_size=12), st.sampled_from([1, 2, 4, 16]))
@settings(max_examples=300, deadline=None)
def test_the_formula_equals_a_simulation(growths: list[Growth], page_size: int) -> None:
    assert predicted_peak_pages(growths, page_size) == peak_by_simulation(growths, page_size)


def test_an_example_by_hand() -> None:
    # Pages of one token: at the ends of the three, 3 x 1 + 15, 2 x 4 + 8, 1 x 7 + 2 tokens.
    assert predicted_peak_pages([Growth(7, 1), Growth(6, 4), Growth(2, 7)], 1) == 18


def test_small_requests_are_expected_to_use_their_max_tokens() -> None:
    lengths = OutputLengths(guess=100)
    assert lengths.predict(0, 60) == 60
    assert lengths.predict(0, 1000) == 100
    assert lengths.predict(150, 1000) == 188


def test_predictions_follow_what_was_seen() -> None:
    lengths = OutputLengths(quantile=0.9, min_known=10)
    for length in range(10, 110, 10):
        lengths.add(length)
    assert lengths.predict(0, 1000) == 90
    assert lengths.predict(85, 1000) == 100
    assert lengths.predict(0, 50) == 50
    assert lengths.predict(100, 1000) > 100


def test_only_the_last_lengths_count() -> None:
    lengths = OutputLengths(capacity=4, min_known=1)
    for length in (500, 500, 3, 3, 3, 3):
        lengths.add(length)
    assert lengths.predict(0, 1000) == 3
    assert len(lengths._recent) == len(lengths._sorted) == 4


LIMITS = Limits(num_pages=4, page_size=4, step_tokens=8, max_context=100, max_running=2, max_queued=1)


def test_a_prompt_that_never_fits_is_refused_with_counts() -> None:
    refused = refusal(make_request(1, [0] * 16), LIMITS)
    assert refused is not None
    assert refused.code == "prompt_too_long"
    assert "<= 15 tokens, got 16" in refused.message
    assert "4 pages of 4" in refused.message
    assert refused.details == {"prompt_tokens": 16, "max_context": 16}
    assert refusal(make_request(1, [0] * 15), LIMITS) is None
    assert refusal(make_request(1, [0] * 16, max_tokens=0), LIMITS) is None
    assert refusal(make_request(1, [0] * 17, max_tokens=0), LIMITS) is not None


def test_a_prompt_beyond_the_context_is_refused() -> None:
    limits = Limits(num_pages=100, step_tokens=8, max_context=20)
    assert refusal(make_request(1, [0] * 19), limits) is None
    refused = refusal(make_request(1, [0] * 20), limits)
    assert refused is not None
    assert "<= 19 tokens, got 20" in refused.message


@pytest.mark.parametrize("fields", [{"prompt": []}, {"prompt": [1], "num_sequences": 0}])
def test_nonsense_is_refused(fields: dict[str, object]) -> None:
    refused = refusal(make_request(1, **fields), LIMITS)  # type: ignore[arg-type]  # as given above
    assert refused is not None
    assert refused.code == "invalid_request"


def test_codes_are_those_of_the_errors() -> None:
    codes = {error.code for base in (RequestError, AdmissionError) for error in base.__subclasses__()}
    assert {"prompt_too_long", "engine_overloaded", "invalid_request"} <= codes


def test_a_full_queue_is_refused_with_counts() -> None:
    request = make_request(1, [1])
    assert overload(request, LIMITS, num_waiting=0, num_running=2) is None
    refused = overload(request, LIMITS, num_waiting=1, num_running=2)
    assert refused is not None
    assert refused.code == "engine_overloaded"
    assert "1 waiting and 2 running" in refused.message
    assert overload(request, LIMITS, num_waiting=2, num_running=0) is None
    assert overload(request, LIMITS, num_waiting=3, num_running=0) is not None


def test_output_is_cut_to_context_and_pages() -> None:
    assert output_limit(make_request(1, [0] * 5, max_tokens=3), LIMITS) == 3
    assert output_limit(make_request(1, [0] * 5, max_tokens=50), LIMITS) == 12  # 16 rows, and the last token is no row
    limits = Limits(num_pages=100, step_tokens=8, max_context=20)
    assert output_limit(make_request(1, [0] * 5, max_tokens=50), limits) == 15


@pytest.mark.parametrize("option", ["num_pages", "page_size", "max_running", "step_tokens", "max_context"])
def test_limits_are_checked(option: str) -> None:
    fields = {"num_pages": 1, "step_tokens": 1, "max_context": 1, option: 0}
    with pytest.raises(ConfigError, match=f"{option}: expected >= 1, got 0"):
        Limits(**fields)  # type: ignore[arg-type]  # all of them are integers


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_pages", "step_tokens", "longest"), [(20, 24, 24), (24, 10, 44)])
def test_honest_lengths_never_lead_to_preemption(
    num_pages: int, step_tokens: int, longest: int, seed: int, depth: int
) -> None:
    """Every request runs to its max_tokens, and that is what is predicted of it."""
    random = Random(seed)
    limits = Limits(num_pages=num_pages, page_size=4, step_tokens=step_tokens, max_context=60, max_running=8)
    harness = Harness(limits)
    harness.scheduler._admission.lengths = OutputLengths(min_known=1_000_000)
    most_running = 0
    for request_id in range(30):
        prompt = [random.randrange(VOCABULARY) for _ in range(random.randrange(1, longest + 1))]
        num_sequences = random.choice([1, 1, 3]) if seed % 2 else 1
        harness.admit(make_request(request_id, prompt, max_tokens=random.randrange(1, 30), num_sequences=num_sequences))
        harness.step(depth=depth)
    while harness.step(depth=depth):
        most_running = max(most_running, harness.scheduler.stats().running)
    harness.run(depth=depth)
    assert harness.scheduler.stats().preemptions == 0
    assert most_running >= 2


def test_the_predicted_peak_is_reached_and_not_passed() -> None:
    harness = Harness(Limits(num_pages=50, page_size=4, step_tokens=64, max_context=60))
    for request_id, (length, max_tokens) in enumerate([(9, 12), (5, 30), (17, 3)]):
        harness.admit(make_request(request_id, [request_id] * length, max_tokens=max_tokens))
    harness.step()
    predicted = harness.scheduler.stats().predicted_peak_pages
    used = 0
    while harness.step():
        used = max(used, harness.scheduler.stats().pages_used)
    assert predicted - 3 <= used <= predicted
    assert harness.scheduler.stats().predicted_peak_pages == 0


def test_a_shared_prompt_counts_once() -> None:
    """Four continuations of a prompt of 9 pages run at once in a cache that could not hold 4 x 9."""
    harness = Harness(Limits(num_pages=24, page_size=4, step_tokens=64, max_context=60))
    harness.admit(make_request(1, list(range(37)), max_tokens=6, num_sequences=4))
    while harness.scheduler.stats().running < 4:
        assert harness.step()
    harness.run()
    assert harness.scheduler.stats().preemptions == 0


def test_pages_are_kept_for_followers() -> None:
    """A leader alone and the second request would fit; with the leader's followers they do not."""
    harness = Harness(Limits(num_pages=12, page_size=4, step_tokens=64, max_context=60))
    harness.admit(make_request(1, list(range(9)), max_tokens=8, num_sequences=3))
    harness.admit(make_request(2, list(range(20, 32)), max_tokens=4))
    harness.step()
    assert harness.scheduler.stats().running == 1
    harness.step()
    assert harness.scheduler.stats().running == 3
    harness.run()
    assert harness.scheduler.stats().preemptions == 0


def test_a_shared_prefix_counts_once() -> None:
    harness = Harness(Limits(num_pages=30, page_size=4, step_tokens=64, max_context=60))
    prefix = list(range(40))
    harness.admit(make_request(0, [*prefix, 1], max_tokens=15))
    harness.step()
    for request_id in (1, 2, 3):
        harness.admit(make_request(request_id, [*prefix, request_id], max_tokens=12))
    harness.step()
    assert harness.scheduler.stats().running == 4
    harness.run()
    assert harness.scheduler.stats().preemptions == 0
