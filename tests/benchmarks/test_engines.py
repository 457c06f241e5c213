"""The adapters against real engines and a real server: ours on a tiny model, the client on events over HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import streamgen as sg
from benchmarks.peersuite.adapters.base import CHILDREN, Setting, Unable, run_child
from benchmarks.peersuite.adapters.llama_cpp import LlamaCpp, _timeline
from benchmarks.peersuite.adapters.ours import Ours
from benchmarks.peersuite.figures import BETWEEN_P99, OVERALL, START, STEADY, Incomplete
from benchmarks.peersuite.generate import GGUF_FILE, Shape, generate
from benchmarks.peersuite.logits import Logits, distance, our_logits
from benchmarks.peersuite.models import MissingModel, Model, Tools, find_model
from benchmarks.peersuite.rounds import Manner, measure
from benchmarks.peersuite.sse import Events, Refused, post, wait_until_up
from benchmarks.peersuite.works import Request, Work, make_work
from streamgen.testing.tiny import CONFIG, write_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.peersuite.figures import Outcome

VOCAB: int = CONFIG["vocab_size"]
SETTING = Setting(threads=2, options={"kv_memory": "32MiB"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    sizes: dict[str, Any] = {"vocab": VOCAB, "file_weights": 1000, "layer_weights": 1000, "head_weights": 1000}
    return Model(name="tiny", ours=folder, gguf=folder, openvino=None, tokenizer=folder, **sizes)


def short(kind: str, count: int) -> Work:
    requests = tuple(
        Request(ids=tuple(range(i, i + 10)), max_tokens=6, arrival=0.05 * i if kind == "poisson" else 0.0)
        for i in range(count)
    )
    return Work(name=kind, kind=kind, requests=requests)


def test_our_engine_does_a_work(tiny: Model) -> None:
    ours = Ours(SETTING)
    assert ours.unavailable() is None and ours.version()
    assert ours.run(short("decode", 3), tiny).values[STEADY.name] > 0
    values = ours.run(short("poisson", 3), tiny).values
    assert values[OVERALL.name] > 0 and values[BETWEEN_P99.name] > 0
    assert 0 < ours.run(make_work("start", VOCAB), tiny).values[START.name] < 60


def test_an_option_that_is_refused_is_a_reason(tiny: Model) -> None:
    with pytest.raises(Unable, match="ConfigError: unknown option 'nothing'"):
        Ours(Setting(threads=2, options={"nothing": 1})).run(short("decode", 1), tiny)


def test_a_child_that_breaks_says_why(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text("import sys; sys.stdin.read(); print('chatter', flush=True); raise SystemExit('it broke')")
    with pytest.raises(Incomplete, match="ended with 1: it broke"):
        run_child([sys.executable, str(child)], short("decode", 1), {})


def test_children_are_where_adapters_look() -> None:
    names = {path.name for path in CHILDREN.glob("*.py")}
    assert {"run_ours.py", "run_openvino.py", "run_transformers.py", "compress_openvino.py"} <= names


class Scripted:
    """An engine whose turns are known before."""

    def __init__(self, name: str, rates: list[float | str]) -> None:
        self.name = name
        self._rates = rates

    def unavailable(self) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def run(self, work: Work, model: Model) -> Outcome:
        from benchmarks.peersuite.figures import Outcome

        rate = self._rates.pop(0)
        if isinstance(rate, str):
            raise Unable(rate)
        return Outcome(values={STEADY.name: rate, OVERALL.name: rate})


def test_rounds_take_turns_and_leave_out_who_cannot(tiny: Model) -> None:
    engines = [Scripted("streamgen", [1.0, 2.0]), Scripted("b", [3.0, 4.0]), Scripted("c", [5.0, "no more"])]
    manner = Manner(threads=1, rounds=2, matmul=False, most_others=99.0)
    measured = measure(short("decode", 1), tiny, engines, manner)
    assert [(t.round, t.engine) for t in measured.turns] == [(0, "streamgen"), (0, "b"), (1, "b"), (1, "streamgen")]
    assert measured.missing == {"c": "no more"} and len(measured.machines) == 2
    assert all(machine.bandwidth > 0 for machine in measured.machines)


def test_a_disturbed_turn_is_tried_again(tiny: Model) -> None:
    engine = Scripted("streamgen", [1.0, 2.0, 3.0])
    manner = Manner(
        threads=1, rounds=1, matmul=False, most_others=-1.0, patience=1.0
    )  # others are always more than that
    measured = measure(short("decode", 1), tiny, [engine], manner)
    assert len(measured.turns) == 1 and engine._rates == []


def test_the_busy_process_is_there_and_gone(tiny: Model) -> None:
    engine = Scripted("streamgen", [8.0, 2.0])
    manner = Manner(threads=1, rounds=1, matmul=False, most_others=99.0)
    (turn,) = measure(make_work("foreign", VOCAB), tiny, [engine], manner).turns
    assert turn.values["share of quiet"] == 0.25


def test_events_as_tokens() -> None:
    """A character of two tokens comes as one event; the last event brings none of its own."""
    told = [1, 2, 4, 5, 5]
    events = Events(times=[0.1, 0.2, 0.4, 0.5, 0.6], lines=[json.dumps({"tokens_predicted": n}).encode() for n in told])
    timeline = _timeline(events, 0.05)
    assert (timeline.times, timeline.counts) == ([0.1, 0.2, 0.4, 0.5], [1, 1, 2, 1])


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET /health"):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n{}")
    elif b"/refuse" in head:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\nno such thing")
    else:
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        body = json.loads(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for i in range(body["count"]):
            event = b"data: " + json.dumps({"i": i}).encode() + b"\n\n"
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")
    writer.close()


def test_the_client_reads_events() -> None:
    async def run() -> Events:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            await wait_until_up(port, "/health", 5.0)
            events = await post(port, "/completion", {"count": 3})
            with pytest.raises(Refused, match=r"400 Bad Request: no such thing$"):
                await post(port, "/refuse", {})
        return events

    events = asyncio.run(run())
    assert [json.loads(text)["i"] for text in events.lines] == [0, 1, 2]
    assert events.times == sorted(events.times) and events.times[-1] - events.times[0] >= 0.015


def test_llama_cpp_is_not_everywhere(tmp_path: Path) -> None:
    reason = LlamaCpp(Setting(threads=1, root=tmp_path)).unavailable()
    assert reason is not None and "llama-bench" in reason


def test_models_that_are_not_there_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path))
    tools = Tools(quantize=None, openvino_python=None)
    with pytest.raises(MissingModel, match="streamgen pull demo"):
        find_model("demo", tools)
    with pytest.raises(MissingModel, match=r"tests\.real_models"):
        find_model("qwen-0.5b", tools)
    with pytest.raises(MissingModel, match="expected one of demo, "):
        find_model("2b-bf16", tools)


async def greedy(model: Path) -> tuple[tuple[int, ...], list[float]]:
    async with sg.Engine(model, dtype="float32", kv_memory="32MiB", threads=2) as engine:
        reply = await engine.generate(list(range(300, 340)), max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
    assert reply.logprobs is not None
    return reply.ids, [score.logprob for score in reply.logprobs]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_files_hold_the_same_model(tmp_path: Path, demo_model_path: Path) -> None:
    """Rope order, names, a vocabulary larger than the tokenizer's: both containers give the same tokens."""
    shape = Shape(name="t", hidden=64, layers=2, heads=4, kv_heads=2, inner=128, vocab=49_216, rope_theta=10_000.0)
    generate(shape, tmp_path / "t")
    folder_ids, folder_scores = asyncio.run(greedy(tmp_path / "t"))
    gguf_ids, gguf_scores = asyncio.run(greedy(tmp_path / "t" / GGUF_FILE))
    assert folder_ids == gguf_ids and folder_scores == gguf_scores
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_logits_are_the_engines_own(tiny: Model) -> None:
    windows = np.arange(48, dtype=np.int32).reshape(2, 24) % VOCAB
    options: dict[str, Any] = {"dtype": "float32", "kv_memory": "16MiB", "threads": 2}
    logits = our_logits(tiny.ours, windows, options, rows=512)
    np.testing.assert_array_equal(logits, our_logits(tiny.ours, windows, options, rows=1))

    async def score() -> list[float]:
        async with sg.Engine(tiny.ours, **options) as engine:
            found = await engine.score(windows[1, :1].tolist(), windows[1, 1:].tolist())
        return [one.logprob for one in found]

    chosen = logits[1] - np.log(np.exp(logits[1]).sum(-1, keepdims=True))
    assert chosen[np.arange(23), windows[1, 1:]].tolist() == pytest.approx(asyncio.run(score()), abs=1e-4)


def test_distance_of_known_distributions() -> None:
    exact: Logits = np.log(np.array([[[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]], np.float32))
    other: Logits = np.log(np.array([[[0.5, 0.5], [0.4, 0.6], [0.1, 0.9]]], np.float32))
    windows = np.array([[0, 1, 0]], np.int32)
    same = distance(exact, exact + np.float32(7.0), windows)
    assert same.mean_kl == pytest.approx(0.0, abs=1e-7) and same.agreement == 1.0
    found = distance(exact, other, windows)  # the last position has no next token, so it does not count
    divergence = 0.9 * np.log(0.9 / 0.4) + 0.1 * np.log(0.1 / 0.6)
    assert found.mean_kl == pytest.approx(divergence / 2, rel=1e-5) and found.agreement == 0.5
    assert found.perplexity == pytest.approx((0.5 * 0.4) ** -0.5, rel=1e-5)
    assert found.exact_perplexity == pytest.approx((0.5 * 0.9) ** -0.5, rel=1e-5)
