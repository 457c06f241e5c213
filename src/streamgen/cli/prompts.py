"""Where prompts come from: the command line, stdin, JSON lines; and whether they go through the chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from streamgen.cli.output import note
from streamgen.errors import ConfigError, InvalidRequest, TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streamgen import sync
    from streamgen.engine import Engine

Chat = list[dict[str, Any]]


class Request(Struct, frozen=True, kw_only=True):
    """One prompt of a batch. Exactly one of `text`, `chat`, `refusal` is set.

    index     0, 1, ... in the order of the input
    sampling  fields that this line sets itself
    refusal   why the line is no request; reported in its place, the others run
    """

    index: int
    text: str | None = None
    chat: Chat | None = None
    sampling: dict[str, Any] = {}
    refusal: InvalidRequest | None = None


class Line(Struct, kw_only=True):
    """A JSON line that is an object; what is left of it are fields of `Sampling`."""

    prompt: str | None = None
    messages: Chat | None = None


def from_texts(texts: Iterable[str]) -> Iterator[Request]:
    """One request per text."""
    for index, text in enumerate(texts):
        yield Request(index=index, text=text)


def from_json_lines(lines: Iterable[str]) -> Iterator[Request]:
    """One request per line that is not blank."""
    index = 0
    for line in lines:
        if line.strip():
            yield _parse_line(index, line)
            index += 1


def _parse_line(index: int, line: str) -> Request:
    try:
        value = msgspec.json.decode(line)
        if isinstance(value, str):
            return Request(index=index, text=value)
        if not isinstance(value, dict):
            return _refuse(index, f"expected a string or an object, got {type(value).__name__}")
        known = msgspec.convert(value, Line)
    except msgspec.MsgspecError as error:
        return _refuse(index, f"{error}")
    if (known.prompt is None) == (known.messages is None):
        return _refuse(index, "expected exactly one of `prompt` and `messages`")
    sampling = {name: field for name, field in value.items() if name not in Line.__struct_fields__}
    return Request(index=index, text=known.prompt, chat=known.messages, sampling=_integer_keys(sampling))


def _integer_keys(sampling: dict[str, Any]) -> dict[str, Any]:
    """JSON has only strings as keys; the keys of `logit_bias` are token ids."""
    bias = sampling.get("logit_bias")
    if not isinstance(bias, dict):
        return sampling
    return {**sampling, "logit_bias": {int(key) if key.isdecimal() else key: value for key, value in bias.items()}}


def _refuse(index: int, reason: str) -> Request:
    return Request(index=index, refusal=InvalidRequest(f"prompt {index}: {reason}", param="prompt"))


def use_template(engine: Engine | sync.Engine, *, raw: bool, system: str | None) -> bool:
    """Whether texts go through the chat template of an open engine: yes where it has one, unless `raw`.

    Raises:
        ConfigError: `system` was given, and the model has no template that could place it.
    """
    if raw:
        return False
    try:
        engine.render([{"role": "user", "content": "."}])
    except TemplateError:
        if system is None:
            note("(this model has no chat template: prompts go in as they are)")
            return False
        raise ConfigError(
            "--system: expected a model with a chat template, this one has none", option="system"
        ) from None
    return True


def as_prompt(request: Request, *, system: str | None, templated: bool) -> str | Chat:
    """What to hand to the engine: messages where there is a template, else the text as it is."""
    head: Chat = [] if system is None else [{"role": "system", "content": system}]
    if request.chat is not None:
        return head + request.chat
    assert request.text is not None, "a refused request has no prompt"
    return [*head, {"role": "user", "content": request.text}] if templated else request.text
