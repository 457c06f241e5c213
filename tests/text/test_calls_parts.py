"""Parts of whole outputs in real tokens: Qwen's vocabulary, with `<think>` where Qwen 3 has it."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.checkpoints.base import TokenizerSource
from streamgen.completion import Reasoning, Text, ToolCall, ToolDelta
from streamgen.errors import InvalidRequest, NotSupported
from streamgen.grammar.source import SchemaSource
from streamgen.messages import GrammarUse, OutputParts
from streamgen.text.decoder import TextDecoder
from streamgen.text.parts import OutputFormats, describe_tools
from streamgen.text.stops import StopMatcher
from streamgen.text.tokenizer import Tokenizer, load_tokenizer
from tests.text import vocabularies

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamgen.completion import Part
    from streamgen.text.parts import Decoded

TEMPLATES = vocabularies.DATA / "chat_templates" / "templates"
ALL = OutputParts(reasoning=True, calls=True)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "日本 🙂 <"}}\n</tool_call>'
OUTPUT = f"Let me think: 日本 🙂.\n</think>\n\nI look.\n{CALL}"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            "strict": strict,
        },
    }
    for name, strict in (("f", True), ("g", False))
]


@cache
def qwen(*, hides_calls: bool = False) -> Tokenizer:
    metadata = vocabularies.qwen25_metadata()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    for old, new in (("<|object_ref_start|>", "<think>"), ("<|object_ref_end|>", "</think>")):
        index = tokens.index(old)
        tokens[index] = new
        metadata["tokenizer.ggml.token_type"][index] = 4
    if hides_calls:
        for token in ("<tool_call>", "</tool_call>"):
            metadata["tokenizer.ggml.token_type"][tokens.index(token)] = 3
    return load_tokenizer(TokenizerSource(gguf=metadata))


def qwen3(**how: bool) -> OutputFormats:
    return OutputFormats(qwen(**how), (TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text())


def token(text: str) -> int:
    found = qwen().token_id(text)
    assert found is not None
    return found


def decode(
    formats: OutputFormats,
    parts: OutputParts,
    steps: Iterable[Sequence[int]],
    *,
    stop: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
) -> tuple[list[Part], list[Decoded]]:
    decoder = formats.split(
        parts,
        decoder=TextDecoder(tokenizer or qwen(), at_start=False),
        stops=StopMatcher(stop, include_stop=False) if stop else None,
        name_call=lambda index: f"call{index}",
    )
    steps = [*steps, ()]
    decoded = []
    for i, ids in enumerate(steps):
        decoded.append(decoder.feed(ids, num_ids=len(ids), is_last=i == len(steps) - 1))
        if decoded[-1].stop is not None:
            break
    return [part for d in decoded for part in d.parts], decoded


def whole(parts: Iterable[Part]) -> tuple[str, str, list[tuple[str, str]], list[str]]:
    """(reasoning, text, calls from their deltas, kinds in order)."""
    reasoning = text = ""
    calls: dict[int, list[str]] = {}
    kinds: list[str] = []
    for part in parts:
        if type(part).__name__ not in kinds[-1:]:
            kinds.append(type(part).__name__)
        match part:
            case Reasoning():
                reasoning += part.text
            case Text():
                text += part.text
            case ToolDelta():
                calls.setdefault(part.index, [part.name, ""])[1] += part.arguments
                assert part.id == f"call{part.index}"
            case ToolCall():
                assert [part.name, part.arguments] == calls[int(part.id.removeprefix("call"))]
    return reasoning, text, [(name, arguments) for name, arguments in calls.values()], kinds


def test_every_token_border() -> None:
    ids = qwen().encode("<think>\n" + OUTPUT)
    expected = (
        "Let me think: 日本 🙂.",
        "I look.",
        [("f", '{"a": "日本 🙂 <"}')],
        ["Reasoning", "Text", "ToolDelta", "ToolCall"],
    )
    for at in range(len(ids) + 1):
        assert whole(decode(qwen3(), ALL, [ids[:at], ids[at:]])[0]) == expected
    parts, decoded = decode(qwen3(), ALL, [[i] for i in ids])
    assert whole(parts) == expected
    end = ids.index(token("</think>"))
    assert sum(d.num_reasoning for d in decoded) == end + 1, "from <think> to </think>, both counted"
    assert all(d.num_used == 1 for d in decoded[:-1])


def test_the_prompt_may_have_opened_the_reasoning() -> None:
    ids = qwen().encode(OUTPUT)
    parts, _ = decode(qwen3(), OutputParts(reasoning=True, is_reasoning=True, calls=True), [ids])
    assert whole(parts)[:2] == ("Let me think: 日本 🙂.", "I look.")


def test_a_call_may_come_where_reasoning_could() -> None:
    ids = qwen().encode('\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    assert whole(decode(qwen3(), ALL, [ids])[0]) == ("", "", [("f", "{}")], ["ToolDelta", "ToolCall"])


def test_a_hidden_token_marks_as_well() -> None:
    tokenizer = qwen(hides_calls=True)
    ids = tokenizer.encode('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    parts, _ = decode(qwen3(hides_calls=True), ALL, [ids], tokenizer=tokenizer)
    assert whole(parts)[1:3] == ("", [("f", "{}")])


@pytest.mark.parametrize("text", ["Plain answer.\n\n", "  spaced  ", "<tool_call", '{"a": 1}', "日本\n"])
def test_text_without_parts_stays_as_it_is(text: str) -> None:
    ids = qwen().encode(text)
    for parts in (ALL, OutputParts(calls=True), OutputParts(reasoning=True)):
        assert whole(decode(qwen3(), parts, [[i] for i in ids])[0])[:3] == ("", text, [])


def test_calls_in_reasoning_are_reasoning() -> None:
    ids = qwen().encode('<think>a<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>b</think>c')
    reasoning, text, calls, _ = whole(decode(qwen3(), ALL, [ids])[0])
    assert (reasoning, text, calls) == ('a<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>b', "c", [])


def test_stop_strings_are_those_of_the_answer() -> None:
    call = CALL.replace("日本 🙂 <", "STOP")
    ids = qwen().encode(f"<think>\nSTOP</think>\n\nOne STO{call}P two STOP three")
    parts, decoded = decode(qwen3(), ALL, [[i] for i in ids], stop=("STOP",))
    assert whole(parts)[:3] == ("STOP", "One STOP two ", [("f", '{"a": "STOP"}')])
    assert decoded[-1].stop == "STOP" and len(decoded) < len(ids)
    assert qwen().decode(ids[: len(decoded)], at_start=False).endswith("two STOP")


def test_a_character_that_a_marker_cuts_is_shown_as_one_replacement() -> None:
    cut = qwen().encode("𓂀")[:1]  # of several
    parts, _ = decode(qwen3(), ALL, [[*qwen().encode("<think>x"), *cut, token("</think>"), *cut]])
    assert whole(parts)[:2] == ("x�", "�")


def test_a_call_that_is_cut_off_has_deltas_and_no_end() -> None:
    ids = qwen().encode('<tool_call>\n{"name": "f", "arguments": {"a": "b')
    parts, _ = decode(qwen3(), ALL, [[i] for i in ids])
    assert whole(parts)[2:] == ([("f", '{"a": "b')], ["ToolDelta"])


# ---- what a request may hold, and its grammar -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tools", "choice", "expected"),
    [
        ("<|im_start|>assistant\n", TOOLS, "auto", ALL),
        ("<|im_start|>assistant\n", [], "auto", OutputParts(reasoning=True)),
        ("<|im_start|>assistant\n", TOOLS, "none", OutputParts(reasoning=True)),
        ("<|im_start|>assistant\n<think>\n", [], "auto", OutputParts(reasoning=True, is_reasoning=True)),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", TOOLS, "auto", OutputParts(calls=True)),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", [], "auto", None),
    ],
)
def test_what_an_output_may_hold(
    prompt: str, tools: list[dict[str, Any]], choice: str, expected: OutputParts | None
) -> None:
    assert qwen3().parts(qwen().encode(prompt), tools, choice) == expected


def test_templates_are_not_told_of_strict() -> None:
    described = describe_tools(TOOLS)
    assert [list(tool["function"]) for tool in described] == [["name", "description", "parameters"]] * 2
    assert "strict" in TOOLS[0]["function"]


def test_who_has_no_tools_says_so() -> None:
    templates = {
        None: "no chat template",
        "{{ tools }} <function=": "in a way that is not known",
    }
    for template, reason in templates.items():
        formats = OutputFormats(qwen(), template)
        with pytest.raises(NotSupported, match=reason):
            formats.parts((1, 2), TOOLS, "auto")
        assert formats.parts((1, 2), TOOLS, "none") is None


def test_a_template_without_tools_has_them_described_in_the_system_message() -> None:
    formats = OutputFormats(qwen(), "{{ messages }}")
    assert formats.parts((1,), TOOLS, "auto") == OutputParts(calls=True)
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1 and 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    prepared, arguments = formats.prepare_chat(chat, TOOLS, "auto")
    assert arguments == {}
    assert [message["role"] for message in prepared] == ["system", "user", "assistant", "user"]
    assert prepared[0]["content"].startswith("Be kind.")
    assert all(tool["function"]["name"] in prepared[0]["content"] for tool in TOOLS)
    assert json.loads(prepared[2]["content"]) == {"name": "add", "arguments": {"a": 1}}
    assert prepared[3]["content"] == "Result of add: 2"
    alone, _ = formats.prepare_chat(chat[1:2], TOOLS, "none")
    assert list(alone) == chat[1:2]
    with pytest.raises(NotSupported, match="strict"):
        formats.grammar_use(None, TOOLS, "auto", OutputParts(calls=True))
    source, use = formats.grammar_use(None, TOOLS, "required", OutputParts(calls=True))
    assert isinstance(source, SchemaSource)
    assert not use["begins_after"]


def test_the_template_for_tools_is_the_one_that_counts() -> None:
    hermes = (TEMPLATES / "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use.jinja").read_text()
    formats = OutputFormats(qwen(), {"default": "{{ messages }}", "tool_use": hermes})
    assert formats.parts((1,), TOOLS, "auto") == OutputParts(calls=True)


OUTPUT_SOURCE = SchemaSource(text='{"type": "integer"}')


def use_of(fields: dict[str, Any]) -> GrammarUse:
    return GrammarUse(key="k", **fields)


def test_a_grammar_begins_where_the_reasoning_ends() -> None:
    formats, begin, end = qwen3(), token("<think>"), token("</think>")

    def fields(parts: OutputParts | None) -> dict[str, Any]:
        source, use = formats.grammar_use(OUTPUT_SOURCE, (), "none", parts)
        assert source == OUTPUT_SOURCE and use_of(use)
        return use

    assert fields(None) == {}
    assert fields(OutputParts(reasoning=True)) == {"begins_after": (end,), "opens_with": (begin,)}
    assert fields(OutputParts(reasoning=True, is_reasoning=True)) == {"begins_after": (end,)}
    assert formats.grammar_use(None, (), "none", ALL) == (None, {})
    with pytest.raises(InvalidRequest, match="either output or tools"):
        formats.grammar_use(OUTPUT_SOURCE, TOOLS, "auto", ALL)
    assert formats.grammar_use(OUTPUT_SOURCE, TOOLS, "none", None) == (OUTPUT_SOURCE, {})


def test_a_grammar_after_reasoning_that_no_token_ends_is_refused() -> None:
    formats = OutputFormats(vocabularies.load("qwen2/json"), (TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text())
    assert formats.reasoning is not None and formats.reasoning.end_id is None
    assert formats.grammar_use(OUTPUT_SOURCE, (), "none", OutputParts(reasoning=True)) == (OUTPUT_SOURCE, {})
    with pytest.raises(NotSupported, match="</think> is no token"):
        formats.grammar_use(OUTPUT_SOURCE, (), "none", OutputParts(reasoning=True, is_reasoning=True))


def grammar(tools: list[dict[str, Any]], choice: str, parts: OutputParts = ALL) -> tuple[SchemaSource, GrammarUse]:
    source, use = qwen3().grammar_use(None, tools, choice, parts)
    assert isinstance(source, SchemaSource)
    return source, use_of(use)


def test_calls_that_are_required_obey_their_schemas() -> None:
    source, use = grammar(TOOLS, "required")
    begin = token("<tool_call>")
    assert (use.begins_after, use.is_forced, use.repeats, use.opens_with) == ((begin,), True, True, ())
    assert (source.before, source.after, source.is_closed, source.on_unsupported) == (
        "\n",
        "\n</tool_call>",
        True,
        "error",
    )
    schema = json.loads(source.text)
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["f", "g"]
    assert list(schema["anyOf"][0]["properties"]) == ["name", "arguments"]

    source, use = grammar(TOOLS, "g")
    assert (use.is_forced, use.repeats, source.on_unsupported) == (True, False, "ignore")
    assert json.loads(source.text)["properties"]["name"] == {"const": "g"}


def test_after_reasoning_a_required_call_is_the_bare_object() -> None:
    source, use = grammar(TOOLS, "g", OutputParts(reasoning=True, is_reasoning=True, calls=True))
    assert (use.begins_after, use.is_forced) == ((token("</think>"),), False)
    assert (source.before, source.after) == ("\n\n", "")
    ids = qwen().encode('Hm.</think>\n\n{"name":"g","arguments":{"a":""}}')
    parts, _ = decode(qwen3(), OutputParts(reasoning=True, is_reasoning=True, calls=True), [[i] for i in ids])
    assert whole(parts)[:3] == ("Hm.", "", [("g", '{"a":""}')])


def test_with_auto_strict_functions_obey_and_others_are_free() -> None:
    source, use = grammar(TOOLS, "auto")
    assert (use.begins_after, use.is_forced, use.repeats) == ((token("<tool_call>"),), False, True)
    strict, free = json.loads(source.text)["anyOf"]
    assert strict["properties"]["arguments"] == TOOLS[0]["function"]["parameters"]
    assert free["properties"]["arguments"] == {"type": "object"}
    assert qwen3().grammar_use(None, TOOLS[1:], "auto", ALL) == (None, {})


def formats_of(template: str, tokenizer: str) -> OutputFormats:
    return OutputFormats(vocabularies.load(tokenizer), (TEMPLATES / f"{template}.jinja").read_text())


def test_llama_calls_can_be_required_and_not_be_strict() -> None:
    formats = formats_of("meta-llama-Llama-3.1-8B-Instruct", "qwen2/json")
    source, use = formats.grammar_use(None, TOOLS, "required", OutputParts(calls=True))
    assert isinstance(source, SchemaSource) and use_of(use) == GrammarUse(key="k")
    assert list(json.loads(source.text)["anyOf"][0]["properties"]) == ["name", "parameters"]
    with pytest.raises(NotSupported, match="f: strict cannot be enforced"):
        formats.grammar_use(None, TOOLS, "auto", OutputParts(calls=True))
    assert formats.grammar_use(None, TOOLS[1:], "auto", OutputParts(calls=True)) == (None, {})


def test_mistral_calls_are_one_list() -> None:
    formats = formats_of("mistralai-Mistral-Nemo-Instruct-2407", "mistral-v3/model")
    begin = vocabularies.load("mistral-v3/model").token_id("[TOOL_CALLS]")
    source, use = formats.grammar_use(None, TOOLS, "required", OutputParts(calls=True))
    assert use_of(use) == GrammarUse(key="k", begins_after=(begin,), is_forced=True) if begin else False
    assert isinstance(source, SchemaSource) and source.before == " "
    schema = json.loads(source.text)
    assert (schema["type"], schema["minItems"], "maxItems" in schema) == ("array", 1, False)
    source, _ = formats.grammar_use(None, TOOLS, "f", OutputParts(calls=True))
    assert isinstance(source, SchemaSource) and json.loads(source.text)["maxItems"] == 1


def test_newer_mistral_calls_can_be_strict_for_one_function() -> None:
    formats = formats_of("unsloth-mistral-Devstral-Small-2507", "mistral-v3/model")
    with pytest.raises(NotSupported, match="cannot require a call"):
        formats.grammar_use(None, TOOLS, "required", OutputParts(calls=True))
    with pytest.raises(NotSupported, match="f: strict"):
        formats.grammar_use(None, TOOLS, "auto", OutputParts(calls=True))


def test_without_a_token_a_required_call_is_spelled() -> None:
    formats = formats_of("Qwen-Qwen2.5-7B-Instruct", "qwen2/json")
    source, use = formats.grammar_use(None, TOOLS, "required", OutputParts(calls=True))
    assert isinstance(source, SchemaSource) and use_of(use) == GrammarUse(key="k")
    assert source.before == "<tool_call>\n" and source.after == "\n</tool_call>"
    with pytest.raises(NotSupported):
        formats.grammar_use(None, TOOLS, "auto", OutputParts(calls=True))
    free = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": None}}]
    assert formats.grammar_use(None, free, "auto", OutputParts(calls=True)) == (None, {})


def test_references_are_bent_to_where_the_schema_went() -> None:
    parameters = {
        "$id": "urn:x",
        "type": "object",
        "properties": {"$ref": {"type": "string"}, "p": {"$ref": "#/$defs/P"}, "self": {"$ref": "#"}},
        "$defs": {"P": {"enum": [{"$ref": "#/$defs/P"}]}},
    }
    tools = [{"type": "function", "function": {"name": "h", "parameters": parameters, "strict": True}}]
    source, _ = grammar([*TOOLS, *tools], "required")
    schema = json.loads(source.text)
    assert schema["anyOf"][2]["properties"]["arguments"] == {"$ref": "#/$defs/tool2"}
    moved = schema["$defs"]["tool2"]
    assert moved["properties"] == {
        "$ref": {"type": "string"},
        "p": {"$ref": "#/$defs/tool2/$defs/P"},
        "self": {"$ref": "#/$defs/tool2"},
    }
    assert moved["$defs"]["P"] == {"enum": [{"$ref": "#/$defs/P"}]} and "$id" not in moved
