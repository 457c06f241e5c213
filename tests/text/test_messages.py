from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamgen.errors import InvalidRequest
from streamgen.text.chat import ROLES, normalize_messages


def test_good_messages_pass_unchanged() -> None:
    messages = [{"role": role, "content": f"as {role}"} for role in ROLES]
    assert normalize_messages(messages) == tuple(messages)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert normalize_messages(parts) == tuple(parts)


def test_the_caller_s_objects_are_not_touched() -> None:
    message: dict[str, Any] = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": [1]}'}}],
    }
    before = msgspec.json.encode(message)
    (normal,) = normalize_messages([message])
    assert normal["content"] == ""
    assert normal["tool_calls"] == [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": [1]}}}]
    normal["tool_calls"][0]["function"]["arguments"]["x"].append(2)
    assert msgspec.json.encode(message) == before


@pytest.mark.parametrize("arguments", ["not json", "[1]", '{"x":', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (normal,) = normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert normal["tool_calls"][0]["function"]["arguments"] == arguments


def test_structs_are_messages_too() -> None:
    class Said(msgspec.Struct):
        role: str
        content: str

    assert normalize_messages([Said("user", "hi")]) == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ("hi", "messages[1]"),
        ({"content": "hi"}, "messages[1].role"),
        ({"role": "robot", "content": "hi"}, "messages[1].role"),
        ({"role": ["user"], "content": "hi"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "tool", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": ["hi"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": object()}, "messages[1].content"),
        ({"role": "user", "content": b"hi"}, "messages[1].content"),
        ({"role": "user", "content": "", 5: 5}, "messages[1]"),
        ({"role": "user", "content": "", "tool_calls": []}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_wrong_message_is_named(message: Any, where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalize_messages([{"role": "user", "content": "secret"}, message])
    assert caught.value.param == where
    assert str(caught.value).startswith(where + ":")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user", "content": "hi"}, None, 5])
def test_a_list_of_messages_is_wanted(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: expected"):
        normalize_messages(messages)


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = {"x": deep}
    with pytest.raises(InvalidRequest, match="nested"):
        normalize_messages([{"role": "user", "content": "hi", "extra": deep}])
