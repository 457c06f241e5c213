"""Who is turned away at the door, and with which words."""

from __future__ import annotations

from typing import Any

import pytest

import streamgen as sg
from streamgen.actors.door import Door, patience
from streamgen.config import Tenant
from streamgen.messages import Submit
from streamgen.sampling import ResolvedSampling


class FixedForecast:
    """A forecast that says what it was told."""

    def __init__(self, start: float) -> None:
        self._start = start

    def start_in(self, num_more: int = 0) -> float:
        return self._start

    def retry_after(self) -> float:
        return self._start / 2


def request(number: int = 1, **fields: Any) -> Submit:
    return Submit(request_id=number, sampling=ResolvedSampling(), text="x", **fields)


def door(**fields: Any) -> Door:
    return Door(**{"max_running": 2, "max_queued": 3, "tenants": {}, **fields})


def refusal(it: Door, message: Submit, start: float | None = None) -> sg.AdmissionError | None:
    forecast: Any = None if start is None else FixedForecast(start)
    return it.refusal(message, forecast)


def test_it_takes_max_running_and_max_queued() -> None:
    it = door()
    requests = [request(i) for i in range(6)]
    for message in requests[:5]:
        assert refusal(it, message) is None
        it.enter(message)
    refused = refusal(it, requests[5], start=8.0)
    assert isinstance(refused, sg.EngineOverloaded) and refused.retry_after == 4.0 and refused.retryable
    assert "expected <= 5 open sequences" in str(refused) and "got 6" in str(refused)
    it.leave(requests[0])
    assert refusal(it, requests[5]) is None


def test_a_request_larger_than_the_engine_may_be_alone_in_it() -> None:
    it = door()
    assert refusal(it, request(num_sequences=16)) is None
    it.enter(request(num_sequences=16))
    assert isinstance(refusal(it, request(2)), sg.EngineOverloaded)


def test_a_tenant_has_limits_of_its_own() -> None:
    it = door(max_queued=100, tenants={"small": Tenant(max_running=1, max_queued=1)})
    for number in (1, 2):
        it.enter(request(number, tenant="small"))
    refused = refusal(it, request(3, tenant="small"))
    assert isinstance(refused, sg.RateLimited) and refused.http_status == 429 and refused.retry_after == 1.0
    assert "tenant 'small': expected <= 2" in str(refused)
    assert refusal(it, request(4, tenant="other")) is None
    it.leave(request(1, tenant="small"))
    assert refusal(it, request(3, tenant="small")) is None


def test_who_would_start_too_late_is_told_at_once() -> None:
    it = door()
    for field in ("timeout", "queue_timeout", "first_token_timeout"):
        fields: dict[str, Any] = {field: 5.0}
        late = request(**fields)
        refused = refusal(it, late, start=12.0)
        assert isinstance(refused, sg.EngineOverloaded) and refused.retry_after == 7.0
        assert "within 5 s" in str(refused) and "12.0 s are predicted" in str(refused)
        assert refusal(it, late, start=4.0) is None
    assert refusal(it, request(), start=1000.0) is None


def test_patience_is_the_shortest_limit() -> None:
    assert patience(request()) is None
    assert patience(request(timeout=9.0, queue_timeout=3.0, first_token_timeout=4.0)) == 3.0


def test_nothing_is_kept_of_tenants_that_left() -> None:
    it = door(max_queued=10_000)
    for number in range(1000):
        message = request(number, tenant=f"tenant {number}")
        it.enter(message)
        it.leave(message)
    assert not it._by_tenant and it._num_open == 0


@pytest.mark.parametrize(
    ("tenants", "words"),
    [
        ({"a": {"weigth": 2}}, "unknown option 'weigth'; did you mean 'weight'"),
        ({"a": {"weight": -1}}, "weight: expected > 0"),
        ({"a": {"weight": 0}}, "weight: expected > 0"),
        ({"a": {"weight": float("inf")}}, "weight: expected > 0"),
        ({"a": {"weight": "much"}}, "weight: expected a number"),
        ({"a": {"max_running": 0}}, "expected >= 1"),
        ({"a": {"max_queued": -1}}, "expected >= 0"),
        ({"a": 3}, "expected a Tenant or its fields"),
        ({"": {}}, "expected names of 1 to"),
        ({3: {}}, "expected names of 1 to"),
        ([("a", {})], "expected a mapping"),
    ],
)
def test_bad_tenants_are_refused_by_the_constructor(tenants: Any, words: str) -> None:
    with pytest.raises(sg.ConfigError, match="tenants:") as caught:
        sg.Engine(tenants=tenants)
    assert words in str(caught.value) and caught.value.option == "tenants"


def test_tenants_round_trip() -> None:
    engine = sg.Engine(tenants={"a": {"weight": 2}, "b": Tenant(max_queued=3)})
    assert engine.options.tenants == {"a": Tenant(weight=2), "b": Tenant(max_queued=3)}
