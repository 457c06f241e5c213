"""Real weights against float32 reference runs made with transformers: ids, log-probabilities, texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import streamgen as sg
from tests.real_models import QWEN_0_5B, real_model_path

if TYPE_CHECKING:
    from pathlib import Path

NEAR_TIE = 1e-4  # a float32 run must follow every path whose gap between the two likeliest tokens is larger
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def golden(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def follows(expected: dict[str, Any], ids: tuple[int, ...]) -> bool:
    """Equal ids up to the first step whose two likeliest tokens nearly tie."""
    for step, (want, got) in enumerate(zip(expected["output_ids"], ids, strict=False)):
        if want != got:
            gap: float = expected["steps"][step].get("gap", 1.0)
            return gap < NEAR_TIE
    return len(ids) == len(expected["output_ids"])


async def check_cases(engine: sg.Engine, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        prompt = case["messages"] if case.get("kind") == "chat" else case["prompt_ids"]
        if case.get("kind") == "chat" and "tools" not in case:
            rendered = engine.render(case["messages"])
            assert rendered.text == case["rendered"], case["name"]
            assert list(rendered.ids) == case["prompt_ids"], case["name"]
        elif case.get("kind") == "raw":
            assert await engine.tokenize(case["prompt"]) == case["prompt_ids"], case["name"]
        if "tools" in case:
            prompt = case["prompt_ids"]
        reply = await engine.generate(prompt, max_tokens=case["max_new_tokens"], temperature=0, logprobs=5)
        assert follows(case, reply.ids), (case.get("name"), reply.text, case["text"])
        assert reply.finish_reason == case["finish"]
        if reply.ids == tuple(case["output_ids"]):
            assert reply.text == case["text"]
        assert reply.logprobs is not None
        for step, got in zip(case["steps"], reply.logprobs, strict=False):
            if got.id != step["token_id"]:
                break
            assert got.logprob == pytest.approx(step["logprob"], abs=2e-3)


async def check_scores(engine: sg.Engine, texts: list[dict[str, Any]], *, tolerance: float) -> None:
    for text in texts:
        scores = await engine.score(text["ids"][:1], text["ids"][1:])
        got = [s.logprob for s in scores]
        assert got == pytest.approx(text["token_logprobs"], abs=tolerance)


async def test_stories_float32(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    expected = golden(folder / "golden.json")
    async with sg.Engine(folder, dtype="float32") as engine:
        await check_cases(engine, expected["cases"])
        await check_scores(engine, expected["scored_texts"], tolerance=1e-4)


async def test_demo_model_float32(shared_data: Path, demo_model_path: Path) -> None:
    expected = golden(shared_data / "real_models" / "smollm2-135m-instruct" / "golden.json")
    async with sg.Engine(demo_model_path, dtype="float32") as engine:
        await check_cases(engine, expected["cases"])
        await check_scores(engine, expected["scored_texts"], tolerance=2e-3)


async def likeliest(model: Path, dtype: str, texts: list[dict[str, Any]]) -> list[sg.TokenLogprob]:
    """The two likeliest tokens at every position of the texts."""
    scores: list[sg.TokenLogprob] = []
    async with sg.Engine(model, dtype=dtype) as engine:
        for text in texts:
            reply = await engine.generate(text["ids"], max_tokens=1, prompt_logprobs=2)
            assert reply.prompt_logprobs is not None
            scores += [score for score in reply.prompt_logprobs if score is not None]
    return scores


async def test_demo_model_packed_agrees(shared_data: Path, demo_model_path: Path) -> None:
    texts = golden(shared_data / "real_models" / "smollm2-135m-instruct" / "golden.json")["scored_texts"]
    exact = await likeliest(demo_model_path, "float32", texts)
    packed = await likeliest(demo_model_path, "auto", texts)
    assert len(exact) == len(packed) == sum(len(text["ids"]) - 1 for text in texts)
    same = [a.top[0].id == b.top[0].id for a, b in zip(exact, packed, strict=True)]
    assert sum(same) / len(same) >= 0.95
    # Where float32 is sure, so are codes of 8 bits.
    assert all(is_same or a.top[0].logprob - a.top[1].logprob < 0.5 for is_same, a in zip(same, exact, strict=True))


@pytest.mark.slow
async def test_qwen_float32(shared_data: Path) -> None:
    expected = golden(shared_data / "real_models" / "qwen2.5-coder-0.5b-instruct" / "golden.json")
    async with sg.Engine(real_model_path(QWEN_0_5B), dtype="float32") as engine:
        await check_cases(engine, expected["cases"])
        await check_scores(engine, expected["scored_texts"], tolerance=2e-3)
