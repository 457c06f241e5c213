"""What a schema's plan accepts, read back by the back ends that serve it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from streamgen.grammar.compiler import compile_source
from streamgen.grammar.source import SchemaSource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamgen.grammar.grammar import Grammar


@lru_cache(maxsize=64)
def compiled(text: str, *, is_closed: bool = False, backend: str = "auto", on_unsupported: str = "error") -> Grammar:
    """The grammar of a schema's text."""
    source = SchemaSource(text=text, is_closed=is_closed, backend=backend, on_unsupported=on_unsupported)
    return compile_source(source)


def accepts_text(schema: Any, text: str, **options: Any) -> bool:
    """Whether exactly this text may be the output."""
    return compiled(json.dumps(schema), **options).accepts(text.encode())


def accepts(schema: Any, value: Any, **options: Any) -> bool:
    """Whether a value may be the output, in each way that encoders write it; these must agree."""
    answers = {accepts_text(schema, text, **options) for text in spellings(value)}
    assert len(answers) == 1, f"spellings of {value!r} are treated differently"
    return answers.pop()


def spellings(value: Any) -> Iterable[str]:
    """With and without spaces, with and without characters beyond ASCII."""
    for separators in ((", ", ": "), (",", ":")):
        for ensure_ascii in (True, False):
            yield json.dumps(value, separators=separators, ensure_ascii=ensure_ascii)
