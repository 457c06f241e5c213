from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from functools import cache
from typing import Any

import pytest

from streamgen.checkpoints.base import TokenizerSource
from streamgen.errors import TemplateError
from streamgen.text.chat import ChatTemplate, ChatTemplates, normalize_messages
from streamgen.text.tokenizer import load_tokenizer
from tests.text import vocabularies as v

FOLDER = v.DATA / "chat_templates"
TEMPLATES = sorted(path.stem for path in (FOLDER / "templates").glob("*.jinja"))
HELLO = [{"role": "user", "content": "hello"}]


def frozen() -> datetime:
    return datetime(2025, 1, 15, 12)


@cache
def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def template(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=special_tokens, now=frozen)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_the_reference(name: str) -> None:
    contexts = read("contexts.json")
    cases = [case for case in read("renderings.json")["cases"] if case["template"] == name]
    assert cases
    source = (FOLDER / "templates" / f"{name}.jinja").read_text()
    for case in cases:
        context = dict(contexts[case["context"]])
        chat = template(source, bos_token=context.pop("bos_token"), eos_token=context.pop("eos_token"))
        context["add_generation_prompt"] = case["add_generation_prompt"]
        if "error" in case:
            with pytest.raises(TemplateError, match="refused the messages"):
                chat.render(context.pop("messages"), **context)
        else:
            assert chat.render(context.pop("messages"), **context) == case["output"]


def test_all_reference_renderings_are_there() -> None:
    cases = read("renderings.json")["cases"]
    assert Counter("error" in case for case in cases) == {False: 360, True: 8}
    assert {case["template"] for case in cases} == set(TEMPLATES)


@pytest.mark.parametrize("case", read("inline_cases.json")["cases"] if FOLDER.is_dir() else [], ids=lambda c: c["name"])
def test_renders_what_llama_cpp_expects(case: dict[str, str]) -> None:
    chat = template(case["template"], bos_token=case["bos_token"], eos_token=case["eos_token"])
    assert chat.render(read("inline_cases.json")["messages"]) == case["expected"]


def test_mistral_text_and_ids() -> None:
    """Template and tokenizer together give the ids that Mistral's own library writes for a chat with parallel calls."""
    case = read("mistral_requests/parallel_calls.json")
    wanted = case["versions"]["v3"]
    source = (FOLDER / "mistral_templates" / "v3_spm.jinja").read_text()
    text = template(source, bos_token="<s>", eos_token="</s>").render(
        case["request"]["messages"], tools=case["request"]["tools"]
    )
    assert text == wanted["text"].replace("▁", " ")
    path = v.DATA / v.FOLDERS["mistral-v3"] / "tokenizer.model"
    tokenizer = load_tokenizer(TokenizerSource(sentencepiece_path=path, config={"legacy": False}))
    assert tokenizer.encode(text, add_bos=False) == wanted["ids"]


# ---- the surface ----------------------------------------------------------------------------------------------------


def test_special_tokens_arguments_and_clock() -> None:
    source = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }} {{ mood }} {{ messages[0].content }}{{ unk_token }}"
    assert template(source, bos_token="<s>").render(HELLO, mood="calm") == "<s>2025-01-15 calm hello"


@pytest.mark.parametrize("name", ["bos_token", "raise_exception", "range", "namespace", "strftime_now"])
def test_arguments_cannot_shadow(name: str) -> None:
    with pytest.raises(TemplateError, match=name):
        arguments: dict[str, Any] = {name: "x"}
        template("x", bos_token="<s>").render(HELLO, **arguments)


def test_json_is_not_escaped_for_html() -> None:
    source = "{{ messages[0] | tojson }}|{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}"
    text = template(source).render([{"role": "user", "content": "<é&'\">"}])
    assert text == '{"role": "user", "content": "<é&\'\\">"}|{\n  "a": 2,\n  "b": 1\n}'


def test_loop_controls_blocks_and_generation_tag() -> None:
    source = """\
{% for m in messages %}
    {% if loop.index > 1 %}{% break %}{% endif %}
    {% generation %}
{{ m.content }}
    {% endgeneration %}
{% endfor %}
"""
    assert template(source).render([*HELLO, *HELLO]) == "hello\n"


def test_the_named_template_for_tools() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "tools", "other": "third"}, special_tokens={})
    assert templates.render(HELLO) == "plain"
    assert templates.render(HELLO, tools=[{"type": "function"}]) == "tools"
    assert templates.select(name="other").render(HELLO) == "third"
    assert templates.select() is templates.select()
    with pytest.raises(TemplateError, match="default, other, tool_use"):
        templates.select(name="nope")
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplates({}, special_tokens={}).render(HELLO)


def test_parts_become_text_where_a_template_wants_text() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert template("{% for m in messages %}[{{ m.content }}]{% endfor %}").render(parts) == "[a\nb]"
    assert template("{% for m in messages %}[{{ 'x' + m.content }}]{% endfor %}").render(parts) == "[xa\nb]"
    walking = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
    )
    assert template(walking).render(parts) == "<a><b>"


def test_developer_messages_are_system_messages_to_older_templates() -> None:
    message = [{"role": "developer", "content": "be brief"}]
    assert template("{{ messages[0].role }}").render(message) == "system"
    assert template("{# developer #}{{ messages[0].role }}").render(message) == "developer"


def test_a_real_template_with_normalized_tool_calls() -> None:
    source = (FOLDER / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = normalize_messages(
        [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ]
    )
    text = template(source).render(messages, tools=[{"type": "function", "function": {"name": "add"}}])
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n2\n</tool_response>" in text


def test_qwen_golden_chats() -> None:
    """Template and tokenizer together give the golden prompts, tools included."""
    source = (FOLDER / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    tokenizer = load_tokenizer(TokenizerSource(gguf=v.qwen25_metadata()))
    for case in v.golden("real_models/qwen2.5-coder-0.5b-instruct")["cases"]:
        text = case.get("prompt")
        if case["kind"] == "chat":
            text = template(source).render(normalize_messages(case["messages"]), tools=case.get("tools"))
            assert text == case["rendered"]
        assert tokenizer.encode(text, add_bos=False) == case["prompt_ids"]
        assert tokenizer.decode(case["output_ids"], at_start=False) == case["text"]
    assert tokenizer.token_bytes(151935) == b""
