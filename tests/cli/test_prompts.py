"""Lines of input become requests, or say why they are none."""

from __future__ import annotations

from typing import Any

import pytest

from streamgen.cli.prompts import Request, as_prompt, from_json_lines, from_texts


def test_texts() -> None:
    assert list(from_texts(["a", "b"])) == [Request(index=0, text="a"), Request(index=1, text="b")]


def test_lines_in_every_form() -> None:
    chat = [{"role": "user", "content": "hi"}]
    lines = ['"plain"', "", '{"prompt": "p", "top_k": 5}', '{"messages": [{"role": "user", "content": "hi"}]}']
    assert list(from_json_lines(lines)) == [
        Request(index=0, text="plain"),
        Request(index=1, text="p", sampling={"top_k": 5}),
        Request(index=2, chat=chat),
    ]


def test_keys_of_logit_bias_are_ids() -> None:
    (request,) = from_json_lines(['{"prompt": "p", "logit_bias": {"17": -2.5, "x": 1}}'])
    assert request.sampling == {"logit_bias": {17: -2.5, "x": 1}}


@pytest.mark.parametrize(
    "line", ["{", "7", "[]", "null", "{}", '{"prompt": 3}', '{"prompt": "a", "messages": []}', '{"messages": ["x"]}']
)
def test_what_is_no_request_says_so(line: str) -> None:
    good, bad = from_json_lines(['"good"', line])
    assert good.refusal is None
    assert bad.index == 1
    assert bad.refusal is not None
    assert str(bad.refusal).startswith("prompt 1: ")


def test_lines_are_read_one_at_a_time() -> None:
    def lines() -> Any:
        yield '"first"'
        raise AssertionError("read too far")

    assert next(from_json_lines(lines())).text == "first"


def test_as_prompt() -> None:
    request = Request(index=0, text="hi")
    assert as_prompt(request, system=None, templated=False) == "hi"
    user = {"role": "user", "content": "hi"}
    assert as_prompt(request, system=None, templated=True) == [user]
    system = {"role": "system", "content": "s"}
    assert as_prompt(request, system="s", templated=True) == [system, user]
    assert as_prompt(Request(index=0, chat=[user]), system="s", templated=False) == [system, user]
