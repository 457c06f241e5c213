"""What a grammar is compiled from: plain data, so that it can be a key, cross a queue, and be compiled in a process."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import msgspec
from msgspec import Struct

BACKENDS = ("auto", "outlines", "llguidance")
ON_UNSUPPORTED = ("error", "warn", "ignore")


class RegexSource(Struct, frozen=True, kw_only=True, tag="regex"):
    """The whole output matches `pattern`. The dialect has no look-around, back-references or word borders."""

    pattern: str
    backend: str = "auto"
    is_trusted: bool = True


class SchemaSource(Struct, frozen=True, kw_only=True, tag="schema"):
    """The output is `before`, then JSON that is valid under a schema, then `after`.

    text       the schema as JSON text; properties are written in the order in which it lists them
    is_closed  objects that list properties have no others, unless the schema itself says what others may be: that is
               what a class means, and not what a schema means
    on_unsupported   what becomes of a keyword that no back end enforces: "error" | "warn" | "ignore"
    backend    "auto": the first that enforces every keyword
    is_trusted whether it may be compiled in the engine's own process
    """

    text: str
    is_closed: bool = False
    before: str = ""
    after: str = ""
    on_unsupported: str = "error"
    backend: str = "auto"
    is_trusted: bool = True


class CfgSource(Struct, frozen=True, kw_only=True, tag="cfg"):
    """The output is derived from `start` ("lark", as llguidance reads it) or `root` ("gbnf", as llama.cpp has it)."""

    text: str
    syntax: str = "lark"
    is_trusted: bool = True


GrammarSource: TypeAlias = RegexSource | SchemaSource | CfgSource


def source_key(source: GrammarSource) -> str:
    """A name for what the source means: equal for equal sources. The order of a schema's keys counts."""
    return hashlib.sha256(msgspec.json.encode(source)).hexdigest()
