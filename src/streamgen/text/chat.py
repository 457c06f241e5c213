"""Chat templates: messages to the one text that the model was trained to continue.

A template is a small jinja program inside the checkpoint. It runs sandboxed and bounded (`sandbox.py` lists the
limits); whatever goes wrong in it becomes a `TemplateError` that never holds text of a message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from streamgen.errors import InvalidRequest, TemplateError

if TYPE_CHECKING:
    from collections.abc import Callable

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 100_000
MAX_DEPTH = 64

_FIXED_NAMES = ("messages", "tools", "add_generation_prompt")
_PROBE = "text-part-probe"


class ChatTemplate:
    """One compiled template. Safe to share between threads.

    source           the jinja text
    special_tokens   `bos_token`, `eos_token` ..., as the template calls them
    now              the clock behind `strftime_now`

    Raises:
        TemplateError: the template is no valid jinja, or too large.
    """

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        # jinja takes a while to import, and a model that is never chatted with does not need it.
        from streamgen.text.sandbox import ChatEnvironment

        self._source = source
        self._special_tokens = dict(special_tokens)
        self._environment = ChatEnvironment(now=now)
        try:
            self._template, self._literals = self._environment.compile_template(source)
        except Exception as error:
            _fail(error, frozenset())
        self._taken_names = {*_FIXED_NAMES, *self._special_tokens, *self._environment.globals}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **args: Any,
    ) -> str:
        """Render messages (`normalize_messages` makes them from what a caller passed).

        args   further variables of the template, such as `enable_thinking` or `documents`

        Raises:
            TemplateError: the template refused the messages, failed, or went over a limit; or an argument has the name
                of something that the template already has.
        """
        for name in args:
            if name in self._taken_names:
                raise TemplateError(f"template argument {name!r}: the name is taken; choose another")
        variables = {
            "documents": None,
            **{name: _plain(value, name) for name, value in args.items()},
            "messages": [self._adapt(message, i) for i, message in enumerate(messages)],
            "tools": _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        return self._run(variables)

    def _run(self, variables: Mapping[str, Any]) -> str:
        from streamgen.text.sandbox import MAX_OUTPUT_CHARS, Budget, LimitExceeded

        parts, size = [], 0
        try:
            with self._environment.spending(Budget()):
                for part in self._template.generate(variables):
                    size += len(part)
                    if size > MAX_OUTPUT_CHARS:
                        raise LimitExceeded(f"more than {MAX_OUTPUT_CHARS} characters of output")
                    parts.append(part)
        except Exception as error:
            _fail(error, self._literals)
        return "".join(parts)

    def _adapt(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The message as this template can take it."""
        plain = _plain(message, f"messages[{index}]")
        if not isinstance(plain, dict):
            raise TemplateError(f"messages[{index}]: expected a message, got {type(message).__name__}")
        if plain.get("role") == "developer" and "developer" not in self._source:
            plain["role"] = "system"  # what the role was called before
        content = plain.get("content")
        if isinstance(content, list) and not self._takes_parts and all(map(_is_text_part, content)):
            plain["content"] = "\n".join(part["text"] for part in content)
        return plain

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template walks over content given as parts, found by trying: older ones want a string."""
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        variables = {"messages": [message], "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = self._run({**variables, **self._special_tokens})
        except TemplateError:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text


class ChatTemplates:
    """A checkpoint's templates by name; each is compiled when it is first used.

    A checkpoint may hold "tool_use" beside "default"; it is then used where tools are given.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._sources = dict(sources)
        self._special_tokens = special_tokens
        self._now = now
        self._compiled: dict[str, ChatTemplate] = {}

    def select(self, *, name: str | None = None, with_tools: bool = False) -> ChatTemplate:
        """The template of that name; without a name, the one for the kind of request.

        Raises:
            TemplateError: there is none.
        """
        if not self._sources:
            raise TemplateError("this model has no chat template: pass text or ids, or give the engine a chat_template")
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        source = self._sources.get(name)
        if source is None:
            raise TemplateError(f"no chat template {name!r}; this model has {', '.join(sorted(self._sources))}")
        if name not in self._compiled:  # two threads may compile the same source; either result is right
            self._compiled[name] = ChatTemplate(source, special_tokens=self._special_tokens, now=self._now)
        return self._compiled[name]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **args: Any,
    ) -> str:
        """Render with the template that fits; see `ChatTemplate.render`."""
        template = self.select(with_tools=bool(tools))
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **args)


