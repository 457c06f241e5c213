"""`streamgen run` on a tiny real model: what is printed, in which order, and how it fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from streamgen import hub
from streamgen.cli import exit_codes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]

GREEDY = ("--temperature", "0", "--dtype", "float32", "--kv-memory", "16MiB", "--threads", "1")
PROMPTS = ("Once upon a time", "Lily and Tom went to the park.", "The big dog was very")


def expected(golden: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
    return next(case for case in golden if case["prompt"] == prompt)


def test_one_prompt_is_streamed(run: Run, stories: Path, golden: list[dict[str, Any]]) -> None:
    case = expected(golden, PROMPTS[0])
    code, out, err = run("run", stories, "-p", PROMPTS[0], "--raw", "--max-tokens", case["max_new_tokens"], *GREEDY)
    assert (code, out, err) == (0, case["text"] + "\n", "")


def test_the_prompt_may_come_from_stdin(
    run: Run, stories: Path, golden: list[dict[str, Any]], pipe: Callable[[str], None]
) -> None:
    case = expected(golden, PROMPTS[1])
    pipe(PROMPTS[1] + "\n")
    _, out, _ = run("run", stories, "--raw", "--max-tokens", case["max_new_tokens"], *GREEDY)
    assert out == case["text"] + "\n"


def test_a_terminal_without_a_prompt_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, out, err = run("run", "never-opened")
    assert code == 4
    assert out == ""
    assert "-p TEXT" in err


def test_without_a_template_it_says_that_prompts_go_in_as_they_are(run: Run, stories: Path) -> None:
    code, out, err = run("run", stories, "-p", PROMPTS[0], "--max-tokens", 4, *GREEDY)
    assert code == 0
    assert out
    assert "no chat template" in err


def test_several_prompts_are_printed_in_order(run: Run, stories: Path, golden: list[dict[str, Any]]) -> None:
    lengths = [expected(golden, prompt)["max_new_tokens"] for prompt in PROMPTS]
    flags = [flag for prompt in PROMPTS for flag in ("-p", prompt)]
    code, out, _ = run("run", stories, *flags, "--json", "--raw", "--max-tokens", min(lengths), *GREEDY)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    for prompt, line in zip(PROMPTS, lines, strict=True):
        assert line["ids"] == expected(golden, prompt)["output_ids"][: min(lengths)]
        assert line["finish_reason"] == "length"
        assert line["usage"]["completion_tokens"] == min(lengths)


def test_several_texts_are_set_apart_by_a_blank_line(run: Run, stories: Path) -> None:
    one = [run("run", stories, "-p", prompt, "--raw", "--max-tokens", 5, *GREEDY)[1] for prompt in PROMPTS[:2]]
    both = run("run", stories, "-p", PROMPTS[0], "-p", PROMPTS[1], "--raw", "--max-tokens", 5, *GREEDY)[1]
    assert both == one[0] + "\n" + one[1]


def test_sampling_options_reach_the_engine(run: Run, stories: Path, golden: list[dict[str, Any]]) -> None:
    options = ("--max-tokens", 64, "--stop", "zebra", "--stop", " time", "--logprobs", 2, "--json", "--raw")
    line = json.loads(run("run", stories, "-p", "Once upon a", *options, *GREEDY)[1])
    assert line["text"] == ""
    assert (line["finish_reason"], line["stop"]) == ("stop", " time")
    assert len(line["logprobs"][0]["top"]) == 2


def test_the_same_seed_gives_the_same_answer(run: Run, stories: Path) -> None:
    fixed = ("--raw", "--max-tokens", 24, "--temperature", 1.5, "--kv-memory", "16MiB", "--threads", 1)
    outs = [run("run", stories, "-p", PROMPTS[0], "--seed", seed, *fixed)[1] for seed in (7, 7, 8)]
    assert outs[0] == outs[1] != outs[2]


class TestJsonLines:
    """`--jsonl`: one prompt per line, answers as they finish."""

    def test_lines_run_and_bad_ones_do_not_stop_the_others(
        self, run: Run, stories: Path, pipe: Callable[[str], None], golden: list[dict[str, Any]]
    ) -> None:
        pipe(
            f'{json.dumps(PROMPTS[0])}\n\n{{"prompt": {json.dumps(PROMPTS[1])}, "max_tokens": 3}}\n'
            '{"prompt": "x", "temperatur": 1}\nno json\n{"prompt": "x", "max_tokens": 0}\n'
        )
        code, out, err = run("run", stories, "--jsonl", "--raw", "--max-tokens", 8, *GREEDY)
        lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
        assert sorted(lines) == [0, 1, 2, 3, 4]
        assert lines[0]["ids"] == expected(golden, PROMPTS[0])["output_ids"][:8]
        assert lines[1]["ids"] == expected(golden, PROMPTS[1])["output_ids"][:3]
        assert "temperature" in lines[2]["error"]["message"]
        assert {lines[i]["error"]["code"] for i in (2, 3, 4)} == {"invalid_request"}
        assert (code, err) == (4, "")

    def test_more_prompts_than_requests_under_way(self, run: Run, stories: Path, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(f"Once {number}") + "\n" for number in range(9)))
        arguments = ("--jsonl", path, "--concurrency", 2, "--raw", "--max-tokens", 3, *GREEDY)
        code, out, _ = run("run", stories, *arguments)
        assert code == 0
        assert sorted(json.loads(line)["index"] for line in out.splitlines()) == list(range(9))

    def test_no_lines_are_no_answers(self, run: Run, stories: Path, pipe: Callable[[str], None]) -> None:
        pipe("\n \n")
        assert run("run", stories, "--jsonl", "--raw", *GREEDY) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--raw", "--system", "s", "-p", "x"), exit_codes.USAGE, "--system"),
        (("--jsonl", "-p", "x"), exit_codes.USAGE, "--jsonl"),
        (("--concurrency", "0", "-p", "x"), exit_codes.USAGE, "--concurrency"),
        (("--jsonl", "/no/such/file"), exit_codes.USAGE, "/no/such/file"),
        (("-p", "x", "--kv-memory", "much"), exit_codes.USAGE, "kv_memory"),
        (("-p", "x", "--kv-memory", "1.5"), exit_codes.USAGE, "kv_memory"),
        (("-p", "x", "--threads", "0"), exit_codes.USAGE, "threads"),
        (("-p", "x", "--max-context", "100000"), exit_codes.USAGE, "max_context"),
        (("-p", "x", "--system", "s", "--threads", "1"), exit_codes.USAGE, "chat template"),
        (("-p", "x", "--max-tokens", "0"), 4, "max_tokens"),
        (("-p", "x", "--temperature", "nan"), 4, "temperature"),
        (("-p", "word " * 2000), 4, "512"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_one_sentence(
    run: Run, stories: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    got, out, err = run("run", stories, *arguments)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_3(run: Run) -> None:
    code, out, err = run("run", "./no-such.gguf", "-p", "x")
    assert (code, out) == (3, "")
    assert "no-such.gguf" in err


def test_a_file_that_is_no_model_is_3(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    code, _, err = run("run", path, "-p", "x")
    assert code == 3
    assert "broken.gguf" in err


def test_the_demo_model_is_pulled_on_first_use(
    run: Run, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The puller is replaced by one that brings the tiny model."""
    pulled: list[object] = []
    missing = tmp_path / "demo.gguf"

    def pull(on_progress: object = None) -> Path:
        pulled.append(on_progress)
        missing.symlink_to(stories / "model.safetensors")
        return stories / "model.safetensors"

    monkeypatch.setattr(hub, "demo_model_path", lambda: missing)
    monkeypatch.setattr(hub, "pull_demo", pull)
    _, _, err = run("run", "-p", "x", "--raw", "--max-tokens", "2", *GREEDY)
    assert len(pulled) == 1
    assert "pulling it, once" in err
    run("run", "-p", "x", "--raw", "--max-tokens", "2", *GREEDY)
    assert len(pulled) == 1


def long_run(model: Path) -> subprocess.Popen[bytes]:
    """An answer of 2000 tokens, in a process of its own, whose first byte is there."""
    arguments = ["run", str(model), "-p", "Count.", "--max-tokens", "2000", "--ignore-eos", "--kv-memory", "64MiB"]
    command = [sys.executable, "-m", "streamgen", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_ctrl_c_ends_it_at_once_and_silently(demo_model_path: Path) -> None:
    with long_run(demo_model_path) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == exit_codes.INTERRUPTED
    assert err == b""


def test_a_reader_that_leaves_ends_it_silently(demo_model_path: Path) -> None:
    with long_run(demo_model_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == exit_codes.BROKEN_PIPE
    assert err == b""
