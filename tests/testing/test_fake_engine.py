"""FakeEngine: scripts, faults, delays on a virtual clock; and the same behaviour as the real engine around it."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from msgspec import Struct

import streamgen as sg
from streamgen.testing import FakeEngine, FakeRequest, Reply, VirtualClock
from streamgen.testing.script import Answer, ScriptExhausted
from streamgen.text_engine import TextEngine

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


def has_text(stream: sg.Stream[Any], text: str) -> bool:
    return stream.result.text == text


async def test_the_same_text_for_all() -> None:
    async with FakeEngine("héllo 🙂") as engine:
        completion = await engine.generate("anything")
        assert completion.text == "héllo 🙂" and completion.finish_reason == "stop"
        assert completion.usage.completion_tokens == len("héllo 🙂".encode()) + 1
        assert "".join([delta.text async for delta in engine.stream([sg.user("x")])]) == "héllo 🙂"


async def test_answers_in_turn_by_prompt_and_by_function() -> None:
    async with FakeEngine(["one", Reply(text="two")]) as engine:
        assert [(await engine.generate("x")).text for _ in range(2)] == ["one", "two"]
        with pytest.raises(ScriptExhausted, match="2 answers, and this is request 3"):
            await engine.generate("x")
    async with FakeEngine({"ping": "pong"}) as engine:
        assert (await engine.generate([sg.system("be kind"), sg.user("ping")])).text == "pong"
        with pytest.raises(ScriptExhausted, match="'other'"):
            engine.stream("other")

    def shout(request: FakeRequest) -> str:
        return request.text.upper() + "!" * int(request.fields["max_tokens"] > 50)

    async with FakeEngine(shout) as engine:
        assert (await engine.generate("hey", max_tokens=99)).text == "HEY!"
        assert (await engine.generate("hey", max_tokens=2)).text == "HE"
    with pytest.raises(sg.ConfigError, match="script: expected text, a Reply, a list"):
        FakeEngine(3)  # type: ignore[arg-type]
    async with FakeEngine(lambda request: None) as engine:  # type: ignore[arg-type,return-value]
        with pytest.raises(sg.ConfigError, match="as an answer, got NoneType"):
            engine.stream("x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": b"x"}, "Reply.text: expected text, got bytes"),
        ({"seconds_per_token": -1}, "Reply.seconds_per_token: expected >= 0, got -1"),
        ({"first_token_seconds": float("nan")}, "Reply.first_token_seconds: expected >= 0, got nan"),
        ({"fail_after": -1}, "Reply.fail_after: expected >= 0, got -1"),
        ({"logprob": 0.5}, "Reply.logprob: expected <= 0, got 0.5"),
        ({"error": sg.LoadError("x")}, "or EngineFailed, got LoadError"),
        ({"error": ValueError("x")}, "or EngineFailed, got ValueError"),
    ],
)
def test_a_reply_says_what_it_expects(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(sg.ConfigError) as caught:
        Reply(**fields)
    assert words in str(caught.value)


async def test_requests_are_kept_for_assertions() -> None:
    async with FakeEngine("ok") as engine:
        await engine.generate([sg.user("hi")], temperature=0.5, tenant="t", sampling=sg.Sampling(max_tokens=3))
        (request,) = engine.requests
        assert request.text == "hi" and request.messages == ({"role": "user", "content": "hi"},)
        assert request.fields["temperature"] == 0.5 and request.fields["tenant"] == "t"
        assert request.fields["max_tokens"] == 3
        with pytest.raises(sg.InvalidRequest):
            engine.stream("x", temperature=-1)
        assert len(engine.requests) == 1, "what is refused when it is made never was a request"


@pytest.mark.parametrize("error", [sg.EngineOverloaded("busy", retry_after=3.0), sg.RateLimited("slowly")])
async def test_refusals_come_before_any_work(error: sg.AdmissionError) -> None:
    async with FakeEngine(Reply(error=error)) as engine:
        stream = engine.stream("x")
        with pytest.raises(type(error)) as caught:
            async with stream:
                pass
        assert caught.value.retry_after == error.retry_after
        engine.overload()
        with pytest.raises(sg.EngineOverloaded):
            await engine.generate("x")
        assert engine.stats().steps == 0


async def test_a_request_fails_half_way_and_others_do_not() -> None:
    script: dict[str, Answer] = {
        "good": "all is well",
        "bad": Reply(text="half of it", error=sg.ProcessorError("boom"), fail_after=4),
    }
    async with FakeEngine(script) as engine, anyio.create_task_group() as group:

        async def good() -> None:
            assert (await engine.generate("good")).text == "all is well"

        group.start_soon(good)
        with pytest.raises(sg.ProcessorError, match="boom") as caught:
            await engine.generate("bad")
        assert caught.value.partial.text == "half" and caught.value.partial.finish_reason == "error"


async def test_the_engine_fails_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    script: list[Answer] = [
        "first",
        Reply(text="never", error=sg.EngineFailed("the card fell out"), fail_after=2),
        "third",
    ]
    async with FakeEngine(script) as engine:
        assert (await engine.generate("x")).text == "first"
        with pytest.raises(sg.EngineFailed, match="the card fell out"):
            await engine.generate("x")
        assert engine.state == "failed"
        await engine.restart()
        assert (await engine.generate("x")).text == "third"
    async with FakeEngine("ok") as engine:
        assert (await engine.generate("x")).text == "ok"
        engine.fail("told to")
        with pytest.raises(sg.EngineFailed, match="told to"):
            await engine.generate("x")
        await engine.restart()
        assert (await engine.generate("x")).text == "ok"


async def test_time_passes_when_it_is_told_to() -> None:
    clock = VirtualClock()
    async with FakeEngine(Reply(text="abc", seconds_per_token=10, never_ends=True), clock=clock) as engine:
        stream = engine.stream("x", timeout=25)
        async with stream:
            assert stream.result.text == ""
            for text in ("a", "ab"):
                await until(lambda: clock.num_sleeping == 1)
                clock.advance(10)
                await until(partial(has_text, stream, text))
            clock.advance(5)
            with pytest.raises(sg.DeadlineExceeded) as caught:
                await stream.final()
            assert caught.value.partial.text == "ab"
    with pytest.raises(ValueError, match="seconds: expected >= 0"):
        clock.advance(-1)


async def test_a_queue_timeout_on_virtual_time() -> None:
    clock = VirtualClock()
    async with FakeEngine(Reply(text="slow", seconds_per_token=100), clock=clock, max_running=1) as engine:
        async with engine.stream("first") as first:
            await until(lambda: engine.stats().running == 1 or first._mailbox.is_started)
            second = engine.stream("second", queue_timeout=30)
            async with second:
                clock.advance(31)
                with pytest.raises(sg.DeadlineExceeded, match="queue_timeout"):
                    await second.final()
            first.cancel()


async def test_who_ends_holds_nobody_up() -> None:
    """A model that would take years, on the real clock: cancelled, timed out, and cancelled before it runs."""
    script: dict[str, str | Reply] = {"years": Reply(text="x", seconds_per_token=1e9), "now": "ok"}
    async with FakeEngine(script, max_running=1) as engine:
        async with engine.stream("years"):
            await until(lambda: engine.stats().steps > 0)
        with anyio.fail_after(10):
            assert (await engine.generate("now")).text == "ok"
        with pytest.raises(sg.DeadlineExceeded):
            await engine.generate("years", timeout=0.02)
        for _ in range(50):  # some end between the plan of their first step and the step
            stream = engine.stream("years")
            await stream.__aenter__()
            stream.cancel()
            assert (await engine.generate("now")).text == "ok"


async def test_time_passes_by_itself() -> None:
    clock = VirtualClock(auto=True)
    script = {"slow": Reply(text="abc", seconds_per_token=10), "never": Reply(first_token_seconds=float("inf"))}
    start = time.monotonic()
    async with FakeEngine(script, clock=clock, max_running=1) as engine:
        completion = await engine.generate("slow", timeout=60)
        assert completion.text == "abc" and 40 <= clock() < 41, "three letters and the end"
        assert completion.timings.first_token == pytest.approx(10, abs=0.5)
        before = clock()
        with pytest.raises(sg.DeadlineExceeded):
            await engine.generate("never", timeout=30)
        assert 30 <= clock() - before < 31
        with pytest.raises(sg.DeadlineExceeded, match="queue_timeout"):
            async with engine.stream("slow", timeout=100), engine.stream("slow", queue_timeout=5) as second:
                await second.final()
        async with engine.stream("slow") as stream:
            async for _ in stream:
                stream.cancel()
    assert time.monotonic() - start < 10


async def test_an_automatic_clock_stands_still_while_nothing_sleeps_and_serves_several_engines() -> None:
    clock = VirtualClock(auto=True)
    async with FakeEngine(Reply(text="a", seconds_per_token=5), clock=clock) as one, FakeEngine(clock=clock) as two:
        assert (await two.generate("x")).text == "ok" and clock() == 0
        async with anyio.create_task_group() as group:
            group.start_soon(one.generate, "x")
            group.start_soon(two.generate, "x")
        assert 10 <= clock() < 11
        await two.aclose()
        assert (await one.generate("x")).text == "a" and 20 <= clock() < 22, "a closed engine holds no time up"


async def test_closing_does_not_wait_for_virtual_time() -> None:
    clock = VirtualClock()
    engine = FakeEngine(Reply(text="x", seconds_per_token=1e9), clock=clock)
    await engine.open()
    stream = engine.stream("x")
    await stream.__aenter__()
    with anyio.fail_after(10):
        await engine.aclose()
    assert stream.result.finish_reason == "cancelled"


async def test_the_rest_is_the_real_engine() -> None:
    async with FakeEngine(Reply(text="y", never_ends=True), max_running=2, max_queued=1) as engine:
        streams = [engine.stream("x") for _ in range(3)]
        for stream in streams:
            await stream.__aenter__()
        with pytest.raises(sg.EngineOverloaded):
            await engine.generate("x")
        for stream in streams:
            await stream.__aexit__(None, None, None)
        session = engine.session()
        assert (await session.ask("hello", max_tokens=3)).text == "yyy" and len(session.messages) == 2
        results = [result async for result in engine.map(["a", "b"], max_tokens=2)]
        assert [result.index for result in results] == [0, 1]
        completion = await engine.generate("x", max_tokens=4, stop="yy", logprobs=1)
        assert completion.text == "" and completion.stop == "yy" and completion.logprobs is not None
        with pytest.raises(sg.NotSupported, match="processors"):
            engine.stream("x", processors=[lambda ids, logits: None])


async def test_scores_and_samples_have_the_scripted_logprobs() -> None:
    script = [Reply(logprob=-0.5), Reply(text="y", logprob=-2.0), Reply(text="z", logprob=-1.0)]
    async with FakeEngine(script) as engine:
        scores = await engine.score("ab" * 400, "cd")
        assert [(score.text, score.logprob) for score in scores] == [("c", -0.5), ("d", -0.5)]
        completion = await engine.generate("ab", prompt_logprobs=1, logprobs=0)
        assert completion.prompt_logprobs is not None and completion.logprobs is not None
        assert [entry and entry.text for entry in completion.prompt_logprobs] == [None, "a", "b"]
        assert [entry.logprob for entry in completion.logprobs] == [-2.0, -2.0]
        assert [completion.text for completion in await engine.sample("x", n=2, best_of=3)] == ["z", "z"]


@pytest.mark.parametrize(
    "kind",
    [sg.GenerationError, sg.DeadlineExceeded, sg.SlowConsumer, sg.ProcessorError, sg.OutputInvalid],
    ids=lambda kind: kind.__name__,
)
async def test_errors_arrive_as_what_they_are(kind: type[sg.GenerationError]) -> None:
    async with FakeEngine(Reply(text="abc", error=kind("why"), fail_after=1)) as engine:
        with pytest.raises(sg.GenerationError, match="why") as caught:
            await engine.generate("x")
        assert type(caught.value) is kind and caught.value.partial.text == "a"
        assert engine.stats().pages_used == 0


def test_plain_code_has_one_too() -> None:
    from streamgen.testing.sync import FakeEngine as SyncFakeEngine

    with SyncFakeEngine({"ping": "pong", "bad": Reply(error=sg.EngineOverloaded("busy"))}) as engine:
        assert isinstance(engine, sg.sync.Engine)
        assert engine.generate("ping").text == "pong"
        assert "".join(engine.stream("ping").texts()) == "pong"
        assert [request.text for request in engine.requests] == ["ping", "ping"]
        with pytest.raises(sg.EngineOverloaded):
            engine.generate("bad")


async def test_prompts_that_fit_a_real_model_fit_here_and_a_small_one_can_be_had() -> None:
    async with FakeEngine("ok") as engine:
        assert (await engine.generate("x" * 60_000)).text == "ok"
    async with FakeEngine(Reply(text="y", never_ends=True), num_pages=4) as engine:
        completion = await engine.generate("x" * 50)
        assert completion.finish_reason == "length" and completion.usage.completion_tokens == 64 - 51
        with pytest.raises(sg.PromptTooLong):
            await engine.generate("x" * 70)


async def test_a_load_error() -> None:
    with pytest.raises(sg.InsufficientMemory, match="too small"):
        async with FakeEngine(load_error=sg.InsufficientMemory("too small")):
            pass


def test_all_are_text_engines() -> None:
    def use(engine: TextEngine) -> TextEngine:
        return engine

    assert use(FakeEngine()) and isinstance(FakeEngine(), TextEngine)
    assert use(sg.Engine("nowhere")) and isinstance(sg.Engine("nowhere"), TextEngine)


def test_it_needs_neither_torch_nor_numpy_nor_kernels(tmp_path: Path) -> None:
    blocked = ("torch", "numpy", "outlines", "safetensors", "tokenizers", "streamgen._cpu", "transformers")
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r} or name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is not installed here", name=name)
sys.meta_path.insert(0, Blocker())
import anyio, streamgen as sg
from streamgen.testing import FakeEngine
async def main():
    async with FakeEngine("hello") as engine:
        print((await engine.generate([sg.user("hi")])).text, *[m for m in {blocked!r} if m in sys.modules])
anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(Path(sg.__file__).parents[1]), "PATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["hello"]


def test_the_package_says_what_it_has() -> None:
    import streamgen.testing as testing

    assert all(getattr(testing, name) is not None for name in testing.__all__)
    name: Any = "nothing"
    with pytest.raises(AttributeError, match="nothing"):
        getattr(testing, name)


class Amount(Struct):
    quantity: int


async def test_replies_are_read_as_the_output_type() -> None:
    async with FakeEngine(['{"quantity": 3}', '{"quantity": "three"}', '[{"quantity": 1}, {"quantity": 2}]']) as engine:
        assert (await engine.generate("x", output=Amount)).parsed == Amount(3)
        with pytest.raises(sg.OutputInvalid):
            await engine.generate("x", output=Amount)
        async with engine.stream("x", output=list[Amount]) as stream:
            assert [item async for item in stream.items()] == [Amount(1), Amount(2)]


async def test_a_tool_loop_over_scripted_calls() -> None:
    def double(number: int) -> int:
        """Twice a number."""
        return 2 * number

    script = ['{"name": "double", "arguments": {"number": 21}}', "It is 42."]
    async with FakeEngine(script) as engine:
        reply = await engine.run_tools([sg.user("twice 21?")], tools=[double])
    assert (reply.text, reply.finish_reason) == ("It is 42.", "stop")
    said = engine.requests[1].messages
    assert said is not None
    assert [message["role"] for message in said] == ["user", "assistant", "tool"]
    assert said[2]["content"] == "42"
