"""Prompts: raw text, token ids, or a chat; checked here before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from streamgen.errors import InvalidRequest
from streamgen.text.chat import normalize_messages

MAX_TEXT_BYTES = 8_000_000
MAX_IDS = 1_000_000  # checking them takes the caller about 40 ms

Message: TypeAlias = Mapping[str, Any]
"""One chat message in OpenAI's form: "role", "content", and for tools "tool_calls", "tool_call_id", "name"."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Raw text, token ids, or a chat that goes through the checkpoint's template."""


class ParsedPrompt(Struct, frozen=True, kw_only=True):
    """Exactly one of the three is set."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    chat: tuple[dict[str, object], ...] | None = None


class Rendered(Struct, frozen=True, kw_only=True):
    """A chat after the template, as the model would see it."""

    text: str
    ids: tuple[int, ...]


def system(text: str, /) -> dict[str, object]:
    """A system message."""
    return {"role": "system", "content": text}


def user(text: str, /) -> dict[str, object]:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str, /) -> dict[str, object]:
    """A message of the model."""
    return {"role": "assistant", "content": text}


def tool_result(content: str, /, *, tool_call_id: str | None = None, name: str | None = None) -> dict[str, object]:
    """What a tool answered."""
    message: dict[str, object] = {"role": "tool", "content": content}
    if tool_call_id is not None:
        message["tool_call_id"] = tool_call_id
    if name is not None:
        message["name"] = name
    return message


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Tell the three forms apart and check them.

    Raises:
        InvalidRequest: empty, too long, mixed, or of a wrong type.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(text=check_text("prompt", prompt))
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Sequence):
        return _parse_array(prompt)
    if not prompt:
        raise InvalidRequest("prompt: expected text, token ids or messages, got an empty sequence", param="prompt")
    if all(isinstance(item, Mapping) for item in prompt):
        return ParsedPrompt(chat=_check_chat(prompt))  # type: ignore[arg-type]  # all are mappings
    if any(isinstance(item, Mapping) for item in prompt):
        raise InvalidRequest("prompt: expected either token ids or messages, got both", param="prompt")
    return ParsedPrompt(ids=check_ids("prompt", prompt))


def check_text(name: str, text: str) -> str:
    """Text that can be tokenized.

    Raises:
        InvalidRequest: empty, over the limit, or not valid Unicode.
    """
    if not text:
        raise InvalidRequest(f"{name}: expected text that is not empty", param=name)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as e:
        raise InvalidRequest(f"{name}: expected valid Unicode, got a lone surrogate at {e.start}", param=name) from None
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name}: expected <= {MAX_TEXT_BYTES} bytes of text, got {size}", param=name)
    return text


def check_ids(name: str, ids: Sequence[Any]) -> tuple[int, ...]:
    """Token ids as plain ints; the range is checked against the vocabulary by the engine.

    Raises:
        InvalidRequest: too many, or something that is not an integer >= 0.
    """
    if len(ids) > MAX_IDS:
        raise InvalidRequest(f"{name}: expected <= {MAX_IDS} token ids, got {len(ids)}", param=name)
    if set(map(type, ids)) == {int} and min(ids) >= 0:
        return tuple(ids)
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise InvalidRequest(
                f"{name}[{index}]: expected a token id (an integer) or a message (a dict), got {type(token).__name__}",
                param=name,
            )
        if token < 0:
            raise InvalidRequest(f"{name}[{index}]: expected a token id >= 0, got {token}", param=name)
    return tuple(ids)


def _parse_array(prompt: Any) -> ParsedPrompt:
    # Arrays of numpy and torch are not Sequences; taking their list keeps both out of here.
    tolist = getattr(prompt, "tolist", None)
    values = tolist() if callable(tolist) else None
    if not isinstance(values, list):
        raise InvalidRequest(
            f"prompt: expected a string, token ids or messages, got {type(prompt).__name__}", param="prompt"
        )
    if not values:
        raise InvalidRequest("prompt: expected token ids, got an empty array", param="prompt")
    return ParsedPrompt(ids=check_ids("prompt", values))


def _check_chat(messages: Sequence[Message]) -> tuple[dict[str, object], ...]:
    checked = normalize_messages(messages)
    size = sum(_text_size(index, message["content"]) for index, message in enumerate(checked))
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(f"messages: expected <= {MAX_TEXT_BYTES} bytes of text, got {size}", param="messages")
    return checked


def _text_size(index: int, content: Any) -> int:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return sum(len(check_text(f"messages[{index}].content", text).encode()) for text in texts if text)
