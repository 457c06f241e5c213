"""Order within a tenant: priority raised by waiting, then deadline, then arrival."""

from __future__ import annotations

from streamgen.scheduling.sequence import AGE_SECONDS
from tests.scheduling.hash_model import make_request
from tests.scheduling.small import make_harness, planned


def order_of(*requests: dict[str, object]) -> list[int]:
    """In what order requests start that wait together; the first has number 1."""
    harness = make_harness(max_running=1, prefix_cache=False)
    for request_id, fields in enumerate(requests, 1):
        harness.admit(make_request(request_id, [request_id], max_tokens=1, **fields))
    order = []
    for _ in requests:
        order += [begin.ids[0] for begin in planned(harness).begins]
        harness.complete()
    harness.run()
    return order


def test_earliest_deadline_first_and_none_last() -> None:
    assert order_of({}, {"deadline": 9.0}, {"deadline": 3.0}, {"deadline": 9.0}, {}) == [3, 2, 4, 1, 5]


def test_priority_goes_before_deadline() -> None:
    assert order_of({"deadline": 1.0}, {"priority": 1}) == [2, 1]


def test_a_step_of_priority_is_worth_some_seconds_of_waiting() -> None:
    late = AGE_SECONDS * 1.5
    assert order_of({"arrival": 0.0}, {"arrival": late, "priority": 1}) == [1, 2]
    assert order_of({"arrival": 0.0}, {"arrival": late, "priority": 2}) == [2, 1]


def test_who_waits_long_enough_goes_before_a_stream_of_important_ones() -> None:
    """Important requests keep coming, one per second, each taking a second of the only slot."""
    harness = make_harness(max_running=1, max_queued=1000)
    harness.admit(make_request(0, [0], max_tokens=1))
    for second in range(1, 100):
        for number in range(2):
            request_id = 2 * second + number
            harness.admit(make_request(request_id, [1], max_tokens=1, priority=3, arrival=float(second)))
        harness.step()
        if harness.outcomes[0, 0].finish is not None:
            break
    assert 2 * AGE_SECONDS < second < 8 * AGE_SECONDS
    harness.run()
