"""The site's tests: the same application over a scripted engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from app import make_app

import streamgen as sg
from streamgen.testing import FakeEngine, Reply, VirtualClock

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(engine)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as it:
        yield it


async def test_a_story_is_streamed() -> None:
    engine = FakeEngine({"Tell a story about cats.": "There was a cat."})
    async with client(engine) as http:
        response = await http.get("/story", params={"about": "cats"})
        assert (response.status_code, response.text) == (200, "There was a cat.")
        assert engine.requests[0].fields["max_tokens"] == 200
        assert (await http.get("/health")).json() == {"state": "ready", "running": 0}


async def test_overload_is_a_503_with_a_time_to_come_back() -> None:
    async with client(FakeEngine(Reply(error=sg.EngineOverloaded("busy", retry_after=7.2)))) as http:
        response = await http.get("/story", params={"about": "cats"})
        assert response.status_code == 503 and response.headers["Retry-After"] == "7"
        assert response.json() == {"error": "engine_overloaded"}


async def test_a_tenant_over_its_share_is_a_429() -> None:
    async with client(FakeEngine(Reply(error=sg.RateLimited("slowly", retry_after=1)))) as http:
        assert (await http.get("/story", params={"about": "cats"})).status_code == 429


async def test_a_slow_story_ends_at_its_timeout() -> None:
    """Thirty seconds of timeout, without waiting for them: the clock goes on whenever the model only waits."""
    clock = VirtualClock(auto=True)
    async with client(FakeEngine(Reply(text="Once", seconds_per_token=10, never_ends=True), clock=clock)) as http:
        response = await http.get("/story", params={"about": "snails"})
        assert response.text.startswith("On") and response.text.endswith("[cut short]")
        assert 30 <= clock() < 31