# ---- checking messages ----------------------------------------------------------------------------------------------


def normalize_messages(messages: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Check OpenAI-style messages and bring them into the shape that templates expect.

    Missing content becomes "", and tool-call arguments given as JSON text become the object.

    Raises:
        InvalidRequest: a message has a wrong shape; `param` and the text name its index.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(f"messages: expected a list, got {type(messages).__name__}", param="messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages: expected 1 to {MAX_MESSAGES}, got {len(messages)}", param="messages")
    return tuple(_normalize(message, f"messages[{i}]") for i, message in enumerate(messages))


def _normalize(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, msgspec.Struct):
        message = msgspec.to_builtins(message)
    if not isinstance(message, Mapping):
        _refuse(where, f"expected a message with role and content, got {type(message).__name__}")
    plain = _plain(message, where)
    role = plain.get("role")
    if role not in ROLES:
        _refuse(f"{where}.role", f"expected one of {', '.join(ROLES)}")
    if plain.get("tool_calls") is not None:
        plain["tool_calls"] = _normalize_calls(plain["tool_calls"], role, f"{where}.tool_calls")
    else:
        plain.pop("tool_calls", None)
    plain["content"] = _normalize_content(plain, f"{where}.content")
    return dict(plain)


def _normalize_content(message: Mapping[str, Any], where: str) -> Any:
    content = message.get("content")
    if content is None:
        if message["role"] != "assistant":
            _refuse(where, "expected text, got none")
        return ""
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not _is_text_part(part):
                _refuse(f"{where}[{i}]", 'expected {"type": "text", "text": ...}; other parts are not supported')
    elif not isinstance(content, str):
        _refuse(where, f"expected text or a list of parts, got {type(content).__name__}")
    return content


def _normalize_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if role != "assistant":
        _refuse(where, f"expected on assistant messages only, got role {role}")
    if not isinstance(calls, list):
        _refuse(where, f"expected a list, got {type(calls).__name__}")
    return [_normalize_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _refuse(f"{where}.function", "expected an object with name and arguments")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str | dict):
        _refuse(f"{where}.function.arguments", f"expected JSON text or an object, got {type(arguments).__name__}")
    return {"type": "function", **call, "function": {**function, "arguments": _parse_arguments(arguments)}}


def _parse_arguments(arguments: str | dict[str, Any]) -> str | dict[str, Any]:
    """Arguments as an object. Text that is none stays as it is: a model wrote it, and is to see it again."""
    if isinstance(arguments, dict):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _refuse(where: str, reason: str) -> NoReturn:
    raise InvalidRequest(f"{where}: {reason}", param=where)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` made of JSON types alone: an object's methods would be a way out of the sandbox."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where}: nested more than {MAX_DEPTH} deep", param=where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidRequest(f"{where}: expected strings as keys", param=where)
        return {str(key): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise InvalidRequest(f"{where}: expected JSON data, got {type(value).__name__}", param=where)


# ---- errors ---------------------------------------------------------------------------------------------------------


def _fail(error: Exception, literals: frozenset[str]) -> NoReturn:
    """Raise the `TemplateError` for what happened, without the text of any message."""
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    from streamgen.text.sandbox import LimitExceeded, TemplateRefusal

    if isinstance(error, TemplateError):
        raise error
    if isinstance(error, LimitExceeded):
        reason = f"went over a limit: {error}"
    elif isinstance(error, TemplateRefusal):
        reason = f"refused the messages: {_own_words(str(error), literals)}"
    elif isinstance(error, TemplateSyntaxError):
        reason = f"is not valid, line {error.lineno}: {error.message}"
    elif isinstance(error, SecurityError):
        reason = f"tried something that templates may not do{_line_of(error)}"
    elif isinstance(error, RecursionError):
        reason = "is nested too deeply"
    else:
        reason = f"failed with {type(error).__name__}{_line_of(error)}; its messages may lack a field that it reads"
    raise TemplateError(f"the chat template {reason}") from None


def _own_words(message: str, literals: frozenset[str]) -> str:
    """As much of a refusal as stands in the template itself; the rest may come from a message."""
    known = max((text for text in literals if text and message.startswith(text)), key=len, default="")
    if known == message:
        return message
    return f"{known}..." if known else "(a reason that quotes the messages)"


def _line_of(error: BaseException) -> str:
    """ ", line N" of the template, from the traceback that jinja rewrote."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}" if line is not None else ""
