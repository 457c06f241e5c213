"""tiny_engine: the real engine on generated weights."""

from __future__ import annotations

import gc
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

import streamgen as sg
from streamgen.testing import tiny_engine
from streamgen.testing.tiny import TinyEngine

if TYPE_CHECKING:
    from pathlib import Path

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
    second = tiny_engine(weights_seed=1)
    for _ in range(2):  # a reopened engine has its own weights again
        async with second:
            ids = (await second.generate([sg.user("hello")], max_tokens=24, ignore_eos=True)).ids
            assert ids != first.ids
    options: dict[str, Any] = {"kv_memory": "1MiB", "max_context": 64, "seed": 3}
    async with tiny_engine(**options) as small:
        assert small.plan().max_context == 64
        assert [text async for text in small.stream("x", max_tokens=4, ignore_eos=True).texts()]


def test_its_folder_goes_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiny_engine()  # never opened
    with pytest.raises(sg.ConfigError, match="max_runing"):
        tiny_engine(max_runing=3)
    gc.collect()
    assert not list(tmp_path.iterdir())
