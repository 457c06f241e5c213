"""tiny_engine: the real engine on generated weights."""

from __future__ import annotations

import pytest

import streamgen as sg
from streamgen.testing import tiny_engine
from streamgen.testing.tiny import TinyEngine

pytestmark = pytest.mark.anyio


async def test_it_answers_and_says_the_same_twice() -> None:
    engine = tiny_engine()
    assert isinstance(engine, TinyEngine)
    folder = engine._folder
    assert sum(file.stat().st_size for file in folder.iterdir()) < 700_000
    async with engine:
        first = await engine.generate([sg.user("hello")], max_tokens=24, ignore_eos=True)
        again = await engine.generate([sg.user("hello")], max_tokens=24, ignore_eos=True)
        other = await engine.generate([sg.user("other")], max_tokens=24, ignore_eos=True)
        assert first.ids == again.ids and len(set(first.ids)) > 3 and first.ids != other.ids
        assert again.usage.prompt_tokens == first.usage.prompt_tokens > 7
    assert not folder.exists(), "its folder goes with it"
    async with engine:
        reopened = await engine.generate([sg.user("hello")], max_tokens=24, ignore_eos=True)
        assert reopened.ids == first.ids
    async with tiny_engine(seed=1) as second:
        assert (await second.generate([sg.user("hello")], max_tokens=24, ignore_eos=True)).ids != first.ids
