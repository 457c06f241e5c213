"""The door: which requests are taken at all. It answers on the caller's thread, before anything is tokenized.

A request is turned away if the engine is full, if its tenant is, or if it would start too late to be of use, as far as
the scheduler's forecast can tell. Who is turned away costs nobody anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.config import Tenant
from streamgen.errors import AdmissionError, EngineOverloaded, RateLimited

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamgen.messages import Submit
    from streamgen.scheduling.forecast import Forecast

_DEFAULT = Tenant()


class Door:
    """Counts open sequences, over all and by tenant. Not thread-safe: called with the routes' lock held."""

    def __init__(self, *, max_running: int, max_queued: int, tenants: Mapping[str, Tenant]) -> None:
        self._max_running = max_running
        self._max_open = max_running + max_queued
        self._tenants = tenants
        self._num_open = 0
        self._by_tenant: dict[str, int] = {}  # only those that have something open

    def refusal(self, request: Submit, forecast: Forecast | None) -> AdmissionError | None:
        """Why a request is not taken now, or None."""
        return self._is_full(request, forecast) or self._is_over_share(request, forecast) or _is_late(request, forecast)

    def enter(self, request: Submit) -> None:
        """The request is open from now on."""
        self._num_open += request.num_sequences
        self._by_tenant[request.tenant] = self._by_tenant.get(request.tenant, 0) + request.num_sequences

    def leave(self, request: Submit) -> None:
        """The request has ended."""
        self._num_open -= request.num_sequences
        left = self._by_tenant[request.tenant] - request.num_sequences
        if left:
            self._by_tenant[request.tenant] = left
        else:
            del self._by_tenant[request.tenant]

    def _is_full(self, request: Submit, forecast: Forecast | None) -> AdmissionError | None:
        # A request of several sequences may always be alone in the engine, however small its limits.
        if self._num_open == 0 or self._num_open + request.num_sequences <= self._max_open:
            return None
        return EngineOverloaded(
            f"expected <= {self._max_open} open sequences (max_running + max_queued), got "
            f"{self._num_open + request.num_sequences}; try again later, or open the engine with a larger max_queued",
            retry_after=_retry_after(forecast),
        )

    def _is_over_share(self, request: Submit, forecast: Forecast | None) -> AdmissionError | None:
        tenant = self._tenants.get(request.tenant, _DEFAULT)
        if tenant.max_queued is None:
            return None
        num_open = self._by_tenant.get(request.tenant, 0)
        limit = (tenant.max_running or self._max_running) + tenant.max_queued
        if num_open == 0 or num_open + request.num_sequences <= limit:
            return None
        return RateLimited(
            f"tenant {request.tenant!r}: expected <= {limit} open sequences (its max_running + max_queued), got "
            f"{num_open + request.num_sequences}; try again later",
            retry_after=_retry_after(forecast),
        )


def patience(request: Submit) -> float | None:
    """Seconds after which starting the request is of no use; None: it waits for ever."""
    limits = (request.queue_timeout, request.first_token_timeout, request.timeout)
    return min((seconds for seconds in limits if seconds is not None), default=None)


def _is_late(request: Submit, forecast: Forecast | None) -> AdmissionError | None:
    limit = patience(request)
    if limit is None or forecast is None:
        return None
    start = forecast.start_in()
    if start <= limit:
        return None
    return EngineOverloaded(
        f"expected to start within {limit:g} s (the request's shortest timeout), but about {start:.1f} s are "
        "predicted; try again later, or allow more time",
        retry_after=max(0.1, round(start - limit, 1)),
    )


def _retry_after(forecast: Forecast | None) -> float:
    """Seconds until a place is likely to be free."""
    return 1.0 if forecast is None else max(0.1, round(forecast.retry_after(), 1))
