"""Calls for templates that know of no tools: the system message describes them, and a call is a JSON object.

What a conversation then holds of calls and their results is put into words that any template has: the model's calls as
the JSON that it wrote, results as messages of the user.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streamgen.text.calls.formats import CallFormat, CallGrammar, chosen
from streamgen.text.calls.json_calls import JsonCalls
from streamgen.text.calls.schemas import call_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamgen.text.calls.formats import Definition

_INTRODUCTION = (
    "You can call functions. To call one, answer with nothing but a JSON object: "
    '{"name": "the function", "arguments": {...}}. You will be given its result. The functions:'
)


class PlainCalls(CallFormat):
    """Nothing but its shape tells a call from an answer."""

    name = "plain JSON"

    def parser(self) -> JsonCalls:
        """An object at the beginning."""
        return JsonCalls({}, begin="")

    def grammar(self, definitions: Sequence[Definition], choice: str) -> CallGrammar | None:
        """From the first token on, where a call is required; else there is no telling whether one has begun."""
        if choice == "auto":
            self._refuse_strict(definitions)
            return None
        return CallGrammar(source=call_source(chosen(definitions, choice)))


def describe_plainly(
    chat: Sequence[Mapping[str, Any]], definitions: Sequence[Definition]
) -> tuple[dict[str, Any], ...]:
    """The chat as a template without tools can take it."""
    messages = [_plain(message) for message in chat]
    if not definitions:
        return tuple(messages)
    functions = [json.dumps(_without_strict(definition), ensure_ascii=False) for definition in definitions]
    text = "\n".join((_INTRODUCTION, *functions))
    if messages and messages[0].get("role") in ("system", "developer"):
        head = messages[0]
        return ({**head, "content": f"{_text_of(head)}\n\n{text}"}, *messages[1:])
    return ({"role": "system", "content": text}, *messages)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        name = message.get("name")
        return {"role": "user", "content": f"Result{f' of {name}' if name else ''}: {_text_of(message)}"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    objects = [json.dumps(_call_object(call), ensure_ascii=False) for call in calls]
    return {"role": "assistant", "content": "\n".join(filter(None, (_text_of(message), *objects)))}


def _call_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def _without_strict(definition: Definition) -> dict[str, Any]:
    return {key: value for key, value in definition["function"].items() if key != "strict"}


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
