"""What real templates write of a conversation's calls is read back as these calls."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.text.calls.registry import find_format, takes_tools
from streamgen.text.chat import ChatTemplate, normalize_messages
from tests.text.test_calls import BY_ID, BY_TEXT, cut, read, run

if TYPE_CHECKING:
    from pathlib import Path

    from streamgen.text.calls.formats import CallFormat, CallTokens

FORMATS = {
    "Bielik-11B-v3.0-Instruct": "<tool_call>",
    "MiMo-VL": "<tool_call>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "<tool_call>",
    "Qwen-Qwen2.5-7B-Instruct": "<tool_call>",
    "Qwen-Qwen3-0.6B": "<tool_call>",
    "Reka-Edge": "<tool_call>",
    "ibm-granite-granite-4.1": "<tool_call>",
    "meta-llama-Llama-3.1-8B-Instruct": "Llama 3",
    "mistralai-Mistral-Nemo-Instruct-2407": "[TOOL_CALLS] list",
    "unsloth-mistral-Devstral-Small-2507": "[TOOL_CALLS]name[ARGS]",
    "v2_spm": "[TOOL_CALLS] list",
    "v3": "[TOOL_CALLS] list",
    "v3_spm": "[TOOL_CALLS] list",
}
ARGUMENTS: dict[str, Any] = {"city": 'Zürich "HB"\n', "days": [1, 2], "more": {"a": None, "b": True, "c": "</x> {[ 🙂"}}


@pytest.fixture(scope="module")
def sources(shared_data: Path) -> dict[str, str]:
    folder = shared_data / "chat_templates"
    paths = [*(folder / "templates").glob("*.jinja"), *(folder / "mistral_templates").glob("*.jinja")]
    return {path.stem: path.read_text() for path in paths}


def format_of(source: str, tokens: CallTokens) -> CallFormat:
    found = find_format(source, tokens)
    assert found is not None
    return found


def conversation(*calls: str, as_text: bool) -> list[dict[str, Any]]:
    entries = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(ARGUMENTS)}}
        for i, name in enumerate(calls)
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": entries},
    ]
    return messages if as_text else list(normalize_messages(messages))


def tools(*names: str) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
    return [
        {"type": "function", "function": {"name": name, "description": "Looks.", "parameters": parameters}}
        for name in names
    ]


def written_calls(source: str, *names: str) -> str:
    """What the assistant's turn with these calls looks like, from where it would begin to write."""
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    # These mark objects as safe HTML, and jinja then escapes what stands before them.
    messages = conversation(*names, as_text="|tojson|safe" in source)
    prompt = template.render(messages[:1], tools=tools(*names))
    whole = template.render(messages, tools=tools(*names), add_generation_prompt=False)
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    for end in ("<|im_end|>", "</s>", "<|eot_id|>", "<sep>", "<|end_of_text|>", "\n\n"):
        whole = whole.rstrip().removesuffix(end)
    return whole[at:].replace("<think>\n\n</think>\n\n", "")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [BY_ID, BY_TEXT], ids=["by-id", "by-text"])
@pytest.mark.parametrize("calls", [("weather",), ("weather", "news")])
def test_a_templates_own_history_is_read_back(
    sources: dict[str, str], name: str, tokens: CallTokens, calls: tuple[str, ...]
) -> None:
    if name.startswith("meta-llama") and len(calls) > 1:
        pytest.skip("this template takes one call at a time")
    output = written_calls(sources[name], *calls)
    format_ = format_of(sources[name], tokens)
    assert format_.name == FORMATS[name]
    found = symbols_of(format_, output)
    for step in (1, 7, len(found) + 1):
        text, found_calls = read(run(format_.parser(), cut(found, range(0, len(found), step))))
        assert [(n, json.loads(a), whole) for n, a, whole in found_calls] == [(n, ARGUMENTS, True) for n in calls]
        assert text.strip() == ""


def symbols_of(format_: CallFormat, text: str) -> list[str | int]:
    literals = {marker.literal: token for token, marker in format_.parser().markers.items()}
    found: list[str | int] = []
    while text:
        special = next((literal for literal in literals if text.startswith(literal)), None)
        found.append(literals[special] if special else text[0])
        text = text[len(special or text[0]) :]
    return found


def test_formats_are_found_and_others_are_not_guessed(sources: dict[str, str]) -> None:
    found = {name: find_format(source, BY_TEXT) for name, source in sources.items()}
    assert {name: f.name for name, f in found.items() if f is not None} == FORMATS
    without = {name for name, source in sources.items() if not takes_tools(source)}
    assert without >= {"google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"} and not without & set(FORMATS)


def test_mistrals_own_ids_are_read_back(shared_data: Path) -> None:
    """Token ids that Mistral itself wrote of conversations with calls."""
    from streamgen.text.parts import OutputFormats
    from tests.text import vocabularies

    tokenizer = vocabularies.load("mistral-v3/model")
    template = (shared_data / "chat_templates/mistral_templates/v3_spm.jinja").read_text()
    formats = OutputFormats(tokenizer, template)
    assert formats.calls is not None
    begin = tokenizer.token_id("[TOOL_CALLS]")
    for path in (shared_data / "chat_templates/mistral_requests").glob("*.json"):
        case = json.loads(path.read_text())
        asked = [m["tool_calls"] for m in case["request"]["messages"] if m.get("tool_calls")]
        ids: list[int] = case["versions"]["v3"]["ids"]
        starts = [i for i, token in enumerate(ids) if token == begin]
        assert len(starts) == len(asked) or path.stem == "get_weather_full"
        for start, calls in zip(starts, asked, strict=False):
            parser, pieces, at = formats.calls.parser(), [], start
            while ids[at] != tokenizer.eos_ids[0]:
                token = ids[at]
                known = token in parser.markers
                pieces += parser.feed_token(token) if known else parser.feed(tokenizer.token_text(token))
                at += 1
            text, got = read(pieces + parser.finish())
            assert text == ""
            wanted = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
            assert [(name, json.loads(arguments)) for name, arguments, _ in got] == wanted
