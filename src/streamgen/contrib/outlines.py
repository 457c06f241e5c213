"""An engine as a model of Outlines, for code that is written for it: `pip install outlines`.

    from streamgen.contrib.outlines import from_streamgen

    model = from_streamgen(engine)                  # a streamgen.sync.Engine: a model; a streamgen.Engine: an async one
    model("Yes or no?", Literal["yes", "no"])
    outlines.Generator(model, Invoice)("...", max_tokens=200)

As with every model of Outlines a str comes back, and types mean what they mean there: a Literal is written without
quotes, a bool as Python writes it. What Outlines does not know (a `msgspec.Struct`, a `streamgen.Choice`) is taken as
the engine takes it. Keyword arguments are those of `Engine.generate`, which gives typed values with less.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from outlines import models
from outlines.inputs import Chat
from outlines.models.base import AsyncModel, Model, ModelTypeAdapter
from outlines.types.dsl import JsonSchema as JsonSchemaTerm
from outlines.types.dsl import Term, python_types_to_terms

from streamgen.errors import InvalidRequest, SchemaError
from streamgen.grammar.outputs import JsonSchema, OutputSpec
from streamgen.mapping import Err
from streamgen.prompt import user

if TYPE_CHECKING:
    from streamgen import sync
    from streamgen.prompt import Prompt
    from streamgen.text_engine import TextEngine


@overload
def from_streamgen(engine: sync.Engine, *, chat_mode: bool = True) -> Streamgen: ...
@overload
def from_streamgen(engine: TextEngine, *, chat_mode: bool = True) -> AsyncStreamgen: ...
def from_streamgen(engine: sync.Engine | TextEngine, *, chat_mode: bool = True) -> Streamgen | AsyncStreamgen:
    """A model of Outlines over an engine, which stays the caller's: it is open as long as the model is used.

    chat_mode   a str is a user's message, and goes through the chat template; False: it is the prompt as it stands

    Raises:
        InvalidRequest: this is no engine.
    """
    generate = getattr(engine, "generate", None)
    if not callable(generate):
        raise InvalidRequest(f"engine: expected an engine, got {type(engine).__name__}", param="engine")
    make: Any = AsyncStreamgen if inspect.iscoroutinefunction(generate) else Streamgen
    model: Streamgen | AsyncStreamgen = make(engine, chat_mode=chat_mode)
    return model


class StreamgenTypeAdapter(ModelTypeAdapter):
    """Inputs of Outlines -> prompts; its output types -> what `output=` takes."""

    def __init__(self, *, chat_mode: bool) -> None:
        self._chat_mode = chat_mode

    def format_input(self, model_input: Any) -> Prompt:
        """A prompt: from text, a `Chat`, or a list of texts, which are parts of one message.

        Raises:
            InvalidRequest: it is something else, or holds images.
        """
        if isinstance(model_input, Chat):
            return [{**message, "content": _content(message.get("content"))} for message in model_input.messages]
        if isinstance(model_input, str):
            return [user(model_input)] if self._chat_mode else model_input
        if isinstance(model_input, list):
            return [{"role": "user", "content": _content(model_input)}]
        raise InvalidRequest(
            f"prompt: expected text, a Chat or a list of texts, got {type(model_input).__name__}", param="prompt"
        )

    def format_output_type(self, output_type: Any = None) -> Any:
        """What `output=` takes.

        Raises:
            SchemaError: Outlines takes the type, and cannot convert it.
        """
        if output_type is None or isinstance(output_type, OutputSpec | Term):
            return output_type
        if output_type is dict:  # which Outlines means as any JSON object, and writes as a grammar
            return JsonSchema({"type": "object"})
        if isinstance(output_type, type) and JsonSchemaTerm.is_json_schema(output_type):
            return output_type
        try:
            return python_types_to_terms(output_type)
        except TypeError:
            return output_type  # it may be a type that the engine knows
        except Exception as error:  # checks of schemas raise what they like
            raise SchemaError(f"output: Outlines cannot convert it: {type(error).__name__}") from error


class AsyncStreamgen(AsyncModel):
    """An engine as an async model of Outlines. Make one with `from_streamgen`."""

    def __init__(self, engine: TextEngine, *, chat_mode: bool = True) -> None:
        self.engine: Any = engine  # fields are those of the engine, whichever it is
        self.type_adapter = StreamgenTypeAdapter(chat_mode=chat_mode)

    async def generate(self, model_input: Any, output_type: Any = None, **inference_kwargs: Any) -> str:
        """The whole output, as text.

        Raises:
            What `Engine.generate` raises: IncompleteOutput too, where the output was cut before it was of its type.
        """
        completion = await self.engine.generate(
            *_request(self, model_input), **_fields(self, output_type, inference_kwargs)
        )
        return str(completion.text)

    async def generate_batch(
        self, model_input: Sequence[Any], output_type: Any = None, **inference_kwargs: Any
    ) -> list[str]:
        """Several, side by side, in the order of their inputs. The first that fails ends the others."""
        prompts = [self.type_adapter.format_input(each) for each in model_input]
        fields = _fields(self, output_type, inference_kwargs)
        async with self.engine.map(prompts, ordered=True, **fields) as results:
            return [_text(result) async for result in results]

    async def generate_stream(  # type: ignore[override]  # Outlines means this: it reads it with `async for`
        self, model_input: Any, output_type: Any = None, **inference_kwargs: Any
    ) -> AsyncIterator[str]:
        """The output in pieces."""
        fields = _fields(self, output_type, inference_kwargs)
        async with self.engine.stream(*_request(self, model_input), **fields) as stream:
            async for text in stream.texts():
                yield text
            await stream.final()  # it raises where the whole is not of its type


class Streamgen(Model):
    """An engine as a model of Outlines. Make one with `from_streamgen`."""

    def __init__(self, engine: sync.Engine, *, chat_mode: bool = True) -> None:
        self.engine: Any = engine  # fields are those of the engine, whichever it is
        self.type_adapter = StreamgenTypeAdapter(chat_mode=chat_mode)

    def generate(self, model_input: Any, output_type: Any = None, **inference_kwargs: Any) -> str:
        """The whole output, as text. Raises as its async namesake."""
        completion = self.engine.generate(*_request(self, model_input), **_fields(self, output_type, inference_kwargs))
        return str(completion.text)

    def generate_batch(self, model_input: Sequence[Any], output_type: Any = None, **inference_kwargs: Any) -> list[str]:
        """Several, side by side, in the order of their inputs. The first that fails ends the others."""
        prompts = [self.type_adapter.format_input(each) for each in model_input]
        with self.engine.map(prompts, ordered=True, **_fields(self, output_type, inference_kwargs)) as results:
            return [_text(result) for result in results]

    def generate_stream(self, model_input: Any, output_type: Any = None, **inference_kwargs: Any) -> Iterator[str]:
        """The output in pieces."""
        fields = _fields(self, output_type, inference_kwargs)
        with self.engine.stream(*_request(self, model_input), **fields) as stream:
            yield from stream.texts()
            stream.final()  # it raises where the whole is not of its type


def _request(model: Streamgen | AsyncStreamgen, model_input: Any) -> tuple[Prompt]:
    return (model.type_adapter.format_input(model_input),)


def _fields(model: Streamgen | AsyncStreamgen, output_type: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"output": model.type_adapter.format_output_type(output_type), **given}


def _text(result: Any) -> str:
    if isinstance(result, Err):
        raise result.error
    return str(result.completion.text)


def _content(content: Any) -> Any:
    """The content of a message: its parts are texts here, or OpenAI's dicts."""
    if not isinstance(content, list):
        return content
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, Mapping):
            raise InvalidRequest(
                f"prompt: expected texts, got {type(part).__name__}: the engine reads no other inputs", param="prompt"
            )
    return parts


# `outlines.Generator` asks `isinstance` of a fixed list of classes. They are abstract base classes, so that ours can be
# registered as one of them, which lends it no code.
models.VLLM.register(Streamgen)
models.AsyncVLLM.register(AsyncStreamgen)
