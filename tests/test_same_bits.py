"""The same request gives the same bits: alone, in any company, chunked, cached, preempted, with 1 or 2 threads."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from streamgen.execution import model as execution_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

PROMPTS = [
    "Once upon a time",
    "Lily and Tom went to the park.",
    "The big dog was very",
    "One day, a boy found a red ball",
]
Result = tuple[tuple[int, ...], bytes]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


def requests() -> list[dict[str, Any]]:
    """Greedy and sampled, short and long prompts, one request per case."""
    long_prompt = " ".join(PROMPTS * 6)
    cases: list[dict[str, Any]] = []
    for index, prompt in enumerate([*PROMPTS, long_prompt]):
        cases.append({"prompt": prompt, "max_tokens": 40, "temperature": 0})
        cases.append({"prompt": prompt, "max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 7 + index})
        cases.append(
            {
                "prompt": prompt,
                "max_tokens": 24,
                "temperature": 1.1,
                "top_k": 40,
                "seed": index,
                "presence_penalty": 0.7,
            }
        )
    return cases


async def ask(engine: sg.Engine, case: dict[str, Any]) -> Result:
    fields = dict(case)
    prompt = fields.pop("prompt")
    reply = await engine.generate(prompt, logprobs=3, ignore_eos=True, **fields)
    assert reply.logprobs is not None
    bits = b"".join(struct.pack("<f", p.logprob) for t in reply.logprobs for p in (t, *t.top))
    return reply.ids, bits


async def ask_all(engine: sg.Engine, cases: list[dict[str, Any]]) -> list[Result]:
    results: list[Result | None] = [None] * len(cases)

    async def one(index: int) -> None:
        results[index] = await ask(engine, cases[index])

    async with anyio.create_task_group() as group:
        for index in range(len(cases)):
            group.start_soon(one, index)
    return [r for r in results if r is not None]


async def alone(model: Path, dtype: str) -> list[Result]:
    async with sg.Engine(model, dtype=dtype, threads=1, prefix_cache=False) as engine:
        return [await ask(engine, case) for case in requests()]


def company(count: int) -> list[dict[str, Any]]:
    rng = random.Random(5)
    words = " ".join(PROMPTS).split()
    return [
        {
            "prompt": " ".join(rng.choice(words) for _ in range(rng.randint(1, 60))),
            "max_tokens": rng.randint(1, 60),
            "temperature": rng.choice([0.0, 0.8, 1.2]),
            "seed": i,
        }
        for i in range(count)
    ]


async def test_among_others_and_with_two_threads(model: Path, dtype: str) -> None:
    expected = await alone(model, dtype)
    async with sg.Engine(model, dtype=dtype, threads=2) as engine:
        for seed in (1, 2):
            cases = requests() + company(64)
            order = list(range(len(cases)))
            random.Random(seed).shuffle(order)
            shuffled = await ask_all(engine, [cases[i] for i in order])
            got = {original: shuffled[place] for place, original in enumerate(order)}
            assert [got[i] for i in range(len(expected))] == expected


@pytest.mark.parametrize("budget", [1, 7, 16, 33])
async def test_chunked_in_any_way(model: Path, dtype: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await alone(model, dtype)
    monkeypatch.setattr(execution_model, "STEP_ROWS", budget)
    async with sg.Engine(model, dtype=dtype, threads=2, prefix_cache=False) as engine:
        assert await ask_all(engine, requests()) == expected


async def test_from_a_cached_prefix(model: Path, dtype: str) -> None:
    expected = await alone(model, dtype)
    async with sg.Engine(model, dtype=dtype, threads=2) as engine:
        assert await ask_all(engine, requests()) == expected
        again = [await ask(engine, case) for case in requests()]
        assert again == expected
        reply = await engine.generate(requests()[-1]["prompt"], max_tokens=1)
        assert reply.usage.cached_tokens > 0


async def test_after_preemption(model: Path, dtype: str) -> None:
    expected = await alone(model, dtype)
    page = 2 * 5 * 16 * 4 * 8 * (4 if dtype == "float32" else 2)  # 5 layers, 4 heads of 8
    async with sg.Engine(model, dtype=dtype, threads=2, kv_memory=f"{page * 24}", max_context=384) as engine:
        # Outputs of one token first: the engine then expects short ones, and takes more requests than will fit.
        await ask_all(engine, [{"prompt": "Once", "max_tokens": 1}] * 40)
        assert await ask_all(engine, requests()) == expected
        assert engine.stats().preemptions > 0


async def test_sampled_continuations_equal_single_requests(model: Path, dtype: str) -> None:
    async with sg.Engine(model, dtype=dtype, threads=2) as engine:
        several = await engine.sample("Once upon a time", n=4, max_tokens=30, temperature=1.0, seed=11)
        again = await engine.sample("Once upon a time", n=4, max_tokens=30, temperature=1.0, seed=11)
        assert [c.ids for c in several] == [c.ids for c in again]
        assert len({c.ids for c in several}) > 1
        single = await engine.generate("Once upon a time", max_tokens=30, temperature=1.0, seed=11)
        assert single.ids == several[0].ids


async def test_a_real_chat_model(demo_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 64 and 49,152 tokens: alone on one thread; then chunked in company, cold and from a cached prefix."""
    chats: list[dict[str, Any]] = [
        {"prompt": [sg.user(text)], "max_tokens": 24, "temperature": temperature, "top_p": 0.9, "seed": 3}
        for text in ("Name three rivers.", "Tell me about the sea. " * 12)
        for temperature in (0.0, 0.8)
    ]
    async with sg.Engine(demo_model_path, threads=1, prefix_cache=False) as engine:
        expected = [await ask(engine, case) for case in chats]
    monkeypatch.setattr(execution_model, "STEP_ROWS", 48)
    async with sg.Engine(demo_model_path, threads=2) as engine:
        for seed in (1, 2):
            cases = chats + [{**case, "max_tokens": 12} for case in company(12)]
            order = list(range(len(cases)))
            random.Random(seed).shuffle(order)
            shuffled = await ask_all(engine, [cases[i] for i in order])
            got = {original: shuffled[place] for place, original in enumerate(order)}
            assert [got[i] for i in range(len(chats))] == expected
        assert engine.stats().cached_tokens > 0
